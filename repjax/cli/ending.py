"""How a command ends: by itself, by a signal, or because nobody reads its output.

| exit status | meaning |
|---|---|
| 0 | done; for `repjax train` also stopped by SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 |
| 1 | a mistake, which one paragraph on stderr names |
| 130 | stopped by Ctrl-C |
| 128 + N | stopped by signal N (not `repjax train`) |
| 141 | the program that read the output has ended |
"""

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from repjax import output, signals


def stop_training(number: int, saved: str) -> NoReturn:
  """Ends `repjax train` after a signal.

  Args:
    number: number of the signal.
    saved: the step that the run has saved, such as "step 13/900"; empty if it is not known.
  """
  whence = saved or "the last checkpoint, if there is one yet"
  try:
    print(f"stopped; the same command continues from {whence}")
  finally:  # a lost output does not change the status
    sys.exit(signals.status_of(signals.error_of(number)))


def stop(number: int, saved: str) -> NoReturn:
  """Ends any other command after a signal; arguments as in `stop_training`."""
  del saved  # no other command saves a step
  print("stopped; nothing is half-written, and the same command starts again", file=sys.stderr)
  sys.exit(128 + number)


@contextlib.contextmanager
def session(stopped: Callable[[int, str], NoReturn]) -> Iterator[None]:
  """Ends the command in the block with one line, wherever a signal stops it.

  Args:
    stopped: `stop` or `stop_training`.

  Raises:
    SystemExit: a signal came, or the output cannot be written to.
  """
  came: list[int] = []
  ends, saved = False, ""

  def handle(number: int) -> None:
    if not ends:  # Otherwise a further signal would interrupt the one line that is printed.
      came.append(number)
      raise signals.error_of(number)

  with output.guarded(output.end), _quiet_after(came), signals.handled(handle):
    try:
      yield
    except KeyboardInterrupt as error:
      ends = True
      number, saved = getattr(error, "number", signal.SIGINT), getattr(error, "saved", "")
    except Exception:
      # A stop in the middle of an import, or in a callback from C, can come out as a different
      # error.
      if not came:
        raise
      ends = True
      number = came[-1]
    else:
      return
    stopped(number, saved)


@contextlib.contextmanager
def _quiet_after(came: list[int]) -> Iterator[None]:
  """Hides errors of threads and finalizers after a signal came, since they follow from the stop."""
  thread_hook, unraisable_hook = threading.excepthook, sys.unraisablehook

  def unraisable(problem: Any) -> None:
    if not came:
      unraisable_hook(problem)

  def in_thread(problem: Any) -> None:
    if not came:
      thread_hook(problem)

  threading.excepthook, sys.unraisablehook = in_thread, unraisable
  try:
    yield
  finally:
    # After a signal the hooks stay, because threads may fail until the process has ended.
    if not came and sys.unraisablehook == unraisable:
      sys.unraisablehook = unraisable_hook
    if not came:
      threading.excepthook = thread_hook
