"""Finds the splits of a folder of images and masks, the mask of each image, and what is wrong."""

import collections
import os
import unicodedata
from pathlib import Path
from typing import NamedTuple

from repjax.data import files, layout
from repjax.data.layout import Classes
from repjax.errors import listed, printable

PAIR_FOLDERS = ("images", "masks")
"""The folders of a split. An image and its mask have the same path in them but for the ending."""


class PairLayout(NamedTuple):
  """The images and masks of a folder by split, or the reasons why the folder cannot be used.

  Attributes:
    splits: the name of each split to the paths of its images, each with the path of its mask.
    problems: everything that is wrong; a folder without problems can be used.
    skipped: files without a partner, each with the reason.
    others: files beside the images whose ending is not one of ENDINGS.
  """

  splits: dict[str, dict[str, str]]
  problems: list[str]
  skipped: dict[str, str]
  others: list[str]


def find_pairs(folder: Path, validation_ratio: float | None, seed: int) -> PairLayout:
  """Finds the images and masks of a folder, without opening any of them.

  Args: as in `prepare_mask_folder`.

  Returns:
    The splits in the order train, validation, test; or problems.
  """
  masks, skipped, others = {}, {}, []

  def images(split: Path, problems: list[str]) -> Classes:
    pairs = _pairs(split, folder, problems, skipped, others)
    masks.update(pairs)
    return {"": sorted(pairs)}

  splits, problems = layout.find_splits(
    folder, validation_ratio, seed, images, f"a folder that holds {' and '.join(PAIR_FOLDERS)}"
  )
  for split, found in splits.items():
    if not found[""] and not problems:
      why = listed((f"{path}: {reason}" for path, reason in skipped.items()), 3, between="; ")
      problems.append(f"{folder} has no pair of image and mask for {split} ({why or 'no files'})")
  pairs = {split: {path: masks[path] for path in found[""]} for split, found in splits.items()}
  return PairLayout(pairs, [*dict.fromkeys(map(printable, problems))], skipped, others)


def _pairs(
  split: Path, folder: Path, problems: list[str], skipped: dict[str, str], others: list[str]
) -> dict[str, str]:
  """Returns the images in the folder of a split, each with its mask.

  Appends to the two lists, and adds files without a partner to `skipped`.
  """
  if missing := [name for name in PAIR_FOLDERS if not (split / name).is_dir()]:
    problems.append(
      f"{split} has no folder called {' and none called '.join(missing)}; put images into "
      f"{split / PAIR_FOLDERS[0]} and their masks into {split / PAIR_FOLDERS[1]}"
    )
    return {}
  images, masks = (_by_stem(split / name, folder, problems) for name in PAIR_FOLDERS)
  inside = split.relative_to(folder)
  pairs = {}
  for stem, paths in images.items():
    unusable = [path for path in paths if not files.is_image(path)]
    others += unusable
    paths = [path for path in paths if path not in unusable]
    mask = os.path.join(inside, PAIR_FOLDERS[1], f"{stem}.png")
    found = [path for path in masks.get(stem, ()) if _is_mask(path)]
    if len(paths) > 1 or len(found) > 1:
      skipped |= dict.fromkeys(paths, f"{len(paths)} images and {len(found)} masks share its name")
    elif paths and not found:
      skipped[paths[0]] = f"it has no mask {mask}"
    elif paths:
      pairs[paths[0]] = found[0]
  for stem, paths in masks.items():
    for path in paths:
      if not _is_mask(path):
        skipped[path] = "a mask is a .png file"
      elif not any(map(files.is_image, images.get(stem, ()))):
        skipped[path] = f"it has no image {os.path.join(inside, PAIR_FOLDERS[0], stem)}"
  return pairs


def _is_mask(path: str) -> bool:
  return path.lower().endswith(".png")


def _by_stem(inner: Path, folder: Path, problems: list[str]) -> dict[str, list[str]]:
  """Returns the paths of the files below a folder by their paths in it without the endings."""
  found = collections.defaultdict(list)
  for name in files.walk(inner, problems):
    # One system writes an accent as a part of its letter, a different system as a second character.
    stem = unicodedata.normalize("NFC", os.path.splitext(name)[0])
    found[stem].append(os.path.join(inner.relative_to(folder), name))
  return found
