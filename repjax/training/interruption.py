"""Being stopped: SIGTERM, which clusters send before they take a machine away, and Ctrl-C."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_NOTED = b"\nstopping: the step in hand is finished and saved first (Ctrl-C again: stop at once)\n"


class Stopped(KeyboardInterrupt):
  """Ctrl-C has stopped a run, which the same command continues.

  Attributes:
    agreed: all processes of the run have stopped together.
  """

  def __init__(self, agreed: bool = False):
    super().__init__()
    self.agreed = agreed


class Preempted(Stopped):
  """SIGTERM has."""


class Interruption:
  """Listens to SIGTERM and SIGINT while it is entered, where Python allows: in the main thread.

  Either raises at once, SIGTERM as `Preempted`, except inside `deferred`.

  Attributes:
    noted: the signal that came inside `deferred`; None as long as there is none.
    agreed: whether all processes of the run stop for it.
  """

  def __init__(self) -> None:
    self.noted: int | None = None
    self.agreed = False
    self._deferring = False

  def __enter__(self) -> "Interruption":
    self._before = {}
    if threading.current_thread() is threading.main_thread():
      self._before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
    return self

  def __exit__(self, *_: object) -> None:
    for number, handler in self._before.items():
      if handler is not None:  # one that was not set by Python cannot be put back
        signal.signal(number, handler)

  @contextlib.contextmanager
  def deferred(self) -> Iterator[None]:
    """Notes a signal, to be looked at when a step is done, and raises it at the end."""
    self._deferring = True
    try:
      yield
    finally:
      self._deferring = False
    if self.noted is not None:
      raise _error(self.noted, self.agreed)

  def agree(self) -> None:
    """Takes a signal that came in another process for one of this process too."""
    self.noted = self.noted or signal.SIGTERM
    self.agreed = True

  def _handle(self, number: int, frame: FrameType | None) -> None:
    del frame
    if not self._deferring or (self.noted is not None and number == signal.SIGINT):
      raise _error(number)
    if self.noted is None:
      self.noted = number
      os.write(2, _NOTED)  # print may be what the signal has interrupted


def _error(number: int, agreed: bool = False) -> Stopped:
  return Preempted(agreed) if number == signal.SIGTERM else Stopped(agreed)


def status_of(stop: KeyboardInterrupt) -> int:
  """What the program ends with: nothing is wrong where a cluster wanted its machine back."""
  return 0 if isinstance(stop, Preempted) else 128 + signal.SIGINT
