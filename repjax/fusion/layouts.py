"""Values as products of atoms, so that any reshape can be followed.

An atom is a part of an axis. A map (32, 7, 7, 64) that is reshaped to (32, 7, 7, 4, 16) has the
atoms n, h, w, g and i: the axis of length 64 was g times i. A transposition moves atoms. A reshape
joins or splits atoms. Axes of length 1 have no atoms.
"""

import dataclasses
import math
from collections.abc import Sequence

from repjax.fusion.values import Node, affine_of


@dataclasses.dataclass(frozen=True, eq=False)
class Atom:
  """A part of an axis. Two atoms are the same only if identical."""

  size: int


Axes = tuple[tuple[Atom, ...], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
  """A value whose numbers are those of a source, moved.

  Attributes:
    source: the node that holds the numbers.
    origin: the atoms of each axis of the source.
    axes: the atoms of each axis of the value.
  """

  source: Node
  origin: Axes
  axes: Axes


def atoms_of(axes: Axes) -> tuple[Atom, ...]:
  """Returns the atoms of all axes, in order."""
  return tuple(atom for axis in axes for atom in axis)


def sizes(atoms: Sequence[Atom]) -> tuple[int, ...]:
  """Returns the sizes of atoms, the shape of an array with an axis for each."""
  return tuple(atom.size for atom in atoms)


def new_axes(shape: Sequence[int]) -> Axes:
  """Returns one new atom for each axis that is longer than 1."""
  return tuple((Atom(size),) if size != 1 else () for size in shape)


def layout_of(node: Node) -> Layout:
  """Returns a node as moved numbers of its source, which may be the node itself.

  A value that is computed is its own source, since other terms start from there too.
  """
  if node.layout is not None and not node.computed:
    return node.layout
  affine = affine_of(node)
  term = affine.terms[0]
  plain = affine.is_view and all(
    window.plain(size) for window, size in zip(term.windows, term.source.shape)
  )
  if plain and term.source is not node and node.dtype == term.source.dtype:
    below = layout_of(term.source)
    axes = tuple(() if place is None else below.axes[place] for place in term.view)
    return dataclasses.replace(below, axes=axes)
  axes = new_axes(node.shape)
  return Layout(node, axes, axes)


def rebased(layout: Layout, node: Node) -> Layout | None:
  """Returns the same value as moved numbers of a node that has the same source.

  Returns None if the node has a different source, or splits its axes differently.
  """
  other = layout_of(node)
  if other.source is not layout.source:
    return None
  parts: dict[Atom, tuple[Atom, ...]] = {}
  for mine, theirs in zip(layout.origin, other.origin):
    found = reshaped((mine,), sizes(theirs))
    if found is None or found[1]:
      return None
    parts.update(zip(theirs, found[0]))
  origin = tuple(tuple(part for atom in axis for part in parts[atom]) for axis in other.axes)
  return Layout(node, origin, layout.axes)


def reshaped(axes: Axes, shape: Sequence[int]) -> tuple[Axes, dict[Atom, tuple[Atom, ...]]] | None:
  """Returns the axes of a reshaped value, and the parts of each atom that had to be split.

  Returns None if an atom would have to be split unevenly.
  """
  rest, splits, result = list(atoms_of(axes)), {}, []
  for size in shape:
    axis: list[Atom] = []
    while math.prod(sizes(axis)) < size:
      if not rest:
        return None
      atom, missing = rest.pop(0), size // math.prod(sizes(axis))
      if size % math.prod(sizes(axis)):
        return None
      if atom.size > missing:
        if atom.size % missing:
          return None
        parts = (Atom(missing), Atom(atom.size // missing))
        splits[atom] = parts
        atom, rest = parts[0], [parts[1], *rest]
      axis.append(atom)
    if math.prod(sizes(axis)) != size:
      return None
    result.append(tuple(axis))
  return (tuple(result), splits) if not rest else None


def with_splits(atoms: Sequence[Atom], splits: dict[Atom, tuple[Atom, ...]]) -> tuple[Atom, ...]:
  """Returns atoms with the parts of each atom that was split in its place."""
  result: list[Atom] = []
  for atom in atoms:
    result += with_splits(splits[atom], splits) if atom in splits else [atom]
  return tuple(result)


def split_axes(axes: Axes, splits: dict[Atom, tuple[Atom, ...]]) -> Axes:
  """Returns axes with the parts of each atom that was split in its place."""
  return tuple(with_splits(axis, splits) for axis in axes)
