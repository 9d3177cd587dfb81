"""A product over several axes as one instruction of the fused program."""

import dataclasses
import math
from typing import Any

from jax import lax

from repjax import algebra
from repjax.fusion.contractions import Contraction, arranged
from repjax.fusion.counts import Counts
from repjax.fusion.expressions import Expression, derived
from repjax.fusion.layouts import atoms_of, sizes
from repjax.fusion.values import Node


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


def product_of(contraction: Contraction, shape: tuple[int, ...], dtype: Any) -> Product:
  """Returns the instruction that computes the value."""
  layout, added = (
    contraction.layout,
    [atom for atom in contraction.kept if atom not in contraction.shared],
  )
  order = [*contraction.shared, *contraction.summed, *added]
  kernel = derived(
    _as_operand,
    contraction.kernel,
    order=tuple(contraction.atoms.index(atom) for atom in order),
    dtype=contraction.dtype,
  )
  origin = atoms_of(layout.origin)
  free = [
    atom for atom in origin if atom not in contraction.summed and atom not in contraction.shared
  ]
  result = [*contraction.shared, *free, *added]
  target = atoms_of(layout.axes)
  bias = contraction.bias
  if bias is not None:
    where = [atom for atom in target if atom in contraction.kept]
    bias = derived(
      arranged, bias, shape=bias.shape, order=tuple(map(contraction.kept.index, where))
    )
  return Product(
    contraction=contraction,
    kernel=kernel,
    bias=bias,
    summed=tuple(origin.index(atom) for atom in contraction.summed),
    shared=tuple(origin.index(atom) for atom in contraction.shared),
    order=tuple(result.index(atom) for atom in target),
    varies=tuple(atom in contraction.kept for atom in target),
    shape=shape,
    dtype=dtype,
  )


def _as_operand(kernel: Any, order: tuple[int, ...], dtype: Any) -> Any:
  return kernel.transpose(order).astype(dtype)
