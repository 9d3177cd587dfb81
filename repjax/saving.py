"""Orbax with clocks that cannot be set, and without the noise of its threads."""

import contextlib
import importlib
import importlib.util
import logging
import sys
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

_TIMED = ("futures.future", "futures.signaling_client")
_FOLDERS = ("/orbax/", "\\orbax\\")


def orbax() -> Any:
  """Returns the package `orbax.checkpoint`, whose time limits then ignore that the clock is set.

  Orbax measures its time limits by the clock on the wall. When the clock is set, as after a machine
  has slept, a save would fail although nothing is wrong.
  """
  import orbax.checkpoint  # imported late: it takes a second, and many commands do not need it

  for name in _TIMED:
    name = f"orbax.checkpoint._src.{name}"
    if importlib.util.find_spec(name):  # these files are private and differ between versions
      vars(importlib.import_module(name))["time"] = _Monotonic()
  return orbax.checkpoint


class _Monotonic:
  """The module `time` with a clock that nobody can set."""

  time = staticmethod(time.monotonic)

  def __getattr__(self, name: str) -> Any:
    """Returns anything else from the module itself."""
    return getattr(time, name)


@contextlib.contextmanager
def quietly() -> Iterator[None]:
  """Hides what Orbax logs in the block, and what its threads print about an error of the block.

  Orbax reads or writes many arrays at once. If one of them fails, Orbax raises its error and
  abandons the others. Their threads then print a traceback each, also after the block. So after an
  error the messages of abandoned work stay hidden; those of any other thread or package are shown.
  """
  filters = {"absl": _not_of_orbax, "asyncio": _not_of_orbax}
  hook = _Hook()
  for name, keep in filters.items():
    logging.getLogger(name).addFilter(keep)
  try:
    yield
  except BaseException:
    hook.stays = True
    raise
  finally:
    hook.close()
    logging.getLogger("absl").removeFilter(_not_of_orbax)
    if not hook.stays:
      logging.getLogger("asyncio").removeFilter(_not_of_orbax)


class _Hook:
  """A `sys.unraisablehook` that hides errors of work that Orbax has abandoned.

  TensorStore reports by this hook, without an object, that the event loop was closed too early.
  Python reports errors of abandoned coroutines of Orbax when it collects them.
  """

  def __init__(self) -> None:
    """Sets the hook."""
    self.stays = False
    self._before, sys.unraisablehook = sys.unraisablehook, self._show

  def close(self) -> None:
    """Sets the earlier hook again, unless this one stays or a later one was set on top."""
    if not self.stays and sys.unraisablehook == self._show:
      sys.unraisablehook = self._before

  def _show(self, problem: Any) -> None:
    """Passes an error on, unless the error is that of abandoned work."""
    closed_early = problem.object is None and str(problem.exc_value) == "Event loop is closed"
    if not closed_early and not _passed_orbax(problem.exc_traceback):
      self._before(problem)


def _not_of_orbax(record: logging.LogRecord) -> bool:
  """Checks whether a record of a log is not about Orbax and its tasks."""
  traceback = record.exc_info[2] if record.exc_info else None
  return not (_is_in_orbax(f"{record.pathname} {record.msg}") or _passed_orbax(traceback))


def _passed_orbax(traceback: TracebackType | None) -> bool:
  """Checks whether an error came through a function of Orbax."""
  while traceback is not None:
    if _is_in_orbax(traceback.tb_frame.f_code.co_filename):
      return True
    traceback = traceback.tb_next
  return False


def _is_in_orbax(text: str) -> bool:
  """Checks whether a text holds the path of a file of Orbax."""
  return any(folder in text for folder in _FOLDERS)
