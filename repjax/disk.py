"""Files on disk: JSON files and trees of arrays, written completely or not at all.

Everything is first written under a draft's name, then flushed to the disk, then renamed. A rename
is atomic, so a reader sees the old file or the new one. After a power cut, so does the next run.
"""

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

from repjax import json_files
from repjax.errors import InputError
from repjax.schema import Rule, anything


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file that nobody ever sees half-written, and makes its folder.

  Raises:
    InputError: the file cannot be written; an earlier file of that name is intact.
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
  """Turns an error while `path` is written, such as a full disk, into an InputError.

  The caller writes to a draft, since the message promises that earlier files are intact.

  Raises:
    InputError: anything was raised inside; the text names the path and the reason.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:  # TensorStore raises many kinds, with the errno in their text
    code = re.search(r"os_error_code='(\d+)'", str(error))
    number = int(code[1]) if code else getattr(error, "errno", None)
    reason = os.strerror(number) if number else str(error).partition("\n")[0][:300]
    raise InputError(
      f"{path} could not be written: {reason}. What was saved before is "
      "intact; make room, or mend what the error names, and run the same command again"
    ) from error


def put(draft: Path, path: Path) -> None:
  """Gives a finished file or folder its name, durably.

  The content reaches the disk before the name does. So a power cut leaves the new content under
  `path` or the old one, never a part.
  """
  sync(draft)
  draft.replace(path)
  sync_entries(path.parent)


def sync(path: Path) -> None:
  """Waits until a file, or a folder with everything below it, is on the disk itself."""
  for each in (path, *(path.rglob("*") if path.is_dir() else ())):
    _sync_one(each)


def sync_entries(folder: Path) -> None:
  """Waits until the names in a folder are on the disk itself, without their contents."""
  _sync_one(folder)


def _sync_one(path: Path) -> None:
  """Flushes one file, or the list of names in one folder, to the disk."""
  descriptor = os.open(path, os.O_RDONLY)
  try:
    os.fsync(descriptor)
  except OSError as error:
    # Some network file systems cannot flush folders, which then are as safe as they can be.
    if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
      raise
  finally:
    os.close(descriptor)


def _missing(path: Path) -> InputError:
  """Returns the error for a file or folder that is to be read and is not there."""
  if not path.parent.exists():
    return InputError(
      f"the folder {path.parent} does not exist. Give the folder of a run, an import or an export"
    )
  return InputError(
    f"{path} does not exist; is {path.parent} the right folder? Give the folder of a run, an "
    "import or an export"
  )


def read_json(path: Path, rule: Rule = anything) -> Any:
  """Reads a JSON file.

  Args:
    path: path of the file.
    rule: the rule of its content, see `repjax.schema`.

  Raises:
    InputError: the file is missing or damaged, or holds a value that the rule refuses.
  """
  if not path.exists():
    raise _missing(path)
  return json_files.read(path, rule)


def by_itself() -> Any:
  """Returns options with which Orbax does not wait for the other processes of a run.

  Only one process reads and writes files, so a barrier would never be passed.
  """
  import orbax.checkpoint as ocp

  own = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def write_tree(path: Path, tree: Any) -> None:
  """Writes a tree of arrays into the new folder `path`, one file for each array.

  Raises:
    InputError: the folder cannot be written.
  """
  import orbax.checkpoint as ocp

  arrays = jax.tree.map(lambda leaf: np.asarray(leaf).view(_Constant), jax.device_get(tree))
  # With one database for all arrays (OCDBT), Orbax would hold a second copy of them in memory.
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=False, use_compression=False, multiprocessing_options=by_itself()
  )
  writer = ocp.Checkpointer(handler, multiprocessing_options=by_itself())
  with writing(path), _quiet_absl(), writer as checkpointer:
    checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(arrays))


@contextlib.contextmanager
def _quiet_absl() -> Iterator[None]:
  """Silences warnings of absl: Orbax warns about every tree that is written without OCDBT."""
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.ERROR)
  try:
    yield
  finally:
    logging.set_verbosity(verbosity)


class _Constant(np.ndarray):
  """An array that stays unchanged while Orbax writes it, so that Orbax need not copy it first."""

  def __deepcopy__(self, memo: Any) -> np.ndarray:
    return self


def read_tree(path: Path, like: Any) -> Any:
  """Reads a tree of arrays onto this process's first device.

  Args:
    path: folder of the tree, from `write_tree` or a checkpoint.
    like: tree with the expected structure, shapes and dtypes.

  Raises:
    InputError: the folder is missing or damaged, or the tree differs from `like`.
  """
  if not path.exists():
    raise _missing(path)
  plain = _read_plain(path, like)
  if plain is not None:
    return plain
  import orbax.checkpoint as ocp

  alone = ocp.StandardCheckpointer(multiprocessing_options=by_itself())
  with _held_back_stderr() as problems, alone as checkpointer:
    try:
      return checkpointer.restore(path.absolute(), _on_default_device(like))
    except Exception as error:  # Orbax and TensorStore raise many kinds when a file is damaged
      first_sentence = str(error).partition("\n")[0].partition(". ")[0]
      problems.append(f"{type(error).__name__}: {first_sentence}"[:300])
  raise InputError(f"{path} cannot be read: {problems[0]}")


def _read_plain(path: Path, like: Any) -> Any:
  """Reads a tree from `write_tree` without importing Orbax, which would take a second.

  Such a tree is a folder of Zarr arrays. Each array is one chunk of raw numbers and a file
  `.zarray` that describes it.

  Returns:
    The tree; None where anything is unexpected, so that Orbax reads it or says what is wrong.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  names = [".".join(str(getattr(entry, "key", "")) for entry in keys) for keys, _ in leaves]
  if {each.name for each in path.iterdir() if each.is_dir()} != set(names):
    return None
  arrays = []
  for name, (_, leaf) in zip(names, leaves):
    wanted = {"zarr_format": 2, "dtype": np.dtype(leaf.dtype).str, "order": "C"}
    wanted |= {"shape": list(leaf.shape), "chunks": list(leaf.shape)}
    wanted |= {"compressor": None, "filters": None}
    try:
      found = json.loads((path / name / ".zarray").read_text())
      # The chunk's name is its index: "0.0.0.0" for an array of four axes.
      data = (path / name / (".".join("0" * leaf.ndim) or "0")).read_bytes()
    except (OSError, ValueError):
      return None
    if not wanted.items() <= found.items() or len(data) != leaf.size * leaf.dtype.itemsize:
      return None
    arrays.append(np.frombuffer(data, leaf.dtype).reshape(leaf.shape))
  return jax.device_put(jax.tree.unflatten(structure, arrays), jax.local_devices()[0])


