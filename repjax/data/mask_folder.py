"""Makes TFDS sets of folders of images and masks: `{train,val}/{images,masks}/*`."""

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow_datasets as tfds

from repjax import names, regular_files
from repjax.data import class_table, files, layout, masks, pair_layout, preparation
from repjax.data.class_table import ClassTable
from repjax.data.decode import Picture, fault_of, image_errors
from repjax.data.masks import IGNORED, MOST_CLASSES, Rules
from repjax.data.pair_layout import PairLayout
from repjax.data.pairs import check_sizes
from repjax.data.preparation import LeftOut, SplitWriter
from repjax.data.reading import read_image_file
from repjax.errors import InputError, printable, sentences


class PreparedPairs(NamedTuple):
  """A set that was made from a folder of images and masks.

  Attributes:
    path: the folder with the set's files.
    class_names: the names of the classes, in the order of their numbers in masks.
    counts: the number of images, by split.
    pixels: the number of pixels of each class, by split.
    skipped: files that were left out, each with the reason; the partner is left out too.
    others: files that were left out because their endings are not those of images.
    repeated: images outside the validation split that equal one of it byte for byte, mask included.
  """

  path: Path
  class_names: tuple[str, ...]
  counts: dict[str, int]
  pixels: dict[str, list[int]]
  skipped: dict[str, str]
  others: list[str]
  repeated: list[str]


class PairFile(NamedTuple):
  """An image and its mask that were read.

  Attributes:
    name: path of the image below the folder that was given; if there is a fault, of the file that
      has it.
    data: the bytes of the image.
    classes: the classes of its pixels, uint8 (H, W).
    digest: the SHA-256 of the bytes and of the classes.
    fault: why the pair cannot be used; None where it can.
  """

  name: str
  data: bytes = b""
  classes: np.ndarray = np.zeros((0, 0), np.uint8)
  digest: bytes = b""
  fault: str | None = None


def prepare_mask_folder(
  folder: str | os.PathLike[str],
  name: str,
  *,
  data_dir: str | os.PathLike[str] | None = None,
  validation_ratio: float | None = None,
  seed: int = 0,
  strict: bool = False,
  replace: bool = False,
  num_workers: int | None = None,
) -> PreparedPairs:
  """Makes a TFDS set of a folder of images and masks, which `open_source(name, ...)` then opens.

  The images are stored as they are. The masks are stored as grey PNG files of classes, with 255
  where no class counts. Every file is decoded once. A pair that cannot be used is left out, and
  `skipped.txt` beside the set's files names the file and the reason.

  A mask is a PNG. Without a file `classes.json` in the folder, its values or palette indices are
  the classes, and 255 does not count. The file gives the "names" of the classes, and where needed
  their "colors" or "values" in masks, and the colours and values to "ignore".

  Args:
    folder: a folder with the folders `images` and `masks`, or with a folder for training and one
      for validation that hold these two. An image and its mask have the same path in them but for
      the ending.
    name: the name of the set: lower-case letters, digits and underscores.
    data_dir: the folder in which TFDS keeps its sets; None is TFDS's default.
    validation_ratio: share of the pairs that becomes the validation split, where the folder has no
      validation split. The default is 0.2 where `images` is directly in `folder`.
    seed: fixes this choice, and the order in which pairs are stored.
    strict: makes pairs that cannot be used an error.
    replace: allows a set of this name to be replaced.
    num_workers: the number of threads that read and decode; None is one per core.

  Raises:
    InputError: the folder, the table, the name or the disk cannot be used. The text lists the first
      ten problems.
  """
  folder = names.file(folder)
  with preparation.folder_errors(folder):
    table = class_table.read(folder / class_table.NAME)
    found = pair_layout.find_pairs(folder, validation_ratio, seed)
  workers = num_workers or os.cpu_count() or 1
  with preparation.new_set(name, found.problems, data_dir=data_dir, replace=replace) as place:
    target, draft = place
    class_names, splits, left_out = _write(draft, folder, found, name, table, seed, workers)
    preparation.refuse_skipped(left_out.skipped, strict)
  return PreparedPairs(
    target,
    class_names,
    {split: written.count for split, written in splits.items()},
    {split: written.pixels[: len(class_names)].tolist() for split, written in splits.items()},
    left_out.skipped,
    found.others,
    left_out.repeated,
  )


def read_pair(image: Path, mask: Path, names: tuple[str, str], rules: Rules) -> PairFile:
  """Reads an image and its mask and checks them; a problem becomes the result's `fault`.

  Args:
    image: path of the image.
    mask: path of the mask.
    names: the two paths below the folder that was given.
    rules: how the mask names classes.
  """
  read = read_image_file(image, names[0], 0)
  if read.fault is not None:
    return PairFile(names[0], fault=read.fault)
  try:
    with image_errors(names[1]):
      picture = Picture(read.data)
      classes = rules.classes(regular_files.read(mask, files.LARGEST))
      check_sizes((picture.height, picture.width), classes.shape)
  except InputError as error:
    return PairFile(names[1], fault=fault_of(error))
  # The bytes of a PNG depend on the library that wrote it; classes do not.
  content = read.digest + repr(classes.shape).encode() + classes.tobytes()
  return PairFile(names[0], read.data, classes, hashlib.sha256(content).digest())


