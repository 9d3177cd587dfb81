"""Opens and reads regular files, whatever lies under the name that was given.

A pipe would be waited for, and a device can give bytes without end. Both are refused at once.
"""

import errno
import os
import stat
from typing import BinaryIO


def opened(path: str | os.PathLike[str]) -> BinaryIO:
  """Opens a regular file, or a link to one, to read its bytes.

  Raises:
    OSError: the file cannot be read, or is a pipe, a socket or a device.
  """
  if "\0" in os.fsdecode(path):
    raise OSError(errno.EINVAL, "its name holds a NUL character, which no file has")
  # Without O_NONBLOCK, opening a pipe would wait until a different program writes to it.
  file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
  mode = os.fstat(file).st_mode
  if stat.S_ISREG(mode):
    return open(file, "rb")
  os.close(file)
  if stat.S_ISDIR(mode):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
  raise OSError(errno.EINVAL, "it is no file but a pipe, a socket or a device", os.fspath(path))


def read(path: str | os.PathLike[str], largest: int) -> bytes:
  """Reads a regular file.

  Files of the kernel, as in /proc, say that they have no bytes, and can give any number of them.
  Therefore no more is read than the size of a file says.

  Args:
    path: path of the file, which may be a link.
    largest: number of bytes that the file may have.

  Raises:
    OSError: as in `opened`, or the file is too large.
  """
  with opened(path) as file:
    size = os.fstat(file.fileno()).st_size
    if size > largest:
      raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {largest:,} are read")
    return file.read(size)


def is_regular(path: str | os.PathLike[str]) -> bool:
  """Tells if a path, or the target of a link, is a regular file."""
  try:
    return stat.S_ISREG(os.stat(path).st_mode)
  except (OSError, ValueError):
    return False
