"""Folders of images become TFDS sets: `<class>/*.jpg`, or `{train,val}/<class>/*.jpg`."""

import collections
import hashlib
import io
import itertools
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from PIL import Image, UnidentifiedImageError
from tensorflow_datasets.core import example_serializer, naming
from tqdm import tqdm

from repjax.data import layout, records
from repjax.data.layout import Classes
from repjax.errors import InputError

VERSION = "1.0.0"  # of every set made here; what differs is the checksum
FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # of the contents, whatever a file's ending says
SKIPPED = "skipped.txt"


class Prepared(NamedTuple):
  """A set that was made from a folder.

  Attributes:
    path: the folder with its files.
    class_names: in the order of the labels.
    counts: images of each class, by split.
    skipped: files that were left out, each with the reason.
    repeated: images outside the validation split that are in it too, byte for byte.
  """

  path: Path
  class_names: tuple[str, ...]
  counts: dict[str, list[int]]
  skipped: dict[str, str]
  repeated: int


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
  out and listed in `skipped.txt` beside the set's files. The same folder gives the same files.

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
  target = records.sets_folder(data_dir) / name / VERSION
  try:
    found = layout.find_images(Path(folder), validation_ratio, seed)
  except OSError as error:
    raise InputError(f"{error.filename or folder} cannot be read: {error.strerror}") from error
  problems = [*name_problems(name), *found.problems]
  with records.disk_errors(target):
    problems += records.existing_problems(target, replace=replace)
  if problems:
    raise InputError("\n".join(problems))
  workers = num_workers or os.cpu_count() or 1
  with (
    records.disk_errors(target),
    records.whole_set(target, replace=replace) as draft,
    warnings.catch_warnings(action="ignore"),  # Pillow's, about odd but readable files
  ):
    counts, skipped, repeated = _write(draft, Path(folder), found.splits, name, seed, workers)
    if strict and skipped:
      raise InputError(
        f"{len(skipped)} files cannot be read, so nothing was written; without --strict they are "
        "left out: " + "; ".join(f"{path}: {why}" for path, why in sorted(skipped.items()))
      )
  return Prepared(target, tuple(found.splits["train"]), counts, skipped, repeated)


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
  draft: Path, folder: Path, splits: dict[str, Classes], name: str, seed: int, num_workers: int
) -> tuple[dict[str, list[int]], dict[str, str], int]:
  """Writes the whole set; the images of each class by split, what was skipped and repeated."""
  class_names = tuple(splits["train"])
  total = sum(len(paths) for classes in splits.values() for paths in classes.values())
  files, checksums, counts = {}, {}, {}
  skipped: dict[str, str] = {}
  validation, repeated = set(), 0
  with tqdm(total=total, desc=name, unit=" images", disable=None) as bar:
    # Validation comes first, so that training images that are in it too are seen at once.
    for split in ("validation", *(split for split in splits if split != "validation")):
      writer = _SplitWriter(draft, name, split, class_names)
      for image in _in_order(_read, _stored_order(folder, splits[split], seed), num_workers):
        bar.update()
        if image.fault:
          skipped[image.name] = image.fault
          continue
        writer.write(image)
        if split == "validation":
          validation.add(image.digest)
        repeated += split != "validation" and image.digest in validation
      files[split], checksums[split] = writer.finish()
      counts[split] = writer.counts
  _refuse_lost_classes(splits, counts, skipped)
  records.write_info(
    draft,
    name,
    VERSION,
    features=_features(class_names),
    splits={split: files[split] for split in splits},
    description="Images from a folder, one class for each folder in it.",
    metadata={"checksum": checksums},
  )
  lines = [f"{path}\t{reason}\n" for path, reason in sorted(skipped.items())]
  if lines:
    (draft / SKIPPED).write_text("".join(lines), "utf-8", "surrogateescape")
  return {split: counts[split] for split in splits}, skipped, repeated


def _stored_order(folder: Path, classes: Classes, seed: int) -> list[tuple[Path, str, int]]:
  """The images of a split, mixed, so that any part of the split holds all classes."""
  pairs = [(path, label) for label, paths in enumerate(classes.values()) for path in paths]
  return [
    (folder / path, path, label)
    for path, label in sorted(pairs, key=lambda pair: layout.rank(seed, pair[0]))
  ]


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
    self._shards = records.ShardWriter(draft, name, split)
    self._features = _features(class_names)
    specs: Any = self._features.get_serialized_info()
    self._serializer = example_serializer.ExampleSerializer(specs)
    self._checksum = hashlib.sha256()
    self.counts = [0] * len(class_names)

  def write(self, image: "_Image") -> None:
    """Appends an example."""
    name = image.name.encode("utf-8", "surrogateescape")
    example = {"image": image.data, "label": image.label, "file_name": name}
    self._shards.write(self._serializer.serialize_example(self._features.encode_example(example)))
    self._checksum.update(name + b"\0" + image.digest)
    self.counts[image.label] += 1

  def finish(self) -> tuple[records.SplitFiles, str]:
    """Ends the files; what TFDS notes of them, and the checksum."""
    return self._shards.finish(), self._checksum.hexdigest()


class _Image(NamedTuple):
  """A file that was read; `fault` is why it is no image."""

  name: str
  label: int
  data: bytes
  digest: bytes
  fault: str | None


def _features(class_names: tuple[str, ...]) -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(),
      "label": tfds.features.ClassLabel(names=class_names),
      "file_name": tfds.features.Text(),
    }
  )


def _read(path: Path, name: str, label: int) -> _Image:
  data, digest = b"", b""
  try:
    data = path.read_bytes()
    digest = hashlib.sha256(data).digest()
    fault = _fault(data)
  except OSError as error:
    fault = error.strerror or str(error)
  return _Image(name, label, data, digest, fault)


def _fault(data: bytes) -> str | None:
  """Why these bytes are not a whole image; None where they are."""
  if not data:
    return "empty file"
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      image.draft(None, (1, 1))  # a JPEG at an eighth of its size: all of it is read, in less time
      image.load()
  except UnidentifiedImageError:
    return f"not an image of a known kind ({', '.join(FORMATS)})"
  except Exception as error:  # Pillow has many kinds for damaged files
    return " ".join(str(error).split()) or type(error).__name__
  return None


def _in_order(
  function: Callable[..., _Image], arguments: Iterable[tuple], num_workers: int
) -> Iterator[_Image]:
  """Results of threads, in order, with few of them in memory at a time."""
  arguments, pending = iter(arguments), collections.deque()
  with ThreadPoolExecutor(num_workers) as pool:
    try:
      while True:
        for each in itertools.islice(arguments, 4 * num_workers - len(pending)):
          pending.append(pool.submit(function, *each))
        if not pending:
          return
        yield pending.popleft().result()
    finally:
      pool.shutdown(cancel_futures=True)
