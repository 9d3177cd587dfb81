"""Elementwise operators, on values that may be stored in different orders.

Operands first get the same atoms on the same logical axes. Then one order is chosen, that of a full
operand where there is one, and the other operands are arranged to it. Operands that are broadcast
keep length 1 where they have no atoms, and ONNX repeats them.

  maps stored n|c|h|w  +  bias stored c   ->   Add(maps, bias as 1|c|1|1), stored n|c|h|w
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from repjax.errors import InputError
from repjax.onnx.graph import Graph, split
from repjax.onnx.values import Atom, Axes, Value, aligned, extent, flat


def elementwise(graph: Graph, op: str, *values: Value) -> Value:
  """Adds an operator on numbers at the same places. Axes of length 1 are repeated."""
  unit = unified(graph, values)
  moving = [value for value in unit if not value.is_constant]
  if not moving:
    raise InputError(
      "this model computes with numbers that repeat for each image of the batch, for which the "
      "ONNX graph has no operator. Make them without the batch, and add them by broadcasting"
    )
  stored = _cut(common_layout(unit), unit)
  return Value(graph.add(op, [_fitted(graph, v, stored) for v in unit]), moving[0].axes, stored)


def _cut(stored: Axes, values: Sequence[Value]) -> Axes:
  """Cuts stored axes so that each value has all atoms of an axis or none.

  Only then is a value broadcast along whole axes. Known numbers may have some atoms of an axis,
  since they can be repeated in the file, but not as often as there are images.
  """
  batched = {a for axis in stored if not isinstance(extent(axis), int) for a in axis}
  have = [(set(flat(value.stored)), value.is_constant) for value in values]
  have = [(atoms, is_constant) for atoms, is_constant in have if atoms or not is_constant]

  def owners(atom: Atom) -> list[bool]:
    return [atom in atoms for atoms, known in have if not known or atom in batched]

  return split(stored, owners)


def unified(graph: Graph, values: Sequence[Value]) -> list[Value]:
  """Returns values of one rank, or scalars, with the same atoms on their axes."""
  rank = max(len(value.axes) for value in values)
  full = [
    value if len(value.axes) == rank else dataclasses.replace(value, axes=((),) * rank)
    for value in values
  ]
  places = [(axis,) * len(values) for axis in range(rank)]
  found = aligned(full, places) or aligned([graph.plain(value) for value in full], places)
  assert found is not None  # plain values have one atom for each axis, of the same length
  return found


def common_layout(values: Sequence[Value]) -> Axes:
  """Chooses how the result of several values is stored.

  The result is stored as a full operand, with channels first if one is. If no operand is full, the
  result stores the atoms of all operands, with channels first.
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
  """Returns a tensor that ONNX broadcasts to the stored axes: length 1 where atoms are missing."""
  have = set(flat(value.stored))
  value = graph.arrange(value, tuple(axis if set(axis) & have else () for axis in stored))
  if value.is_constant and not have:
    return value.array.reshape(())
  return value.tensor
