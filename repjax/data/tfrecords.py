"""Copies TFDS sets from TFRecord files into array_record files, without TensorFlow.

A TFRecord file can only be read from beginning to end. An array_record file has an index, so that
training can read its records in any order.
"""

import os
import shutil
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
from tqdm import tqdm

from repjax import disk, json_files, regular_files
from repjax.data import storage
from repjax.data.builders import builder_of, file_formats
from repjax.errors import InputError
from repjax.schema import anything, items, record, text

_INFO = record({"alternativeFileFormats": items(text())}, others=anything)


class _Shard(NamedTuple):
  """A TFRecord file, the name of its array_record copy, and the number of its records."""

  source: Path
  copy: str
  images: int


def prepare_tfrecord(
  name: str,
  *,
  data_dir: str | None = None,
  to: str | os.PathLike[str] | None = None,
  num_workers: int = 4,
) -> Path:
  """Copies a set's records into array_record files; its TFRecord files stay as they are.

  Records are the same bytes in both formats. Every checksum and the number of records in every file
  are compared on the way.

  Args:
    name: the set's name, with a variant or version where the set has several.
    data_dir: the folder in which TFDS keeps its sets; None is TFDS's default.
    to: a different folder of sets, for a copy that is array_record only. None writes the new files
      beside the TFRecord files, and adds array_record to the formats in the set's metadata.
    num_workers: the number of files that are copied at a time.

  Returns:
    The folder of the new files.

  Raises:
    InputError: the set is unknown, not stored as TFRecord, or has an array_record copy already; a
      file is missing, cut off or damaged; or the disk cannot be written.
  """
  builder = builder_of(name, data_dir)
  folder = Path(builder.data_path)
  formats = file_formats(builder) if folder.exists() else []
  if "array_record" in formats and to is None:
    raise InputError(f"{name} in {folder} is stored as array_record already. Use it as it is")
  if "tfrecord" not in formats:
    found = f"is stored as {formats[0]}" if formats else "does not exist"
    raise InputError(f"there is no TFRecord set to copy: {folder} {found}")
  shards = _shards(builder)
  if missing := [
    shard.source.name for shard in shards if not regular_files.is_regular(shard.source)
  ]:
    raise InputError(
      f"{name} in {folder} is incomplete: {len(missing)} of its {len(shards)} files are missing, "
      f"such as {missing[0]}. Copy the set to this place again"
    )
  variant = builder.builder_config.name if builder.builder_config else ""
  target = storage.sets_folder(to) / builder.name / variant / str(builder.version) if to else folder
  with disk.writing(target, OSError):
    if to is None:
      _copy_beside(shards, folder, name, num_workers)
    else:
      _copy_to(target, shards, folder, name, num_workers)
  return target


def _copy_beside(shards: list[_Shard], folder: Path, name: str, num_workers: int) -> None:
  """Adds array_record files to a set's folder, and then to its metadata.

  The metadata is replaced last, in one rename. Until then the set is a TFRecord set as before.
  """
  with disk.private_folder(folder / "array_record", alone=True) as private:
    draft = private / disk.NEW
    draft.mkdir()
    _copy_all(shards, draft, name, num_workers)
    disk.sync(draft)
    for shard in shards:
      (draft / shard.copy).rename(folder / shard.copy)
    disk.sync_entries(folder)
  info = _read_info(folder)
  info["alternativeFileFormats"] = [*info.get("alternativeFileFormats", ()), "array_record"]
  disk.write_json(folder / storage.INFO, info)


def _copy_to(target: Path, shards: list[_Shard], folder: Path, name: str, num_workers: int) -> None:
  """Makes a set at `target` that is stored as array_record only."""
  with storage.whole_set(target, replace=False) as draft:
    _copy_all(shards, draft, name, num_workers)
    for path in folder.iterdir():  # metadata besides dataset_info.json: features, names of classes
      if path.suffix in (".json", ".txt") and path.name != storage.INFO:
        shutil.copyfile(path, draft / path.name)
    info = _read_info(folder) | {"fileFormat": "array_record"}
    info.pop("alternativeFileFormats", None)
    disk.write_json(draft / storage.INFO, info)


