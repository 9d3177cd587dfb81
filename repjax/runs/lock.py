"""A lock on a workdir, so that only one process at a time writes to it."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from repjax import disk, names
from repjax.errors import InputError
from repjax.runs import paths


@contextlib.contextmanager
def hold(workdir: str | Path) -> Iterator[None]:
  """Keeps other processes from writing to a workdir while the block runs.

  The operating system keeps the lock (`flock`), so a process that is killed releases it. The locked
  file says which process holds it, since when, and what its command was. The package filelock is
  not used because its locks on local disks do not record this.

  The folder is made if it is missing, and removed again if it is still empty at the end.

  Raises:
    InputError: another process holds the lock, or the folder cannot be made.
  """
  workdir = names.folder(workdir)
  made = _make(workdir)
  path = paths.lock_file(workdir)
  try:
    file = _take(path)
    try:
      yield
    finally:
      _release(file, path)
  finally:
    # Only empty folders can be removed, so the first that is not empty ends this.
    with contextlib.suppress(OSError):
      for folder in made:
        folder.rmdir()


def _make(workdir: Path) -> list[Path]:
  """Makes a folder and its parents; returns the folders that were missing, the deepest first."""
  disk.real(workdir)  # Raises for a link to nothing, and for a name that is too long.
  missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise InputError(f"{workdir} cannot be a folder: there is a file of that name") from None
  except OSError as error:
    raise InputError(
      f"{workdir} cannot be made: {error.strerror}; give a different folder"
    ) from error
  return missing


def _take(path: Path) -> int:
  """Locks a file and writes into it who holds it.

  Returns:
    The file descriptor, which keeps the lock until it is closed, where the file system has locks.

  Raises:
    InputError: another process holds the lock, or the file cannot be written.
  """
  while True:
    try:
      # Not through a link, and not into a device: the file is emptied, and then removed.
      file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
    except OSError as error:
      if error.errno == errno.ELOOP:
        raise _not_a_lock(path) from error
      raise InputError(f"{path.parent} cannot be written to: {error.strerror}") from error
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
      os.close(file)
      raise _not_a_lock(path)
    if disk.try_lock(file, path) is False:
      os.close(file)
      raise InputError(
        f"{path.parent} is in use by {disk.holder_text(path)}. Wait for that process, "
        "stop it, or give a different folder"
      )
    if disk.is_at(file, path):
      _sign(file, path)
      return file
    # The last holder removed the file after it was opened here. A lock on a file without a name
    # keeps nobody away, so a new file is made and locked.
    os.close(file)


def _not_a_lock(path: Path) -> InputError:
  return InputError(
    f"{path} is a link or no plain file, so repjax has not made it and does not write to it. Move "
    "it away; it would be the lock of the folder"
  )


def _sign(file: int, path: Path) -> None:
  """Writes into a locked file who holds it; raises InputError, and unlocks, if this fails."""
  try:
    with disk.writing(path):
      os.ftruncate(file, 0)
      os.write(file, disk.new_holder())
  except InputError:
    _release(file, path)
    raise


def _release(file: int, path: Path) -> None:
  """Removes the file of a lock, and unlocks it."""
  # Removed while the lock is held: afterwards the file might be that of the next holder. A file
  # that cannot be removed, on a disk that has become read-only, is no error: nobody holds its lock.
  with contextlib.suppress(OSError):
    if disk.is_at(file, path):
      path.unlink()
  os.close(file)
