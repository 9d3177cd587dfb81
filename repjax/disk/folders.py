"""Replaces files and folders so that a reader, or the next process, finds the old or the new."""

import contextlib
import ctypes
import errno
import fnmatch
import glob
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from repjax.disk import manifest
from repjax.disk.flush import sync, sync_entries, writing
from repjax.disk.private import NEW, OLD, is_private, old_of, private_folder, sweep
from repjax.errors import InputError

_CURRENT_FOLDER, _NO_REPLACE, _EXCHANGE = -100, 1, 2  # constants of Linux


@contextlib.contextmanager
def replacing(
  path: Path, *, known: Sequence[str] = (), exists: bool = True, own: Sequence[str] = ()
) -> Iterator[Path]:
  """Yields an empty folder to write into, and puts it at `path` when the block ends well.

  Guarantees, for every folder that this package replaces:
  - Whenever the process is killed, `path` names the old folder or the new one, whole. There is one
    exception: where the system cannot exchange two folders in one step (macOS, NFS), `path` may be
    missing after a kill. `current_folder` finds the old folder then, and the next `replacing` of
    the path puts it back.
  - The new folder is on the disk itself before it has its name, so a power cut changes nothing.
  - An error in the block, a signal included, leaves the old folder and no trace of the new one.
  - If `path` is a link, the folder that the link names is replaced, and the link stays.
  - Files that the manifest of the old folder does not list are somebody else's. They move over. If
    there is no manifest that can be read, so does every entry whose name the new folder lacks and
    `own` does not have.
  - Two processes cannot write one folder at a time.

  Args:
    path: the folder to make or replace.
    known: names of which an old folder without a manifest must hold one to be replaced; any other
      folder is somebody else's. Empty: any folder is replaced.
    exists: an old folder may be replaced; False: only an empty one.
    own: patterns, as of `fnmatch`, of names that this package gives in some such folders only.

  Raises:
    InputError: the folder cannot be written or must not be replaced.
  """
  target = real(path)
  with writing(path, OSError), _parents(target):
    _check(target, known, exists)
    with private_folder(target, alone=True) as private:
      draft = private / NEW
      draft.mkdir()
      yield draft
      _keep_others(target, draft, (*own, *map(glob.escape, os.listdir(draft))))
      sync(draft)
      _put(draft, target, private / OLD, exists)


@contextlib.contextmanager
def replacing_file(path: Path, *, exists: bool = True) -> Iterator[Path]:
  """Yields the path of a file to write, and puts the file at `path` when the block ends well.

  The guarantees are those of `replacing`. A file in the draft of a folder is written in its place,
  since it shares the guarantees of the folder. Several processes may write one file; the last one
  wins.

  Args:
    path: the file to make or replace.
    exists: an old file may be replaced.

  Raises:
    InputError: the file cannot be written or must not be replaced.
  """
  target = real(path)
  with writing(path, OSError), _parents(target):
    if target.is_dir():
      raise InputError(f"{path} cannot be a file: there is a folder of that name")
    if any(map(is_private, target.parts)):
      yield target  # Nobody reads a draft, which goes to the disk and gets its name as a whole.
      return
    with private_folder(target, alone=False) as private:
      draft = private / NEW
      yield draft
      sync(draft)
      if exists or not _renamed(draft, target, _NO_REPLACE):
        if not exists and os.path.lexists(target):
          raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
        os.replace(draft, target)
      sync_entries(target.parent)


def check_new(path: Path) -> Path:
  """Checks that a file or folder can be made at a path, before work that takes long.

  Returns:
    The path without links.

  Raises:
    InputError: the path exists and is not an empty folder, is the current folder, or cannot be
      written, see `check_place`.
  """
  target = check_place(path)
  if target.is_dir() and not any(target.iterdir()):
    if target == Path.cwd():
      raise InputError("the current folder cannot be replaced; give the path of a new one")
  elif target.exists():
    raise _exists(path)
  return target


def check_place(path: Path) -> Path:
  """Checks that a file or folder can be made or replaced at a path, before work that takes long.

  Private folders that dead processes left beside the path are removed, of any target. Otherwise
  those of a target that is never written again would stay for ever.

  Returns:
    The path without links.

  Raises:
    InputError: the path is a link to nothing, its name is too long, it leads through a file, or
      this user may not write there.
  """
  target = real(path)
  with writing(path, OSError):
    nearest = _nearest_folder(target)
    if not os.access(nearest, os.W_OK | os.X_OK):
      raise InputError(
        f"{path} cannot be written: nothing can be made in {nearest}. Change its permissions, or "
        "give a different place"
      )
  sweep(nearest, this_host=True)
  return target


def current_folder(path: Path) -> Path:
  """Returns the folder to read: `path`, or the old one if a process was killed between renames."""
  return path if path.exists() else old_of(real(path)) or path