def _read_info(folder: Path) -> dict[str, Any]:
  return json_files.read(folder / storage.INFO, _INFO)


def read_tfrecord(path: Path) -> Iterator[bytes]:
  """Yields the records of a TFRecord file, and compares all checksums.

  A record in the file is, with all numbers little-endian:

    length       8 bytes
    checksum     4 bytes, of the length
    content      `length` bytes
    checksum     4 bytes, of the content

  Raises:
    InputError: the file is cut off or damaged.
  """
  with regular_files.opened(path) as file:
    index, size = 0, os.fstat(file.fileno()).st_size
    while header := file.read(12):
      whole = len(header) == 12
      # The length is checked before anything of that length is read, since a wrong length could ask
      # for any amount of memory.
      if whole and masked_crc32c(header[:8]) != struct.unpack("<I", header[8:])[0]:
        raise InputError(f"{path} is damaged at record {index}. Copy this file again")
      length = struct.unpack("<Q", header[:8])[0] if whole else 0
      # A length with the right checksum may still be more than the file holds.
      if not whole or length + 4 > size - file.tell():
        raise InputError(f"{path} is cut off in record {index}. Copy this file again")
      data, end = file.read(length), file.read(4)
      if len(end) < 4:  # a different process has cut the file off meanwhile
        raise InputError(f"{path} is cut off in record {index}. Copy this file again")
      if masked_crc32c(data) != struct.unpack("<I", end)[0]:
        raise InputError(f"{path} is damaged in record {index}. Copy this file again")
      yield data
      index += 1


def masked_crc32c(data: bytes) -> int:
  """Returns the CRC-32C of some bytes in the form that TFRecord files store.

  The checksum is rotated right by 15 bits and a constant is added, modulo 2^32.

  References:
    The TFRecord format. https://www.tensorflow.org/tutorials/load_data/tfrecord
  """
  crc = google_crc32c.value(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def _shards(builder: Any) -> list[_Shard]:
  """Returns all files of a set, over all its splits."""
  shards = []
  for split in builder.info.splits.values():
    names = [
      split.replace(filename_template=split.filename_template.replace(filetype_suffix=suffix))
      for suffix in ("tfrecord", "array_record")
    ]
    paths, copies = ([Path(path) for path in info.filepaths] for info in names)
    shards += [
      _Shard(path, copy.name, images)
      for path, copy, images in zip(paths, copies, split.shard_lengths)
    ]
  return shards


def _check_room(folder: Path, wanted: int) -> None:
  """Raises unless the disk has room for `wanted` bytes."""
  free = shutil.disk_usage(folder).free
  if free < wanted:
    raise InputError(
      f"an array_record copy needs {wanted / 1e9:.1f} GB, and the disk of {folder.parents[1]} has "
      f"{free / 1e9:.1f} GB free. Make room, or write to a different disk with --to"
    )


def _copy_all(shards: list[_Shard], draft: Path, name: str, num_workers: int) -> None:
  """Copies all files into the draft folder, several at a time, and shows a progress bar."""
  _check_room(draft, sum(shard.source.stat().st_size for shard in shards))
  total = sum(shard.images for shard in shards)
  with (
    tqdm(total=total, desc=name, unit=" images", disable=None) as bar,
    ThreadPoolExecutor(num_workers) as pool,
  ):
    try:
      for _ in pool.map(lambda shard: _copy(shard, draft, bar), shards):
        pass  # raises the first error
    finally:
      pool.shutdown(cancel_futures=True)  # after an error, files that wait are not begun


def _copy(shard: _Shard, draft: Path, bar: tqdm) -> None:
  """Copies the records of one file, and compares their number with the metadata."""
  copied = 0
  writer = storage.open_writer(draft / shard.copy)
  with storage.writer_errors(draft / shard.copy):
    for record in read_tfrecord(shard.source):
      writer.write(record)
      copied += 1
      bar.update()
    writer.close()
  if copied != shard.images:
    raise InputError(
      f"{shard.source} holds {copied} records, and the set's metadata says {shard.images}. Copy "
      "the set to this place again"
    )
