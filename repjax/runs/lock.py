"""One writer for a workdir: a second process is refused, and told who the first one is."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

from repjax import disk
from repjax.errors import InputError

FILE = ".lock"


@contextlib.contextmanager
def hold(workdir: str | Path) -> Iterator[None]:
  """Keeps other processes from writing to a workdir, for as long as this process lives.

  The lock is the system's own on a file, so it ends with the process whatever ends that. A workdir
  that is still empty at the end is removed again.

  Raises:
    InputError: another process holds it, or the folder cannot be made.
  """
  workdir = Path(workdir)
  made = _make(workdir)
  try:
    file = _take(workdir / FILE)
    try:
      yield
    finally:
      if file is not None:
        (workdir / FILE).unlink(missing_ok=True)  # while it is held, so that it is one's own
        os.close(file)
  finally:
    with contextlib.suppress(OSError):  # one that is not empty stays, and so do those above it
      for folder in made:
        folder.rmdir()


def _make(workdir: Path) -> list[Path]:
  """Makes a folder; those that were missing, the deepest first."""
  missing = [folder for folder in (workdir, *workdir.parents) if not folder.exists()]
  try:
    workdir.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise InputError(f"{workdir} cannot be a folder: there is a file of that name") from None
  except OSError as error:
    raise InputError(f"{workdir} cannot be made: {error.strerror}; give another") from error
  return missing


def _take(path: Path) -> int | None:
  """Locks a file and writes into it whose it is; None where the file system knows no locks."""
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
        f"{path.parent} is in use by {_holder(path)}; wait for it or stop it, or give another "
        "folder"
      ) from None
    except OSError as error:
      os.close(file)
      print(
        f"warning: {path.parent} cannot be locked ({error.strerror}); see to it yourself that "
        "nothing else writes to it",
        flush=True,
      )
      return None
    if _is_at(file, path):
      try:
        with disk.writing(path):
          os.ftruncate(file, 0)
          os.write(file, json.dumps(_oneself()).encode())
      except InputError:
        path.unlink()
        os.close(file)
        raise
      return file
    os.close(file)  # removed by its last holder after it was opened here


def _is_at(file: int, path: Path) -> bool:
  try:
    return os.path.samestat(os.fstat(file), path.stat())
  except FileNotFoundError:
    return False


def _oneself() -> dict[str, object]:
  return {
    "pid": os.getpid(),
    "host": socket.gethostname(),
    "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    "command": " ".join(sys.argv),
  }


def _holder(path: Path) -> str:
  """Whose a lock is, in words."""
  try:
    held = json.loads(path.read_text())
    return (
      f"process {held['pid']} on {held['host']} since {held['since']} ({held['command'][:200]})"
    )
  except (OSError, ValueError, KeyError, TypeError):
    return "another process"
