"""The entry point of `python -m repjax COMMAND`."""

from repjax.cli import program

if __name__ == "__main__":
  program()
