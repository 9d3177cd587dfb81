"""Stopping a run by SIGTERM, which clusters send before they take a machine away, or by Ctrl-C.

While a step runs, a first signal is noted. The loop looks at the note after a step, saves, and
leaves `Interruption.deferred`, which raises the signal. So one signal never cuts a step or a save
in two. A second Ctrl-C stops at once. Before and after the loop a signal is raised at once, which
spoils no file, see `repjax.disk`.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOTED = b"\nstopping: the step in hand is finished and saved first (Ctrl-C again: stop at once)\n"


class Stopped(KeyboardInterrupt):
  """An error by which Ctrl-C ends a run, which the same command continues.

  Attributes:
    agreed: True if all processes of the run stop together.
  """

  def __init__(self, agreed: bool = False):
    """Makes the error of a signal to this process, or of a stop that all processes agreed on."""
    super().__init__()
    self.agreed = agreed


class Preempted(Stopped):
  """An error by which SIGTERM ends a run, which the same command continues."""


class Interruption:
  """A listener to SIGTERM and SIGINT, for as long as it is entered.

  Outside of `deferred`, SIGTERM raises `Preempted` and SIGINT raises `Stopped`, at once. Python
  allows handlers in the main thread only; entered in any other thread, this does nothing.

  Attributes:
    noted: number of the signal that came inside `deferred`; None: no signal came.
    agreed: True if all processes of the run stop for the signal.
  """

  def __init__(self) -> None:
    """Prepares the listener, which listens once it is entered."""
    self.noted: int | None = None
    self.agreed = False
    self._deferring = False

  def __enter__(self) -> "Interruption":
    """Sets the handlers, and keeps the ones that were set before."""
    self._before = {}
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
    return self

  def __exit__(self, *_: object) -> None:
    """Sets the handlers again that were set before."""
    for number, handler in self._before.items():
      if handler is not None:  # None: not set by Python, which then cannot set it again
        signal.signal(number, handler)

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Notes signals instead of raising them, and raises at the end if one was noted.

    An error inside wins over a noted signal.
    """
    self._deferring = True
    try:
      yield
    finally:
      self._deferring = False
    if self.noted is not None:
      raise _error(self.noted, self.agreed)

  def agree(self) -> None:
    """Marks that all processes stop, and treats a signal to a different process as SIGTERM here."""
    self.noted = self.noted or signal.SIGTERM
    self.agreed = True

  def _handle(self, number: int, frame: FrameType | None) -> None:
    """Handles a signal; Python calls this between any two instructions of the main thread."""
    del frame
    # A person who presses Ctrl-C a second time does not want to wait any longer.
    if not self._deferring or (self.noted is not None and number == signal.SIGINT):
      raise _error(number)
    if self.noted is None:
      self.noted = number
      # Not print: the signal may have interrupted a print, whose buffer is then in use.
      os.write(2, _NOTED)


def _error(number: int, agreed: bool = False) -> Stopped:
  """Returns the error of a signal."""
  return Preempted(agreed) if number == signal.SIGTERM else Stopped(agreed)


def status_of(stop: KeyboardInterrupt) -> int:
  """Returns the exit status of a stopped program.

  The status is 0 for SIGTERM, since nothing is wrong where a cluster takes a machine back, and 130
  for Ctrl-C, as shells expect it.
  """
  return 0 if isinstance(stop, Preempted) else 128 + signal.SIGINT
