"""Opens data sets: any TFDS classification set that is stored as array_record, or noise."""

import hashlib
import operator
import os
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from repjax import regular_files
from repjax.data.builders import digits_builder, find_builder, tfds_errors
from repjax.errors import InputError, printable, unknown

_EXAMPLE = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
# The feature that holds the names of the original files; its name differs between TFDS sets.
FILE_NAMES = ("file_name", "image/filename", "filename")


class Examples(Protocol):
  """Random access to {"image": encoded bytes or uint8 (H, W, 3), "label": int, "index": int}.

  An example whose image is encoded also has a "name", which errors use. Where the set holds the
  names of its files, an example has a "file_name".
  """

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Source(NamedTuple):
  """A split of a data set.

  Attributes:
    examples: random access to the images as they are stored.
    class_names: the names of the classes, in the order of the labels.
    fingerprint: a few values, fit for JSON, that identify the split. The fingerprint of a set made
      from a folder holds a checksum over all its images. For all other sets, the number of images
      and their total size stand for the content.
  """

  examples: Examples
  class_names: tuple[str, ...]
  fingerprint: dict[str, Any]


class SyntheticExamples:
  """Noise images with random labels: examples without files, for smoke runs and benchmarks."""

  def __init__(self, length: int, num_classes: int, image_size: int, seed: int):
    self._length, self._num_classes = length, num_classes
    self._image_size, self._seed = image_size, seed

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    rng = np.random.default_rng([self._seed, index])  # an example depends on its index alone
    size = self._image_size
    image = rng.integers(0, 256, (size, size, 3), np.uint8)
    return {"image": image, "label": int(rng.integers(self._num_classes)), "index": int(index)}


class StoredExamples:
  """The examples of a TFDS split on disk; an error names the example that cannot be read."""

  def __init__(self, stored: Any, name: str, split: str, file_name: str | None, num_classes: int):
    self._stored, self._name, self._split, self._file_name = stored, name, split, file_name
    self._num_classes = num_classes

  def __len__(self) -> int:
    return len(self._stored)

  def __getitem__(self, index: int) -> dict[str, Any]:
    index = operator.index(index)
    if not 0 <= index < len(self):
      raise IndexError(f"index {index} of {len(self)} images")
    whole_name = f"image {index} of the {self._split} split of {self._name}"
    try:
      # TFDS's own decoding takes five times as long, and reads features that are not needed here.
      found = _EXAMPLE.FromString(self._stored[index]).features.feature
      example = {
        "image": _only(found, "image", "bytes_list"),
        "label": int(_only(found, "label", "int64_list")),
        "index": index,
        "name": whole_name,
      }
    except Exception as error:  # array_record and protobuf raise classes of their own
      reason = printable(" ".join(str(error).split()))
      raise InputError(
        f"{whole_name} cannot be read ({reason}). The files of the set are damaged or incomplete. "
        "Prepare the set again"
      ) from error
    if not 0 <= example["label"] < self._num_classes:
      raise InputError(
        f"{whole_name} has the label {example['label']}; labels must be 0 to "
        f"{self._num_classes - 1}. Such a split is for submissions to a contest and names no "
        "classes. Choose a different split"
      )
    if self._file_name:
      file_name = found[self._file_name].bytes_list.value[0].decode("utf-8", "replace")
      example |= {"file_name": file_name, "name": f"{whole_name} ({printable(file_name)})"}
    return example


def _only(features: Any, name: str, kind: str) -> Any:
  """Returns the value of a feature of an example.

  Raises:
    ValueError: the example does not have the feature, as an empty record has none.
  """
  values = getattr(features[name], kind).value if name in features else ()
  if not values:
    raise ValueError(f"its record has no {name}")
  return values[0]


def open_source(
  name: str,
  split: str,
  *,
  data_dir: str | None = None,
  num_classes: int = 1000,
  image_size: int = 224,
) -> Source:
  """Opens one split of a data set for random access, without TensorFlow.

  Args:
    name: a set made with repjax prepare-dataset, a TFDS name ("imagenet2012", "cifar10",
      "imagenette/320px", ...), "digits", which is prepared on first use, or "synthetic".
    split: "train", "validation", "test", or a different split that the set has. The split "sample"
      of the synthetic set has 16 images.
    data_dir: the folder in which TFDS keeps its sets; None is TFDS's default.
    num_classes: the number of classes of the synthetic set.
    image_size: side of the synthetic set's images in pixels.

  Raises:
    InputError: the set is unknown, not on disk, not complete, not for classification, or stored in
      a format that needs TensorFlow; or it has no such split.
  """
  if name == "synthetic":
    return _synthetic(split, num_classes, image_size)
  builder = digits_builder(data_dir) if name == "digits" else find_builder(name, data_dir)
  with tfds_errors(name):
    return _opened(name, split, builder)


def _opened(name: str, split: str, builder: tfds.core.DatasetBuilder) -> Source:
  """Returns a split of a set whose builder has been found.

  Raises: as in `open_source`.
  """
  if split not in builder.info.splits:
    raise InputError(
      f"{unknown(f'split of {name}', split, builder.info.splits)} "
      "(config.train_split and config.eval_split choose the splits, or --split of a command)"
    )
  features: Any = builder.info.features
  class_names = _class_names(name, features)
  if not class_names:
    known = sorted(features) if hasattr(features, "keys") else type(features).__name__
    raise InputError(
      f"{name} is not an image classification set: its features are {known}. An image and a label "
      "with class names are needed"
    )
  file_name = next((key for key in FILE_NAMES if key in features), None)
  examples = StoredExamples(
    _stored_records(name, builder, split), name, split, file_name, len(class_names)
  )
  return Source(examples, class_names, _fingerprint(builder, split, class_names))


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
  metadata: Any = builder.info.metadata or {}
  if "checksum" in metadata.keys():  # noqa: SIM118 - TFDS reads its file in keys(), not before
    values["checksum"] = metadata["checksum"].get(split)
  return values


def _hash(names: Sequence[str]) -> str:
  """Returns 16 hexadecimal digits that identify the names and their order."""
  return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _synthetic(split: str, num_classes: int, image_size: int) -> Source:
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
  examples = SyntheticExamples(length, num_classes, image_size, seed=zlib.crc32(split.encode()))
  return Source(examples, class_names, fingerprint)
