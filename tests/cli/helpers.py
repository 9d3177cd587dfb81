"""A helper for tests of programs that end with an error."""

import pytest


def stop_of(run, *arguments):
  """Returns the error message or the exit status with which a call ends the program."""
  with pytest.raises(SystemExit) as stop:
    run(*arguments)
  return stop.value.code
