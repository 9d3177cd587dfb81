"""Values as moved numbers of earlier values, and the rules for reshapes and transpositions.

An atom is a part of an axis. A map (32, 7, 7, 64) that is reshaped to (32, 7, 7, 4, 16) has the
atoms n, h, w, g and i: the axis of length 64 was g times i. A transposition moves atoms. A reshape
joins or splits atoms. Axes of length 1 have no atoms.

A reshape that only adds or drops axes of length 1, and a transposition, are views of a sum, so that
convolutions merge across them. Any other reshape makes a layout.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from repjax.fusion import kernels
from repjax.fusion.arithmetic import Given, Rule
from repjax.fusion.expressions import Expression
from repjax.fusion.report import Counts
from repjax.fusion.values import Affine, Border, Node, affine_of


@dataclasses.dataclass(frozen=True, eq=False)
class Atom:
  """A part of an axis. Two atoms are the same only if identical."""

  size: int


Atoms = tuple[Atom, ...]
Axes = tuple[Atoms, ...]
Splits = dict[Atom, Atoms]


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

  @property
  def shape(self) -> tuple[int, ...]:
    """The shape of the value."""
    return tuple(math.prod(sizes(axis)) for axis in self.axes)

  @property
  def step(self) -> "Rearranged":
    """The operation that makes the value from the source."""
    origin = atoms_of(self.origin)
    order = tuple(map(origin.index, atoms_of(self.axes)))
    return Rearranged(sizes(origin), order, self.shape)

  def reshaped(self, shape: Sequence[int]) -> "Layout | None":
    """Returns the value in a shape, None if its atoms cannot be split that way."""
    found = regrouped(self.axes, shape)
    if found is None:
      return None
    axes, splits = found
    return Layout(self.source, tuple(with_splits(axis, splits) for axis in self.origin), axes)

  def permuted(self, order: Sequence[int]) -> "Layout":
    """Returns the value transposed."""
    return dataclasses.replace(self, axes=tuple(self.axes[place] for place in order))


@dataclasses.dataclass(frozen=True)
class Rearranged:
  """The instruction that reshapes, transposes and reshapes a value."""

  atoms: tuple[int, ...]
  order: tuple[int, ...]
  shape: tuple[int, ...]
  counts = Counts()

  def run(self, x: Any) -> list[Any]:
    """Returns the moved numbers."""
    return [x.reshape(self.atoms).transpose(self.order).reshape(self.shape)]


def atoms_of(axes: Axes) -> Atoms:
  """Returns the atoms of all axes, in order."""
  return tuple(itertools.chain.from_iterable(axes))


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
  if affine.is_view and term.plain and term.source is not node and node.dtype == term.source.dtype:
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
  parts: Splits = {}
  for mine, theirs in zip(layout.origin, other.origin):
    found = regrouped((mine,), sizes(theirs))
    if found is None or found[1]:
      return None
    parts.update(zip(theirs, found[0]))
  origin = tuple(atoms_of(tuple(parts[atom] for atom in axis)) for axis in other.axes)
  return Layout(node, origin, layout.axes)


def regrouped(axes: Axes, shape: Sequence[int]) -> tuple[Axes, Splits] | None:
  """Returns the axes of a reshaped value, and the parts of each atom that had to be split.

  Returns None if an atom would have to be split unevenly.
  """
  rest, splits, result = list(atoms_of(axes)), {}, []
  for size in shape:
    axis: list[Atom] = []
    # Equality comes first: a batch of any size cannot be compared with a number.
    while (length := math.prod(sizes(axis))) != size:
      if not rest or length == 0 or size % length:
        return None
      atom, missing = rest.pop(0), size // length
      if atom.size != missing and atom.size > missing:
        if atom.size % missing:
          return None
        splits[atom] = (Atom(missing), Atom(atom.size // missing))
        atom, second = splits[atom]
        rest.insert(0, second)
      axis.append(atom)
    result.append(tuple(axis))
  return (tuple(result), splits) if not rest else None


def with_splits(atoms: Atoms, splits: Splits) -> Atoms:
  """Returns atoms with the parts of each atom that was split in its place."""
  return tuple(
    part
    for atom in atoms
    for part in (with_splits(splits[atom], splits) if atom in splits else (atom,))
  )


def spread(value: Expression, axes: Axes, target: Axes) -> Expression | None:
  """Returns an array with the axes of one value as one with the axes of a moved value.

  Both have the same atoms. The result has length 1 along axes that it does not vary along.

  Args:
    value: with length 1 along axes that it does not vary along.
    axes: the atoms of the axes of the array. Leading axes may be missing in the array.
    target: the atoms of the axes of the result.

  Returns:
    None if the array has an axis of a different length.
  """
  given = (1,) * (len(axes) - len(value.shape)) + value.shape
  long = {atom for axis, size in zip(axes, given) if size != 1 for atom in axis}
  if any(size not in (1, math.prod(sizes(axis))) for axis, size in zip(axes, given)):
    return None
  atoms, moved = atoms_of(axes), atoms_of(target)
  wide = [axis if long & {*axis} else () for axis in target]
  kept = {*atoms_of(tuple(wide))}
  return kernels.arranged(
    value,
    order=tuple(map(atoms.index, moved)),
    shape=tuple(atom.size if atom in long else 1 for atom in atoms),
    wide=tuple(atom.size if atom in kept else 1 for atom in moved),
    into=tuple(math.prod(sizes(axis)) for axis in wide),
  )


def move(given: Given) -> Affine | Layout | None:
  """Applies the rule of a transposition, a reshape, or a broadcast that only adds axes of length 1.

  The result is a view if no axis is split or joined, and else a layout. A moved sum that is not
  computed keeps its layout, so that its terms may yet merge.
  """
  node, shape, params = given.node(), given.shape, given.params
  if node is None or math.prod(shape) != math.prod(node.shape):
    return None
  waits = node.layout is not None and not node.computed and node.layout.source.is_open
  places = _places(given, node.shape)
  view = None if waits or places is None else moved(node, shape, places)
  if view is not None:
    return view
  layout = layout_of(node)
  order = params.get("permutation")
  return layout.reshaped(shape) if order is None else layout.permuted(order)


def _places(given: Given, old: Sequence[int]) -> list[int | None] | None:
  """Returns for each axis of a result the axis of the operand, None for a new axis of length 1.

  Returns None alone if axes are split or joined.
  """
  params, new = given.params, given.shape
  if "permutation" in params:
    return list(params["permutation"])
  if "broadcast_dimensions" in params:
    axes = {place: axis for axis, place in enumerate(params["broadcast_dimensions"])}
    return [axes.get(place) for place in range(len(new))]
  if [size for size in old if size != 1] != [size for size in new if size != 1]:
    return None
  places: list[int | None] = []
  at = 0  # axes of length 1 are matched from left to right
  for size in new:
    while size != 1 and old[at] == 1:
      at += 1  # an old axis of length 1 that is dropped
    same = at < len(old) and old[at] == size
    places.append(at if same else None)
    at += same
  return places


def moved(node: Node, shape: tuple[int, ...], places: Sequence[int | None]) -> Affine | None:
  """Returns a node with its axes in new places.

  Args:
    node: the value.
    shape: shape of the result.
    places: for each axis of the result the axis of the node, None for a new one of length 1.

  Returns:
    None where the channels are dropped, or where a border would lose an axis.
  """
  affine = affine_of(node)
  lost = affine.channel is not None and affine.channel not in places
  permuted = None not in places and len(places) == len(node.shape)
  if lost or (affine.borders and not permuted):
    return None
  terms = tuple(
    dataclasses.replace(
      term, view=tuple(None if place is None else term.view[place] for place in places)
    )
    for term in affine.terms
  )
  channel = None if affine.channel is None else list(places).index(affine.channel)
  borders = tuple(_moved_border(border, affine.channel, places) for border in affine.borders)
  return dataclasses.replace(affine, shape=shape, terms=terms, channel=channel, borders=borders)


def _moved_border(border: Border, channel: int | None, places: Sequence[int | None]) -> Border:
  others = [axis for axis in range(len(border.windows)) if axis != channel]
  order = [place for place in places if place is not None]
  kept = [others.index(place) for place in order if place != channel]
  taps = [border.kernel.shape[place] for place in kept]
  windows = tuple(border.windows[place] for place in order)
  return Border(kernels.rearranged(border.kernel, kept, taps), windows)


RULES: dict[str, Rule] = dict.fromkeys(
  ("broadcast_in_dim", "reshape", "squeeze", "transpose"), move
)