def remove(path: Path, own: Sequence[str]) -> None:
  """Removes a folder so that nobody ever sees a part of it under its name; of a link, the link.

  Somebody else's files in the folder stay in their place, and with them the folder.

  Args:
    path: the folder.
    own: patterns, as of `fnmatch`, of all names that this package gives in such a folder. They say
      what is somebody else's where there is no manifest that can be read.

  Raises:
    InputError: the folder cannot be removed.
  """
  with writing(path, OSError):
    if path.is_symlink():
      path.unlink()
      return
    with private_folder(path, alone=True) as private:
      rest = private / NEW
      rest.mkdir()
      _keep_others(path, rest, own)
      if any(rest.iterdir()):
        sync(rest)
        _put(rest, path, private / OLD, exists=True)
      else:
        path.rename(rest)  # Over the empty folder. Under the name OLD, a kill would put it back.
        sync_entries(path.parent)


def real(path: Path) -> Path:
  """Returns the absolute path without links.

  Raises:
    InputError: the path is a link to nothing, or its name is too long.
  """
  with writing(path, OSError):
    found = Path(os.path.realpath(path))
    if path.is_symlink() and not found.exists():
      raise InputError(
        f"{path} is a link to {os.readlink(path)}, which does not exist. Make that folder "
        "available again, such as by mounting its disk, or remove the link"
      )
    if len(os.fsencode(found.name)) > 255:
      raise InputError(f"the name of {path} is longer than 255 bytes; give a shorter one")
  return found


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
  """Makes the parents of a target; removes those that it made after an error, if still empty."""
  missing = [folder for folder in target.parents if not folder.exists()]
  _nearest_folder(target)
  target.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield
  except BaseException:
    # Only empty folders can be removed, so the first that is not empty ends this.
    with contextlib.suppress(OSError):
      for folder in missing:
        folder.rmdir()
    raise


def _nearest_folder(target: Path) -> Path:
  """Returns the nearest parent of a target that exists.

  Raises:
    InputError: there is a file in its place, or the target is the root of the file system.
  """
  if target == target.parent:
    raise InputError(f"{target} cannot be replaced; give the path of a folder in it")
  nearest = next(folder for folder in target.parents if folder.exists())
  if not nearest.is_dir():
    raise InputError(f"{nearest} cannot be a folder: there is a file of that name")
  return nearest


def _exists(path: Path) -> InputError:
  return InputError(f"{path} exists already; give a different path, or remove it first")


def _check(target: Path, known: Sequence[str], exists: bool) -> None:
  """Raises InputError for a target that must not be replaced."""
  if not target.exists():
    return
  if not target.is_dir():
    raise InputError(f"{target} cannot be a folder: there is a file of that name")
  if not any(target.iterdir()):
    return
  if not exists:
    raise _exists(target)
  if known and not any((target / name).exists() for name in (manifest.MANIFEST, *known)):
    raise InputError(
      f"{target} holds files that repjax did not write, so it is not replaced. Move it away, or "
      "give a different folder"
    )


def _keep_others(target: Path, draft: Path, own: Sequence[str]) -> None:
  """Puts into a draft what the old folder holds of other people."""
  for path in _others(target, own):
    kept = draft / path.relative_to(target)
    if os.path.lexists(kept):
      continue
    kept.parent.mkdir(parents=True, exist_ok=True)
    try:
      os.link(path, kept, follow_symlinks=False)
    except OSError:  # Not every file system has hard links.
      shutil.copy2(path, kept, follow_symlinks=False)


def _others(target: Path, own: Sequence[str]) -> Iterator[Path]:
  """Yields the files and links in a folder that this package has not made."""
  listed = manifest.listed(target)
  for folder, folders, files in os.walk(target):
    if listed is None and Path(folder) == target:
      own = (*own, manifest.MANIFEST)
      folders[:], files = (
        [name for name in some if not any(fnmatch.fnmatchcase(name, each) for each in own)]
        for some in (folders, files)
      )
    folders[:] = [name for name in folders if not is_private(name)]
    for path in (Path(folder, name) for name in (*folders, *files)):
      is_listed = listed is not None and path.relative_to(target).as_posix() in listed
      if not is_listed and (path.is_symlink() or not path.is_dir()):
        yield path


def _put(draft: Path, target: Path, old: Path, exists: bool) -> None:
  """Gives a draft its name; what had the name before is then in the draft's private folder."""
  if not os.path.lexists(target):
    if not _renamed(draft, target, _NO_REPLACE):
      os.rename(draft, target)
  elif not exists or not any(target.iterdir()):
    os.rename(draft, target)  # In one step, and an error if the folder is no longer empty.
  elif not _renamed(draft, target, _EXCHANGE):
    _rename_twice(draft, target, old)
  sync_entries(target.parent)


def _rename_twice(draft: Path, target: Path, old: Path) -> None:
  """Exchanges two folders where the system cannot do it in one step."""
  try:
    os.rename(target, old)
    os.rename(draft, target)
  except BaseException:  # a signal too
    if not os.path.lexists(target):
      os.rename(old, target)
    raise


def _renamed(first: Path, second: Path, flags: int) -> bool:
  """Renames by `renameat2` of Linux; returns False where the system or the disk has no such call.

  Raises:
    OSError: the call exists and failed.
  """
  call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
  if call is None:
    return False
  paths = os.fsencode(first), os.fsencode(second)
  if not call(_CURRENT_FOLDER, paths[0], _CURRENT_FOLDER, paths[1], flags):
    return True
  number = ctypes.get_errno()
  if number in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
    return False
  raise OSError(number, os.strerror(number), str(second))
