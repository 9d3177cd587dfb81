"""Files on disk: JSON and trees of arrays, written whole or not at all, with clear errors."""

import contextlib
import errno
import gc
import io
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from repjax.errors import InputError


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file that is never seen half-written.

  Raises:
    InputError: it cannot be written; what was there before is intact.
  """
  text = json.dumps(value, indent=2) + "\n"
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
  except (FileExistsError, NotADirectoryError):
    raise InputError(f"{path.parent} cannot be a folder: there is a file of that name") from None
  draft = path.with_name(f"{path.name}.{os.getpid()}.draft")
  with writing(path):
    draft.write_text(text)
    put(draft, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
  """Says what could not be written when anything fails, such as a disk that is full.

  Raises:
    InputError: in place of the error; its text promises that what was there before is intact.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # TensorStore's are of many kinds
    code = re.search(r"os_error_code='(\d+)'", str(error))  # how it tells the system's
    number = int(code[1]) if code else getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error).partition("\n")[0][:300]
    raise InputError(
      f"{path} could not be written: {reason}. What was saved before is "
      "intact; make room, or mend what the error names, and run the same command again"
    ) from error


def put(draft: Path, path: Path) -> None:
  """Gives a finished file or folder its name; a power cut leaves it whole or not there at all."""
  sync(draft)
  draft.replace(path)
  sync_entries(path.parent)


def sync(path: Path) -> None:
  """Waits until a file, or a folder with all that is below it, is on the disk itself."""
  for each in (path, *(path.rglob("*") if path.is_dir() else ())):
    _sync_one(each)


def sync_entries(folder: Path) -> None:
  """Waits until a folder's entries, not what is in them, are on the disk itself."""
  _sync_one(folder)


def _sync_one(path: Path) -> None:
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some network file systems know no such thing for folders.
    if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
      raise
  finally:
    os.close(descriptor)


def read_json(path: Path) -> Any:
  """Reads a JSON file.

  Raises:
    InputError: there is none, or it is damaged.
  """
  if not path.exists():
    raise InputError(f"{path} does not exist; is {path.parent} the right folder?")
  try:
    return json.loads(path.read_text())
  except ValueError as error:
    raise InputError(f"{path} is damaged ({error}); restore it or start in a new folder") from error


def by_itself() -> Any:
  """Options by which Orbax does not wait for the other processes of a run; one reads and writes."""
  import orbax.checkpoint as ocp

  own = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def write_tree(path: Path, tree: Any) -> None:
  """Writes a tree of arrays into the new folder `path`."""
  import orbax.checkpoint as ocp

  arrays = jax.tree.map(lambda leaf: np.asarray(leaf).view(_Constant), jax.device_get(tree))
  # A file for each array: Orbax's one database would hold another copy of everything in memory.
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, use_compression=False, multiprocessing_options=by_itself()
  )
  writer = ocp.Checkpointer(handler, multiprocessing_options=by_itself())
  with writing(path), _quiet_absl(), writer as checkpointer:
    checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(arrays))


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
  """Holds back warnings, of which Orbax has one for every tree that is in no database."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


class _Constant(np.ndarray):
  """An array that nobody changes while Orbax writes it, so that it need not copy it first."""

  def __deepcopy__(self, memo: Any) -> np.ndarray:
    return self


def read_tree(path: Path, like: Any) -> Any:
  """Reads a tree of arrays with the structure, shapes and dtypes of `like`.

  Raises:
    InputError: there is none, it is damaged, or it is of another model.
  """
  if not path.exists():
    raise InputError(f"{path} does not exist; is {path.parent} the right folder?")
  plain = _read_plain(path, like)
  if plain is not None:
    return plain
  import orbax.checkpoint as ocp

  alone = ocp.StandardCheckpointer(multiprocessing_options=by_itself())
  with _held_back_stderr() as problems, alone as checkpointer:
    try:
      return checkpointer.restore(path.absolute(), _on_default_device(like))
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
      first_sentence = str(error).partition("\n")[0].partition(". ")[0]
      problems.append(f"{type(error).__name__}: {first_sentence}"[:300])
  raise InputError(f"{path} cannot be read: {problems[0]}")


def _read_plain(path: Path, like: Any) -> Any:
  """The same for what `write_tree` has written, without importing Orbax, which takes long.

  Returns:
    The tree; None where anything is not as expected, for Orbax to read it or say what is wrong.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  names = [".".join(str(getattr(entry, "key", "")) for entry in keys) for keys, _ in leaves]
  if {each.name for each in path.iterdir() if each.is_dir()} != set(names):
    return None
  arrays = []
  for name, (_, leaf) in zip(names, leaves):
    # One chunk of raw numbers.
    wanted = {"zarr_format": 2, "dtype": np.dtype(leaf.dtype).str, "order": "C"}
    wanted |= {"shape": list(leaf.shape), "chunks": list(leaf.shape)}
    wanted |= {"compressor": None, "filters": None}
    try:
      found = json.loads((path / name / ".zarray").read_text())
      data = (path / name / (".".join("0" * leaf.ndim) or "0")).read_bytes()
    except (OSError, ValueError):
      return None
    if not wanted.items() <= found.items() or len(data) != leaf.size * leaf.dtype.itemsize:
      return None
    arrays.append(np.frombuffer(data, leaf.dtype).reshape(leaf.shape))
  return jax.device_put(jax.tree.unflatten(structure, arrays), jax.local_devices()[0])


def replace_folder(draft: Path, path: Path) -> None:
  """Puts the finished folder `draft` in the place of `path`, which may exist.

  Between two renames the old one is called `<path>.old`; see `current_folder`.
  """
  old = path.with_name(f"{path.name}.old")
  with writing(path):
    sync(draft)
    if path.exists():
      shutil.rmtree(old, ignore_errors=True)
      path.replace(old)
    put(draft, path)
  shutil.rmtree(old, ignore_errors=True)


def current_folder(path: Path) -> Path:
  """`path`, or what `replace_folder` was about to replace when it was killed."""
  old = path.with_name(f"{path.name}.old")
  return old if old.exists() and not path.exists() else path


def remove_folder(path: Path) -> None:
  """Removes a folder, of which nobody sees a part."""
  draft = path.with_name(f"{path.name}.draft")
  shutil.rmtree(draft, ignore_errors=True)
  path.replace(draft)
  shutil.rmtree(draft)


def _on_default_device(like: Any) -> Any:
  """The same shapes and dtypes, to be put on this process's first device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[list[str]]:
  """Yields a list for problems; what is written to stderr meanwhile is shown if it stays empty.

  Where one array of many cannot be read, Orbax abandons the other reads, and each of them prints a
  traceback from a thread of its own.
  """
  problems, text = [], io.StringIO()
  with contextlib.redirect_stderr(text):
    yield problems
    if problems:
      gc.collect()  # abandoned reads complain when they are collected
      time.sleep(0.2)
  if not problems:
    sys.stderr.write(text.getvalue())
