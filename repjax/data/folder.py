"""Makes TFDS sets of folders of images: `<class>/*.jpg`, or `{train,val}/<class>/*.jpg`."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import tensorflow_datasets as tfds

from repjax import names
from repjax.data import layout, preparation
from repjax.data.layout import Classes
from repjax.data.preparation import LeftOut, SplitWriter
from repjax.data.reading import ImageFile, read_image_file
from repjax.errors import InputError, listed, printable


class PreparedSet(NamedTuple):
  """A set that was made from a folder.

  Attributes:
    path: the folder with the set's files.
    class_names: the names of the classes, in the order of the labels.
    counts: the number of images of each class, by split.
    skipped: images that cannot be read and were left out, each with the reason.
    others: files that were left out because their endings are not those of images.
    repeated: images outside the validation split that equal a validation image byte for byte.
  """

  path: Path
  class_names: tuple[str, ...]
  counts: dict[str, list[int]]
  skipped: dict[str, str]
  others: list[str]
  repeated: list[str]


def prepare_folder(
  folder: str | os.PathLike[str],
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  validation_ratio: float | None = None,
  seed: int = 0,
  strict: bool = False,
  replace: bool = False,
  num_workers: int | None = None,
) -> PreparedSet:
  """Makes a TFDS set of a folder of images, which `open_source(name, ...)` then opens.

  The bytes of the files are stored as they are. Every file is decoded once as a check. Files that
  cannot be decoded, and files whose endings are not those of images, are left out and listed in
  `skipped.txt` beside the set's files. The same folder gives the same examples in the same order.

  Args:
    folder: a folder with one folder per class, or with such folders in its folders for training and
      validation. Class folders may hold further folders. Labels follow the sorted class names.
    name: the name of the set: lower-case letters, digits and underscores.
    data_dir: the folder in which TFDS keeps its sets; None is TFDS's default.
    validation_ratio: share of each class that becomes the validation split, where the folder has no
      validation split. At least one image of a class is taken, and at least one remains. The
      default is 0.2 where the classes are directly in `folder`.
    seed: fixes this choice, and the order in which images are stored.
    strict: makes unreadable files an error.
    replace: allows a set of this name to be replaced.
    num_workers: the number of threads that read and decode; None is one per core.

  Raises:
    InputError: the folder, the name or the disk cannot be used. The text lists the first ten
      problems.
  """
  folder = names.file(folder)
  with preparation.folder_errors(folder):
    found = layout.find_images(folder, validation_ratio, seed)
  workers = num_workers or os.cpu_count() or 1
  with preparation.new_set(name, found.problems, data_dir=data_dir, replace=replace) as place:
    target, draft = place
    counts, left_out = _write(draft, folder, found, name, seed, workers)
    preparation.refuse_skipped(left_out.skipped, strict)
  class_names = tuple(found.splits["train"])
  return PreparedSet(target, class_names, counts, left_out.skipped, found.others, left_out.repeated)


def _write(
  draft: Path, folder: Path, found: layout.FolderLayout, name: str, seed: int, num_workers: int
) -> tuple[dict[str, list[int]], LeftOut]:
  """Writes the whole set; returns `counts` as in `PreparedSet`, and what was left out."""
  splits = found.splits
  class_names = tuple(splits["train"])
  features = _features(class_names)
  writers = {split: SplitWriter(draft, name, split, features) for split in splits}
  counts = {split: [0] * len(class_names) for split in splits}

  def keep(split: str, image: ImageFile) -> None:
    writers[split].write(image, {"image": image.data, "label": image.label})
    counts[split][image.label] += 1

  left_out = preparation.read_all(
    {split: _stored_order(folder, classes, seed) for split, classes in splits.items()},
    read_image_file,
    keep,
    name=name,
    total=sum(len(paths) for classes in splits.values() for paths in classes.values()),
    num_workers=num_workers,
  )
  _refuse_lost_classes(splits, counts, left_out.skipped)
  preparation.write_info(
    draft,
    name,
    writers,
    features=features,
    description="Images from a folder, one class for each folder in it.",
  )
  others = dict.fromkeys(found.others, f"its ending is none of {', '.join(layout.ENDINGS)}")
  preparation.write_skipped(draft, others | left_out.skipped)
  return counts, left_out


def _stored_order(folder: Path, classes: Classes, seed: int) -> Iterator[tuple[Path, str, int]]:
  """Yields (path, name, label) of a split's images, shuffled so that classes mix."""
  pairs = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
  for path, label in sorted(pairs, key=lambda pair: layout.rank(seed, pair[0])):
    yield folder / path, path, label


def _refuse_lost_classes(
  splits: dict[str, Classes], counts: dict[str, list[int]], skipped: dict[str, str]
) -> None:
  """Raises where none of a class's images in a split could be read."""
  lost = []
  for split, classes in splits.items():
    for (name, paths), count in zip(classes.items(), counts[split]):
      if not count:
        first = min(path for path in paths if path in skipped)
        why = f"{printable(first)}: {skipped[first]}"
        lost.append(f"{name} in {split} ({len(paths)} of {len(paths)}: {why})")
  if lost:
    raise InputError(
      f"no image could be read of {listed(lost, between='; ', longest=None)}. Every class needs "
      "images in every split. Replace these files, or remove the class"
    )


def _features(class_names: tuple[str, ...]) -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(),
      "label": tfds.features.ClassLabel(names=class_names),
      "file_name": tfds.features.Text(),
    }
  )
