"""Folders of folded parameters.

folder/
  params/        one Zarr array for each array, as in a deploy folder
  fused.json     the names, shapes and dtypes of the arrays
  manifest.json  checksums
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from repjax import disk, json_files, names
from repjax.devices import need_devices
from repjax.disk import trees
from repjax.disk.manifest import gone
from repjax.disk.manifest import listed as listed_files
from repjax.errors import InputError, listed
from repjax.schema import record, table, text
from repjax.trees import generator_of, is_key

_PARAMS, _FACTS = "params", disk.FUSED
_RULE = record({"arrays": table(text())}, required=("arrays",))


def save(folded: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
  """Writes folded parameters, as `repjax.disk.replacing` promises.

  Args:
    folded: arrays by name.
    folder: the folder to make, or one that this function made for arrays of the same names, shapes
      and dtypes.

  Raises:
    InputError: the folder cannot be written, or holds something else.
  """
  need_devices()
  path, described = names.folder(folder), _described(folded)
  _check_replaceable(disk.current_folder(path), described)
  with disk.replacing(path, known=[_FACTS]) as draft:
    trees.write_tree(draft / _PARAMS, _numbered(jax.tree.map(_plain, dict(folded))))
    disk.write_json(draft / _FACTS, {"arrays": described})
    disk.write_manifest(draft)


def load(
  shapes: Mapping[str, jax.ShapeDtypeStruct], folder: str | os.PathLike[str], *, verify: bool
) -> dict[str, jax.Array]:
  """Reads folded parameters that `save` wrote.

  Args:
    shapes: the shape and dtype of each array that is wanted, by name.
    folder: the folder.
    verify: compare files with their checksums, and refuse numbers that are not finite.

  Raises:
    InputError: the folder is missing or damaged, or holds other arrays.
  """
  need_devices()
  path = names.folder(folder)

  def read(snapshot: disk.Snapshot) -> dict[str, jax.Array]:
    facts = snapshot.folder / _FACTS
    if not facts.exists():
      if _FACTS in (listed_files(snapshot.folder) or ()):
        raise gone(facts)
      raise InputError(f"{path} holds no folded parameters. Give a folder that `save` wrote")
    held = json_files.content(facts, snapshot.read_bytes(facts), _RULE)["arrays"]
    _check_same(held, _described(shapes), path)
    plain = jax.eval_shape(lambda arrays: jax.tree.map(_plain, arrays), dict(shapes))
    numbered = trees.read_tree(snapshot.folder / _PARAMS, _numbered(plain), snapshot)
    snapshot.check()
    arrays = {name: numbered[_number(place)] for place, name in enumerate(sorted(shapes))}
    if verify:
      _check_finite(arrays, path)
    return {name: _like(shapes[name], array) for name, array in arrays.items()}

  return disk.read_whole(lambda: disk.current_folder(path), read, verify=verify, warn=path)


def _check_finite(arrays: Mapping[str, Any], folder: Path) -> None:
  """Raises InputError if some of the arrays hold NaN or infinity, by the names of `fold`."""
  odd = [name for name, array in arrays.items() if trees.not_finite(array)]
  if odd:
    raise InputError(
      f"{folder} holds folded parameters that are not finite (NaN or infinity): {listed(odd, 3)}. "
      "Fold finite parameters and save them again, or pass verify=False to read these"
    )


def _check_replaceable(folder: Path, described: Mapping[str, str]) -> None:
  """Raises InputError for a folder that repjax wrote, but not for these arrays."""
  facts = folder / _FACTS
  if facts.exists():
    if json_files.read(facts, _RULE)["arrays"] == described:
      return
    held = "folded parameters of a different function"
  elif (folder / disk.MANIFEST).exists():
    held = "something else than folded parameters"
  else:
    return  # `replacing` refuses the files of others.
  raise InputError(
    f"{folder} holds {held}, so it is not replaced. Give a different folder, or remove it first"
  )


def _check_same(held: Mapping[str, str], wanted: Mapping[str, str], folder: Any) -> None:
  """Raises InputError if the arrays of a folder are not those of a fused function."""
  odd = [f"{name} is missing" for name in wanted if name not in held]
  odd += [
    f"{name} is {held[name]} and not {wanted[name]}"
    for name in wanted
    if name in held and held[name] != wanted[name]
  ]
  odd += [f"{name} is unknown" for name in held if name not in wanted]
  if odd:
    raise InputError(
      f"{folder} holds folded parameters of a different function: {listed(odd, 3, between='; ')}. "
      "Load them with the function, shapes and settings of `fuse` that they were saved with, or "
      "fold the parameters again"
    )


def _plain(array: Any) -> Any:
  """Returns an array as numbers, which a random key is not."""
  return jax.random.key_data(array) if is_key(array) else array


def _like(shape: jax.ShapeDtypeStruct, array: jax.Array) -> jax.Array:
  """Returns numbers as the random keys that they were written from, if they were."""
  if not is_key(shape):
    return array
  return jax.random.wrap_key_data(array, impl=generator_of(shape))


def _numbered(arrays: Mapping[str, Any]) -> dict[str, Any]:
  """Returns arrays by number, in the order of their names, which need not be names of files."""
  return {_number(place): arrays[name] for place, name in enumerate(sorted(arrays))}


def _number(place: int) -> str:
  return f"{place:05}"


def _described(arrays: Mapping[str, Any]) -> dict[str, str]:
  """Returns the dtype and the shape of each array as text, by name."""
  return {
    name: f"{jnp.result_type(each)}{list(jnp.shape(each))}" for name, each in sorted(arrays.items())
  }
