"""TFDS's builders of sets: those that it knows, those that are on disk, and the digits."""

import contextlib
import io
import itertools
import shlex

import tensorflow_datasets as tfds
from google.protobuf import json_format

from repjax.data import storage
from repjax.data.digits import Digits
from repjax.errors import InputError, unknown

PREPARE = "repjax prepare-dataset"


def find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """TFDS's builder of a set that is on disk and can be read here.

  Raises:
    InputError: nobody knows the set, it is not on disk, or in another format.
  """
  builder = builder_of(name, data_dir)
  if not builder.data_path.exists():
    raise InputError(
      f"{name} is not in {builder.data_path}; prepare it once with: "
      f"{command('--tfds', name, data_dir)}"
    )
  formats = file_formats(builder)
  if "array_record" not in formats:
    stored = formats[0]
    way_out = (
      f"make an array_record copy of it once with: {command('--from-tfrecord', name, data_dir)}"
      if stored == "tfrecord"
      else f"prepare it once more, in another folder: {command('--tfds', name, 'FOLDER')}"
    )
    raise InputError(
      f"{name} in {builder.data_path} is stored as {stored}, which allows no random access "
      f"without TensorFlow; {way_out}"
    )
  return builder


def builder_of(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """TFDS's builder of a set that it knows, or that is in `data_dir`, prepared or not."""
  known = tfds.list_builders(with_community_datasets=False)
  own = stored_sets(data_dir)
  if name.split("/")[0].split(":")[0] not in {*known, *own}:
    raise InputError(
      f"{unknown('data set', name, [*known, *own, 'digits', 'synthetic'])} (a set of your own is "
      f"made from a folder of images by {PREPARE} --from-folder FOLDER --name NAME, and looked for "
      f"in {storage.sets_folder(data_dir)})"
    )
  try:
    return tfds.builder(name, data_dir=data_dir)
  except (AssertionError, OSError, ValueError, json_format.Error) as error:
    # A version or variant that the set does not have, or damaged metadata.
    raise InputError(f"TFDS cannot open {name!r}: {str(error).partition(chr(10))[0]}") from error


def stored_sets(data_dir: str | None) -> set[str]:
  """The names of the sets that are in `data_dir`, whoever made them."""
  folder = storage.sets_folder(data_dir)
  files = itertools.chain.from_iterable(  # name/version, or name/variant/version
    folder.glob(f"{pattern}/dataset_info.json") for pattern in ("*/*", "*/*/*")
  )
  return {path.relative_to(folder).parts[0] for path in files}


def command(mode: str, name: str, data_dir: str | None) -> str:
  """A command line that makes a set usable."""
  where = f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else ""
  return f"{PREPARE} {mode} {name}{where}"


def file_formats(builder: tfds.core.DatasetBuilder) -> list[str]:
  """The formats in which a prepared set is on disk."""
  info = builder.info.as_proto
  return [info.file_format or "tfrecord", *info.alternative_file_formats]


def digits_builder(data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Opens the digits set; writes it first, with one line in place of TFDS's bars."""
  builder = Digits(data_dir=data_dir, file_format="array_record")
  if builder.data_path.exists():
    return builder
  print(f"preparing the digits data set in {builder.data_path}", flush=True)
  try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      builder.download_and_prepare()
  except FileExistsError:
    if not builder.data_path.exists():  # otherwise another process was faster
      raise
  return builder
