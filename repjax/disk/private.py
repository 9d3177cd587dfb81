"""Hidden folders beside a target, in which one process writes the target's successor.

data/.set.repjax-1f0c9a2e/     beside the target data/set
  owner.json                   the process that writes; its lock (`flock`) ends with the process
  new                          the successor, a file or a folder
  old                          the predecessor, while two renames exchange the two

No other program uses such names, and owner.json records the target. So a folder that a killed
process left is known without doubt: its name fits, and the lock on its owner.json is free.
"""

import contextlib
import datetime
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from repjax import json_files
from repjax.disk.locks import is_at, try_lock
from repjax.errors import InputError, printable
from repjax.schema import MisfitError, record, text, whole

_OWNER, NEW, OLD = "owner.json", "new", "old"
_ORBAX_DRAFT = ".orbax-checkpoint-tmp"  # in the names of folders that Orbax has not finished
_LATE = 0.2  # seconds that such threads may take
_HOLDER = record(
  {"pid": whole(1, 2**31 - 1), **dict.fromkeys(("host", "since", "command", "target"), text())},
  required=("pid", "host", "since", "command"),
)
_NAME = re.compile(r"\..+\.repjax-[0-9a-f]{8}")
# Linux allows 255 bytes. A private folder needs 17 more than its target, the rest is for others.
_LONGEST = 200


def is_private(name: str) -> bool:
  """Checks whether a name is that of a private folder, of any target."""
  return _NAME.fullmatch(name) is not None


@contextlib.contextmanager
def private_folder(target: Path, *, alone: bool) -> Iterator[Path]:
  """Makes a private folder for a target, and removes it with all that is in it at the end.

  Private folders of the same target that dead processes left are removed first.

  Args:
    target: file or folder to be written; its parent exists.
    alone: raise if a different process writes the same target.

  Yields:
    The folder, whose entries `new` and `old` the caller may make.

  Raises:
    InputError: a different process writes the target, and `alone` is set.
    OSError: the folder cannot be made.
  """
  folder, owner = _make(target)
  try:
    for other in sweep(target.parent, target, but=folder):
      if alone:
        raise InputError(
          f"another process is writing {target} right now: {holder_text(other / _OWNER)}. "
          "Let that process finish, or stop it first"
        )
    yield folder
  finally:
    try:
      _discard(folder)
    finally:
      os.close(owner)


def sweep(
  folder: Path,
  target: Path | None = None,
  *,
  but: Path | None = None,
  this_host: bool = False,
) -> list[Path]:
  """Removes the private folders that dead processes left, and nothing else.

  If a process died between two renames, its target goes back to its place. What cannot be removed
  stays, without an error.

  Args:
    folder: folder to look in.
    target: remove the private folders of this target only; None: of all targets.
    but: a private folder to leave out.
    this_host: leave out the folders of processes on other machines. Some file systems that machines
      share keep locks for each machine alone.

  Returns:
    The private folders whose processes live.
  """
  living = []
  with contextlib.suppress(OSError):
    for path in sorted(folder.iterdir()):
      fits = is_private(path.name) if target is None else _is_for(path.name, target)
      if fits and path != but and not path.is_symlink():
        with contextlib.suppress(OSError):
          living += _sweep_one(path, this_host)
  return living


def old_of(target: Path) -> Path | None:
  """Returns where the old version of a target is while two renames replace it; None: nowhere."""
  with contextlib.suppress(OSError):
    for path in target.parent.iterdir():
      if _is_for(path.name, target) and (path / OLD).exists():
        return path / OLD
  return None


def new_holder(**more: Any) -> bytes:
  """Returns JSON that says which process this is, for a file that the process holds a lock on."""
  holder = {
    "pid": os.getpid(),
    "host": socket.gethostname(),
    "since": datetime.datetime.now().astimezone().isoformat(" ", "seconds"),
    "command": " ".join(sys.argv)[:1000],
  }
  return json.dumps(holder | more).encode()


def holder_text(path: Path) -> str:
  """Returns in words which process `new_holder` has noted in a file."""
  try:
    held = json_files.read(path, _HOLDER)
  except InputError:
    return "another process"  # The process has locked the file, and has not written to it yet.
  host, since, command = (printable(held[name])[:200] for name in ("host", "since", "command"))
  return f"process {held['pid']} on {host} since {since} ({command})"


