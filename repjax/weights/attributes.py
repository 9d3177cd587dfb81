"""Reads attributes of a model, such as its depth and widths, off the shapes of weights."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.models import create_model, list_models
from repjax.models.base import Network
from repjax.weights import repmlp
from repjax.weights.naming import Entry, NoNameError
from repjax.weights.recognition import Recognition, fits
from repjax.weights.sources import expected

_BLOCK = re.compile(r"(.*?stages?[._]?\d+|.*?layer\d+)\.(?:blocks\.)?(\d+)\.")
"""Beginning of the name of a tensor in a block: the stage, and the number of the block."""


def changed_attributes(
  state: Mapping[str, np.ndarray],
  wanted: Mapping[str, Entry],
  found: Recognition,
  overrides: Mapping[str, Any],
) -> dict[str, Any]:
  """Returns attributes that a state dict shows and that differ from those of the model.

  Attributes of a RepMLP are returned as they are read. Depth, widths and flags are returned only if
  the model with these attributes has exactly the names and shapes of the state dict, heads aside.

  Args:
    state: the state dict.
    wanted: the tensors of the model.
    found: the model, the naming and the form.
    overrides: overrides of the model that the caller has given.
  """
  model = create_model(found.model, **overrides)
  theirs = {name: value.shape for name, value in state.items()}
  ours = {name: entry.shape for name, entry in wanted.items()}
  if found.model in repmlp.NAMINGS:
    held = repmlp.attributes(ours, ours, model.tile)
    read = repmlp.attributes(theirs, ours, model.tile)
    return {name: value for name, value in read.items() if value != held.get(name)}
  read = {**_depth(model, theirs, ours), **_widths(model, theirs, ours)}
  # Depth and widths show in the names and shapes; flags are tried, alone.
  tried = [read] if read else [{name: not value} for name, value in _flags(model).items()]
  return next((each for each in tried if _fits_with(state, found, {**overrides, **each})), {})


def _fits_with(
  state: Mapping[str, np.ndarray], found: Recognition, overrides: Mapping[str, Any]
) -> bool:
  """Tells if a state dict fits the model that was found, with these overrides."""
  try:
    return fits(state, expected(found.model, found.naming, found.kind, 1000, overrides))
  except (InputError, NoNameError):
    return False


def _flags(model: Any) -> dict[str, bool]:
  """Returns the attributes of a model that are True or False and that not all families have."""
  shared = {field.name for field in dataclasses.fields(Network)}
  own = (field.name for field in dataclasses.fields(model) if field.name not in shared)
  return {name: getattr(model, name) for name in own if isinstance(getattr(model, name), bool)}


def model_with(found: Recognition, overrides: Mapping[str, Any]) -> str | None:
  """Returns the name of the model that a model with some overrides is, or None."""
  try:
    wanted = create_model(found.model, **overrides)
  except InputError:  # Attributes that were read one by one need not fit together.
    return None
  for name in list_models():
    if create_model(name) == wanted:
      return name
  return None


def _depth(model: Any, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the number of blocks in each stage, if it differs."""
  held, read = (_blocks(shapes) for shapes in (ours, theirs))
  # The names show the depth only if they do so for the model itself.
  known = list(held.values()) == list(getattr(model, "stage_sizes", ()))
  if not known or held == read or held.keys() != read.keys():
    return {}
  return {"stage_sizes": [read[stage] for stage in held]}


def _blocks(names: Mapping[str, Any]) -> dict[str, int]:
  """Returns the number of blocks of every stage, by the beginning of the stage's names."""
  blocks = {match.groups() for match in map(_BLOCK.match, names) if match}
  stages = sorted({stage for stage, _ in blocks})
  return {stage: sum(each == stage for each, _ in blocks) for stage in stages}


def _widths(model: Any, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the width of each stage, if one differs."""
  attribute = next((name for name in ("width_multipliers", "widths") if hasattr(model, name)), "")
  held, stages = list(getattr(model, attribute, ())), list(_blocks(ours))
  if not held or len(stages) != len(held):
    return {}
  ratios = [_ratio(stage, theirs, ours) for stage in stages]
  if None in ratios or set(ratios) == {1}:
    return {}
  read = [width * ratio for width, ratio in zip(held, ratios)]
  return {attribute: [int(each) if each == int(each) else round(each, 9) for each in read]}


def _ratio(stage: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> float | None:
  """Returns the ratio of their output channels to ours, in the first block of a stage."""
  for name, shape in ours.items():
    match = _BLOCK.match(name)
    is_kernel = len(shape) == 4 and len(theirs.get(name, ())) == 4
    if match and match[1] == stage and is_kernel and shape[0]:
      return theirs[name][0] / shape[0]
  return None
