"""Opens data sets: any TFDS set with labels or masks that is stored as array_record, or noise."""

import hashlib
import os
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource

from repjax import regular_files
from repjax.data import mask_sets, masks
from repjax.data.builders import DEMOS, demo_builder, find_builder, metadata_of, tfds_errors
from repjax.data.examples import (
  Examples,
  Records,
  StoredExamples,
  StoredPairs,
  SyntheticExamples,
  SyntheticPairs,
  largest_size,
)
from repjax.data.formats import MOST_PIXELS
from repjax.data.mask_sets import MaskSet
from repjax.errors import InputError, printable, unknown

# The feature that holds the names of the original files; its name differs between TFDS sets.
FILE_NAMES = ("file_name", "image/filename", "filename")
TASKS = ("classification", "segmentation")
"""What the examples of a set can be for: an image has a label, or a mask."""


class Source(NamedTuple):
  """A split of a data set.

  Attributes:
    examples: random access to the images as they are stored.
    class_names: the names of the classes, in the order of the labels.
    fingerprint: a few values, fit for JSON, that identify the split. The fingerprint of a set made
      from a folder holds a checksum over all its images. For all other sets, the number of images
      and their total size stand for the content.
    task: "classification" where an image has a label, "segmentation" where it has a mask.
    colors: the colour of each class in pictures of masks, (red, green, blue) in 0 ... 255; empty
      for classification.
  """

  examples: Examples
  class_names: tuple[str, ...]
  fingerprint: dict[str, Any]
  task: str = "classification"
  colors: tuple[masks.Color, ...] = ()

  def canvas(
    self, fit: Callable[[tuple[int, int]], tuple[int, int]] | None = None
  ) -> tuple[int, int] | None:
    """Returns the (height, width) on which every image fits; None for classification.

    Args:
      fit: function of the largest (height, width) that returns the canvas, such as the `canvas` of
        a network; None: the canvas is as large as the largest height and width.

    Raises:
      InputError: the canvas would have too many pixels.
    """
    if self.task == "classification":
      return None
    # Some of the examples of a split know no sizes, but their images do.
    largest = getattr(self.examples, "largest", None) or largest_size(self.examples)
    height, width = fit(largest) if fit else largest
    if height * width > MOST_PIXELS:
      name, split = self.fingerprint["name"], self.fingerprint["split"]
      raise InputError(
        f"the images of the {split} split of {name} are up to {height} pixels high and up to "
        f"{width} wide; a canvas for all of them has more than {MOST_PIXELS:,} pixels. Make the "
        "largest images smaller"
      )
    return height, width


def open_source(
  name: str,
  split: str,
  *,
  data_dir: str | None = None,
  num_classes: int = 1000,
  image_size: int = 224,
  task: str | None = None,
) -> Source:
  """Opens one split of a data set for random access, without TensorFlow.

  Args:
    name: a set made with repjax prepare-dataset, a TFDS name ("imagenet2012", "cifar10",
      "imagenette/320px", ...), "digits" or "scenes", which are prepared on first use, or
      "synthetic".
    split: "train", "validation", "test", or a different split that the set has. The split "sample"
      of the synthetic set has 16 images.
    data_dir: the folder in which TFDS keeps its sets; None is TFDS's default.
    num_classes: the number of classes of the synthetic set.
    image_size: side of the synthetic set's images in pixels.
    task: "classification" reads the labels of a set, "segmentation" its masks. None reads the
      labels where there are any, else the masks.

  Raises:
    InputError: the set is unknown, not on disk, not complete, not for the task, or stored in a
      format that needs TensorFlow; or it has no such split.
  """
  if task is not None and task not in TASKS:
    raise unknown("task", task, TASKS)
  if name == "synthetic":
    return _synthetic(split, num_classes, image_size, task or TASKS[0])
  builder = demo_builder(name, data_dir) if name in DEMOS else find_builder(name, data_dir)
  with tfds_errors(name):
    return _opened(name, split, builder, task)


def _opened(name: str, split: str, builder: tfds.core.DatasetBuilder, task: str | None) -> Source:
  """Returns a split of a set whose builder has been found.

  Raises: as in `open_source`.
  """
  if split not in builder.info.splits:
    raise InputError(
      f"{unknown(f'split of {name}', split, builder.info.splits)} "
      "(config.train_split and config.eval_split choose the splits, or --split of a command)"
    )
  features: Any = builder.info.features
  class_names = () if task == "segmentation" else _class_names(name, features)
  if class_names:
    records = _records(name, builder, split, FILE_NAMES)
    examples = StoredExamples(records, len(class_names))
    return Source(examples, class_names, _fingerprint(builder, split, class_names))
  mask_set = mask_sets.find(name, builder)
  if mask_set is None or task == "classification":
    raise _not_for(name, task or "classification", features, mask_set)
  return _opened_pairs(name, split, builder, mask_set)


def _not_for(name: str, task: str, features: Any, mask_set: MaskSet | None) -> InputError:
  """Returns the error for a set whose features are not those of a task."""
  known = sorted(features) if hasattr(features, "keys") else type(features).__name__
  if task == "segmentation":
    needed = "An image, and a mask whose values are known, are needed"
  elif mask_set is not None:
    needed = "It has masks in place of labels, for config.task = 'segmentation'"
  else:
    needed = "An image and a label with class names are needed"
  return InputError(
    f"{name} is not an image {task} set: its features are {printable(known)}. {needed}"
  )