def replace_folder(draft: Path, path: Path) -> None:
  """Replaces the folder `path`, which may be missing, by the finished folder `draft`.

  A folder cannot be replaced by one rename, as a file can. Between the two renames the old folder
  is called `<path>.old`, and `current_folder` finds it there if the process is killed.

  Raises:
    InputError: a rename or the flush to the disk failed; the old folder is intact.
  """
  old = old_folder(path)
  with writing(path):
    sync(draft)
    if path.exists():
      shutil.rmtree(old, ignore_errors=True)
      path.replace(old)
    put(draft, path)
  shutil.rmtree(old, ignore_errors=True)


def current_folder(path: Path) -> Path:
  """Returns the folder to read: `path`, or the old one if `replace_folder` was killed midway."""
  old = old_folder(path)
  return old if old.exists() and not path.exists() else path


def old_folder(path: Path) -> Path:
  """Returns the name that a folder has while `replace_folder` replaces it."""
  return path.with_name(f"{path.name}.old")


def draft_folder(path: Path) -> Path:
  """Returns the name that a folder has until it is finished, and while it is removed."""
  return path.with_name(f"{path.name}.draft")


def remove_folder(path: Path) -> None:
  """Removes a folder so that nobody ever sees a part of it under its name."""
  draft = draft_folder(path)
  shutil.rmtree(draft, ignore_errors=True)
  path.replace(draft)
  shutil.rmtree(draft)


def _on_default_device(like: Any) -> Any:
  """Returns shapes and dtypes of a tree that Orbax shall put on this process's first device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)


@contextlib.contextmanager
def _held_back_stderr() -> Iterator[list[str]]:
  """Holds back stderr, and shows it at the end unless the caller has noted a problem.

  If one array of many cannot be read, Orbax abandons the other reads. Each abandoned read prints a
  traceback from its thread, which would bury the one error that matters.

  Yields:
    A list to which the caller appends problems.
  """
  problems, text = [], io.StringIO()
  with contextlib.redirect_stderr(text):
    yield problems
    if problems:
      # Abandoned reads print when they are collected, and their threads need a moment for it.
      gc.collect()
      time.sleep(0.2)
  if not problems:
    sys.stderr.write(text.getvalue())
