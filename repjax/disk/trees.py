"""Trees of arrays: folders in Orbax's formats."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from repjax import json_files, saving, signals
from repjax.disk.flush import writing
from repjax.disk.manifest import Snapshot
from repjax.disk.values import missing
from repjax.errors import InputError, listed
from repjax.schema import MisfitError


def by_itself() -> Any:
  """Returns options with which Orbax does not wait for the other processes of a run.

  Only one process reads and writes files, so a barrier would never be passed.
  """
  ocp = saving.orbax()
  own = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=own, active_processes={own})


def write_tree(path: Path, tree: Any, *, database: bool = False) -> None:
  """Writes a tree of arrays into the new folder `path`.

  Args:
    path: folder to make.
    tree: the arrays; they must not change until this function returns.
    database: write few files, in which all arrays are compressed together (OCDBT). Orbax then holds
      a second copy of them in memory. False: one file for each array.

  Raises:
    InputError: the folder cannot be written.
  """
  ocp = saving.orbax()
  arrays = jax.tree.map(lambda leaf: np.asarray(leaf).view(_Constant), jax.device_get(tree))
  handler = ocp.PyTreeCheckpointHandler(
    use_ocdbt=database, use_compression=database, multiprocessing_options=by_itself()
  )
  writer = ocp.Checkpointer(handler, multiprocessing_options=by_itself())
  with writing(path), saving.quietly(), writer as checkpointer:
    checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(arrays))


class _Constant(np.ndarray):
  """An array that stays unchanged while Orbax writes it, so that Orbax need not copy it first."""

  def __deepcopy__(self, memo: Any) -> np.ndarray:
    return self


def read_tree(
  path: Path, like: Any, snapshot: Snapshot | None = None, *, finite: bool = False
) -> Any:
  """Reads a tree of arrays onto this process's first device.

  Args:
    path: folder of the tree, from `write_tree` or a checkpoint.
    like: tree with the expected structure, shapes and dtypes.
    snapshot: compares the files with the manifest of a folder; None compares nothing.
    finite: refuse NaN and infinity.

  Raises:
    InputError: the folder is missing or damaged, the tree differs from `like`, or a number is not
      finite.
  """
  if not path.exists():
    raise missing(path)
  snapshot = snapshot or Snapshot(path, verify=False)
  tree = _read_plain(path, like, snapshot)
  snapshot.check(path)  # all files that were not read yet, which for Orbax are all
  if tree is None:
    tree = _read_by_orbax(path, like)
  if finite:
    check_finite(tree, path)
  return jax.device_put(tree, jax.local_devices()[0])


def check_finite(tree: Any, what: Any) -> None:
  """Raises InputError if a tree holds NaN or infinity; the text names the arrays."""
  if names := not_finite(tree):
    raise InputError(
      f"{what} holds numbers that are not finite (NaN or infinity), in {listed(names, 3)}"
      ". No image would get a sensible result; take an earlier checkpoint, or make the folder again"
    )


def not_finite(tree: Any) -> list[str]:
  """Returns the paths of all arrays in a tree that hold NaN or infinity."""
  return [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    if not np.isfinite(np.asarray(leaf)).all()
  ]


def _read_by_orbax(path: Path, like: Any) -> Any:
  """Reads a tree in any format of Orbax.

  Raises:
    InputError: Orbax cannot read it, and the text holds the first sentence of its error; or a
      description of an array is no JSON.
  """
  ocp = saving.orbax()
  _check_descriptions(path)
  alone = ocp.StandardCheckpointer(multiprocessing_options=by_itself())
  with saving.quietly(), alone as checkpointer:
    try:
      return checkpointer.restore(path.absolute(), _on_default_device(like))
    except Exception as error:  # Orbax and TensorStore raise many kinds when a file is damaged
      if stop := signals.stop_within(error):
        raise stop from None
      first_sentence = str(error).partition("\n")[0].partition(". ")[0]
      problem = f"{type(error).__name__}: {first_sentence}"[:300]
      if type(error) is Exception:  # what Orbax raises where TensorStore finds too few bytes
        problem = f"a file is cut off or missing ({first_sentence[:300]}). Restore it from a copy"
      raise InputError(f"{path} cannot be read: {problem}") from None


def _check_descriptions(path: Path) -> None:
  """Raises unless the files that describe the arrays of a tree are JSON.

  TensorStore parses them by recursion, and a file that is nested deep would end the process.

  Raises:
    InputError: a file is no JSON, or lists and tables in it are nested deep.
  """
  for each in sorted(path.rglob("*")):
    if each.name in (".zarray", "_METADATA", "_CHECKPOINT_METADATA"):
      with json_files.opened(each) as file:
        data = file.read(json_files.LARGEST + 1)
      try:
        json_files.parse(data)
      except MisfitError as misfit:
        what = f"{each.relative_to(path)}: {misfit.words(repr)[:200]}"
        raise InputError(f"{path} cannot be read: {what}") from None


def _read_plain(path: Path, like: Any, snapshot: Snapshot) -> Any:
  """Reads a tree from `write_tree` without importing Orbax, which would take a second.

  Such a tree is a folder of Zarr arrays. Each array is one chunk of raw numbers and a file
  `.zarray` that describes it.

  Returns:
    The tree in host memory; None where anything is unexpected, so that Orbax reads it or says what
    is wrong.

  Raises:
    InputError: a file is not as the manifest says, or holds numbers of another kind.
  """
  leaves, structure = jax.tree_util.tree_flatten_with_path(like)
  names = [".".join(str(getattr(entry, "key", "")) for entry in keys) for keys, _ in leaves]
  if {each.name for each in path.iterdir() if each.is_dir()} != set(names):
    return None
  arrays = [_read_array(path / name, leaf, snapshot) for name, (_, leaf) in zip(names, leaves)]
  if any(array is None for array in arrays):
    return None
  return jax.tree.unflatten(structure, arrays)


def _read_array(folder: Path, like: Any, snapshot: Snapshot) -> np.ndarray | None:
  """Reads one array of a plain tree; None where anything is unexpected."""
  dtype = np.dtype(like.dtype)
  wanted = {"zarr_format": 2, "dtype": _name_in_zarr(dtype), "order": "C"}
  wanted |= {"shape": list(like.shape), "chunks": list(like.shape)}
  wanted |= {"compressor": None, "filters": None}
  # The chunk's name is its index: "0.0.0.0" for an array of four axes.
  described, chunk = folder / ".zarray", folder / (".".join("0" * like.ndim) or "0")
  if not (described.exists() and chunk.exists()) and not snapshot.can_verify:
    return None
  described, data = snapshot.read_bytes(described), snapshot.read_bytes(chunk)
  try:
    found = json_files.parse(described)
  except MisfitError:
    return None
  if not isinstance(found, dict):
    return None
  # Orbax would turn integers into floats without a word.
  if _is_float(found.get("dtype")) not in (None, _is_float(_name_in_zarr(dtype))):
    raise InputError(
      f"{folder / '.zarray'} says that the numbers are {found['dtype']}, and the model has {dtype}."
      " Restore the file"
    )
  if not wanted.items() <= found.items() or len(data) != like.size * dtype.itemsize:
    return None
  return np.frombuffer(data, dtype).reshape(like.shape)


def _name_in_zarr(dtype: np.dtype) -> str:
  """Returns the name that TensorStore gives to a dtype, such as "<f4" or "bfloat16"."""
  return dtype.name if dtype.kind == "V" else dtype.str


def _is_float(name: Any) -> bool | None:
  """Checks whether a dtype is one of floats; None for what is no name of a dtype."""
  try:
    return np.dtype(name).kind in "fV"  # V: bfloat16
  except (TypeError, ValueError):
    return None


def _on_default_device(like: Any) -> Any:
  """Returns shapes and dtypes of a tree that Orbax shall put on this process's first device."""
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
