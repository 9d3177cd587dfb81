"""Makes TFDS sets of folders of images: `<class>/*.jpg`, or `{train,val}/<class>/*.jpg`."""

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

from repjax import disk, names
from repjax.data import layout, storage
from repjax.data.layout import Classes
from repjax.data.reading import ImageFile, in_order, read_image_file
from repjax.errors import InputError, listed, printable

VERSION = "1.0.0"  # the same for every set made here; the checksum tells sets apart


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
  target = storage.sets_folder(data_dir) / name / VERSION
  try:
    found = layout.find_images(folder, validation_ratio, seed)
  except OSError as error:
    where = printable(error.filename or folder)
    raise InputError(f"{where} cannot be read: {error.strerror}") from error
  problems = [*name_problems(name), *found.problems]
  with disk.writing(target, OSError):
    problems += storage.existing_problems(target, replace=replace)
  if problems:
    raise InputError(listed(problems, 10, between="\n", longest=None))
  workers = num_workers or os.cpu_count() or 1
  with (
    storage.whole_set(target, replace=replace) as draft,
    warnings.catch_warnings(action="ignore"),  # Pillow warns about odd files that it can read
  ):
    counts, skipped, repeated = _write(draft, folder, found, name, seed, workers)
    if strict and skipped:
      raise InputError(
        f"nothing was written, since {len(skipped):,} of the files cannot be read; without "
        f"--strict they are left out, and {storage.SKIPPED} lists them all: "
        + listed(
          (f"{path}: {why}" for path, why in sorted(skipped.items())),
          20,
          between="; ",
          longest=None,
        )
      )
  class_names = tuple(found.splits["train"])
  return PreparedSet(target, class_names, counts, skipped, found.others, repeated)


def name_problems(name: str) -> list[str]:
  """Returns the reason why a set cannot have this name, with a possible name, or an empty list."""
  plain = re.sub(r"[^a-z0-9]+", "_", naming.camelcase_to_snakecase(name.strip())).strip("_")
  proposed = plain if re.match("[a-z]", plain) else f"set_{plain}".rstrip("_")
  taken = {*tfds.list_builders(with_community_datasets=False), "digits", "synthetic"}
  if proposed in taken:
    proposed = f"my_{proposed}"
  if name in taken:
    return [f"the name {name} belongs to a data set already; take {proposed}, for example"]
  if not re.fullmatch("[a-z][a-z0-9_]*", name) or naming.camelcase_to_snakecase(name) != name:
    return [
      f"{name!r} cannot be the name of a set. A name consists of lower-case letters, digits and "
      f"underscores, and starts with a letter; take {proposed}, for example"
    ]
  return []


def _write(
  draft: Path, folder: Path, found: layout.FolderLayout, name: str, seed: int, num_workers: int
) -> tuple[dict[str, list[int]], dict[str, str], list[str]]:
  """Writes the whole set; returns `counts`, `skipped` and `repeated` as in `PreparedSet`."""
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
  # Names keep their bytes, but a line break in a name must not look like two files.
  lines = [f"{_one_line(path)}\t{reason}\n" for path, reason in sorted(listed.items())]
  if lines:
    (draft / storage.SKIPPED).write_text("".join(lines), "utf-8", "surrogateescape")
  return counts, skipped, repeated


def _one_line(path: str) -> str:
  """Returns a path with its control characters escaped."""
  return path.translate({code: f"\\x{code:02x}" for code in (*range(32), 127)})


def _write_images(
  writers: dict[str, "_SplitWriter"],
  folder: Path,
  splits: dict[str, Classes],
  name: str,
  seed: int,
  num_workers: int,
) -> tuple[dict[str, str], list[str]]:
  """Writes the images of all splits; returns `skipped` and `repeated` as in `PreparedSet`."""
  skipped: dict[str, str] = {}
  validation, repeated = set(), []
  total = sum(len(paths) for classes in splits.values() for paths in classes.values())
  with tqdm(total=total, desc=name, unit=" images", disable=None) as bar:
    # The validation split comes first, so that its digests are known when the other splits follow.
    for split in sorted(splits, key=lambda split: split != "validation"):
      files = _stored_order(folder, splits[split], seed)
      for image in in_order(read_image_file, files, num_workers):
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


class _SplitWriter:
  """Writes the examples of a split, counts each class, and computes the split's checksum.

  The checksum is the SHA-256 over the name, a zero byte and the SHA-256 of each image in turn.
  """

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
    """Closes the files, and returns the facts about them that TFDS keeps."""
    return self._shards.finish()


def _features(class_names: tuple[str, ...]) -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(),
      "label": tfds.features.ClassLabel(names=class_names),
      "file_name": tfds.features.Text(),
    }
  )
