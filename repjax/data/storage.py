"""Stores data sets as files: array_record shards beside TFDS's metadata.

A set appears in its place whole or not at all, as `repjax.disk.replacing` promises.
"""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from tensorflow_datasets.core import constants, dataset_info, file_adapters, naming

from repjax import disk, names
from repjax.errors import InputError

INFO = "dataset_info.json"
SKIPPED = "skipped.txt"  # the list of files that were left out
SHARD_BYTES = 256 * 2**20  # a shard that holds this much is full
# TFDS and Grain read single records, so every record is a group of its own. Images are compressed
# already.
WRITER_OPTIONS = "group_size:1,uncompressed"


class SplitFiles(NamedTuple):
  """The facts about a split's files that TFDS keeps in its metadata.

  Attributes:
    shard_lengths: the number of images in each shard.
    num_bytes: the size of all records together.
  """

  shard_lengths: list[int]
  num_bytes: int


def sets_folder(data_dir: str | os.PathLike[str] | None) -> Path:
  """Returns the folder that holds the sets; None is TFDS's default."""
  return names.folder(data_dir or constants.DATA_DIR)


@contextlib.contextmanager
def whole_set(target: Path, *, replace: bool) -> Iterator[Path]:
  """Makes an empty folder to write a set into, and moves it to `target` when the block ends well.

  With `replace`, the old set stays in its place until the new one is complete.

  Args:
    target: data_dir / name / version.
    replace: allows a set that is there already to be replaced.

  Raises:
    InputError: a set is there and must not be replaced, or a different process is writing the set.
  """
  with disk.writing(target, OSError):
    problems = existing_problems(target, replace=replace)
  if problems:
    raise InputError(problems[0])
  own = [f"{target.parent.name}-*-of-*", SKIPPED]  # an old set may have more splits and shards
  with disk.replacing(target, known=[INFO], exists=replace, own=own) as draft:
    yield draft


def existing_problems(target: Path, *, replace: bool) -> list[str]:
  """Returns the reason why `target` must not be written, or an empty list."""
  if replace or not target.exists():
    return []
  return [
    f"a set called {target.parent.name} exists already, in {target}. Choose a different name, or "
    "add --replace, which keeps the old set until the new one is complete"
  ]


class ShardWriter:
  """Writes the records of one split, in order, into as many shards as they need.

  The name of a shard holds the number of all shards, which is known only at the end. Until then
  shards have temporary names.
  """

  def __init__(self, folder: Path, name: str, split: str):
    self._template = file_template(folder, name, split)
    self._folder, self._lengths, self._bytes = folder, [], 0
    self._writer: Any = None

  def write(self, record: bytes) -> None:
    """Appends a record."""
    if self._writer is None:
      path = self._temporary_path(len(self._lengths))
      self._writer, self._left = open_writer(path), SHARD_BYTES
      self._lengths.append(0)
    with writer_errors(self._folder):
      self._writer.write(record)
    self._lengths[-1] += 1
    self._bytes += len(record)
    self._left -= len(record)
    if self._left <= 0:
      self._end_shard()

  def finish(self) -> SplitFiles:
    """Closes the last shard, gives all shards their names, and returns the facts about them."""
    self._end_shard()
    count = len(self._lengths)
    for index in range(count):
      target = self._template.sharded_filepath(shard_index=index, num_shards=count)
      self._temporary_path(index).rename(target)
    return SplitFiles(self._lengths, self._bytes)

  def _temporary_path(self, index: int) -> Path:
    return self._folder / f"{self._template.split}.{index}"

  def _end_shard(self) -> None:
    if self._writer is not None:
      with writer_errors(self._folder):
        self._writer.close()
      self._writer = None


def open_writer(path: Path) -> Any:
  """Opens an array_record file for writing."""
  with writer_errors(path):
    return array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)


@contextlib.contextmanager
def writer_errors(path: Path) -> Iterator[None]:
  """Turns a RuntimeError of array_record into an `OSError` with the reason from its text."""
  try:
    yield
  except RuntimeError as error:
    reason = re.search(r"failed: ([^;]*)", str(error))
    raise OSError(None, reason[1] if reason else str(error), str(path)) from error


def file_template(folder: Path, name: str, split: str) -> naming.ShardedFileTemplate:
  """Returns the template of the file names of a split."""
  return naming.ShardedFileTemplate(
    data_dir=tfds.core.Path(folder), dataset_name=name, split=split, filetype_suffix="array_record"
  )


def write_info(
  folder: Path,
  name: str,
  version: str,
  *,
  features: tfds.features.FeaturesDict,
  splits: dict[str, SplitFiles],
  description: str,
  metadata: dict[str, Any],
) -> None:
  """Writes the metadata with which TFDS opens the shards in `folder` as the set `name`."""
  identity = dataset_info.DatasetIdentity(
    name=name,
    version=tfds.core.Version(version),
    data_dir=str(folder),
    module_name="",
  )
  infos = [
    tfds.core.SplitInfo(
      name=split,
      shard_lengths=files.shard_lengths,
      num_bytes=files.num_bytes,
      filename_template=file_template(folder, name, split),
    )
    for split, files in splits.items()
  ]
  info = tfds.core.DatasetInfo(
    builder=identity,
    description=description,
    features=features,
    supervised_keys=("image", "label" if "label" in features else "mask"),
    disable_shuffling=True,  # the order of the records is meant
    metadata=tfds.core.MetadataDict(metadata),
  )
  info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
  info.set_splits(tfds.core.SplitDict(infos))
  info.write_to_directory(folder)