def _prefix(target: Path) -> str:
  """Returns the beginning of the names of all private folders of a target."""
  name = target.name
  if len(os.fsencode(name)) > _LONGEST:
    name = hashlib.sha256(os.fsencode(name)).hexdigest()[:32]
  return f".{name}.repjax-"


def _is_for(name: str, target: Path) -> bool:
  prefix = _prefix(target)
  return name.startswith(prefix) and re.fullmatch("[0-9a-f]{8}", name[len(prefix) :]) is not None


def _make(target: Path) -> tuple[Path, int]:
  """Makes a private folder; returns it and the locked owner.json, which the caller closes."""
  while True:
    folder = target.with_name(_prefix(target) + secrets.token_hex(4))
    folder.mkdir()
    try:
      owner = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    except FileNotFoundError:
      continue  # A process that sweeps took the empty folder for one that was left.
    except BaseException:
      folder.rmdir()
      raise
    try:
      # The same may happen until the lock is held. Then there is a new folder.
      if try_lock(owner, folder / _OWNER) is not False and is_at(owner, folder / _OWNER):
        os.write(owner, new_holder(target=target.name))
        return folder, owner
    except BaseException:
      _discard(folder)
      os.close(owner)
      raise
    os.close(owner)


def _has_ended(file: int, path: Path, held: dict[str, Any]) -> bool | None:
  """Checks whether the process that has signed an open owner.json has ended; None: unknown."""
  locked = try_lock(file, path)
  if locked is not None:
    return locked
  if held.get("host") != socket.gethostname():
    return None
  try:
    os.kill(held["pid"], 0)
  except ProcessLookupError:
    return True
  except (PermissionError, OverflowError):  # the process of a different user, or no process
    pass
  return False


def _sweep_one(folder: Path, this_host: bool) -> list[Path]:
  """Removes a private folder if its process is dead; returns it if its process lives."""
  try:
    file = _open(folder / _OWNER)
  except FileNotFoundError:
    if _is_late(folder):
      shutil.rmtree(folder / NEW)
    folder.rmdir()  # Only an empty folder: killed before it was signed, or after it was emptied.
    return []
  try:
    held = _parsed(os.read(file, 2**16))
    if this_host and held.get("host") != socket.gethostname():
      return []
    ended = _has_ended(file, folder / _OWNER, held)
    if not ended:
      return [] if ended is None else [folder]
    names = {path.name for path in folder.iterdir()}
    if not is_at(file, folder / _OWNER) or not names <= {_OWNER, NEW, OLD}:
      return []
    if OLD in names and "target" in held:
      target = folder.with_name(Path(held["target"]).name)
      if not os.path.lexists(target):
        (folder / OLD).rename(target)
    _discard(folder)
  finally:
    os.close(file)
  return []


def _is_late(folder: Path) -> bool:
  """Checks whether threads of a save that failed made a folder again after it was removed.

  TensorStore makes the folders of each file that it writes. Only drafts of Orbax are in them.
  """
  new = folder / NEW
  if os.listdir(folder) != [NEW] or new.is_symlink() or not new.is_dir():
    return False
  return all(_ORBAX_DRAFT in name for name in os.listdir(new))


def _open(path: Path) -> int:
  """Opens an owner.json; on NFS, only what is open for writing can be locked."""
  try:
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW)
  except PermissionError:
    return os.open(path, os.O_RDONLY | os.O_NOFOLLOW)


def _parsed(data: bytes) -> dict[str, Any]:
  """Returns the content of an owner.json; empty if the process was killed before it had signed."""
  try:
    return json_files.parse(data, _HOLDER)
  except MisfitError:
    return {}


def _discard(folder: Path, seconds: float = 5.0) -> None:
  """Removes a private folder, owner.json last, so that what is left by a kill is still known."""
  # Threads of a save that failed may still add files, so that a removal fails: try again. They may
  # even make the folder again, after it was removed.
  deadline = time.monotonic() + seconds
  has_threads = any((folder / NEW).glob(f"*{_ORBAX_DRAFT}*"))
  with contextlib.suppress(OSError):
    for path in (folder / NEW, folder / OLD):
      while os.path.lexists(path):
        if path.is_dir() and not path.is_symlink():
          shutil.rmtree(path, ignore_errors=time.monotonic() < deadline)
        else:
          path.unlink()
    (folder / _OWNER).unlink(missing_ok=True)
    folder.rmdir()
    if has_threads:
      time.sleep(_LATE)
      if _is_late(folder):
        shutil.rmtree(folder, ignore_errors=True)
