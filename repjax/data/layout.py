"""What a folder of images holds: splits, classes, files, and everything that is wrong with it."""

import collections
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

Classes = dict[str, list[str]]
"""A class's name to the paths of its images, below the folder that was given."""

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ROLES = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("val", "valid", "validation"), "validation"),
  **dict.fromkeys(("test", "testing"), "test"),
}
_TWO_SPLITS = {"train", "validation"}
DEFAULT_RATIO = 0.2


class Found(NamedTuple):
  """The images of a folder by split and class, or why it cannot be used.

  Attributes:
    splits: name to its classes.
    problems: all that is wrong; without any, the folder can be used.
    others: files in the classes' folders whose ending is not one of ENDINGS.
  """

  splits: dict[str, Classes]
  problems: list[str]
  others: list[str]


def find_images(folder: Path, validation_ratio: float | None, seed: int) -> Found:
  """Looks through a folder without opening any image.

  Args: as in `prepare_folder`.

  Returns:
    splits in the order train, validation, test, each with the same classes, sorted; or problems.
  """
  problems, others = _ratio_problems(validation_ratio), []
  if not folder.is_dir():
    what = "is a file" if folder.exists() else "does not exist"
    wanted = f"{folder} {what}; a folder with one folder a class is wanted"
    return Found({}, [*problems, wanted], [])
  parts = _split_folders(folder, problems)
  splits = {role: _classes(path, folder, problems, others) for role, path in parts.items()}
  ratio = DEFAULT_RATIO if validation_ratio is None or problems else validation_ratio
  if not splits:
    splits = _divide(_classes(folder, folder, problems, others), ratio, seed)
  elif set(splits) == {"train"} and validation_ratio is not None:
    splits = _divide(splits["train"], ratio, seed)
  elif validation_ratio is not None:
    problems.append(f"{folder} has a validation split of its own; leave --validation-ratio out")
  problems += _class_problems(folder, splits)
  if not problems:
    problems += _single_images(splits)
  return Found(splits, list(dict.fromkeys(problems)), others)


def rank(seed: int, path: str) -> bytes:
  """A place in an order that looks random and, for two paths, does not depend on any other."""
  return hashlib.sha256(f"{seed}\0{path}".encode("utf-8", "surrogateescape")).digest()


def _ratio_problems(ratio: float | None) -> list[str]:
  if ratio is None or 0 < ratio < 1:
    return []
  return [f"--validation-ratio is a share between 0 and 1, such as 0.2; got {ratio}"]


def _split_folders(folder: Path, problems: list[str]) -> dict[str, Path]:
  """The folders of the splits; none where the folder holds classes."""
  inner = _subfolders(folder, problems)
  named = [path for path in inner if path.name.lower() in ROLES]
  others = [path for path in inner if path not in named]
  if others and not any(_subfolders(path, problems) for path in named):
    return {}  # a class may be called "train", too
  parts: dict[str, Path] = {}
  for path in named:
    role = ROLES[path.name.lower()]
    if role in parts:
      problems.append(f"{parts[role]} and {path} would both be the {role} split; keep one of them")
    parts[role] = path
  if named and others:
    problems.append(
      f"{folder} holds folders of splits ({_listed(path.name for path in named)}) and others "
      f"({_listed(path.name for path in others)}); move one kind somewhere else"
    )
  if "test" in parts and "validation" not in parts:
    parts["validation"] = parts.pop("test")
  if parts and "train" not in parts:
    problems.append(f"{folder} has no folder called train beside {_listed(p.name for p in named)}")
  return {role: parts[role] for role in ("train", "validation", "test") if role in parts}


