"""Checksums of all files of a folder, and reading a folder as one writer left it.

manifest.json
{"algorithm": "crc32c", "files": {"params/head.bias/0": "40 1c291ca3 0000c03f", ...}}

Each file has its size in bytes, its CRC-32C and its last four bytes. Many files of Orbax end with
their own CRC-32C. The CRC-32C of all such files is the same number, so only the last bytes tell two
of them apart. A writer makes the manifest last, before its folder
gets its name. Equal folders have equal manifests.
"""

import functools
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from repjax import json_files, regular_files
from repjax.errors import InputError
from repjax.schema import below, record, table, text

MANIFEST = "manifest.json"
_ALGORITHM = "crc32c"
_RULE = record(
  {"algorithm": text(_ALGORITHM), "files": table(text())}, required=("algorithm", "files")
)
_FACTS = re.compile(
  "[0-9]{1,18} [0-9a-f]{8}( [0-9a-f]{2,8})?"
)  # Earlier versions wrote no last bytes.
_LONGEST_NAME = 1000  # characters
_CHUNK = 2**22
# A reader beside a writer that replaces a folder all the time fails this often, and then gives up.
_ATTEMPTS = 50

_T = TypeVar("_T")


def content(folder: Path, files: Iterable[Path] | None = None) -> dict[str, Any]:
  """Returns the content of a manifest.

  Args:
    folder: the folder that the manifest is about.
    files: the files to list; None: all files below the folder.
  """
  if files is None:
    files = (path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST)
  table = {path.relative_to(folder).as_posix(): _facts(path) for path in files}
  return {"algorithm": _ALGORITHM, "files": dict(sorted(table.items()))}


def write_manifest(folder: Path) -> None:
  """Writes the manifest of a finished draft, all of whose files it lists.

  Raises:
    OSError: a file cannot be read, or the manifest cannot be written.
  """
  (folder / MANIFEST).write_text(json.dumps(content(folder), indent=1) + "\n")


def with_file(folder: Path, path: Path) -> dict[str, Any] | None:
  """Returns the content of a folder's manifest after one file was written anew.

  None if the folder has no manifest that can be read.
  """
  try:
    files = _parse(folder, _bytes_of(folder))
  except (OSError, InputError):
    return None
  name = path.relative_to(folder).as_posix()
  return {"algorithm": _ALGORITHM, "files": dict(sorted({**files, name: _facts(path)}.items()))}


def listed(folder: Path) -> frozenset[str] | None:
  """Returns the names of a folder's own files, the manifest among them.

  None if the folder has no manifest that can be read.
  """
  try:
    return frozenset({MANIFEST, *_parse(folder, _bytes_of(folder))})
  except (OSError, InputError):
    return None


class Snapshot:
  """The files of one folder, compared with its manifest as they are read.

  Attributes:
    folder: the folder.
    verify: True if files are to be compared with the manifest, where there is one.
  """

  def __init__(self, folder: Path, *, verify: bool = True):
    """Reads the manifest.

    Args:
      folder: the folder.
      verify: compare files with the manifest.

    Raises:
      InputError: the manifest is damaged or cannot be read.
    """
    self.folder, self.verify = folder, verify
    self._files: dict[str, str] | None = None
    self._compared: set[str] = set()
    try:
      data = _read_manifest(folder) if verify else None
    except OSError as error:
      raise InputError(f"{folder / MANIFEST} cannot be read: {error.strerror}") from error
    if data is not None:
      self._files = _parse(folder, data)

  @property
  def can_verify(self) -> bool:
    """True if there is a manifest to compare with."""
    return self._files is not None

  def read_bytes(self, path: Path) -> bytes:
    """Reads a file of the folder.

    Raises:
      InputError: the file cannot be read, or is not as the manifest says.
    """
    wanted = self._wanted(path)
    with json_files.opened(path) as file:
      data = file.read()
    if wanted is not None:
      _compare(path, wanted, _facts_of([data]))
      self._compared.add(path.relative_to(self.folder).as_posix())
    return data

  def check(self, below: Path | None = None, *, but: Iterable[Path] = ()) -> None:
    """Compares every listed file with the manifest that was not compared when it was read.

    Args:
      below: compare the files in this folder only.
      but: files that are not compared.

    Raises:
      InputError: a file is missing, cannot be read, or is not as the manifest says.
    """
    left_out = {*self._compared, *(path.relative_to(self.folder).as_posix() for path in but)}
    start = "" if below is None else below.relative_to(self.folder).as_posix() + "/"
    listed = self._files is None or any(name.startswith(start) for name in self._files)
    if not listed and below is not None and below.exists():
      # Otherwise an empty manifest, or that of a different folder, would pass for a check.
      raise _damaged(self.folder / MANIFEST, f"it lists no file of {below}")
    for name, wanted in (self._files or {}).items():
      if name.startswith(start) and name not in left_out:
        path = self.folder / name
        if not os.path.lexists(path):
          raise gone(path)
        _compare(path, wanted, _facts(path))

  def _wanted(self, path: Path) -> str | None:
    """Returns what the manifest says about a file; None without a manifest."""
    if self._files is None:
      return None
    name, exists = path.relative_to(self.folder).as_posix(), os.path.lexists(path)
    if name in self._files and not exists:
      raise gone(path)
    if name not in self._files and exists:
      raise _damaged(path, f"{MANIFEST} does not list it, so it was added later")
    return self._files.get(name)


