"""Standard output and standard error that can vanish: closed, full, or a pipe without a reader."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

PIPE_STATUS = 141
"""Exit status of a command whose reader has gone, as of programs that SIGPIPE ends: 128 + 13."""


class Stream:
  """A text stream that reports the first error of its file, and from then on writes nowhere.

  Characters that the encoding of the stream does not have are escaped.
  """

  def __init__(self, stream: Any, lost: Callable[[OSError], None]):
    """Wraps a stream.

    Args:
      stream: the stream, such as sys.stdout; None: the process was started without it.
      lost: called with the error when the stream cannot be written to for the first time.
    """
    if isinstance(stream, Stream):  # this one decides what happens, as long as it is in use
      stream = stream._stream
    self._stream, self._lost = stream or _nowhere(), lost

  def write(self, text: str) -> int:
    """Writes a text, and returns its length."""
    try:
      self._stream.write(text)
    except UnicodeEncodeError:
      encoding = self._stream.encoding
      self.write(text.encode(encoding, "backslashreplace").decode(encoding))
    except OSError as error:
      self._give_up(error)
    return len(text)

  def writelines(self, lines: Any) -> None:
    """Writes texts."""
    for line in lines:
      self.write(line)

  def flush(self) -> None:
    """Passes on what was written."""
    try:
      self._stream.flush()
    except OSError as error:
      self._give_up(error)

  def __getattr__(self, name: str) -> Any:
    """Returns any further attribute from the stream itself."""
    return getattr(self._stream, name)

  def _give_up(self, error: OSError) -> None:
    """Writes nowhere from now on, and reports the error."""
    before, self._stream = self._stream, _nowhere()
    # The old stream still holds what it could not write, and Python tries again at its exit.
    with contextlib.suppress(OSError, ValueError):
      os.dup2(self._stream.fileno(), before.fileno())
    self._lost(error)


def _nowhere() -> io.TextIOWrapper:
  """Returns a stream into nothing."""
  return open(os.devnull, "w", encoding="utf-8")


def end(error: OSError) -> NoReturn:
  """Ends a command that cannot print: quietly where its reader has gone, else with the reason."""
  if error.errno == errno.EPIPE:
    sys.exit(PIPE_STATUS)
  sys.exit(f"error: the output cannot be written: {error.strerror}")


def go_on(error: OSError) -> None:
  """Says on stderr that the output is lost and that work goes on."""
  print(f"the output is no longer shown ({error.strerror}); training goes on", file=sys.stderr)


@contextlib.contextmanager
def status(text: str) -> Iterator[None]:
  """Shows on a terminal what the block does, on a line of stderr that vanishes after the block.

  Nothing is shown if stderr is no terminal.
  """
  stream = sys.stderr
  if stream is None or not stream.isatty():
    yield
    return
  print(f"{text} ...", end="\r", file=stream, flush=True)
  try:
    yield
  finally:
    print(_ERASE, end="\r", file=stream, flush=True)


_ERASE = "\x1b[2K"  # the terminal's code that empties the line


@contextlib.contextmanager
def guarded(lost: Callable[[OSError], None]) -> Iterator[None]:
  """Guards stdout and stderr inside the block against errors of their files.

  Args:
    lost: `end` or `go_on`, called when stdout cannot be written to. A lost stderr is ignored,
      because there is no place to report it.
  """
  _open_missing()
  before = sys.stdout, sys.stderr
  out, err = Stream(sys.stdout, lost), Stream(sys.stderr, lambda error: None)
  sys.stdout, sys.stderr = out, err  # pyright: ignore[reportAttributeAccessIssue]
  try:
    try:
      yield
    finally:
      err.flush()
    out.flush()
  finally:
    with contextlib.suppress(SystemExit):  # an error of the block is in flight, or this one's own
      out.flush()
    sys.stdout, sys.stderr = before


def _open_missing() -> None:
  """Opens file descriptors 0, 1 and 2 where they are closed.

  Otherwise the next file that is opened would get such a number, and libraries would print into it.
  """
  for number in (0, 1, 2):
    try:
      os.fstat(number)
    except OSError:
      # The system gives the lowest free number.
      os.open(os.devnull, os.O_RDWR)
