"""Kernels of terms, as expressions: the algebra of `repjax.algebra` on values that come later.

All kernels are (taps of all axes of the source besides the channels, I/g, O). The axis of the batch
counts as an axis with one tap.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from repjax import algebra
from repjax.fusion.expressions import Expression, derived
from repjax.fusion.values import Term
from repjax.fusion.vectors import widened
from repjax.fusion.windows import Window


def regrouped(kernel: Expression, groups: int, fewer: int) -> Expression:
  """Returns the kernel of the same convolution in fewer groups."""
  if groups == fewer:
    return kernel
  return derived(algebra.merge_groups, kernel, groups=groups, fewer=fewer)


def diagonal(term: Term, table: Any) -> Expression:
  """Returns the depthwise kernel of a term without a kernel: its scale, at every tap."""
  features, dtype = term.features, algebra.wide_dtype(term.dtype)
  scale = term.scale or table.constant(np.ones((), dtype))
  return derived(_spread_scale, scale, taps=term.taps, features=features)


def _spread_scale(scale: Any, taps: tuple[int, ...], features: int) -> Any:
  shape = (*taps, 1, features)
  return jnp.broadcast_to(scale.reshape((1,) * (len(shape) - scale.ndim) + scale.shape), shape)


def kernel_of(term: Term, groups: int, table: Any) -> Expression:
  """Returns the kernel of a term in a number of groups that divides the term's own."""
  if term.kernel is not None:
    return regrouped(widened(term.kernel), term.groups, groups)
  assert term.features is not None
  return regrouped(diagonal(term, table), term.features, groups)


def with_kernel(term: Term, table: Any) -> Term:
  """Returns a term with a kernel that computes the same, a depthwise one where it had none."""
  if term.kernel is not None:
    return term
  assert term.features is not None
  kernel = diagonal(term, table)
  return dataclasses.replace(term, kernel=kernel, scale=None, groups=term.features)


def embedded(kernel: Expression, old: Sequence[Window], new: Sequence[Window]) -> Expression:
  """Returns the kernel on the grid of larger windows; windows are those of the axes with taps."""
  places = tuple(window.place_in(larger) for window, larger in zip(old, new))
  if not any(map(any, places)):
    return kernel
  return derived(_padded, kernel, places=places)


def _padded(kernel: Any, places: tuple[tuple[int, int, int], ...]) -> Any:
  kernel = algebra.dilate_kernel(kernel, tuple(between + 1 for *_, between in places))
  config = [*((before, after, 0) for before, after, _ in places), (0, 0, 0), (0, 0, 0)]
  return lax.pad(kernel, jnp.zeros((), kernel.dtype), config)


def input_scaled(kernel: Expression, vector: Expression, groups: int) -> Expression:
  """Returns the kernel of the convolution after a scale of its inputs, a vector (I,) or ()."""
  return derived(_by_inputs, widened(kernel), widened(vector), groups=groups)


def _by_inputs(kernel: Any, vector: Any, groups: int) -> Any:
  """Multiplies each weight by the number of the channel that it reads."""
  dtype = algebra.wide_dtype(kernel.dtype, vector.dtype)
  kernel, vector = kernel.astype(dtype), vector.astype(dtype)
  *taps, inputs, outputs = kernel.shape
  if not vector.ndim:
    return kernel * vector
  each = vector.reshape(groups, inputs).T  # (I/g, g)
  each = jnp.repeat(each, outputs // groups, axis=1)  # (I/g, O)
  return kernel * each.reshape(*(1 for _ in taps), inputs, outputs)


def shift_by_tap(kernel: Expression, shift: Expression, groups: int) -> Expression:
  """Returns what a shift of the inputs, (I,) or (), adds through each tap: (taps, O)."""
  return derived(_summed_inputs, input_scaled(kernel, shift, groups))


def _summed_inputs(kernel: Any) -> Any:
  return kernel.sum(-2)


def summed_taps(shift: Expression) -> Expression:
  """Returns the sum over all taps of (taps, O)."""
  return derived(_summed_taps, shift)


def _summed_taps(shift: Any) -> Any:
  return shift.reshape(-1, shift.shape[-1]).sum(0)


def rearranged(kernel: Expression, order: Sequence[int], taps: Sequence[int]) -> Expression:
  """Returns a kernel or a map of taps with its axes of taps in a new order, then reshaped.

  Args:
    kernel: (taps, ...).
    order: the axes of taps in their new order.
    taps: number of taps of each axis of the result. Axes with one tap may come and go.
  """
  return derived(_rearranged, kernel, order=tuple(order), taps=tuple(taps))


def _rearranged(kernel: Any, order: tuple[int, ...], taps: tuple[int, ...]) -> Any:
  rest = range(len(order), kernel.ndim)
  tail = kernel.shape[len(order) :]
  return kernel.transpose(*order, *rest).reshape(*taps, *tail)


def chained(
  first: Expression,
  second: Expression,
  groups: int,
  windows: tuple[Sequence[Window], Sequence[Window], Sequence[Window]],
) -> Expression:
  """Returns the kernel of two convolutions, one after the other, in a number of groups.

  Args:
    first: (taps, I/g, M).
    second: (taps, M/g, O).
    groups: number of groups of both.
    windows: of the first kernel, of the second and of the result, along the axes with taps.
  """
  steps = [
    (one.dilation // whole.dilation, two.dilation * one.stride // whole.dilation)
    for one, two, whole in zip(*windows)
  ]
  # The step of a lone tap means nothing, but must not be 0.
  first_steps = tuple(max(one, 1) for one, _ in steps)
  second_steps = tuple(max(two, 1) for _, two in steps)
  return derived(
    algebra.chain_kernels,
    *(first, second),
    groups=groups,
    first_steps=first_steps,
    second_steps=second_steps,
  )


def input_rows(kernel: Expression, start: int, stop: int) -> Expression:
  """Returns the part of an ungrouped kernel that reads a range of channels."""
  return derived(_rows, kernel, start=start, stop=stop)


def _rows(kernel: Any, start: int, stop: int) -> Any:
  return kernel[..., start:stop, :]


def pointwise_map(border: Expression, kernel: Expression, groups: int) -> Expression:
  """Returns a border's kernel (taps, M) after a pointwise convolution (1..., M/g, O): (taps, O)."""
  return derived(_pointwise, border, regrouped(widened(kernel), groups, 1))


def _pointwise(border: Any, kernel: Any) -> Any:
  matrix = kernel.reshape(border.shape[-1], -1)
  dtype = algebra.wide_dtype(border.dtype, matrix.dtype)
  border, matrix = border.astype(dtype), matrix.astype(dtype)
  return jnp.einsum("...i,io->...o", border, matrix, precision=lax.Precision.HIGHEST)
