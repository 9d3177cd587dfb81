"""Random access to the examples of a split: images with a label, or images with a mask."""

import functools
import operator
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

import numpy as np
from tensorflow_datasets.proto import tf_example_pb2

from repjax.data.pairs import picture_of
from repjax.errors import InputError, printable

_EXAMPLE = tf_example_pb2.Example  # pyright: ignore[reportAttributeAccessIssue]


class Examples(Protocol):
  """Random access to {"image": encoded bytes or uint8 (H, W, 3), "label": int, "index": int}.

  An example whose image is encoded also has a "name", which errors use. Where the set holds the
  names of its files, an example has a "file_name". An example for segmentation has a "mask" in
  place of the "label": uint8 (H, W), or encoded bytes and the "table" that translates its values,
  from `masks.lookup`.
  """

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict[str, Any]: ...


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


class SyntheticPairs(SyntheticExamples):
  """Noise images with a random class for each pixel.

  Attributes:
    largest: height and width of every image.
  """

  @property
  def largest(self) -> tuple[int, int]:
    return self._image_size, self._image_size

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = super().__getitem__(index)
    rng = np.random.default_rng([self._seed, index, example.pop("label")])
    return example | {"mask": rng.integers(self._num_classes, size=self.largest).astype(np.uint8)}


class Records(NamedTuple):
  """The records of a split on disk, and how errors name them.

  Attributes:
    stored: random access to the serialized examples.
    name: name of the set.
    split: name of the split.
    file_name: the feature that holds the name of the original file; None where there is none.
  """

  stored: Any
  name: str
  split: str
  file_name: str | None

  def read(self, index: int, take: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Reads an example.

    Args:
      index: number of the example.
      take: function of the features that returns what the example consists of.

    Returns:
      What `take` returns, with "index", "name" and, where the set has it, "file_name".

    Raises:
      InputError: the example cannot be read; the text names it.
    """
    index = operator.index(index)
    if not 0 <= index < len(self.stored):
      raise IndexError(f"index {index} of {len(self.stored)} images")
    whole_name = f"image {index} of the {self.split} split of {self.name}"
    try:
      # TFDS's own decoding takes five times as long, and reads features that are not needed here.
      found = _EXAMPLE.FromString(self.stored[index]).features.feature
      example = take(found) | {"index": index, "name": whole_name}
    except Exception as error:  # array_record and protobuf raise classes of their own
      reason = printable(" ".join(str(error).split()))
      raise InputError(
        f"{whole_name} cannot be read ({reason}). The files of the set are damaged or incomplete. "
        "Prepare the set again"
      ) from error
    if self.file_name:
      file_name = found[self.file_name].bytes_list.value[0].decode("utf-8", "replace")
      example |= {"file_name": file_name, "name": f"{whole_name} ({printable(file_name)})"}
    return example


class StoredExamples:
  """The examples of a TFDS split on disk; an error names the example that cannot be read."""

  def __init__(self, records: Records, num_classes: int):
    self._records, self._num_classes = records, num_classes

  def __len__(self) -> int:
    return len(self._records.stored)

  def __getitem__(self, index: int) -> dict[str, Any]:
    example = self._records.read(index, _labelled)
    if not 0 <= example["label"] < self._num_classes:
      raise InputError(
        f"{example['name']} has the label {example['label']}; labels must be 0 to "
        f"{self._num_classes - 1}. Such a split is for submissions to a contest and names no "
        "classes. Choose a different split"
      )
    return example


def _labelled(features: Any) -> dict[str, Any]:
  """Returns the image and the label of an example."""
  return {
    "image": _only(features, "image", "bytes_list"),
    "label": int(_only(features, "label", "int64_list")),
  }


class StoredPairs:
  """The images and masks of a TFDS split on disk."""

  def __init__(
    self,
    records: Records,
    keys: tuple[str, str],
    table: np.ndarray,
    largest: Sequence[int] | None,
  ):
    """Keeps what is needed to read; nothing is read yet.

    Args:
      records: the records of the split.
      keys: the features that are image and mask.
      table: from `masks.lookup`.
      largest: the largest height and width of the split, where they are known.
    """
    self._records, self._keys, self._table, self._largest = records, keys, table, largest

  def __len__(self) -> int:
    return len(self._records.stored)

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._records.read(index, self._pair) | {"table": self._table}

  def _pair(self, features: Any) -> dict[str, Any]:
    image, mask = (_only(features, key, "bytes_list") for key in self._keys)
    return {"image": image, "mask": mask}

  @functools.cached_property
  def largest(self) -> tuple[int, int]:
    """The largest height and the largest width; reads all headers where nothing tells them."""
    if self._largest is None:
      return largest_size(self)
    height, width = self._largest
    return height, width


def largest_size(examples: Examples) -> tuple[int, int]:
  """Returns the largest height and the largest width of some images, from their headers."""
  with ThreadPoolExecutor() as pool:
    pictures = pool.map(lambda index: picture_of(examples[index]), range(len(examples)))
    sizes = [(picture.height, picture.width) for picture in pictures]
  return max(height for height, _ in sizes), max(width for _, width in sizes)


def _only(features: Any, name: str, kind: str) -> Any:
  """Returns the value of a feature of an example.

  Raises:
    ValueError: the example does not have the feature, as an empty record has none.
  """
  values = getattr(features[name], kind).value if name in features else ()
  if not values:
    raise ValueError(f"its record has no {name}")
  return values[0]
