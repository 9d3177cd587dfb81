"""Where examples come from: any TFDS classification set stored as array_record, or noise."""

import contextlib
import io
import zlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import tensorflow_datasets as tfds

from repjax.data.digits import Digits
from repjax.errors import InputError, unknown


class Examples(Protocol):
  """Random access to {"image": encoded bytes or uint8 (H, W, 3), "label": int}."""

  def __len__(self) -> int: ...
  def __getitem__(self, index: int) -> dict[str, Any]: ...


class Source(NamedTuple):
  """A split: its examples, the names of the classes in the order of the labels, and what tells this
  set from another of the same name."""

  examples: Examples
  class_names: tuple[str, ...]
  fingerprint: Mapping[str, Any] = MappingProxyType({})


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
    return {"image": image, "label": int(rng.integers(self._num_classes))}


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
    name: a TFDS name ("imagenet2012", "cifar10", ...), "digits", which is prepared on first use, or
      "synthetic".
    split: "train", "validation", "test", or whatever the set has; "sample" of the synthetic set
      has 16 images.
    data_dir: where TFDS keeps its sets; None is TFDS's own default.
    num_classes: of the synthetic set.
    image_size: pixels of the synthetic set's images.

  Raises:
    InputError: TFDS does not know the set, it is not on disk, it is stored in a format that needs
      TensorFlow, it has no such split, or it is not for classification.
  """
  if name == "synthetic":
    length = {"train": 1024, "sample": 16}.get(split, 128)
    examples = Synthetic(length, num_classes, image_size, seed=zlib.crc32(split.encode()))
    return Source(examples, tuple(str(label) for label in range(num_classes)))
  if name == "digits":
    builder = Digits(data_dir=data_dir, file_format="array_record")
    if not builder.data_path.exists():
      _prepare_digits(builder)
  else:
    builder = _find_builder(name, data_dir)
  if split not in builder.info.splits:
    raise unknown(f"split of {name}", split, builder.info.splits)
  features: Any = builder.info.features
  if not {"image", "label"} <= set(features) or not hasattr(features["label"], "names"):
    raise InputError(f"{name} is not an image classification set: it has {sorted(features)}")
  untyped = cast(Any, builder)  # TFDS's decorators hide the signature
  examples = untyped.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
  return Source(examples, tuple(features["label"].names))


def _find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  known = tfds.list_builders(with_community_datasets=False)
  if name.split("/")[0].split(":")[0] not in known:
    raise unknown("data set", name, [*known, "digits", "synthetic"])
  try:
    builder = tfds.builder(name, data_dir=data_dir)
  except (AssertionError, ValueError) as error:  # a version or variant that the set does not have
    raise InputError(f"TFDS cannot open {name!r}: {str(error).partition(chr(10))[0]}") from error
  where = f"data_dir={data_dir!r}, " if data_dir else ""
  prepare = (
    'python -c "import tensorflow_datasets as tfds; '
    f"tfds.builder('{name}', {where}file_format='array_record').download_and_prepare()\""
  )
  if not builder.data_path.exists():
    raise InputError(f"{name} is not in {builder.data_path}; prepare it once with: {prepare}")
  stored = builder.info.file_format
  if stored is None or stored.value != "array_record":
    raise InputError(
      f"{name} in {builder.data_path} is stored as {stored.value if stored else 'unknown'}, which "
      "allows no random access without TensorFlow; prepare it once more, in another data_dir, as "
      f"array_record: {prepare}"
    )
  return builder


def _prepare_digits(builder: tfds.core.DatasetBuilder) -> None:
  """Writes the digits set, with one line in place of TFDS's bars about downloads."""
  print(f"preparing the digits data set in {builder.data_path}", flush=True)
  try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      builder.download_and_prepare()
  except FileExistsError:
    if not builder.data_path.exists():  # otherwise another process was faster
      raise
