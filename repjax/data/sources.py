"""Where examples come from: any TFDS classification set stored as array_record, or noise."""

import hashlib
import operator
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from tensorflow_datasets.proto import tf_example_pb2

from repjax.data.builders import digits_builder, find_builder
from repjax.errors import InputError, unknown

_EXAMPLE = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]
FILE_NAMES = ("file_name", "image/filename", "filename")  # TFDS sets differ


class Examples(Protocol):
  """Random access to {"image": encoded bytes or uint8 (H, W, 3), "label": int, "index": int}.

  Where the set holds the names of its files, an example has its "file_name" too, and where the
  image is encoded a "name", by which errors call it.
  """

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Source(NamedTuple):
  """A split.

  Attributes:
    examples: random access to the images as they are stored.
    class_names: in the order of the labels.
    fingerprint: a few values, fit for JSON, that are equal exactly if the split is the same one. A
      set made from a folder has a checksum over all its images, others only their number and size.
  """

  examples: Examples
  class_names: tuple[str, ...]
  fingerprint: dict[str, Any]


class Synthetic:
  """Noise images with labels: a source without files, for smoke runs and benchmarks."""

  def __init__(self, length: int, num_classes: int, image_size: int, seed: int):
    self._length, self._num_classes = length, num_classes
    self._image_size, self._seed = image_size, seed

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> dict[str, Any]:
    rng = np.random.default_rng([self._seed, index])
    size = self._image_size
    image = rng.integers(0, 256, (size, size, 3), np.uint8)
    return {"image": image, "label": int(rng.integers(self._num_classes)), "index": int(index)}


class Records:
  """The examples of a TFDS split; an error says which of them cannot be read."""

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
      # TFDS's own way takes five times as long, and would read the features that nobody asks for.
      found = _EXAMPLE.FromString(self._stored[index]).features.feature
      example = {
        "image": found["image"].bytes_list.value[0],
        "label": int(found["label"].int64_list.value[0]),
        "index": index,
        "name": whole_name,
      }
    except Exception as error:  # array_record, protobuf and missing files have a kind each
      raise InputError(
        f"{whole_name} cannot be read: the set's files are damaged or incomplete "
        f"({' '.join(str(error).split())}); prepare the set once more"
      ) from error
    if not 0 <= example["label"] < self._num_classes:
      raise InputError(
        f"{whole_name} has the label {example['label']}, where 0 to {self._num_classes - 1} are "
        "wanted: this split is for submissions and says no classes; take another"
      )
    if self._file_name:
      file_name = found[self._file_name].bytes_list.value[0].decode("utf-8", "replace")
      example |= {"file_name": file_name, "name": f"{whole_name} ({file_name})"}
    return example


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
    split: "train", "validation", "test", or whatever the set has; "sample" of the synthetic set
      has 16 images.
    data_dir: where TFDS keeps its sets; None is TFDS's own default.
    num_classes: of the synthetic set.
    image_size: pixels of the synthetic set's images.

  Raises:
    InputError: nobody knows the set, it is not on disk or not complete, it is stored in a format
      that needs TensorFlow, it has no such split, or it is not for classification.
  """
  if name == "synthetic":
    return _synthetic(split, num_classes, image_size)
  builder = digits_builder(data_dir) if name == "digits" else find_builder(name, data_dir)
  if split not in builder.info.splits:
    raise InputError(
      f"{unknown(f'split of {name}', split, builder.info.splits)}; config.train_split and "
      "config.eval_split name them, or a script's --split"
    )
  features: Any = builder.info.features
  if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
    raise InputError(f"{name} is not an image classification set: it has {sorted(features)}")
  class_names = tuple(features["label"].names)
  file_name = next((key for key in FILE_NAMES if key in features), None)
  examples = Records(
    _stored_records(name, builder, split), name, split, file_name, len(class_names)
  )
  return Source(examples, class_names, _fingerprint(builder, split, class_names))


def _stored_records(name: str, builder: tfds.core.DatasetBuilder, split: str) -> Any:
  info: Any = builder.info.splits[split]
  template = info.filename_template.replace(filetype_suffix="array_record")
  files = info.replace(filename_template=template)
  missing = [path.name for path in files.filepaths if not path.exists()]
  if missing:
    raise InputError(
      f"{name} in {builder.data_path} is incomplete: {len(missing)} of its "
      f"{len(files.filepaths)} {split} files are missing, {missing[0]} for one; copy the set once "
      "more, or remove it and prepare it again"
    )
  return ArrayRecordDataSource(files.file_instructions)


def _fingerprint(
  builder: tfds.core.DatasetBuilder, split: str, class_names: tuple[str, ...]
) -> dict[str, Any]:
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
    values["checksum"] = metadata["checksum"][split]
  return values


def _hash(names: Sequence[str]) -> str:
  return hashlib.sha256("\n".join(names).encode()).hexdigest()[:16]


def _synthetic(split: str, num_classes: int, image_size: int) -> Source:
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
  examples = Synthetic(length, num_classes, image_size, seed=zlib.crc32(split.encode()))
  return Source(examples, class_names, fingerprint)
