"""Convolutions over tiles as products over all pixels of a tile.

RepMLP trains convolutions beside a fully connected layer over the same tiles. A convolution that
keeps the size of the tile is such a layer too (`repjax.algebra.conv_to_dense`), so that both become
one.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp

from repjax import algebra
from repjax.fusion.contractions import Contraction, arranged
from repjax.fusion.cost import Group, grouped
from repjax.fusion.emission import joint_kernel
from repjax.fusion.expressions import Expression, derived
from repjax.fusion.layouts import Atom, rebased, sizes
from repjax.fusion.values import Affine
from repjax.fusion.vectors import plus
from repjax.fusion.windows import Window


def with_convolution(product: Contraction, affine: Affine, table: Any) -> Contraction | None:
  """Returns a product with a convolution over its tiles added to its weights.

  Args:
    product: over all pixels and channels of a source.
    affine: a sum of convolutions of the same source.
    table: the table of expressions.

  Returns:
    None if the two do not have the same source and result, or compute in different dtypes.
  """
  group, channel = _convolution(affine, product), affine.channel
  layout = None if group is None else rebased(product.layout, group.head.source)
  if group is None or layout is None or channel is None:
    return None
  product = dataclasses.replace(product, layout=layout)
  spatial = _spatial(group, product)
  found = _atoms(product, group.head.view, spatial, channel) if spatial else None
  if found is None or group.groups % found[1]:
    return None
  atoms, shared = found
  kernel = _over_tile(group, spatial, shared, table)
  order = tuple(atoms.index(atom) for atom in product.atoms)
  kernel = plus(product.kernel, derived(arranged, kernel, shape=sizes(atoms), order=order))
  result = Contraction(
    product.layout,
    product.atoms,
    kernel,
    product.bias,
    product.dtype,
    product.settings,
    product.equations | affine.equations,
    (*product.names, *(" > ".join(term.names) for term in group.members)),
  )
  if affine.bias is None:
    return result
  shape = [1] * len(affine.shape)
  shape[channel] = -1 if affine.bias.shape else 1
  shift = result.spread(derived(_reshaped, affine.bias, shape=tuple(shape)))
  return None if shift is None else result.shifted(shift)


def _convolution(affine: Affine, product: Contraction) -> Group | None:
  """Returns a sum as one convolution of the product's source, None if it is none.

  A source that is scaled is a depthwise 1x1 convolution.
  """
  groups = grouped(affine.terms, 1.0)
  if len(groups) != 1 or affine.borders:
    return None
  (group,) = groups
  head = group.head
  if len(head.view) != len(product.layout.axes):
    return None
  if not group.is_product:
    wider = head.dtype.itemsize > product.dtype.itemsize
    return None if wider or not head.features else dataclasses.replace(group, groups=head.features)
  same = (head.dtype, group.settings) == (product.dtype, product.settings)
  return group if same else None


def _spatial(group: Group, product: Contraction) -> list[int]:
  """Returns the two axes of the source that a centred convolution runs along.

  Returns [] if the convolution is different.
  """
  head, moved = group.head, []
  for axis in head.others:
    window, size = group.windows[axis], head.source.shape[axis]
    if {*product.layout.origin[axis]} & {*product.summed}:
      moved.append(axis)
      if window.taps % 2 == 0 or window != Window(size, window.taps, low=window.taps // 2):
        return []
    elif not window.plain(size):
      return []
  return moved if len(moved) == 2 else []


def _atoms(
  product: Contraction, view: tuple[int | None, ...], spatial: list[int], channel: int
) -> tuple[list[Atom], int] | None:
  """Returns the atoms of the kernel in the order of `conv_to_dense`, and the number of groups."""
  axes, summed = product.layout.axes, {*product.summed}
  # From here on, axes of the source are named by the axes of the value.
  origin = [() if axis is None else product.layout.origin[axis] for axis in view]
  spatial = [view.index(axis) for axis in spatial]
  groups = [atom for atom in origin[channel] if atom in product.shared]
  inputs = [atom for atom in origin[channel] if atom in summed]
  outputs = [atom for atom in axes[channel] if atom not in groups]
  rows = [*origin[spatial[0]], *origin[spatial[1]]]
  columns = [*axes[spatial[0]], *axes[spatial[1]]]
  atoms = [*groups, *rows, *inputs, *columns, *outputs]
  ordered = [*groups, *inputs] == [*origin[channel]] and [*groups, *outputs] == [*axes[channel]]
  same = [math.prod(sizes(origin[axis])) for axis in spatial] == [
    math.prod(sizes(axes[axis])) for axis in spatial
  ]
  whole = ordered and same and {*rows} <= summed and {*atoms} == {*product.atoms}
  return (atoms, math.prod(sizes(groups))) if whole else None


def _over_tile(group: Group, spatial: list[int], groups: int, table: Any) -> Expression:
  """Returns the kernel of a convolution over a tile, as `conv_to_dense` orders it."""
  source = group.head.source
  taps = tuple(group.windows[axis].taps for axis in spatial)
  kernel = derived(
    algebra.merge_groups, joint_kernel(group, table), groups=group.groups, fewer=groups
  )
  tile = tuple(source.shape[axis] for axis in spatial)
  return derived(_dense, kernel, taps=taps, tile=tile, groups=groups)


def _dense(kernel: Any, taps: tuple[int, int], tile: tuple[int, int], groups: int) -> Any:
  kernel = kernel.reshape(*taps, *kernel.shape[-2:])
  bias = jnp.zeros(kernel.shape[-1], kernel.dtype)
  return algebra.conv_to_dense(algebra.ConvParams(kernel, bias), tile, groups)[0]


def _reshaped(value: Any, shape: tuple[int, ...]) -> Any:
  return value.reshape(shape)
