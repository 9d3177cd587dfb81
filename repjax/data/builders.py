"""Finds the TFDS builder of a data set, and has TFDS download and prepare sets."""

import contextlib
import importlib.util
import io
import itertools
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from tensorflow_datasets.core import naming
from tensorflow_datasets.core.utils import file_utils

from repjax.data import metadata, storage
from repjax.data.digits import Digits
from repjax.data.scenes import Scenes
from repjax.errors import InputError, printable, unknown

PREPARE = "repjax prepare-dataset"
DEMOS: Mapping[str, type[tfds.core.GeneratorBasedBuilder]] = {"digits": Digits, "scenes": Scenes}
"""Sets that are made on first use, from images inside of installed packages."""
LARGE_SETS = (
  "TFDS makes sets above 1 GB with TensorFlow only: either install it for this one step, or unpack "
  "the images into folders, one per class, and use --from-folder, which needs no TensorFlow"
)


def find_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Returns the TFDS builder of a set that is on disk as array_record.

  Raises:
    InputError: the set is unknown, not on disk, or stored in a different format.
  """
  builder = builder_of(name, data_dir)
  if not builder.data_path.exists():
    raise InputError(
      f"{name} is not in {builder.data_path}. Name a different set by --dataset, "
      f"or by --config.dataset in training. Or prepare this one once with: "
      f"{command('--tfds', name, data_dir)}"
    )
  formats = file_formats(builder)
  if "array_record" not in formats:
    stored = printable(formats[0])
    way_out = (
      f"Make an array_record copy of it once with: {command('--from-tfrecord', name, data_dir)}"
      if stored == "tfrecord"
      else f"Prepare it again, in a different folder: {command('--tfds', name, 'FOLDER')}"
    )
    raise InputError(
      f"{name} in {builder.data_path} is stored as {stored}, which allows no random access "
      f"without TensorFlow. {way_out}"
    )
  return builder


def builder_of(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Returns the TFDS builder of a set, prepared or not.

  Raises:
    InputError: TFDS neither knows the set nor finds it in `data_dir`, or cannot open it; or its
      metadata are damaged or name code to import.
  """
  # TFDS would also take arguments in the name, and the names of places on the internet.
  parts = _NAME.fullmatch(name)
  if parts is None:
    raise InputError(
      f"{name!r} is no name of a data set. A name has the form NAME, NAME/VARIANT, NAME:1.0.0 or "
      "NAME/VARIANT:1.0.0"
    )
  known = tfds.list_builders(with_community_datasets=False)
  own = stored_sets(data_dir)
  if parts["name"] not in {*known, *own}:
    raise InputError(
      f"{unknown('data set', name, [*known, *own, *DEMOS, 'synthetic'])} (sets of your own are "
      f"looked for in {storage.sets_folder(data_dir)}; make one from a folder of images with: "
      f"{PREPARE} --from-folder FOLDER --name NAME)"
    )
  plain = naming.camelcase_to_snakecase(parts["name"])
  with tfds_errors(name):
    for folder in file_utils.list_data_dirs(given_data_dir=_given(data_dir)):
      metadata.check_sets(Path(folder).expanduser(), plain, parts["variant"])
    return tfds.builder(name, data_dir=_given(data_dir))


_NAME = re.compile(r"(?P<name>\w+)(/(?P<variant>(?!\.+(:|$))[\w.-]+))?(:[\w.*]+)?")