def _classes(part: Path, folder: Path, problems: list[str], others: list[str]) -> Classes:
  """The classes of one split, in order of their names."""
  direct = [p.name for p in _entries(part, problems) if _is_image(p.name) and p.is_file()]
  if direct:
    problems.append(
      f"{len(direct)} image{'s lie' if len(direct) > 1 else ' lies'} directly in {part} ("
      f"{_listed(direct)}); every class needs a folder of its own, whose name is the class's"
    )
  classes, empty = {}, []
  for path in _subfolders(part, problems):
    inside = path.relative_to(folder)
    if {ROLES.get(inner.name.lower()) for inner in _subfolders(path, problems)} >= _TWO_SPLITS:
      problems.append(
        f"{path} holds folders for training and validation, so it is no class: did you mean "
        f"--from-folder {path}?"
      )
    files = _files(path, problems)
    classes[path.name] = sorted(os.path.join(inside, name) for name in files if _is_image(name))
    others += [os.path.join(inside, name) for name in files if not _is_image(name)]
    if not classes[path.name]:
      endings = collections.Counter(Path(name).suffix or "no ending" for name in files)
      holds = ", ".join(f"{count} x {ending}" for ending, count in sorted(endings.items()))
      empty.append(f"{inside} ({holds or 'no files'})")
  if empty:
    problems.append(
      f"class folders in {folder} without any {', '.join(ENDINGS)}: {'; '.join(empty)}. Remove "
      "them, or convert their images"
    )
  return classes


def _class_problems(folder: Path, splits: dict[str, Classes]) -> list[str]:
  problems = []
  names = sorted(set().union(*splits.values()))
  if len(names) < 2:
    have = f"only one, {names[0]}" if names else "none"
    problems.append(f"{folder} has too few classes: two folders with images are wanted, got {have}")
  for split, classes in splits.items():
    if missing := [name for name in names if name not in classes]:
      others = _listed(other for other in splits if other != split)
      problems.append(
        f"classes that are in {others} but have no folder in {split}: {', '.join(missing)}. Every "
        "split needs all classes"
      )
  # TFDS keeps the names in a text file, one a line, and strips them.
  if odd := [name for name in names if name != name.strip() or not name.isprintable()]:
    problems.append(
      "class names with surrounding blanks or unprintable characters, whose folders need other "
      f"names: {', '.join(map(repr, odd))}"
    )
  if "train" in splits and "validation" not in splits:
    problems.append(
      f"{folder} has no validation images: add a folder called val, or say with "
      f"--validation-ratio {DEFAULT_RATIO} which share of the training images to set aside"
    )
  return problems


def _divide(classes: Classes, ratio: float, seed: int) -> dict[str, Classes]:
  """Sets a share of every class aside; adding a file moves hardly any other to the other split."""
  train, validation = {}, {}
  for name, paths in classes.items():
    ordered = sorted(paths, key=lambda path: rank(seed, path))
    count = min(max(round(len(paths) * ratio), 1), max(len(paths) - 1, 0))
    validation[name], train[name] = ordered[:count], ordered[count:]
  return {"train": train, "validation": validation}


def _single_images(splits: dict[str, Classes]) -> list[str]:
  alone = [name for name, paths in splits.get("validation", {}).items() if not paths]
  return (
    [f"classes with a single image, which cannot be in both splits: {', '.join(alone)}"]
    if alone
    else []
  )


def _entries(folder: Path, problems: list[str]) -> list[Path]:
  """What is in a folder, without the hidden files that file managers leave."""
  try:
    return sorted(path for path in folder.iterdir() if not _is_hidden(path.name))
  except OSError as error:
    problems.append(f"{folder} cannot be read: {error.strerror}")
    return []


def _subfolders(folder: Path, problems: list[str]) -> list[Path]:
  return [path for path in _entries(folder, problems) if path.is_dir()]


def _files(folder: Path, problems: list[str]) -> list[str]:
  """The paths of all files below a folder, through links too, but never twice."""
  found, seen = [], set()

  def fail(error: OSError) -> None:
    problems.append(f"{error.filename} cannot be read: {error.strerror}")

  for path, inner, names in os.walk(folder, onerror=fail, followlinks=True):
    real = os.path.realpath(path)
    if real in seen:
      inner.clear()
      continue
    seen.add(real)
    inner[:] = sorted(name for name in inner if not _is_hidden(name))
    above = os.path.relpath(path, folder)
    found += [os.path.normpath(os.path.join(above, name)) for name in names if not _is_hidden(name)]
  return found


def _is_hidden(name: str) -> bool:
  return name.startswith((".", "__MACOSX", "@eaDir"))


def _is_image(name: str) -> bool:
  return name.lower().endswith(ENDINGS)


def _listed(names: Iterable[str]) -> str:
  """The first three of some names."""
  names = list(names)
  return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
