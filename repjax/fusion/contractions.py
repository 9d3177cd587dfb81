"""Matrix products over several axes, in a batch of matrices, or after a reshape of any kind.

A contraction is a product of a source with weights whose axes are atoms. Some atoms are summed.
Some are shared by source and result, as in a batch of matrices. The weights add the rest.

  y[g, n, v, u, o] = sum over h, w, i of x[n, h, w, g, i] M[g, h, w, i, v, u, o] + b[g, v, u, o]

A scale and a shift after the product may vary along all axes that the weights have. Convolutions
over the same tiles can be added, since a convolution over a tile is such a product (RepMLP).
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from repjax.fusion.expressions import Expression, derived
from repjax.fusion.layouts import (
  Atom,
  Layout,
  atoms_of,
  reshaped,
  sizes,
  split_axes,
  with_splits,
)
from repjax.fusion.vectors import plus, times, widened
from repjax.program import Equation


@dataclasses.dataclass(frozen=True, eq=False)
class Contraction:
  """A product of a source with weights over several axes, and a shift.

  Attributes:
    layout: the atoms of the source and of the value.
    atoms: the atoms of the kernel's axes.
    kernel: the weights, with an axis for each atom.
    bias: with an axis for each atom of the kernel that the value has, of length 1 where it does
      not vary. None for 0.
    dtype: the dtype that the program multiplies in.
    settings: precision and preferred dtype of the product.
    equations: the equations of the program that the product replaces.
    names: what it is made of, for the report.
  """

  layout: Layout
  atoms: tuple[Atom, ...]
  kernel: Expression
  bias: Expression | None
  dtype: Any
  settings: tuple[Any, ...]
  equations: frozenset[Equation]
  names: tuple[str, ...] = ("dense",)

  @property
  def summed(self) -> tuple[Atom, ...]:
    """The atoms that the source has and the value does not."""
    kept = {*atoms_of(self.layout.axes)}
    return tuple(atom for atom in atoms_of(self.layout.origin) if atom not in kept)

  @property
  def shared(self) -> tuple[Atom, ...]:
    """The atoms that source, kernel and value have."""
    source = {*atoms_of(self.layout.origin)} - {*self.summed}
    return tuple(atom for atom in self.atoms if atom in source)

  @property
  def kept(self) -> tuple[Atom, ...]:
    """The atoms of the kernel that the value has, in the order of the kernel."""
    return tuple(atom for atom in self.atoms if atom not in self.summed)

  def with_shape(self, shape: Sequence[int]) -> "Contraction | None":
    """Returns the same value reshaped, None if its atoms cannot be split that way."""
    found = reshaped(self.layout.axes, shape)
    if found is None:
      return None
    axes, splits = found
    layout = Layout(self.layout.source, split_axes(self.layout.origin, splits), axes)
    atoms, kept = with_splits(self.atoms, splits), with_splits(self.kept, splits)
    kernel = derived(_reshaped, self.kernel, shape=sizes(atoms))
    bias = self.bias
    if bias is not None:
      wide = derived(_broadcast, bias, shape=sizes(self.kept))
      bias = derived(_reshaped, wide, shape=sizes(kept))
    return dataclasses.replace(self, layout=layout, atoms=atoms, kernel=kernel, bias=bias)

  def with_order(self, order: Sequence[int]) -> "Contraction":
    """Returns the same value transposed."""
    axes = tuple(self.layout.axes[place] for place in order)
    return dataclasses.replace(self, layout=dataclasses.replace(self.layout, axes=axes))

  def spread(self, value: Expression) -> Expression | None:
    """Returns an array with the axes of the value as one with the atoms of the kernel.

    Returns None if the array varies along axes that the kernel does not have.
    """
    shape: dict[Atom, int] = {}
    rank = len(self.layout.axes)
    given = (1,) * (rank - len(value.shape)) + value.shape
    for axis, size in zip(self.layout.axes, given):
      if size != 1 and size != math.prod(sizes(axis)):
        return None
      shape.update((atom, atom.size if size != 1 else 1) for atom in axis)
    order = [atom for atom in atoms_of(self.layout.axes) if atom in self.kept]
    if any(shape[atom] != 1 for atom in atoms_of(self.layout.axes) if atom not in order):
      return None
    return derived(
      arranged,
      widened(value),
      shape=tuple(shape[atom] for atom in order),
      order=tuple(order.index(atom) for atom in self.kept),
    )

  def scaled(self, scale: Expression) -> "Contraction":
    """Returns the value times an array that `spread` returned."""
    shape = tuple(
      scale.shape[self.kept.index(atom)] if atom in self.kept else 1 for atom in self.atoms
    )
    kernel = times(widened(self.kernel), derived(_reshaped, scale, shape=shape))
    bias = None if self.bias is None else times(self.bias, scale)
    return dataclasses.replace(self, kernel=kernel, bias=bias)

  def shifted(self, shift: Expression) -> "Contraction":
    """Returns the value plus an array that `spread` returned."""
    return dataclasses.replace(self, bias=plus(self.bias, shift))

  def replacing(self, *equations: Equation) -> "Contraction":
    """Returns the same value, noted as a replacement of further equations."""
    return dataclasses.replace(self, equations=self.equations | {*equations})

  def after(
    self, scale: Expression | None, shift: Expression | None, axis: int
  ) -> "Contraction | None":
    """Returns the product whose source has yet to be scaled and shifted along an axis.

    Returns None if the axis is not summed as a whole.
    """
    atoms = self.layout.origin[axis]
    if not {*atoms} <= {*self.summed}:
      return None
    kernel, bias = widened(self.kernel), self.bias
    if shift is not None:
      moved = times(kernel, self._along(shift, atoms))
      summed = tuple(self.atoms.index(atom) for atom in self.summed)
      bias = plus(bias, derived(_summed, moved, axes=summed))
    if scale is not None:
      kernel = times(kernel, self._along(scale, atoms))
    return dataclasses.replace(self, kernel=kernel, bias=bias)

  def _along(self, vector: Expression, atoms: Sequence[Atom]) -> Expression:
    """Returns a vector over some atoms, or a number, with an axis for each atom of the kernel."""
    if not vector.shape:
      return derived(_reshaped, vector, shape=(1,) * len(self.atoms))
    order = [atom for atom in self.atoms if atom in atoms]
    shape = tuple(atom.size if atom in atoms else 1 for atom in self.atoms)
    places = tuple(atoms.index(atom) for atom in order)
    moved = derived(arranged, vector, shape=sizes(atoms), order=places)
    return derived(_reshaped, moved, shape=shape)


def _reshaped(value: Any, shape: tuple[int, ...]) -> Any:
  return value.reshape(shape)


def _broadcast(value: Any, shape: tuple[int, ...]) -> Any:
  return jnp.broadcast_to(value, shape)


def arranged(value: Any, shape: tuple[int, ...], order: tuple[int, ...]) -> Any:
  """Returns an array, reshaped and then transposed."""
  return value.reshape(shape).transpose(order)


def _summed(value: Any, axes: tuple[int, ...]) -> Any:
  return value.sum(axes)
