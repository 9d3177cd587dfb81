"""Signals that stop a program: which there are, their errors, and the exit status they lead to."""

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and the signals that schedulers and terminals send before they take a machine away."""


_MOMENT, _LONGER, _PATIENCE = 0.05, 0.5, 20.0  # seconds


class Stopped(KeyboardInterrupt):
  """An error by which Ctrl-C ends a run, which the same command continues.

  Attributes:
    agreed: True if all processes of the run stop together.
    number: number of the signal.
    saved: the step that the run has saved, such as "step 13/900"; empty if it is not known.
  """

  number: int = signal.SIGINT
  saved: str = ""

  def __init__(self, agreed: bool = False):
    """Makes the error of a signal to this process, or of a stop that all processes agreed on."""
    super().__init__()
    self.agreed = agreed


class Preempted(Stopped):
  """An error by which SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 ends a run.

  The same command continues the run.
  """

  number = signal.SIGTERM


def error_of(number: int, agreed: bool = False) -> Stopped:
  """Returns the error of a signal."""
  if number == signal.SIGINT:
    return Stopped(agreed)
  error = Preempted(agreed)
  error.number = number
  return error


def status_of(stop: KeyboardInterrupt) -> int:
  """Returns the exit status of a stopped run.

  The status is 0 for SIGTERM and its like, since nothing is wrong where a cluster takes a machine
  back, and 130 for Ctrl-C, as shells expect it.
  """
  return 0 if isinstance(stop, Preempted) else 128 + signal.SIGINT


@contextlib.contextmanager
def handled(handler: Callable[[int], None]) -> Iterator[None]:
  """Handles every stopping signal inside the block, and puts the earlier handlers back.

  A signal that the program was started to ignore stays ignored, as `nohup` and shells want it.
  Python allows handlers in the main thread only; in any other thread, this does nothing.

  Args:
    handler: function of the number of a signal, which may raise `error_of` it.
  """
  insistent, before = _Insistent(handler), {}
  try:
    if threading.current_thread() is threading.main_thread():
      for number in STOPPING:
        # None is a handler that was not set by Python, which then cannot set it again.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
          before[number] = signal.signal(number, insistent)
    yield
  finally:
    for number, earlier in before.items():
      signal.signal(number, earlier)
    insistent.close()


class _Insistent:
  """A handler of signals whose errors are not lost.

  Python raises the error of a handler between any two instructions. In the middle of an import,
  packages in C print it or fail in ways of their own. In the middle of a call of Orbax, it abandons
  threads that then print tracebacks. So the handler waits until the import or the call has ended.
  It waits for at most `_PATIENCE` seconds, because a disk may hang.

  Callbacks from C and finalizers drop the error. So the handler looks again a little later, and
  raises again unless the error is on its way.
  """

  def __init__(self, handler: Callable[[int], None]):
    """Wraps a handler."""
    self._handler = handler
    self._timer: threading.Timer | None = None
    self._setting = False  # True: the timer is being set
    self._again = False  # True: the timer has sent the signal, not a person or a scheduler
    self._waits_until: float | None = None  # set while the handler waits for the end of a call

  def __call__(self, number: int, frame: FrameType | None) -> None:
    """Handles a signal; Python calls this between any two instructions of the main thread."""
    if self._setting:
      # In the middle of the handling of an earlier signal, which is enough to stop. The timer's
      # locks are held, so setting it again would wait for ever.
      return
    again, self._again = self._again, False
    insisted = self._waits_until is not None and not again  # by a person who presses Ctrl-C twice
    if _is_in_foreign_call(frame) and not insisted and self._may_wait():
      self._look_again(number, _MOMENT)
    elif again and _is_on_its_way():
      self._look_again(number, _LONGER)
    else:
      self._waits_until = None
      try:
        self._handler(number)
      except Stopped:
        self._look_again(number, _LONGER)
        raise

  def _may_wait(self) -> bool:
    """Checks whether the handler has waited for less than `_PATIENCE` seconds."""
    now = time.monotonic()
    self._waits_until = self._waits_until or now + _PATIENCE
    return now < self._waits_until

  def close(self) -> None:
    """Stops looking."""
    self._setting = True
    if self._timer is not None:
      self._timer.cancel()
      self._timer.join()

  def _look_again(self, number: int, seconds: float) -> None:
    """Sends the signal to the main thread once more, after a while."""

    def send() -> None:
      self._again = True
      _thread.interrupt_main(signal.Signals(number))

    self._setting = True
    try:
      if self._timer is not None:
        self._timer.cancel()
      self._timer = threading.Timer(seconds, send)
      self._timer.daemon = True
      self._timer.start()
    finally:
      self._setting = False


def _is_in_foreign_call(frame: FrameType | None) -> bool:
  """Checks whether a module is being imported, or Orbax reads or writes."""
  while frame is not None:
    name = frame.f_code.co_filename
    if name.startswith("<frozen importlib") or f"{os.sep}orbax{os.sep}" in name:
      return True
    frame = frame.f_back
  return False


def _is_on_its_way() -> bool:
  """Checks whether a `finally` or `except` block in this thread handles the error of a signal."""
  return stop_within(sys.exc_info()[1]) is not None


def stop_within(error: BaseException | None) -> Stopped | None:
  """Returns the error of a signal that led to an error; None if no signal did.

  Libraries turn any error into one of their own, so that a stop looks like a damaged file.
  """
  while error is not None and not isinstance(error, Stopped):
    error = error.__context__
  return error


@contextlib.contextmanager
def kept_from_children() -> Iterator[None]:
  """Lets processes that this thread starts inside the block ignore all stopping signals.

  Terminals and schedulers signal all processes of a program. Helper processes then would end before
  the program has made use of their work. They end when the program ends them, or has ended.
  """
  # Unlike handlers, the mask of blocked signals is passed on to programs that are started.
  before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
