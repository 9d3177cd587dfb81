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
from jax import lax

from repjax import algebra
from repjax.fusion.counts import Counts
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
from repjax.fusion.values import Node, plus, times, widened
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
      _arranged,
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
    moved = derived(_arranged, vector, shape=sizes(atoms), order=places)
    return derived(_reshaped, moved, shape=shape)

  def step(self, shape: tuple[int, ...], dtype: Any) -> "Product":
    """Returns the instruction that computes the value."""
    layout, added = self.layout, [atom for atom in self.kept if atom not in self.shared]
    order = [*self.shared, *self.summed, *added]
    kernel = derived(
      _as_operand,
      self.kernel,
      order=tuple(self.atoms.index(atom) for atom in order),
      dtype=self.dtype,
    )
    origin = atoms_of(layout.origin)
    free = [atom for atom in origin if atom not in self.summed and atom not in self.shared]
    result = [*self.shared, *free, *added]
    target = atoms_of(layout.axes)
    bias = self.bias
    if bias is not None:
      where = [atom for atom in target if atom in self.kept]
      bias = derived(_arranged, bias, shape=bias.shape, order=tuple(map(self.kept.index, where)))
    return Product(
      contraction=self,
      kernel=kernel,
      bias=bias,
      summed=tuple(origin.index(atom) for atom in self.summed),
      shared=tuple(origin.index(atom) for atom in self.shared),
      order=tuple(result.index(atom) for atom in target),
      varies=tuple(atom in self.kept for atom in target),
      shape=shape,
      dtype=dtype,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
  """A contraction as an instruction.

  Attributes:
    contraction: what is computed.
    kernel: shared, summed and added atoms, in this order.
    bias: with an axis for each atom of the value that the kernel has, or None.
    summed, shared: axes of the source, reshaped to its atoms.
    order: how the axes of the product are moved to those of the value.
    varies: for each atom of the value, if the bias has an axis for it.
    shape, dtype: of the value.
  """

  contraction: Contraction
  kernel: Expression
  bias: Expression | None
  summed: tuple[int, ...]
  shared: tuple[int, ...]
  order: tuple[int, ...]
  varies: tuple[bool, ...]
  shape: tuple[int, ...]
  dtype: Any

  @property
  def sources(self) -> list[Node]:
    """The node that is read."""
    return [self.contraction.layout.source]

  @property
  def stored(self) -> list[Expression]:
    """The kernel and the bias."""
    return [self.kernel] if self.bias is None else [self.kernel, self.bias]

  @property
  def kinds(self) -> list[str]:
    """The kind of each stored array."""
    return ["kernel", "bias"][: len(self.stored)]

  @property
  def parts(self) -> list[str]:
    """The branches that are merged."""
    return list(self.contraction.names)

  @property
  def operations(self) -> int:
    """The number of equations that the instruction stands for."""
    return len(self.stored)

  @property
  def counts(self) -> Counts:
    """The cost of the instruction."""
    summed = math.prod(sizes(self.contraction.summed))
    stored = sum(each.size for each in self.stored)
    return Counts(1, math.prod(self.shape) * summed, stored)

  def run(self, x: Any, kernel: Any, bias: Any = None) -> list[Any]:
    """Computes the value from the source and the stored arrays."""
    x = x.reshape(sizes(atoms_of(self.contraction.layout.origin))).astype(kernel.dtype)
    count, rank = len(self.shared), len(self.shared) + len(self.summed)
    precision, preferred = self.contraction.settings
    numbers = (self.summed, tuple(range(count, rank))), (self.shared, tuple(range(count)))
    y = lax.dot_general(x, kernel, numbers, precision=precision, preferred_element_type=preferred)
    y = y.transpose(self.order)
    if bias is not None:
      lengths = iter(bias.shape)
      bias = bias.reshape([next(lengths) if each else 1 for each in self.varies])
      wide = algebra.wide_dtype(self.dtype)
      y = y.astype(wide) + bias.astype(wide)
    return [y.reshape(self.shape).astype(self.dtype)]


def _reshaped(value: Any, shape: tuple[int, ...]) -> Any:
  return value.reshape(shape)


def _broadcast(value: Any, shape: tuple[int, ...]) -> Any:
  return jnp.broadcast_to(value, shape)


def _arranged(value: Any, shape: tuple[int, ...], order: tuple[int, ...]) -> Any:
  return value.reshape(shape).transpose(order)


def _as_operand(kernel: Any, order: tuple[int, ...], dtype: Any) -> Any:
  return kernel.transpose(order).astype(dtype)


def _summed(value: Any, axes: tuple[int, ...]) -> Any:
  return value.sum(axes)
