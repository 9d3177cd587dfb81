"""Finds the splits, classes and files in a folder of images, and all that is wrong with it."""

import collections
import hashlib
import os
import unicodedata
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from repjax.data import files
from repjax.data.files import ENDINGS
from repjax.errors import listed, printable

Classes = dict[str, list[str]]
"""The name of a class to the paths of its images, relative to the folder that was given."""

# The name of a folder to the split that it holds.
SPLITS = {
  **dict.fromkeys(("train", "training"), "train"),
  **dict.fromkeys(("val", "valid", "validation"), "validation"),
  **dict.fromkeys(("test", "testing"), "test"),
}
_TWO_SPLITS = {"train", "validation"}
DEFAULT_RATIO = 0.2


class FolderLayout(NamedTuple):
  """The images of a folder by split and class, or the reasons why the folder cannot be used.

  Attributes:
    splits: the name of each split to its classes.
    problems: everything that is wrong; a folder without problems can be used.
    others: files in class folders whose ending is not one of ENDINGS.
  """

  splits: dict[str, Classes]
  problems: list[str]
  others: list[str]


def find_images(folder: Path, validation_ratio: float | None, seed: int) -> FolderLayout:
  """Finds the images of a folder, without opening any of them.

  Args: as in `prepare_folder`.

  Returns:
    The splits in the order train, validation, test, each with the same sorted classes; or problems.
  """
  others = []
  splits, problems = find_splits(
    folder,
    validation_ratio,
    seed,
    lambda split, problems: _classes(split, folder, problems, others),
    "a folder with one folder per class",
  )
  if splits:
    problems += _class_problems(folder, splits)
  if not problems:  # with problems, a class may seem small for a reason that is named already
    problems += _single_images(splits)
  return FolderLayout(splits, [*dict.fromkeys(map(printable, problems))], others)


def find_splits(
  folder: Path,
  validation_ratio: float | None,
  seed: int,
  read: Callable[[Path, list[str]], Classes],
  wanted: str,
) -> tuple[dict[str, Classes], list[str]]:
  """Returns the files of each split, and all that is wrong with the folder and its splits.

  Args: as in `prepare_folder`, and
    read: function of the folder of a split, and of the list to which it appends problems, that
      returns the files in it.
    wanted: the kind of folder that should be given, for the error.
  """
  # The functions below append to this list, so that one error names every problem.
  problems = _ratio_problems(validation_ratio)
  if not folder.is_dir():
    what = "is a file" if folder.exists() else "does not exist"
    return {}, [*problems, f"{folder} {what}; give {wanted}"]
  folders = _split_folders(folder, problems)
  splits = {split: read(path, problems) for split, path in folders.items()}
  ratio = DEFAULT_RATIO if validation_ratio is None or problems else validation_ratio
  if not splits:  # the files of all splits lie directly in the folder
    splits = _divide(read(folder, problems), ratio, seed)
  elif set(splits) == {"train"} and validation_ratio is not None:
    splits = _divide(splits["train"], ratio, seed)
  elif validation_ratio is not None:
    problems.append(f"{folder} has a validation split already; leave --validation-ratio out")
  if "train" in splits and "validation" not in splits:
    problems.append(
      f"{folder} has no validation images. Add a folder called val, or set a share of the training "
      f"images aside with --validation-ratio {DEFAULT_RATIO}"
    )
  return splits, problems


def name_problems(names: Iterable[str], way_out: str) -> list[str]:
  """Returns the problem of names of classes that TFDS would not keep, or an empty list."""
  # TFDS keeps the names in a text file, one a line, and strips them.
  odd = [name for name in names if name != name.strip() or not name.isprintable()]
  return (
    [
      "class names with surrounding blanks or unprintable characters: "
      f"{listed(map(repr, odd))}. {way_out}"
    ]
    if odd
    else []
  )


def rank(seed: int, path: str) -> bytes:
  """Returns a sort key that shuffles paths.

  The key of a path does not depend on other paths. Therefore the order of two paths stays the same
  when files are added or removed.
  """
  return hashlib.sha256(f"{seed}\0{path}".encode("utf-8", "surrogateescape")).digest()


def _ratio_problems(ratio: float | None) -> list[str]:
  """Returns the reason why a ratio cannot be used, or an empty list."""
  if ratio is None or 0 < ratio < 1:
    return []
  return [f"--validation-ratio is a share between 0 and 1, such as 0.2; got {ratio}"]