def read_whole(
  find: Callable[[], Path],
  read: Callable[[Snapshot], _T],
  *,
  verify: bool = True,
  warn: Path | None = None,
) -> _T:
  """Reads a folder that a writer may replace at any moment.

  The result comes from the files of one writer, never from two. The folder is read again if its
  name meant a different folder at the end than at the beginning.

  Args:
    find: returns the folder to read.
    read: reads the folder through a `Snapshot`.
    verify: compare files with the manifest. A folder without one is older than manifests.
    warn: folder to name, once, in a warning that there is no manifest; None: no warning.

  Raises:
    InputError: the folder is damaged.
  """
  for attempt in range(_ATTEMPTS):
    folder = find()
    before, problem, result = _identity(folder), None, None
    try:
      snapshot = Snapshot(folder, verify=verify)
      result = read(snapshot)
      can_verify = snapshot.can_verify
    except (InputError, OSError) as error:
      problem, can_verify = error, True
    if (find(), _identity(folder)) == (folder, before):
      if isinstance(problem, OSError):
        raise InputError(
          f"{problem.filename or folder} cannot be read: {problem.strerror}"
        ) from problem
      if problem is not None:
        raise problem
      if verify and not can_verify and warn is not None:
        _warn(warn)
      return result  # pyright: ignore[reportReturnType]
    time.sleep(0.002 * attempt)
  raise InputError(f"{find()} is replaced again and again while it is read; try again later")


def _identity(folder: Path) -> Any:
  """Returns a value that differs if a different folder has taken the place of this one."""
  try:
    status = os.stat(folder)
    return status.st_dev, status.st_ino, _read_manifest(folder)
  except OSError:
    return None


def _read_manifest(folder: Path) -> bytes | None:
  try:
    return _bytes_of(folder)
  except (FileNotFoundError, NotADirectoryError):
    return None


def _bytes_of(folder: Path) -> bytes:
  """Returns the bytes of a folder's manifest.

  Raises:
    OSError: there is none, or it cannot be read.
  """
  return regular_files.read(folder / MANIFEST, json_files.LARGEST)


def _parse(folder: Path, data: bytes) -> dict[str, str]:
  """Returns the files of a manifest; raises InputError for anything else."""
  path = folder / MANIFEST
  files = json_files.content(path, data, _RULE)["files"]
  for name, facts in files.items():
    if not _FACTS.fullmatch(facts) or not _is_inside(name):
      raise _damaged(path, f"{below('files', name)[:200]} is no file with a size and a checksum")
  return files


def _is_inside(name: str) -> bool:
  """Checks whether a name is that of a file in the folder; no name may lead out of the folder."""
  return len(name) <= _LONGEST_NAME and not {"", ".", ".."} & set(name.split("/"))


def _facts(path: Path) -> str:
  """Returns the facts about a file, as a manifest lists them; InputError: it cannot be read."""
  with json_files.opened(path) as file:
    return _facts_of(iter(lambda: file.read(_CHUNK), b""))


def _facts_of(chunks: Iterable[bytes]) -> str:
  """Returns size, CRC-32C and last four bytes of a file whose content comes in chunks."""
  import google_crc32c  # imported late: a second package for `import repjax`

  size, crc, last = 0, 0, b""
  for chunk in chunks:
    size, crc = size + len(chunk), google_crc32c.extend(crc, chunk)
    last = (last + chunk[-4:])[-4:]
  return f"{size} {crc:08x} {last.hex()}".rstrip()


def _compare(path: Path, wanted: str, found: str) -> None:
  if not f"{found} ".startswith(f"{wanted} "):
    size, found_size = wanted.split()[0], found.split()[0]
    raise _damaged(
      path,
      "its bytes are not those that were written"
      if size == found_size
      else f"it has {found_size} bytes instead of {size}",
    )


def gone(path: Path) -> InputError:
  """Returns the error for a file that the manifest of its folder lists and that is not there."""
  return InputError(
    f"{path} is damaged: it is missing. Restore it from a copy, or make its folder again"
  )


def _damaged(path: Path, reason: str) -> InputError:
  """Returns the error for a file that is not as the manifest of its folder says."""
  return InputError(
    f"{path} is damaged: {reason}. Restore it from a copy, or make its folder again. If you "
    f"changed it on purpose, move {MANIFEST} of its folder away, or read the folder without checks "
    "by verify=False or --no-verify"
  )


@functools.cache
def _warn(folder: Path) -> None:
  """Prints, once for each folder, that nothing tells whether the folder is damaged."""
  print(
    f"warning: {folder} cannot be checked for damage, because it was written without checksums; "
    "what repjax writes from now on has them",
    file=sys.stderr,
    flush=True,
  )
