"""Locks on open files, which end with the process that holds them."""

import fcntl
import os
import sys
from pathlib import Path

_warned: set[int] = set()  # numbers of file systems


def try_lock(file: int, path: Path) -> bool | None:
  """Locks an open file by `flock`, and does not wait for the lock.

  Some file systems have no such locks, such as Lustre and NFS by their settings. Then work goes on,
  and a warning on stderr names the first folder of each such file system.

  Args:
    file: file descriptor; on NFS, it must be open for writing.
    path: path of the file, for the warning.

  Returns:
    True: this process holds the lock until the file is closed. False: a different process holds
    it. None: the file system has no locks.
  """
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    _warn(os.fstat(file).st_dev, path.parent, error)
    return None
  return True


def is_at(file: int, path: Path) -> bool:
  """Checks whether an open file is still the file at `path`, where a lock keeps others away."""
  try:
    return os.path.samestat(os.fstat(file), path.stat())
  except OSError:
    return False


def _warn(system: int, folder: Path, error: OSError) -> None:
  """Prints, once for each file system, that it has no locks."""
  if system in _warned:
    return
  _warned.add(system)
  print(
    f"warning: {folder} is on a file system without locks ({error.strerror}); make sure that no "
    "other process writes to the same folder",
    file=sys.stderr,
    flush=True,
  )
