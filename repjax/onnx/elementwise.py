"""Operators on numbers at the same places of values that may lie in different orders."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from repjax.errors import InputError
from repjax.onnx.graph import Graph, split
from repjax.onnx.values import Atom, Axes, Value, aligned, extent, flat


def elementwise(graph: Graph, op: str, *values: Value) -> Value:
  """An operator on numbers at the same places; values are repeated along axes of length 1."""
  unit = unified(graph, values)
  moving = [value for value in unit if not value.is_constant]
  if not moving:
    raise InputError(
      "this model computes with numbers that repeat for each image of the batch, for which the "
      "ONNX graph here has no operator; make them without the batch, and add them by broadcasting"
    )
  stored = _cut(common_layout(unit), unit)
  return Value(graph.add(op, [_fitted(graph, v, stored) for v in unit]), moving[0].axes, stored)


def _cut(stored: Axes, values: Sequence[Value]) -> Axes:
  """Stored axes of which each value has all atoms or none.

  Known numbers may have some, since they can be repeated; but not as often as there are images.
  """
  batched = {a for axis in stored if not isinstance(extent(axis), int) for a in axis}
  have = [(set(flat(value.stored)), value.is_constant) for value in values]
  have = [(atoms, is_constant) for atoms, is_constant in have if atoms or not is_constant]

  def owners(atom: Atom) -> list[bool]:
    return [atom in atoms for atoms, known in have if not known or atom in batched]

  return split(stored, owners)


def unified(graph: Graph, values: Sequence[Value]) -> list[Value]:
  """Values of one rank, or scalars, with the same atoms on their axes."""
  rank = max(len(value.axes) for value in values)
  full = [
    value if len(value.axes) == rank else dataclasses.replace(value, axes=((),) * rank)
    for value in values
  ]
  places = [(axis,) * len(values) for axis in range(rank)]
  found = aligned(full, places) or aligned([graph.plain(value) for value in full], places)
  assert found is not None  # axes of one atom each, of one length
  return found


def common_layout(values: Sequence[Value]) -> Axes:
  """How the result of several values is stored: as a full one, channels first if there is such.

  Without a full one it has the atoms of all.
  """
  full = [value for value in values if value.is_full and not value.is_constant]
  axes = values[0].axes
  order = (0, 3, 1, 2) if len(axes) == 4 else range(len(axes))
  wanted = tuple(axes[axis] for axis in order)
  if full:
    return next((v.stored for v in full if flat(v.stored) == flat(wanted)), full[0].stored)
  present = {atom for value in values for atom in flat(value.stored)}
  return tuple(tuple(atom for atom in axis if atom in present) for axis in wanted)


def _fitted(graph: Graph, value: Value, stored: Axes) -> str | np.ndarray:
  """The tensor of a value that is repeated where it has no atom of a stored axis."""
  have = set(flat(value.stored))
  value = graph.arrange(value, tuple(axis if set(axis) & have else () for axis in stored))
  if value.is_constant and not have:
    return value.array.reshape(())
  return value.tensor
