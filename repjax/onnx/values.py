"""Values whose logical axes are kept apart from how their numbers lie in a tensor.

An axis is a product of atoms, its digits in a mixed radix, the most significant first. A tensor's
stored axes are products of the same atoms in any order. So a reshape that only splits or joins axes
and a transposition change what is known about a tensor and not the tensor itself.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Size = Any  # a whole number above 1, or JAX's expression of the batch


class Atom:
  """A factor of an axis; two of one size are not the same. There are none of size 1."""

  __slots__ = ("size",)

  def __init__(self, size: Size):
    self.size = size


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Value:
  """A logical array.

  Attributes:
    tensor: a tensor's name, or the numbers where they are known.
    axes: logical, as the traced program sees them.
    stored: the tensor's; atoms that are missing here are those along which all numbers are alike.
  """

  tensor: str | np.ndarray
  axes: Axes
  stored: Axes

  @property
  def shape(self) -> tuple[Size, ...]:
    """The logical one."""
    return tuple(map(extent, self.axes))

  @property
  def is_constant(self) -> bool:
    return isinstance(self.tensor, np.ndarray)

  @property
  def array(self) -> np.ndarray:
    """The tensor of a constant."""
    assert isinstance(self.tensor, np.ndarray)
    return self.tensor

  @property
  def is_full(self) -> bool:
    """Whether no atom is missing in the tensor."""
    return len(flat(self.stored)) == len(flat(self.axes))


def flat(axes: Iterable[Axis]) -> Axis:
  """All atoms in their order."""
  return tuple(itertools.chain.from_iterable(axes))


def extent(atoms: Iterable[Atom]) -> Size:
  """The length of an axis of these atoms."""
  return math.prod(atom.size for atom in atoms)


def new_axes(shape: Iterable[Size]) -> Axes:
  """Axes of one atom each, or of none where the length is 1."""
  return tuple(() if is_one(size) else (Atom(size),) for size in shape)


def known(array: Any) -> Value:
  """A value whose numbers are known."""
  array = np.asarray(array)
  axes = new_axes(array.shape)
  return Value(array, axes, axes)


def is_one(size: Size) -> bool:
  return isinstance(size, int | np.integer) and size == 1


def divides(divisor: Size, size: Size) -> bool:
  """Whether it does so for every batch size."""
  if isinstance(size, int) and not isinstance(divisor, int):
    return False
  return bool(size % divisor == 0)


def replaced(value: Value, parts: dict[Atom, Axis]) -> Value:
  """The value with atoms divided into others."""
  if not parts:
    return value

  def over(axes: Axes) -> Axes:
    return tuple(flat(parts.get(atom, (atom,)) for atom in axis) for axis in axes)

  return dataclasses.replace(value, axes=over(value.axes), stored=over(value.stored))


def renewed(value: Value) -> Value:
  """The value with atoms of its own, so that it can stand beside itself in one array."""
  atoms = (*flat(value.axes), *flat(value.stored))
  return replaced(value, {atom: (Atom(atom.size),) for atom in dict.fromkeys(atoms)})


def transpose(value: Value, permutation: Sequence[int]) -> Value:
  """The logical axes in another order; the tensor stays."""
  return dataclasses.replace(value, axes=tuple(value.axes[axis] for axis in permutation))


def broadcast(value: Value, shape: Sequence[Size], dimensions: Sequence[int]) -> Value:
  """Axes put where `dimensions` say, and repeated to a shape; the tensor stays."""
  axes = list(new_axes(shape))
  for axis, place in zip(value.axes, dimensions):
    if axis:
      axes[place] = axis
  return dataclasses.replace(value, axes=tuple(axes))


def reshape(value: Value, shape: Sequence[Size]) -> Value | None:
  """Other logical axes over the same numbers; None where atoms cannot be divided so."""
  waiting, parts, axes = list(flat(value.axes)), {}, []
  for size in shape:
    axis: list[Atom] = []
    while not is_one(size):
      if not waiting:
        return None
      atom = waiting.pop(0)
      if not divides(atom.size, size):
        if not divides(size, atom.size):
          return None
        whole, atom, rest = atom, Atom(size), Atom(atom.size // size)
        parts[whole] = (atom, rest)
        waiting.insert(0, rest)
      axis.append(atom)
      size = size // atom.size
    axes.append(tuple(axis))
  stored = value.stored
  while any(atom in parts for atom in flat(stored)):  # a rest may be divided again
    stored = tuple(flat(parts.get(atom, (atom,)) for atom in axis) for axis in stored)
  return None if waiting else dataclasses.replace(value, axes=tuple(axes), stored=stored)


def aligned(values: Sequence[Value], places: Sequence[Sequence[int]]) -> list[Value] | None:
  """The same values with shared atoms on axes that are one, such as those of a sum.

  Args:
    values: any number of them.
    places: for each common axis where it is in each value. Where one has length 1, it is repeated.

  Returns:
    None where lengths do not divide.
  """
  values = list(values)
  for place in places:
    rows = {index: value.axes[axis] for index, (value, axis) in enumerate(zip(values, place))}
    found = _divided({index: row for index, row in rows.items() if row})
    if found is None:
      return None
    common, parts = found
    for index, axis in enumerate(place):
      value = replaced(values[index], parts.get(index, {}))
      axes = (*value.axes[:axis], common, *value.axes[axis + 1 :])
      values[index] = dataclasses.replace(value, axes=axes)
  return values


def _divided(rows: dict[int, Axis]) -> tuple[Axis, dict[int, dict[Atom, Axis]]] | None:
  """Atoms that all rows have in common, and what each row's atoms are made of."""
  waiting = {index: [(atom.size, atom) for atom in row] for index, row in rows.items()}
  parts: dict[int, dict[Atom, Axis]] = {index: {} for index in rows}
  common: list[Atom] = []
  while rows and all(waiting.values()):
    sizes = [row[0][0] for row in waiting.values()]
    least = next((a for a in sizes if all(divides(a, b) for b in sizes)), None)
    if least is None:
      return None
    shared = Atom(least)
    common.append(shared)
    for index, row in waiting.items():
      size, origin = row.pop(0)
      parts[index][origin] = (*parts[index].get(origin, ()), shared)
      if not is_one(size // least):
        row.insert(0, (size // least, origin))
  return None if any(waiting.values()) else (tuple(common), parts)
