"""Signals that stop a program: which there are, their errors, and the exit status they lead to."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and the signals that schedulers and terminals send before they take a machine away."""


class Stopped(KeyboardInterrupt):
  """An error by which Ctrl-C ends a run, which the same command continues.

  Attributes:
    agreed: True if all processes of the run stop together.
    number: number of the signal.
  """

  number: int = signal.SIGINT

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
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
  """Handles every stopping signal inside the block, and puts the earlier handlers back.

  A signal that the program was started to ignore stays ignored, as `nohup` and shells want it.
  Python allows handlers in the main thread only; in any other thread, this does nothing.
  """
  before = {}
  try:
    if threading.current_thread() is threading.main_thread():
      for number in STOPPING:
        # None is a handler that was not set by Python, which then cannot set it again.
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
          before[number] = signal.signal(number, handler)
    yield
  finally:
    for number, earlier in before.items():
      signal.signal(number, earlier)


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