@contextlib.contextmanager
def tfds_errors(name: str) -> Iterator[None]:
  """Turns every error in the block into an `InputError` that names the set.

  The set may lack the version or variant, or have damaged metadata, for which TFDS, protobuf and
  Python raise errors of many classes.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    reason = printable(str(error).strip().partition("\n")[0][:800]) or type(error).__name__
    raise InputError(f"TFDS cannot open {name!r}: {reason}") from error


def _given(data_dir: str | None) -> str | None:
  """Returns the path of `data_dir` for TFDS, which looks in several folders where it is None."""
  return str(storage.sets_folder(data_dir)) if data_dir else None


def stored_sets(data_dir: str | None) -> set[str]:
  """Returns the names of the sets in `data_dir`, made by TFDS or by repjax."""
  folder = storage.sets_folder(data_dir)
  files = itertools.chain.from_iterable(  # name/version, or name/variant/version
    folder.glob(f"{pattern}/dataset_info.json") for pattern in ("*/*", "*/*/*")
  )
  names = (path.relative_to(folder).parts for path in files)
  return {parts[0] for parts in names if not any(part.startswith(".") for part in parts)}


def command(mode: str, name: str, data_dir: str | None) -> str:
  """Returns the command line that prepares a set; `mode` is --tfds or --from-tfrecord."""
  where = f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else ""
  return f"{PREPARE} {mode} {name}{where}"


def file_formats(builder: tfds.core.DatasetBuilder) -> list[str]:
  """Returns the formats in which a prepared set is on disk, the main format first.

  Old metadata names no format. TFDS then had TFRecord only.
  """
  info = builder.info.as_proto
  return [info.file_format or "tfrecord", *info.alternative_file_formats]


def metadata_of(builder: tfds.core.DatasetBuilder) -> dict[str, Any]:
  """Returns what `metadata.json` of a set holds; empty where there is none."""
  metadata: Any = builder.info.metadata or {}
  return {key: metadata[key] for key in metadata.keys()}  # noqa: SIM118 - TFDS reads its file in keys(), not before


def demo_builder(name: str, data_dir: str | None) -> tfds.core.DatasetBuilder:
  """Returns the builder of one of DEMOS, and prepares the set on first use.

  A printed line says where the set goes. TFDS's progress bars are not shown.
  """
  with tfds_errors(name):
    metadata.check_sets(storage.sets_folder(data_dir), name, None)
    builder = DEMOS[name](data_dir=_given(data_dir), file_format="array_record")
  if builder.data_path.exists():
    return builder
  print(f"preparing the {name} data set in {builder.data_path}", flush=True)
  try:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
      builder.download_and_prepare()
  except FileExistsError:
    if not builder.data_path.exists():  # where the set is there now, a second process made it
      raise
  return builder


def download_set(name: str, *, data_dir: str | None = None) -> Path:
  """Has TFDS download and prepare a set as array_record; a set that is there is left alone.

  Args:
    name: TFDS's name of the set, with a variant where the set has several.
    data_dir: the folder in which TFDS keeps its sets; None is TFDS's default.

  Returns:
    The folder of the set's files.

  Raises:
    InputError: TFDS does not know the set, cannot download it, misses files that have to be
      downloaded by hand, or needs TensorFlow; or the set is there in a different format.
  """
  builder = builder_of(name, data_dir)
  folder = Path(builder.data_path)
  if not folder.exists():
    try:
      builder.download_and_prepare(file_format="array_record")
    except InputError:
      raise
    except Exception as error:  # TFDS has hundreds of builders, each with errors of its own
      raise InputError(f"TFDS cannot prepare {name}: {_explained(error)}") from error
  if "array_record" not in (formats := file_formats(builder)):
    raise InputError(
      f"{name} is in {folder} already, stored as {printable(formats[0])}. Make an array_record "
      f"copy of it with: {command('--from-tfrecord', name, data_dir)}"
    )
  return folder


def _explained(error: Exception) -> str:
  """Returns what went wrong in TFDS and what to do about it."""
  text = printable(" ".join(str(error).split())) or type(error).__name__
  # Classes are compared by name, since their packages need not be installed.
  names = {each.__name__ for each in type(error).__mro__}
  if isinstance(error, ImportError):
    return f"it needs a package that is not installed ({text}). {LARGE_SETS}"
  if names & {"ConnectionError", "DownloadError", "Timeout", "HTTPError", "URLError"}:
    return (
      f"the download failed ({text}). Look at the network and run the same command again. Or "
      "prepare the set on a different machine and copy its folder here"
    )
  if isinstance(error, AssertionError):  # files to be downloaded by hand are missing
    here = importlib.util.find_spec("tensorflow")
    return f"{text} Then run the same command again. {'' if here else LARGE_SETS}".rstrip()
  return f"{type(error).__name__}: {text}"
