"""Stopping a run by Ctrl-C, or by the signals that clusters send before they take a machine away.

These are SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2. All four act alike.

While a step runs, a first signal is noted. The loop looks at the note after a step, saves, and
leaves `Interruption.deferred`, which raises the signal. So one signal never cuts a step or a save
in two. A second Ctrl-C stops at once. Before and after the loop a signal is raised at once, which
spoils no file, see `repjax.disk`.
"""

import contextlib
import os
import signal
from collections.abc import Iterator

from repjax.signals import Preempted, Stopped, error_of, handled, status_of

__all__ = ["Interruption", "Preempted", "Stopped", "status_of"]

_NOTED = b"\nstopping: the step in hand is finished and saved first (Ctrl-C again: stop at once)\n"


class Interruption:
  """A listener to the signals that stop a run, for as long as it is entered.

  Outside of `deferred`, Ctrl-C raises `Stopped`, and any other of them `Preempted`, at once. Python
  allows handlers in the main thread only; entered in any other thread, this does nothing.

  Attributes:
    noted: number of the signal that came inside `deferred`; None: no signal came.
    agreed: True if all processes of the run stop for the signal.
    saved: the step that the run has saved, as in `Stopped`.
  """

  def __init__(self) -> None:
    """Prepares the listener, which listens once it is entered."""
    self.noted: int | None = None
    self.agreed = False
    self.saved = ""
    self._deferring = False
    self._handling = handled(self._handle)

  def __enter__(self) -> "Interruption":
    """Sets the handlers, and keeps the ones that were set before."""
    self._handling.__enter__()
    return self

  def __exit__(self, *_: object) -> None:
    """Sets the handlers again that were set before."""
    self._handling.__exit__(None, None, None)

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
      error = error_of(self.noted, self.agreed)
      error.saved = self.saved
      raise error

  def agree(self) -> None:
    """Marks that all processes stop, and treats a signal to a different process as SIGTERM here."""
    self.noted = self.noted or signal.SIGTERM
    self.agreed = True

  def _handle(self, number: int) -> None:
    """Handles a signal."""
    # A person who presses Ctrl-C a second time does not want to wait any longer.
    if not self._deferring or (self.noted is not None and number == signal.SIGINT):
      raise error_of(number)
    if self.noted is None:
      self.noted = number
      # Not print: the signal may have interrupted a print, whose buffer is then in use.
      with contextlib.suppress(OSError):  # stderr may be closed or full
        os.write(2, _NOTED)