def _opened_pairs(
  name: str, split: str, builder: tfds.core.DatasetBuilder, mask_set: MaskSet
) -> Source:
  """Returns a split of a set whose masks are known."""
  features: Any = builder.info.features
  height, width, _ = features[mask_set.image].shape
  largest = None if height is None or width is None else (height, width)
  largest = metadata_of(builder).get("largest_images", {}).get(split, largest)
  records = _records(name, builder, split, mask_set.file_names)
  keys = mask_set.image, mask_set.mask
  examples = StoredPairs(records, keys, masks.lookup(mask_set.classes), largest)
  names = mask_set.class_names
  fingerprint = {**_fingerprint(builder, split, names), "task": "segmentation"}
  colors = mask_set.colors or masks.palette(len(names))
  return Source(examples, names, fingerprint, "segmentation", colors)


def _records(
  name: str, builder: tfds.core.DatasetBuilder, split: str, file_names: Sequence[str]
) -> Records:
  """Returns the records of a split, after checking its files."""
  features: Any = builder.info.features
  file_name = next((key for key in file_names if key in features), None)
  return Records(_stored_records(name, builder, split), name, split, file_name)


def _class_names(name: str, features: Any) -> tuple[str, ...]:
  """Returns the names of the classes; none where the features are not those of a classification.

  Raises:
    InputError: the file of the names does not fit the number of classes. TFDS says nothing then.
  """
  if not hasattr(features, "keys") or not {"image", "label"} <= set(features):
    return ()
  label = features["label"]
  # A label may have neither names nor a number of classes, and its `names` then raises.
  if not getattr(label, "num_classes", None):
    return ()
  names = tuple(label.names)
  if len(names) != label.num_classes or len(set(names)) < len(names):
    raise InputError(
      f"{name} has {label.num_classes} classes, and its file of labels has {len(names)} names, "
      f"{len(set(names))} of them different. Copy the data set again, or prepare it again"
    )
  return names


def _stored_records(name: str, builder: tfds.core.DatasetBuilder, split: str) -> Any:
  """Returns random access to the serialized examples of a split, after checking its files."""
  info: Any = builder.info.splits[split]
  # The set may be stored in two formats; its metadata then gives the file names of the first one.
  template = info.filename_template.replace(filetype_suffix="array_record")
  stored = info.replace(filename_template=template)
  missing = [path.name for path in stored.filepaths if not regular_files.is_regular(path)]
  if missing:
    raise InputError(
      f"{name} in {builder.data_path} is incomplete: {len(missing)} of its "
      f"{len(stored.filepaths)} {split} files are missing, such as {printable(missing[0])}. Copy "
      "the set again, or remove it and prepare it again"
    )
  for path, images in zip(stored.filepaths, stored.shard_lengths):
    # A record takes more than a byte. Otherwise the metadata could claim any number of images.
    if images > (size := os.stat(path).st_size):
      raise InputError(
        f"{printable(path)} has {size:,} bytes, and the metadata of {name} says that it holds "
        f"{images:,} images. Copy the set again, or remove it and prepare it again"
      )
  return ArrayRecordDataSource(stored.file_instructions)


def _fingerprint(
  builder: tfds.core.DatasetBuilder, split: str, class_names: tuple[str, ...]
) -> dict[str, Any]:
  """Returns the values that identify a split. Runs store and compare them: they must not change."""
  variant = f"/{builder.builder_config.name}" if builder.builder_config else ""
  info = builder.info.splits[split]
  values = {
    "name": builder.name + variant,
    "version": str(builder.version),
    "split": split,
    "images": int(info.num_examples),
    "bytes": int(info.num_bytes),
    "classes": _hash(class_names),
  }
  metadata = metadata_of(builder)
  if "checksum" in metadata:
    values["checksum"] = metadata["checksum"].get(split)
  return values


def _hash(names: Sequence[str]) -> str:
  """Returns 16 hexadecimal digits that identify the names and their order."""
  return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _synthetic(split: str, num_classes: int, image_size: int, task: str) -> Source:
  """Returns a split of the synthetic set; the split's name seeds its noise."""
  length = {"train": 1024, "sample": 16}.get(split, 128)
  class_names = tuple(str(label) for label in range(num_classes))
  fingerprint = {
    "name": "synthetic",
    "version": "1.0.0",
    "split": split,
    "images": length,
    "bytes": length * image_size * image_size * 3,
    "classes": _hash(class_names),
  }
  seed = zlib.crc32(split.encode())
  if task == "classification":
    examples = SyntheticExamples(length, num_classes, image_size, seed)
    return Source(examples, class_names, fingerprint)
  if num_classes > masks.MOST_CLASSES:
    raise InputError(
      f"masks name at most {masks.MOST_CLASSES} classes, and config.num_classes is {num_classes}"
    )
  examples = SyntheticPairs(length, num_classes, image_size, seed)
  colors = masks.palette(num_classes)
  return Source(examples, class_names, fingerprint | {"task": task}, task, colors)
