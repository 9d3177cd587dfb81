"""Folders of images become TFDS sets: `<class>/*.jpg`, or `{train,val}/<class>/*.jpg`."""

import hashlib
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, naming
from tqdm import tqdm

from repjax.data import layout, storage
from repjax.data.layout import Classes
from repjax.data.reading import ImageFile, in_order, read_image
from repjax.errors import InputError

VERSION = "1.0.0"  # of every set made here; what differs is the checksum
SKIPPED = "skipped.txt"


class Prepared(NamedTuple):
  """A set that was made from a folder.

  Attributes:
    path: the folder with its files.
    class_names: in the order of the labels.
    counts: images of each class, by split.
    skipped: images that cannot be read and were left out, each with the reason.
    others: files that are no images by their endings, left out too.
    repeated: images outside the validation split that are in it too, byte for byte.
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
) -> Prepared:
  """Makes a TFDS set of a folder of images, which `open_source(name, ...)` then opens.

  The files' bytes are stored as they are. Every file is decoded once; those that cannot be are left
  out and listed in `skipped.txt` beside the set's files, as are files with other endings. The same
  folder gives the same files.

  Args:
    folder: one folder a class, either directly in it or in its folders for training and validation.
      Class folders may hold further folders. Labels follow the sorted names of the classes.
    name: of the set: lower-case letters, digits and underscores.
    data_dir: where TFDS keeps its sets; None is TFDS's own default.
    validation_ratio: share of each class that becomes the validation split, where the folder has no
      split of its own; at least one image, and one remains. Default: 0.2 where the classes are
      directly in `folder`.
    seed: of that choice, and of the order in which images are stored.
    strict: makes unreadable files an error.
    replace: whether a set of this name may give way.
    num_workers: threads that read and decode; None: one for each core.

  Raises:
    InputError: the folder, the name or the disk cannot be used; lists everything that was found.
  """
  target = storage.sets_folder(data_dir) / name / VERSION
  try:
    found = layout.find_images(Path(folder), validation_ratio, seed)
  except OSError as error:
    raise InputError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
  problems = [*name_problems(name), *found.problems]
  with storage.disk_errors(target):
    problems += storage.existing_problems(target, replace=replace)
  if problems:
    raise InputError("\n".join(problems))
  workers = num_workers or os.cpu_count() or 1
  with (
    storage.disk_errors(target),
    storage.whole_set(target, replace=replace) as draft,
    warnings.catch_warnings(action="ignore"),  # Pillow's, about odd but readable files
  ):
    counts, skipped, repeated = _write(draft, Path(folder), found, name, seed, workers)
    if strict and skipped:
      raise InputError(
        f"nothing was written, since {len(skipped):,} of the files cannot be read; without "
        "--strict they are left out: "
        + "; ".join(f"{path}: {why}" for path, why in sorted(skipped.items()))
      )
  class_names = tuple(found.splits["train"])
  return Prepared(target, class_names, counts, skipped, found.others, repeated)


def name_problems(name: str) -> list[str]:
  """Why a set cannot be called so, with a name that would do."""
  plain = re.sub(r"[^a-z0-9]+", "_", naming.camelcase_to_snakecase(name.strip())).strip("_")
  proposed = plain if re.match("[a-z]", plain) else f"set_{plain}".rstrip("_")
  taken = {*tfds.list_builders(with_community_datasets=False), "digits", "synthetic"}
  if proposed in taken:
    proposed = f"my_{proposed}"
  if name in taken:
    return [f"the name {name} belongs to another data set already; take {proposed}, for example"]
  if not re.fullmatch("[a-z][a-z0-9_]*", name) or naming.camelcase_to_snakecase(name) != name:
    return [
      f"{name!r} cannot be a set's name, which consists of lower-case letters, digits and "
      f"underscores and starts with a letter; take {proposed}, for example"
    ]
  return []


def _write(
  draft: Path, folder: Path, found: layout.Found, name: str, seed: int, num_workers: int
) -> tuple[dict[str, list[int]], dict[str, str], list[str]]:
  """Writes the whole set; the images of each class by split, what was skipped and repeated."""
  splits = found.splits
  class_names = tuple(splits["train"])
  writers = {split: _SplitWriter(draft, name, split, class_names) for split in splits}
  skipped, repeated = _write_images(writers, folder, splits, name, seed, num_workers)
  counts = {split: writer.counts for split, writer in writers.items()}
  _refuse_lost_classes(splits, counts, skipped)
  storage.write_info(
    draft,
    name,
    VERSION,
    features=_features(class_names),
    splits={split: writer.finish() for split, writer in writers.items()},
    description="Images from a folder, one class for each folder in it.",
    metadata={
      "checksum": {split: writer.checksum.hexdigest() for split, writer in writers.items()}
    },
  )
  listed = (
    dict.fromkeys(found.others, f"its ending is none of {', '.join(layout.ENDINGS)}") | skipped
  )
  lines = [f"{path}\t{reason}\n" for path, reason in sorted(listed.items())]
  if lines:
    (draft / SKIPPED).write_text("".join(lines), "utf-8", "surrogateescape")
  return counts, skipped, repeated


def _write_images(
  writers: dict[str, "_SplitWriter"],
  folder: Path,
  splits: dict[str, Classes],
  name: str,
  seed: int,
  num_workers: int,
) -> tuple[dict[str, str], list[str]]:
  skipped: dict[str, str] = {}
  validation, repeated = set(), []
  total = sum(len(paths) for classes in splits.values() for paths in classes.values())
  with tqdm(total=total, desc=name, unit=" images", disable=None) as bar:
    # Validation comes first, so that other images that are in it too are seen at once.
    for split in sorted(splits, key=lambda split: split != "validation"):
      for image in in_order(read_image, _stored_order(folder, splits[split], seed), num_workers):
        bar.update()
        if image.fault:
          skipped[image.name] = image.fault
          continue
        writers[split].write(image)
        if split == "validation":
          validation.add(image.digest)
        elif image.digest in validation:
          repeated.append(image.name)
  return skipped, repeated


def _stored_order(folder: Path, classes: Classes, seed: int) -> Iterator[tuple[Path, str, int]]:
  """The images of a split, mixed, so that any part of the split holds all classes."""
  pairs = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
  for path, label in sorted(pairs, key=lambda pair: layout.rank(seed, pair[0])):
    yield folder / path, path, label


def _refuse_lost_classes(
  splits: dict[str, Classes], counts: dict[str, list[int]], skipped: dict[str, str]
) -> None:
  lost = []
  for split, classes in splits.items():
    for (name, paths), count in zip(classes.items(), counts[split]):
      if not count:
        first = min(path for path in paths if path in skipped)
        lost.append(f"{name} in {split} ({len(paths)} of {len(paths)}: {first}: {skipped[first]})")
  if lost:
    raise InputError(
      f"no image could be read of {'; '.join(lost)}. Every class needs images in every split: "
      "replace these files, or remove them and, where nothing else is in it, the class's folder"
    )


class _SplitWriter:
  """Writes examples; counts each class and folds names and contents into one checksum."""

  def __init__(self, draft: Path, name: str, split: str, class_names: tuple[str, ...]):
    self._shards = storage.ShardWriter(draft, name, split)
    self._features = _features(class_names)
    specs: Any = self._features.get_serialized_info()
    self._serializer = example_serializer.ExampleSerializer(specs)
    self.checksum = hashlib.sha256()
    self.counts = [0] * len(class_names)

  def write(self, image: ImageFile) -> None:
    """Appends an example."""
    name = image.name.encode("utf-8", "surrogateescape")
    example = {"image": image.data, "label": image.label, "file_name": name}
    self._shards.write(self._serializer.serialize_example(self._features.encode_example(example)))
    self.checksum.update(name + b"\0" + image.digest)
    self.counts[image.label] += 1

  def finish(self) -> storage.SplitFiles:
    """Ends the files; what TFDS notes of them."""
    return self._shards.finish()


def _features(class_names: tuple[str, ...]) -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(),
      "label": tfds.features.ClassLabel(names=class_names),
      "file_name": tfds.features.Text(),
    }
  )
