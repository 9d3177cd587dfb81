"""Compares a folder after a fault with the same folder before the command and after the command.

A folder is seen in two ways: file by file, and as repjax reads it. Both must show the old content
or the new content. The new content is known from runs of the command without a fault.
"""

import contextlib
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import jax
import numpy as np

Files = dict[str, str]
"""The path of each file to the hash of its bytes. The path of a folder ends in a slash."""

Reading = str | None
"""A hash of what a reader found; None: there is nothing to read."""

Reader = Callable[[Path], Reading]
"""A function of a folder that returns a reading. It raises where something cannot be read."""

_UNREADABLE = "unreadable: "


class Problem(NamedTuple):
  """A way in which a folder is not as it should be.

  Attributes:
    kind: "lost", "wrong", "foreign" or "left over".
    text: what was found.
  """

  kind: str
  text: str


class Expected(NamedTuple):
  """The content before a command, and after it.

  Attributes:
    before, final: the files.
    volatile: files whose bytes differ between two runs without a fault.
    planted: other people's files, which stay.
    old, new: name of each reader to its reading, in the order in which the command changes them.
    between: name of a reader to the readings that may be found on the way.
    targets: paths of the folders and files that the command makes or replaces as a whole.
    growing: files that the command extends, to their final bytes. A beginning may be found.
    in_steps: the command writes JSON files outside of its targets more than once.
  """

  before: Files
  final: Files
  volatile: frozenset[str]
  planted: Files
  old: Mapping[str, Reading]
  new: Mapping[str, Reading]
  between: Mapping[str, frozenset[Reading]]
  targets: Sequence[str]
  growing: Mapping[str, bytes]
  in_steps: bool


def files_in(folder: Path) -> Files:
  """Returns every file and folder below a folder."""
  found = {}
  for path in folder.rglob("*"):
    # Orbax draws the names of some files at random, so these files cannot be compared one by one.
    name = re.sub(r"[0-9a-f]{32}", "*", path.relative_to(folder).as_posix())
    if path.is_dir() and not path.is_symlink():
      found[f"{name}/"] = ""
    else:
      found[name] = "" if "*" in name else _hash(path)
  return found


def _hash(path: Path) -> str:
  if path.is_symlink():
    return f"a link to {path.readlink()}"
  return hashlib.sha256(path.read_bytes()).hexdigest()


def plant(folder: Path, targets: Sequence[str]) -> Files:
  """Writes other people's files beside targets, under names that drafts often have, and inside.

  Returns:
    The written files and their folders.
  """
  earlier = files_in(folder)
  for target in targets:
    path = folder / target
    if path.is_dir():
      (path / "mine.txt").write_text(target)
    if path.parent.is_dir():
      path.with_name(f".{path.name}.tmp").write_text(target)
      for ending in ("old", "draft"):
        beside = path.with_name(f"{path.name}.{ending}")
        beside.mkdir()
        (beside / "mine").write_text(target)
  return {name: value for name, value in files_in(folder).items() if name not in earlier}


def digest(tree: Any) -> str:
  """Returns a hash of the paths, dtypes, shapes and bits of all arrays in a tree."""
  result = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    array = np.asarray(leaf)
    result.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    result.update(array.tobytes())
  return result.hexdigest()


def read(readers: Mapping[str, Reader], folder: Path) -> dict[str, Reading]:
  """Returns the reading of each reader. What cannot be read equals no other reading."""
  return {name: _read(reader, folder) for name, reader in readers.items()}


def _read(reader: Reader, folder: Path) -> Reading:
  said = io.StringIO()
  try:
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
      reading = reader(folder)
  except Exception as error:  # damage may raise anything, and the table shall show it
    return f"{_UNREADABLE}{type(error).__name__}: {error}"
  # A loader may take an earlier checkpoint where one is damaged, and then only prints a warning.
  return f"{_UNREADABLE}{said.getvalue()}" if "damaged" in said.getvalue() else reading


def _kind(reading: Reading) -> str:
  """Returns the kind of the problem that a reading is neither old nor new."""
  return "lost" if reading is None or reading.startswith(_UNREADABLE) else "wrong"


def problems_after_fault(
  expected: Expected, readers: Mapping[str, Reader], folder: Path, succeeded: bool
) -> list[Problem]:
  """Returns how a folder after a fault is neither as before the command nor as after it.

  Args:
    expected: the content before and after.
    readers: name to reader.
    folder: the folder.
    succeeded: the command reported success, so that only the new content will do.
  """
  readings = read(readers, folder)
  files, found = _without_planted(expected, files_in(folder))
  found += _reading_problems(expected, readings)
  found += _file_problems(expected, files, folder)
  found += _mixtures(expected, files)
  if succeeded and readings != dict(expected.new):
    found.append(Problem("wrong", "the command reported success and left the old content"))
  return found


