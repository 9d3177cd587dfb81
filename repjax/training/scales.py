"""Reads the scales of RepOptimizer: from the run of a hyper-search, or from a file."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from repjax import names, runs, weights
from repjax.algebra import BranchScales
from repjax.errors import InputError, printable
from repjax.recognition import layer_name
from repjax.schema import shown
from repjax.spec import ModelSpec
from repjax.training.repoptimizer import scales_in, search_spec
from repjax.weights.sources import expected

_IN_FILES = re.compile(r"scale_(conv|1x1|identity)\.weight")
_SHOWN = 3
"""Number of scales that an error names."""

Place = tuple[str, ...]
"""The path of a leaf in the parameters."""


class _Held(NamedTuple):
  """The scales that a folder or a file holds, and those that it should hold.

  Attributes:
    values: name to scale.
    wanted: name to the path of the scale in the parameters, and its shape.
  """

  values: Mapping[str, Any]
  wanted: Mapping[str, tuple[Place, tuple[int, ...]]]


def read_scales(source: str, spec: ModelSpec) -> dict[str, Any]:
  """Reads the scales that a plain network needs.

  Args:
    source: folder of the run of a hyper-search; or a file that `repjax.weights.read` reads, in the
      authors' names, such as `stage1.0.scale_conv.weight`, `stage1.0.scale_1x1.weight` and
      `stage1.1.scale_identity.weight`. A file may also hold the rest of the network.
    spec: spec of the plain network.

  Returns:
    A BranchScales in float32 for each layer, as `repjax.training.multipliers` takes them.

  Raises:
    InputError: there is no such folder or file, it cannot be read, or its scales do not fit.
  """
  search, path = search_spec(spec), names.file(source)
  if not path.exists():
    raise InputError(
      f"config.scales: {path} does not exist. Give the folder of a hyper-search, which is a run of "
      f"{spec.name} with --config.model_overrides.scaled=True, or a file of scales"
    )
  held = _in_folder(path, search) if path.is_dir() else _in_file(path, search)
  _check_fit(path, search, held)
  params: dict[str, Any] = {}
  for name, (place, _) in held.wanted.items():
    _put(params, place, jnp.asarray(np.asarray(held.values[name]), jnp.float32))
  return scales_in(params)


def _in_folder(folder: Path, search: ModelSpec) -> _Held:
  """Returns the scales of the best checkpoint of a run."""
  spec = ModelSpec.read(names.folder(folder))
  shapes = spec.variable_shapes()
  if not list(_scales(shapes["params"])):
    raise InputError(
      f"config.scales: {folder} holds a {spec.name} without scales. Give the run of a "
      "hyper-search, whose model has model_overrides.scaled=True"
    )
  _check_same_network(folder, spec, search)
  _, variables, _ = runs.read_best(folder, shapes)
  wanted = _scales(search.variable_shapes()["params"])
  return _Held(
    {"/".join(path): leaf for path, leaf in _scales(variables["params"])},
    {"/".join(path): (path, leaf.shape) for path, leaf in wanted},
  )


def _check_same_network(folder: Path, found: ModelSpec, wanted: ModelSpec) -> None:
  """Raises InputError if a search has different groups or strides.

  The shapes of scales do not tell these numbers.
  """
  for field in ("groups", "strides"):
    values = [_as_in_json(getattr(spec.create_model(), field)) for spec in (found, wanted)]
    if values[0] != values[1]:
      raise InputError(
        f"config.scales: {folder} is the search of a network with {field} {shown(values[0])}, but "
        f"the plain network has {shown(values[1])}. Give both the same {field} in model_overrides"
      )


def _as_in_json(value: Any) -> Any:
  """Returns a number, a sequence or a table of numbers as a JSON file holds it."""
  if isinstance(value, Mapping):
    return {str(key): number for key, number in value.items()}
  return list(value) if isinstance(value, Sequence) else value


def _in_file(path: Path, search: ModelSpec) -> _Held:
  """Returns the scales of a file in the authors' names."""
  state = weights.read(path)
  entries = expected(search.name, "repopt", "train", search.num_classes, search.overrides)
  return _Held(
    {name: value for name, value in state.items() if _IN_FILES.search(name)},
    {
      name: (entry.path[1:], entry.shape)
      for name, entry in entries.items()
      if _is_scale(entry.path)
    },
  )


def _scales(params: Mapping[str, Any]) -> Iterator[tuple[Place, Any]]:
  """Yields the path and the value of every scale of a branch."""
  for key_path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
    path = tuple(entry.key for entry in key_path)
    if _is_scale(path):
      yield path, leaf


def _is_scale(path: Sequence[str]) -> bool:
  """Returns whether a leaf is the scale of a branch of a ScaledConv."""
  if len(path) < 3 or layer_name(path[-3]) != "ScaledConv":
    return False
  return path[-2] in BranchScales._fields and path[-1] == "scale"


def _check_fit(path: Path, search: ModelSpec, held: _Held) -> None:
  """Raises InputError if scales are missing, too many, of other shapes, or no finite numbers."""
  values = {name: np.asarray(value) for name, value in held.values.items()}
  shapes = {name: shape for name, (_, shape) in held.wanted.items()}
  both = [name for name in shapes if name in values]
  floating = [name for name in both if jnp.issubdtype(values[name].dtype, jnp.floating)]
  problems = {
    "missing": [name for name in shapes if name not in values],
    "beyond the network": [name for name in values if name not in shapes],
    "of a different length": [
      f"{name} {values[name].shape} instead of {shapes[name]}"
      for name in both
      if values[name].shape != shapes[name]
    ],
    "not floating-point": [
      f"{name}, of type {values[name].dtype}" for name in both if name not in floating
    ],
    "not finite in float32": [
      name
      for name in floating  # a comparison with NaN is false too
      if not (np.abs(values[name].astype(np.float64)) <= np.finfo(np.float32).max).all()
    ],
  }
  said = "; ".join(f"{kind}: {_some(found)}" for kind, found in problems.items() if found)
  if said:
    raise InputError(
      f"config.scales: {path} does not hold the scales of {search.name} with these "
      f"model_overrides; {said}. The hyper-search needs the same stage_sizes, width_multipliers, "
      "groups and strides as the plain network"
    )


def _some(found: Sequence[str]) -> str:
  """Joins the first names of many."""
  more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
  return ", ".join(printable(name, 100) for name in found[:_SHOWN]) + more


def _put(tree: dict[str, Any], path: Place, value: Any) -> None:
  for key in path[:-1]:
    tree = tree.setdefault(key, {})
  tree[path[-1]] = value
