"""The entry point of `python -m repjax COMMAND`."""

from repjax.cli import main

if __name__ == "__main__":
  main()