class _Split:
  """A split that is being written.

  Attributes:
    writer: writes the examples.
    count: number of pairs so far.
    pixels: number of pixels of each class, int64 (256,).
    largest: the largest height and the largest width.
  """

  def __init__(self, writer: SplitWriter):
    self.writer, self.count = writer, 0
    self.pixels, self.largest = np.zeros(256, np.int64), [0, 0]

  def keep(self, pair: PairFile) -> None:
    """Writes a pair, and counts its pixels."""
    self.writer.write(pair, {"image": pair.data, "mask": masks.encoded(pair.classes)})
    self.count += 1
    self.pixels += np.bincount(pair.classes.ravel(), minlength=256)
    self.largest = [*map(max, self.largest, pair.classes.shape)]


def _write(
  draft: Path,
  folder: Path,
  found: PairLayout,
  name: str,
  table: ClassTable,
  seed: int,
  num_workers: int,
) -> tuple[tuple[str, ...], dict[str, _Split], LeftOut]:
  """Writes the whole set; returns the names of the classes, the splits, and what was left out."""
  features = _features(("any",))  # records hold no names, which may not be known yet
  splits = {split: _Split(SplitWriter(draft, name, split, features)) for split in found.splits}
  left_out = preparation.read_all(
    {split: _stored_order(folder, pairs, table, seed) for split, pairs in found.splits.items()},
    read_pair,
    lambda split, pair: splits[split].keep(pair),
    name=name,
    total=sum(map(len, found.splits.values())),
    num_workers=num_workers,
  )
  left_out = left_out._replace(skipped=found.skipped | left_out.skipped)
  _refuse_lost_splits(splits, left_out.skipped)
  pixels = np.sum([split.pixels for split in splits.values()], axis=0)
  class_names = table.names or _numbers(pixels)
  _refuse_one_class(pixels, class_names, folder)
  preparation.write_info(
    draft,
    name,
    {split: written.writer for split, written in splits.items()},
    features=_features(class_names),
    description="Images and masks from a folder.",
    largest_images={split: written.largest for split, written in splits.items()},
    class_colors=[list(color) for color in table.colors],
  )
  others = dict.fromkeys(found.others, f"its ending is none of {', '.join(files.ENDINGS)}")
  preparation.write_skipped(draft, others | left_out.skipped)
  return class_names, splits, left_out


def _stored_order(
  folder: Path, pairs: Mapping[str, str], table: ClassTable, seed: int
) -> Iterator[tuple[Path, Path, tuple[str, str], Rules]]:
  """Yields the arguments of `read_pair` for the pairs of a split, shuffled."""
  for image in sorted(pairs, key=lambda path: layout.rank(seed, path)):
    mask = pairs[image]
    yield folder / image, folder / mask, (image, mask), table.rules


def _numbers(pixels: np.ndarray) -> tuple[str, ...]:
  """Returns the numbers up to the largest class that has pixels, as names of the classes."""
  seen = np.flatnonzero(pixels[:MOST_CLASSES])
  return tuple(str(number) for number in range(seen.max() + 1))


def _refuse_lost_splits(splits: Mapping[str, _Split], skipped: Mapping[str, str]) -> None:
  """Raises InputError where no pair of a split could be used, or no pixel counts."""
  for name, split in splits.items():
    if not split.count:
      first = min(skipped)
      raise InputError(
        f"no pair of the {name} split could be used, for example {printable(first)}: "
        f"{skipped[first]}. Repair these files"
      )
    if not split.pixels[:MOST_CLASSES].any():
      raise InputError(
        f"no pixel of the {name} split has a class: its masks have the value {IGNORED} everywhere, "
        "which does not count. Write the classes as 0, 1, 2, ..."
      )


def _refuse_one_class(pixels: np.ndarray, class_names: Sequence[str], folder: Path) -> None:
  """Raises InputError where all pixels that count are of one class, as in black and white masks."""
  seen = np.flatnonzero(pixels[:MOST_CLASSES])
  if len(seen) > 1:
    return
  problem = f"every pixel of the masks in {folder} that counts has the class {class_names[seen[0]]}"
  way_out = "Use masks of at least two classes"
  if pixels[IGNORED]:
    problem += (
      f", and {pixels[IGNORED] / pixels.sum():.1%} have the value 255, which does not count"
    )
    way_out = (
      f"If 255 is a class too, write into {folder / class_table.NAME}: "
      '{"names": ["background", "object"], "values": [0, 255]}'
    )
  raise InputError(sentences(problem, way_out))


def _features(class_names: tuple[str, ...]) -> tfds.features.FeaturesDict:
  return tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(),
      "mask": tfds.features.LabeledImage(labels=list(class_names), encoding_format="png"),
      "file_name": tfds.features.Text(),
    }
  )