def _split_folders(folder: Path, problems: list[str]) -> dict[str, Path]:
  """Returns the folder of each split, or an empty mapping where the folder holds classes."""
  inner = _subfolders(folder, problems)
  named = [path for path in inner if path.name.lower() in SPLITS]
  others = [path for path in inner if path not in named]
  if others and not any(_subfolders(path, problems) for path in named):
    return {}  # a class may be called "train"; such a folder holds images, not classes
  folders: dict[str, Path] = {}
  for path in named:
    split = SPLITS[path.name.lower()]
    if split in folders:
      problems.append(
        f"{folders[split]} and {path} would both be the {split} split; keep one of the two"
      )
    folders[split] = path
  if named and others:
    problems.append(
      f"{folder} holds folders of splits ({listed(path.name for path in named)}) and others "
      f"({listed(path.name for path in others)}); move one kind to a different place"
    )
  # A test split without a validation split serves as the validation split.
  if "test" in folders and "validation" not in folders:
    folders["validation"] = folders.pop("test")
  if folders and "train" not in folders:
    problems.append(f"{folder} has no folder called train beside {listed(p.name for p in named)}")
  return {split: folders[split] for split in ("train", "validation", "test") if split in folders}


def _classes(split: Path, folder: Path, problems: list[str], others: list[str]) -> Classes:
  """Returns the classes in the folder of a split, sorted by name; appends to the two lists."""
  inside = files.entries(split, problems)
  direct = [e.name for e in inside if files.is_image(e.name) and not files.is_folder(e)]
  if direct:
    problems.append(
      f"{len(direct)} image{'s lie' if len(direct) > 1 else ' lies'} directly in {split} ("
      f"{listed(direct, 3)}); put the images of each class into a folder with the name of the class"
    )
  classes, empty = {}, []
  for path in _subfolders(split, problems):
    inside = path.relative_to(folder)
    if {SPLITS.get(inner.name.lower()) for inner in _subfolders(path, problems)} >= _TWO_SPLITS:
      problems.append(
        f"{path} holds folders for training and validation, so it is no class; did you mean "
        f"--from-folder {path}?"
      )
    found = [os.path.join(inside, name) for name in files.walk(path, problems)]
    # One system writes an accent as a part of its letter, a different system as a second character.
    name = unicodedata.normalize("NFC", path.name)
    if name in classes:
      problems.append(
        f"{split} has two folders for the class {name}, whose names differ only in how accents are "
        "encoded; put all of its images into one folder"
      )
    classes[name] = sorted(filter(files.is_image, found))
    others += [path for path in found if not files.is_image(path)]
    if not classes[name]:
      endings = collections.Counter(Path(path).suffix or "no ending" for path in found)
      holds = listed((f"{count} x {end}" for end, count in endings.most_common()), 3)
      empty.append(f"{inside} ({holds or 'no files'})")
  if empty:
    problems.append(
      f"class folders in {folder} without any {', '.join(ENDINGS)}: "
      f"{listed(empty, between='; ', longest=None)}. Remove them, or save their images in "
      "one of these formats"
    )
  # The accents may have changed the order, and all splits need the same order.
  return dict(sorted(classes.items()))


def _class_problems(folder: Path, splits: dict[str, Classes]) -> list[str]:
  """Returns all that is wrong with the classes and the splits."""
  problems = []
  names = sorted(set().union(*splits.values()))
  if len(names) < 2:
    have = f"only one, {names[0]}" if names else "none"
    problems.append(f"{folder} has too few classes: at least two are needed, got {have}")
  if {name.lower() for name in names} == {"images", "masks"}:
    problems.append(
      f"{folder} has the folders {listed(names)}, which are no classes but images with masks; did "
      f"you mean --from-mask-folder {folder}?"
    )
  for split, classes in splits.items():
    if missing := [name for name in names if name not in classes]:
      others = listed(other for other in splits if other != split)
      problems.append(
        f"classes that are in {others} but have no folder in {split}: {listed(missing)}. Every "
        "split needs all classes"
      )
  problems += name_problems(names, "Rename their folders")
  return problems


def _divide(classes: Classes, ratio: float, seed: int) -> dict[str, Classes]:
  """Sets a share of every class aside as the validation split.

  The images with the lowest ranks are taken, so that adding a file moves hardly any file from one
  split to the other.
  """
  train, validation = {}, {}
  for name, paths in classes.items():
    ordered = sorted(paths, key=lambda path: rank(seed, path))
    # At least one image is set aside, and at least one stays. A single image stays.
    count = min(max(round(len(paths) * ratio), 1), max(len(paths) - 1, 0))
    validation[name], train[name] = ordered[:count], ordered[count:]
  return {"train": train, "validation": validation}


def _single_images(splits: dict[str, Classes]) -> list[str]:
  """Returns the problem of classes that are too small to be divided, or an empty list."""
  alone = [name for name, paths in splits.get("validation", {}).items() if not paths]
  return (
    [f"classes with a single image, which cannot be in both splits: {listed(alone)}"]
    if alone
    else []
  )


def _subfolders(folder: Path, problems: list[str]) -> list[Path]:
  return [Path(each) for each in files.entries(folder, problems) if files.is_folder(each)]
