"""Sets as files: array_record shards beside TFDS's metadata, in place whole or not at all."""

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow_datasets as tfds
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]
from tensorflow_datasets.core import constants, dataset_info, file_adapters, naming

from repjax.errors import InputError

SHARD_BYTES = 256 * 2**20  # a new shard begins once this much is in one
# TFDS and Grain want every record by itself; images are compressed already.
WRITER_OPTIONS = "group_size:1,uncompressed"


class SplitFiles(NamedTuple):
  """What TFDS notes down of a split: images in each shard, and bytes over all of them."""

  shard_lengths: list[int]
  num_bytes: int


def sets_folder(data_dir: str | os.PathLike[str] | None) -> Path:
  """The folder that holds the sets; None is TFDS's own default."""
  return Path(data_dir or constants.DATA_DIR).expanduser()


@contextlib.contextmanager
def disk_errors(path: Path) -> Iterator[None]:
  """Makes an `InputError` of a disk that is full, a folder that may not be written, and so on."""
  try:
    yield
  except OSError as error:
    where = error.filename or path
    raise InputError(
      f"{where} cannot be written ({error.strerror or error}); nothing was changed: make room or "
      "get the permission, or choose another folder"
    ) from error


@contextlib.contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
  """An empty folder that is gone at the end, unless it was moved. One process at a time has it.

  What a killed process left in it is cleared by the next one.
  """
  path.mkdir(parents=True, exist_ok=True)
  handle = os.open(path, os.O_RDONLY)
  try:
    _lock(handle, path)
    try:
      for left_over in path.iterdir():
        shutil.rmtree(left_over) if left_over.is_dir() else left_over.unlink()
      yield path
    finally:
      if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
        shutil.rmtree(path, ignore_errors=True)
  finally:
    os.close(handle)


def _lock(handle: int, path: Path) -> None:
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    if os.path.samestat(os.fstat(handle), path.stat()):  # not moved away in between
      return
  except (BlockingIOError, FileNotFoundError):
    pass
  raise InputError(f"another process is writing {path} right now; let it finish or stop it first")


@contextlib.contextmanager
def whole_set(target: Path, *, replace: bool) -> Iterator[Path]:
  """A folder to write a set into, which takes the place of `target` when the block ends well.

  Args:
    target: data_dir / name / version.
    replace: whether a set that is there already gives way; it does so in the last moment.
  """
  name, data_dir = target.parent.name, target.parent.parent
  replaced = data_dir / f".{name}.replaced"
  with draft_folder(data_dir / f".{name}.incomplete") as draft:
    if replaced.exists() and not target.exists():  # killed between the two renames below
      target.parent.mkdir(exist_ok=True)
      replaced.rename(target)
    shutil.rmtree(replaced, ignore_errors=True)
    if problems := existing_problems(target, replace=replace):
      raise InputError(problems[0])
    yield draft
    target.parent.mkdir(exist_ok=True)
    if target.exists():
      target.rename(replaced)
    try:
      draft.rename(target)
    except OSError:
      if replaced.exists():
        replaced.rename(target)
      raise
    shutil.rmtree(replaced, ignore_errors=True)


def existing_problems(target: Path, *, replace: bool) -> list[str]:
  """Why `target` cannot be written, if it is taken."""
  if replace or not target.exists():
    return []
  return [
    f"a set called {target.parent.name} exists already, in {target}; choose another name, or add "
    "--replace, which keeps the old set until the new one is complete"
  ]


class ShardWriter:
  """Writes the records of one split, in order, into as many shards as they need."""

  def __init__(self, folder: Path, name: str, split: str):
    self._template = file_template(folder, name, split)
    self._folder, self._lengths, self._bytes = folder, [], 0
    self._writer: Any = None

  def write(self, record: bytes) -> None:
    """Appends a record."""
    if self._writer is None:
      path = self._unnamed(len(self._lengths))
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
    """Closes the last shard, and names all of them now that their number is known."""
    self._end_shard()
    count = len(self._lengths)
    for index in range(count):
      target = self._template.sharded_filepath(shard_index=index, num_shards=count)
      self._unnamed(index).rename(target)
    return SplitFiles(self._lengths, self._bytes)

  def _unnamed(self, index: int) -> Path:
    return self._folder / f"{self._template.split}.{index}"

  def _end_shard(self) -> None:
    if self._writer is not None:
      with writer_errors(self._folder):
        self._writer.close()
      self._writer = None


def open_writer(path: Path) -> Any:
  """A writer of one array_record file."""
  with writer_errors(path):
    return array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)


@contextlib.contextmanager
def writer_errors(path: Path) -> Iterator[None]:
  """array_record raises RuntimeErrors, a full disk in the middle of the text."""
  try:
    yield
  except RuntimeError as error:
    reason = re.search(r"failed: ([^;]*)", str(error))
    raise OSError(None, reason[1] if reason else str(error), str(path)) from error


def file_template(folder: Path, name: str, split: str) -> naming.ShardedFileTemplate:
  """How the files of a split are called."""
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
  """Writes what TFDS needs to open the shards in `folder` as the set `name`."""
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
    supervised_keys=("image", "label"),
    disable_shuffling=True,
    metadata=tfds.core.MetadataDict(metadata),
  )
  info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
  info.set_splits(tfds.core.SplitDict(infos))
  info.write_to_directory(folder)