def problems_at_end(
  expected: Expected, readers: Mapping[str, Reader], folder: Path
) -> list[Problem]:
  """Returns how a folder differs from what the command leaves without a fault."""
  files, found = _without_planted(expected, files_in(folder))
  for name, reading in read(readers, folder).items():
    if reading != expected.new[name]:
      text = f"at the end, {name} reads as {reading or 'nothing'}"
      found.append(Problem(_kind(reading), text))
  for name in sorted(expected.final.keys() | files.keys()):
    if name not in files:
      found.append(Problem("lost", f"at the end, {name} is missing"))
    elif name not in expected.final:
      # A folder that is left over is named without everything below it.
      if f"{PurePosixPath(name).parent}/" not in files.keys() - expected.final.keys():
        found.append(Problem("left over", f"at the end, {name} is still there"))
    elif name in expected.volatile or (expected.in_steps and _is_position(folder / name)):
      continue
    elif files[name] != expected.final[name]:
      found.append(Problem("wrong", f"at the end, {name} is different"))
  return found


def _without_planted(expected: Expected, files: Files) -> tuple[Files, list[Problem]]:
  """Returns the files that are not other people's, and what has become of other people's files."""
  changed = [name for name, value in expected.planted.items() if files.get(name) != value]
  found = [Problem("foreign", f"{name}, which is not repjax's, was changed") for name in changed]
  # A folder that a command removes stays if other people's files are in it.
  kept = {f"{parent}/" for name in expected.planted for parent in PurePosixPath(name).parents}
  kept = (kept - expected.final.keys()) | expected.planted.keys()
  return {name: files[name] for name in files.keys() - kept}, found


def _reading_problems(expected: Expected, readings: Mapping[str, Reading]) -> Iterator[Problem]:
  """Yields readings that are neither old nor new, or that are new too early."""
  waiting = None  # the first reading that is not new yet
  for name, reading in readings.items():
    old, new = expected.old[name], expected.new[name]
    if reading not in (old, new, *expected.between.get(name, ())):
      yield Problem(_kind(reading), f"{name} reads as {reading or 'nothing'}")
    elif waiting and reading == new != old:
      yield Problem("wrong", f"{name} is new, and {waiting} is not new yet")
    if reading != new and waiting is None:
      waiting = name


def _file_problems(expected: Expected, files: Files, folder: Path) -> Iterator[Problem]:
  """Yields files that are neither as before the command nor as after the command."""
  for name in sorted(expected.before.keys() | expected.final.keys()):
    sides = [side[name] for side in (expected.before, expected.final) if name in side]
    if name not in files:
      # A folder that is lost is named without everything below it.
      if len(sides) == 2 and ("/" not in name or f"{PurePosixPath(name).parent}/" in files):
        yield Problem("lost", f"{name} is missing")
    elif name in expected.growing:
      if not expected.growing[name].startswith((folder / name).read_bytes()):
        yield Problem("wrong", f"{name} is no beginning of what the command writes")
    elif files[name] not in sides and not _may_differ(expected, name, folder / name):
      yield Problem("wrong", f"{name} is neither old nor new")


def _may_differ(expected: Expected, name: str, path: Path) -> bool:
  """Checks whether a file may be neither old nor new."""
  # A file that the command removes may change first. The readers check that it was whole.
  removed = name not in expected.final
  return removed or name in expected.volatile or (expected.in_steps and _is_json(path))


def _is_json(path: Path) -> bool:
  """Checks whether a file is a whole JSON file."""
  try:
    named = path.suffix == ".json" or _is_position(path) or path.name == "metrics"
    return named and json.loads(path.read_text()) is not None
  except ValueError:
    return False


def _is_position(path: Path) -> bool:
  """Checks whether a file is a bookmark, or lists its checksum.

  A stop before an evaluation saves a checkpoint whose bookmark says so. It keeps saying so after
  the same command has made up for the evaluation.
  """
  checkpoint = path.parents[1].name.isdigit() or path.parent.name.isdigit()
  return checkpoint and f"{path.parent.name}/{path.name}".endswith(
    ("bookmark/metadata", "/manifest.json")
  )


def _mixtures(expected: Expected, files: Files) -> Iterator[Problem]:
  """Yields targets in which one file is old and one is new; a missing file can be either."""
  for target in expected.targets:
    ages = {}
    for name in sorted(expected.before.keys() | expected.final.keys()):
      old, new = expected.before.get(name), expected.final.get(name)
      inside = f"{name}/".startswith(f"{target}/") and not name.endswith("/")
      if inside and old != new and name not in expected.volatile:
        ages["old" if files.get(name) == old else "new"] = name
    if len(ages) == 2:
      yield Problem("wrong", f"in {target}, {ages['old']} is old and {ages['new']} is new")
