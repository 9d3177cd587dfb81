"""Durability, and errors of the disk as one paragraph."""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from repjax import signals
from repjax.errors import InputError


class NotWrittenError(InputError):
  """An error of a file or folder that could not be written.

  Attributes:
    reason: what the system said.
  """

  def __init__(self, path: Path, reason: str):
    """Makes the text of the error."""
    super().__init__(
      f"{path} could not be written: {reason}. What was saved before is "
      "intact; make room, or mend what the error names, and run the same command again"
    )
    self.reason = reason


@contextlib.contextmanager
def writing(path: Path, kind: type[Exception] = Exception) -> Iterator[None]:
  """Turns an error while `path` is written, such as a full disk, into an InputError.

  The caller writes to a draft, since the message promises that earlier files are intact. Blocks may
  be nested: the error then names the path of the outermost block, which is the one people know.

  Args:
    path: what is written.
    kind: class of the errors to turn; TensorStore raises many, with the reason in their text.

  Raises:
    InputError: an error of this kind was raised; the text names the path and the reason.
  """
  try:
    yield
  except NotWrittenError as error:
    raise NotWrittenError(path, error.reason) from error
  except InputError:
    raise
  except kind as error:
    if stop := signals.stop_within(error):
      raise stop from None
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(code[1]) if code else getattr(error, "errno", None)
    text = getattr(error, "strerror", None) or str(error).partition("\n")[0][:300]
    raise NotWrittenError(path, os.strerror(number) if number else text) from error


def sync(path: Path) -> None:
  """Waits until a file, or a folder with everything below it, is on the disk itself."""
  for each in (path, *(path.rglob("*") if path.is_dir() else ())):
    # Other people's links and devices, which a folder may hold too, have no content of their own.
    if stat.S_IFMT(each.lstat().st_mode) in (stat.S_IFREG, stat.S_IFDIR):
      _sync_one(each)


def sync_entries(folder: Path) -> None:
  """Waits until the names in a folder are on the disk itself, without their contents."""
  _sync_one(folder)


def _sync_one(path: Path) -> None:
  """Flushes one file, or the list of names in one folder, to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some network file systems cannot flush folders, which then are as safe as they can be.
    if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
      raise
  finally:
    os.close(descriptor)
