"""Values: arrays whose logical axes are kept apart from how their numbers lie in a tensor.

An axis is divided into atoms. An axis of length 6 may be the atoms (2, 3): then an index has two
digits, and is 3 times the first plus the second. A tensor stores the same atoms, in an order that
need not be the order of the logical axes. So a reshape that splits or joins axes, and
a transposition, change the axes of a value and leave its tensor as it is.

  value                         axes               stored           numbers moved
  images                        n | h | w | c      n | c | h | w
  .reshape(N, H, W, 2, C/2)     n | h | w | 2 | d  n | 2 d | h | w   none (c is now 2 d)
  .swapaxes(3, 4)               n | h | w | d | 2  n | 2 d | h | w   none
"""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

Size = Any
"""A whole number above 1, or JAX's symbolic expression of the batch."""


class Atom:
  """A factor of an axis, above 1. Two atoms are the same only if they are identical."""

  __slots__ = ("size",)

  def __init__(self, size: Size):
    self.size = size


Axis = tuple[Atom, ...]
Axes = tuple[Axis, ...]


@dataclasses.dataclass(frozen=True)
class Value:
  """A logical array.

  Attributes:
    tensor: name of a tensor, or an array if the numbers are known.
    axes: logical axes, as the traced program sees them.
    stored: axes of the tensor. An atom of `axes` may be missing here: the numbers are then the same
      all along this atom, as after a broadcast.
  """

  tensor: str | np.ndarray
  axes: Axes
  stored: Axes

  @property
  def shape(self) -> tuple[Size, ...]:
    """The logical shape."""
    return tuple(map(extent, self.axes))

  @property
  def is_constant(self) -> bool:
    """True if the numbers are known."""
    return isinstance(self.tensor, np.ndarray)

  @property
  def array(self) -> np.ndarray:
    """The tensor of a constant."""
    assert isinstance(self.tensor, np.ndarray)
    return self.tensor

  @property
  def is_full(self) -> bool:
    """True if the tensor stores every atom."""
    return len(flat(self.stored)) == len(flat(self.axes))


def flat(axes: Iterable[Axis]) -> Axis:
  """Returns the atoms of some axes, in order."""
  return tuple(itertools.chain.from_iterable(axes))


def extent(atoms: Iterable[Atom]) -> Size:
  """Returns the length of an axis of these atoms."""
  return math.prod(atom.size for atom in atoms)


def new_axes(shape: Iterable[Size]) -> Axes:
  """Returns axes of one new atom each, or of no atom where the length is 1."""
  return tuple(() if is_one(size) else (Atom(size),) for size in shape)


def known(array: Any) -> Value:
  """Returns the value of a known array."""
  array = np.asarray(array)
  axes = new_axes(array.shape)
  return Value(array, axes, axes)


def is_one(size: Size) -> bool:
  """Checks that a length is the number 1. A symbolic batch size never counts as 1."""
  return isinstance(size, int | np.integer) and size == 1


def divides(divisor: Size, size: Size) -> bool:
  """Checks that a size divides a size, for every batch."""
  if isinstance(size, int) and not isinstance(divisor, int):
    return False
  return bool(size % divisor == 0)


def replaced(value: Value, parts: dict[Atom, Axis]) -> Value:
  """Returns the value with some atoms divided into several."""
  if not parts:
    return value

  def over(axes: Axes) -> Axes:
    return tuple(flat(parts.get(atom, (atom,)) for atom in axis) for axis in axes)

  return dataclasses.replace(value, axes=over(value.axes), stored=over(value.stored))


def renewed(value: Value) -> Value:
  """Returns the value with new atoms, so that its axes can stand beside the old ones in one array.

  The product of a matrix with itself, x @ x.T, has such axes.
  """
  atoms = (*flat(value.axes), *flat(value.stored))
  return replaced(value, {atom: (Atom(atom.size),) for atom in dict.fromkeys(atoms)})


def transpose(value: Value, permutation: Sequence[int]) -> Value:
  """Permutes the logical axes. The tensor stays."""
  return dataclasses.replace(value, axes=tuple(value.axes[axis] for axis in permutation))


def broadcast(value: Value, shape: Sequence[Size], dimensions: Sequence[int]) -> Value:
  """Puts axes where `dimensions` say, and repeats them to a shape. The tensor stays."""
  axes = list(new_axes(shape))
  for axis, place in zip(value.axes, dimensions):
    if axis:
      axes[place] = axis
  return dataclasses.replace(value, axes=tuple(axes))


def reshape(value: Value, shape: Sequence[Size]) -> Value | None:
  """Returns the same numbers under new logical axes, or None if the atoms cannot be divided so.

  Atoms are handed out in order. Where an atom is larger than what an axis still needs, it is split:
  6 into (2, 3) for the shape (2, 3). The shape (4, 6) cannot become (6, 4), since 4 does not divide
  6: its numbers have to be read in the order of the logical axes first.
  """
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
  # The rest of a split atom may have been split again, so that one replacement is not enough.
  while any(atom in parts for atom in flat(stored)):
    stored = tuple(flat(parts.get(atom, (atom,)) for atom in axis) for axis in stored)
  return None if waiting else dataclasses.replace(value, axes=tuple(axes), stored=stored)


def aligned(values: Sequence[Value], places: Sequence[Sequence[int]]) -> list[Value] | None:
  """Returns the values with the same atoms on axes that belong together, such as those of a sum.

  Args:
    values: any number of values.
    places: for each common axis, its place in each value. An axis of length 1 is repeated.

  Returns:
    The values, or None if an axis is divided into (2, 3) in one value and (3, 2) in a second.
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
  """Finds the coarsest division of an axis that refines its division in every row.

  The rows (6,) and (2, 3) have the common atoms (2, 3), of which the first row's 6 is made.

  Returns:
    The common atoms, and for each row a map from its atoms to common atoms. None if there are none.
  """
  waiting = {index: [(atom.size, atom) for atom in row] for index, row in rows.items()}
  parts: dict[int, dict[Atom, Axis]] = {index: {} for index in rows}
  common: list[Atom] = []
  while rows and all(waiting.values()):
    # The smallest first atom must divide all first atoms, and is split off each of them.
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
