"""A lock on a workdir, so that only one process at a time writes to it."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from repjax import disk, json_files
from repjax.errors import InputError, printable
from repjax.runs import contents, paths


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
  workdir = Path(workdir)
  made = _make(workdir)
  path = paths.lock_file(workdir)
  try:
    file = _take(path)
    try:
      yield
    finally:
      if file is not None:
        # Removed while the lock is held: afterwards the file might be that of the next holder.
        path.unlink(missing_ok=True)
        os.close(file)
  finally:
    # Only empty folders can be removed, so the first that is not empty ends this.
    with contextlib.suppress(OSError):
      for folder in made:
        folder.rmdir()


def _make(workdir: Path) -> list[Path]:
  """Makes a folder and its parents; returns the folders that were missing, the deepest first."""
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


def _take(path: Path) -> int | None:
  """Locks a file and writes into it who holds it.

  Returns:
    The file descriptor, which keeps the lock until it is closed; None where the file system has no
    locks.

  Raises:
    InputError: another process holds the lock, or the file cannot be written.
  """
  while True:
    try:
      file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
      raise InputError(f"{path.parent} cannot be written to: {error.strerror}") from error
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      os.close(file)
      raise InputError(
        f"{path.parent} is in use by {_holder(path)}. Wait for that process, stop it, or give a "
        "different folder"
      ) from None
    except OSError as error:
      os.close(file)
      print(
        f"warning: {path.parent} cannot be locked ({error.strerror}); make sure that nothing else "
        "writes to it",
        flush=True,
      )
      return None
    if _is_at(file, path):
      _sign(file, path)
      return file
    # The last holder removed the file after it was opened here. A lock on a file without a name
    # keeps nobody away, so a new file is made and locked.
    os.close(file)


def _is_at(file: int, path: Path) -> bool:
  """Checks whether an open file is still the file at `path`."""
  try:
    return os.path.samestat(os.fstat(file), path.stat())
  except FileNotFoundError:
    return False


def _sign(file: int, path: Path) -> None:
  """Writes into a locked file who holds it; raises InputError, and unlocks, if this fails."""
  holder = {
    "pid": os.getpid(),
    "host": socket.gethostname(),
    "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    "command": " ".join(sys.argv),
  }
  try:
    with disk.writing(path):
      os.ftruncate(file, 0)
      os.write(file, json.dumps(holder).encode())
  except InputError:
    path.unlink()
    os.close(file)
    raise


def _holder(path: Path) -> str:
  """Returns who holds a lock, in words."""
  try:
    held = json_files.read(path, contents.HOLDER)
    host, since, command = (printable(held[name])[:200] for name in ("host", "since", "command"))
    return f"process {held['pid']} on {host} since {since} ({command})"
  except InputError:
    return "another process"  # The holder has locked the file, and has not signed it yet.
