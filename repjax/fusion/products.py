"""Rules for convolutions and matrix products whose weights depend on parameters alone.

A product over several axes, or in a batch of matrices, is a pointwise product of a moved value:

  y[g, n, o] = sum_i x[n, g, i] M[g, i, o]    becomes    y = layout of (layout of x) * M

Heads of attention are such products, and so are fully connected layers over tiles (RepMLP). The
operand and the product are hidden nodes. Arithmetic after the product works on the hidden product,
and a norm in front of the operand merges into the product, as for any other pointwise product.

RepMLP trains convolutions beside a fully connected layer over the same tiles. A convolution that
keeps the size of the tile is such a layer too (`repjax.algebra.conv_to_dense`), so that both become
one.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from repjax.fusion import arithmetic, kernels
from repjax.fusion.arithmetic import Given, Rule
from repjax.fusion.choice import Group, alone, grouped, joined
from repjax.fusion.expressions import Expression, reshaped
from repjax.fusion.layouts import (
  Atom,
  Atoms,
  Axes,
  Layout,
  atoms_of,
  layout_of,
  new_axes,
  rebased,
  sizes,
  spread,
)
from repjax.fusion.values import Affine, Node, Refusal, Term, affine_of, hidden, identity
from repjax.fusion.windows import Window


def convolve(given: Given) -> Affine:
  """Applies the rule of a convolution, transposed ones included."""
  params, node, kernel = given.params, given.operands[0], given.precise[1]
  if not isinstance(node, Node) or not isinstance(kernel, Expression):
    raise Refusal("a convolution whose kernel depends on the input")
  if params["batch_group_count"] != 1:
    raise Refusal("a convolution with groups of the batch")
  dtype = _dtype_of(given)
  spec = params["dimension_numbers"]
  batch, channel, *spatial = spec.lhs_spec
  view = [0] * len(node.shape)
  for place, axis in zip(spec.out_spec, spec.lhs_spec):
    view[place] = axis
  windows = [Window(size) for size in node.shape]
  for number, axis in enumerate(spatial):
    windows[axis] = Window(
      given.shape[spec.out_spec[2 + number]],
      kernel.shape[spec.rhs_spec[2 + number]],
      params["window_strides"][number],
      params["rhs_dilation"][number],
      params["padding"][number][0],
      params["lhs_dilation"][number],
    )
  # Axes of taps lie in the order of the source's axes, and the batch has one tap.
  order = sorted(range(len(spatial)), key=spatial.__getitem__)
  axes = [*(spec.rhs_spec[2 + number] for number in order), spec.rhs_spec[1], spec.rhs_spec[0]]
  shape = [kernel.shape[axis] for axis in axes]
  shape.insert(batch - (batch > channel), 1)
  size = "x".join(str(kernel.shape[axis]) for axis in spec.rhs_spec[2:])
  kind = "transposed " if set(params["lhs_dilation"]) != {1} else ""
  term = Term(
    source=node,
    view=tuple(view),
    windows=tuple(windows),
    channel=channel,
    dtype=dtype,
    kernel=kernels.arranged(kernel, order=tuple(axes), into=tuple(shape)),
    groups=params["feature_group_count"],
    batch=batch,
    settings=_settings(given.params, dtype),
    names=(f"{kind}conv{size}",),
  )
  return Affine(given.shape, (term,), channel=view.index(channel)).replacing(given.equation)


def _dtype_of(given: Given) -> Any:
  """Returns the dtype that a product computes in: the wider dtype of its operands."""
  dtypes = {jnp.dtype(operand.dtype) for operand in given.operands}
  widest = max(dtypes, key=lambda dtype: dtype.itemsize)
  same = [dtype for dtype in dtypes if dtype.itemsize == widest.itemsize]
  floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes)
  # Weights of 8 bits cannot hold a scale, which must stay after the product.
  if len(same) > 1 or not floating or any(dtype.itemsize < 2 for dtype in dtypes):
    raise Refusal(f"a product in {' and '.join(sorted(map(str, dtypes)))}")
  return widest


def _settings(params: Mapping[str, Any], dtype: Any) -> tuple[Any, ...]:
  """Returns precision and preferred dtype of a product, None for the dtype of its operands."""
  preferred = params["preferred_element_type"]
  return params["precision"], None if preferred == dtype else preferred


def multiply_matrices(given: Given) -> Affine | Layout | None:
  """Applies the rule of a product with weights."""
  place = 0 if isinstance(given.operands[0], Node) else 1
  node, weights = given.operands[place], given.precise[1 - place]
  if not isinstance(node, Node) or not isinstance(weights, Expression):
    return None  # a product of two values, as in attention
  dtype = _dtype_of(given)
  contract, batch = given.params["dimension_numbers"]
  summed, shared = contract[place], batch[place]
  rows, groups = contract[1 - place], batch[1 - place]
  free = [axis for axis in range(len(node.shape)) if axis not in (*summed, *shared)]
  columns = [axis for axis in range(len(weights.shape)) if axis not in (*rows, *groups)]
  layout = layout_of(node)
  operand, channel = node, summed[0] if len(summed) == 1 else None
  if channel is None or shared or (node.layout is not None and not node.computed):
    operand, channel = _operand(given, layout, free, (*shared, *summed)), len(free)
  inputs, outputs, wide = (
    math.prod(weights.shape[axis] for axis in axes) for axes in (rows, columns, groups)
  )
  term = Term(
    source=operand,
    view=(*(free if operand is node else range(len(free))), channel),
    windows=tuple(map(Window, operand.shape)),
    channel=channel,
    dtype=dtype,
    kernel=kernels.arranged(
      weights,
      order=(*rows, *groups, *columns),
      into=(*(1 for _ in free), inputs, wide * outputs),
    ),
    groups=wide,
    settings=_settings(given.params, dtype),
    names=("dense",),
  )
  shape = (*(node.shape[axis] for axis in free), wide * outputs)
  product = Affine(shape, (term,), channel=len(free)).replacing(given.equation)
  if not shared and len(columns) == 1:
    if place == 0:
      return product
    view = (channel, *term.view[:-1])  # the weights come first
    term = dataclasses.replace(term, view=view)
    return dataclasses.replace(product, shape=given.shape, terms=(term,), channel=0)
  added_axes = new_axes([weights.shape[axis] for axis in columns])
  origin = tuple(layout.axes[axis] for axis in free)
  last = (*atoms_of(tuple(layout.axes[axis] for axis in shared)), *atoms_of(added_axes))
  parts = (origin, added_axes) if place == 0 else (added_axes, origin)
  axes = (*(layout.axes[axis] for axis in shared), *parts[0], *parts[1])
  source = hidden(node, shape, given.dtype, product, equation=given.equation)
  return Layout(source, (*origin, last), axes)


def _operand(given: Given, layout: Layout, free: Sequence[int], channels: Sequence[int]) -> Node:
  """Returns a hidden node: a moved value whose last axis is what a product sums over, by groups.

  Its source may be scaled and shifted, such as a norm. The operand is then a sum too, into which
  the product may merge.
  """
  last = atoms_of(tuple(layout.axes[axis] for axis in channels))
  layout = dataclasses.replace(layout, axes=(*(layout.axes[axis] for axis in free), last))
  source = layout.source
  operand = _moved(given, layout)
  affine = source.affine
  if affine is None or source.computed or affine.borders or affine.channel is None:
    return operand
  (term, *more) = affine.terms
  if more or term.kernel is not None or not {*layout.origin[affine.channel]} <= {*last}:
    return operand
  moved = identity(_moved(given, _without_scale(given, layout, affine))).with_channel(len(free))
  scale, shift = (_along(each, layout, affine.channel) for each in (term.scale, affine.bias))
  moved = moved if scale is None else moved.scaled(scale)
  operand.affine = moved.shifted(shift).replacing(*affine.equations)
  return operand


def _moved(given: Given, layout: Layout) -> Node:
  """Returns the node of a moved value, the same one each time."""
  source, step = layout.source, layout.step
  if (source, step) not in given.moved:
    given.moved[source, step] = hidden(source, layout.shape, source.dtype, step=(source, step))
  node = given.moved[source, step]
  node.layout = node.layout or layout
  return node


def _without_scale(given: Given, layout: Layout, affine: Affine) -> Layout:
  """Returns a moved sum of one term without the scale of the term and the shift after it."""
  (term,), node, rank = affine.terms, layout.source, len(layout.origin)
  if term.plain and sorted(term.view, key=str) == sorted(range(rank), key=str):
    origin = tuple(layout.origin[term.view.index(axis)] for axis in range(rank))
    return Layout(term.source, origin, layout.axes)
  if (node, "plain") not in given.moved:
    plain = dataclasses.replace(affine, terms=(dataclasses.replace(term, scale=None),), bias=None)
    given.moved[node, "plain"] = hidden(node, node.shape, node.dtype, plain)
  return dataclasses.replace(layout, source=given.moved[node, "plain"])


def _along(vector: Expression | None, layout: Layout, channel: int) -> Expression | None:
  """Returns a vector along an axis of the source, or a number, along the last axis of a layout."""
  if vector is None or not vector.shape:
    return vector
  shape = [-1 if axis == channel else 1 for axis in range(len(layout.origin))]
  found = spread(reshaped(vector, shape=tuple(shape)), layout.origin, layout.axes)
  assert found is not None
  return reshaped(found, shape=(-1,))


def through(rule: Rule, given: Given) -> Any:
  """Applies a rule of arithmetic, to the product itself if an operand is a moved product."""
  for place, node in enumerate(given.operands):
    if isinstance(node, Node) and node.shape == given.shape and _is_product(node):
      inside = _inside(given, place, node)
      try:
        affine = None if inside is None else rule(inside)
      except Refusal:
        if node.layout.source.hidden:
          raise
        affine = None  # The moved value may still be scaled as it is.
      if affine is not None:
        source = hidden(node, affine.shape, given.dtype, affine, equation=given.equation)
        return dataclasses.replace(node.layout, source=source)
  return rule(given)


def _is_product(node: Node) -> bool:
  """Tells if a node is moved numbers of a product that is not computed, and that is read once."""
  source = None if node.layout is None or node.computed else node.layout.source
  if source is None or not source.is_open or not source.affine.has_kernel:
    return False
  return source.hidden or source.reads == 1


def _inside(given: Given, place: int, node: Node) -> Given | None:
  """Returns an operation on a moved product as one on the hidden product, None if it is none."""
  layout, operands = node.layout, list(given.compact)
  operands[place] = layout.source
  for other, operand in enumerate(given.compact):
    if other == place:
      continue
    if isinstance(operand, Expression):
      inside = spread(operand, layout.axes, layout.origin)
    else:
      inside = _over_tiles(layout, affine_of(operand)) if operand.shape == node.shape else None
    if inside is None:
      return None
    operands[other] = inside
  return Given(
    given.equation, layout.source.shape, given.table, operands, operands, operands, given.moved
  )


def _over_tiles(layout: Layout, affine: Affine) -> Node | None:
  """Returns a convolution over tiles as a product like the one that a layout holds.

  Args:
    layout: of a product over all pixels and channels of a tile.
    affine: a sum of convolutions of the same source.

  Returns:
    None if the two do not have the same source and result, or compute in different dtypes.
  """
  product = layout.source
  assert product.affine is not None
  term = product.affine.terms[0]
  group = _as_convolution(affine, len(layout.axes))
  operand = term.source.layout
  below = None if group is None or operand is None else rebased(operand, group.head.source)
  if group is None or below is None or affine.channel is None:
    return None
  tile = _Tile(layout, below, group, affine.channel, term.groups)
  kernel = tile.kernel()
  if kernel is None:
    return None
  names = tuple(" > ".join(each.names) for each in group.members)
  own = dataclasses.replace(
    term, kernel=kernel, dtype=group.head.dtype, settings=group.head.settings, names=names
  )
  if joined(alone(term), own) is None:
    return None
  bias = affine.bias
  if bias is not None and bias.shape:
    shape = [-1 if axis == affine.channel else 1 for axis in range(len(affine.shape))]
    bias = spread(reshaped(bias, shape=tuple(shape)), layout.axes, layout.origin)
    bias = None if bias is None else reshaped(bias, shape=(-1,))
  total = Affine(product.shape, (own,), bias, (), product.affine.channel, affine.equations)
  return hidden(product, product.shape, product.dtype, total)


def _as_convolution(affine: Affine, rank: int) -> Group | None:
  """Returns a sum as one convolution, None if it is none.

  A source that is scaled is a depthwise 1x1 convolution.
  """
  groups = grouped(affine.terms, 1.0)
  if len(groups) != 1 or affine.borders or len(groups[0].head.view) != rank:
    return None
  (group,) = groups
  if group.is_product:
    return group
  features = group.head.features
  return None if features is None else dataclasses.replace(group, groups=features)


@dataclasses.dataclass(frozen=True)
class _Tile:
  """A convolution and a product of one source over the same tiles.

  Attributes:
    layout: of the product, as the value.
    below: of the product's operand, as a moved source of the convolution.
    group: the convolution.
    channel: axis of the value that holds the channels.
    groups: number of groups of the product.
  """

  layout: Layout
  below: Layout
  group: Group
  channel: int
  groups: int

  def kernel(self) -> Expression | None:
    """Returns the convolution as weights of the product, None if it does not fit the tiles."""
    rank, last = len(self.layout.origin), self.below.axes[-1]
    shared = self._shared()
    if shared is None or self.group.groups % self.groups:
      return None
    mine, theirs = shared
    summed, added_atoms = last[len(theirs) :], self.layout.origin[-1][len(mine) :]
    same = dict(zip(mine, theirs))
    for one, two in zip(self.layout.origin[:-1], self.below.axes[:-1]):
      if sizes(one) != sizes(two):
        return None
      same.update(zip(one, two))
    axes = tuple(tuple(same.get(atom, atom) for atom in axis) for axis in self.layout.axes)
    view = self.group.head.view
    origin = tuple(() if axis is None else self.below.origin[axis] for axis in view)
    spatial = self._spatial({*summed})
    atoms = self._atoms(axes, origin, [view.index(each) for each in spatial], theirs, {*summed})
    wanted = (*summed, *theirs, *added_atoms)
    if not spatial or atoms is None or {*atoms} != {*wanted}:
      return None
    source, windows = self.group.head.source, self.group.windows
    kernel = kernels.over_tile(
      self.group.kernel,
      taps=tuple(windows[axis].taps for axis in spatial),
      tile=tuple(source.shape[axis] for axis in spatial),
      groups=(self.group.groups, self.groups),
    )
    into = (math.prod(sizes(summed)), math.prod(sizes((*theirs, *added_atoms))))
    return kernels.arranged(
      kernel,
      shape=sizes(atoms),
      order=tuple(map(atoms.index, wanted)),
      into=(*(1 for _ in range(rank - 1)), *into),
    )

  def _shared(self) -> tuple[Atoms, Atoms] | None:
    """Returns the atoms that count the groups, of the product and of its operand."""
    found = [_leading(axes[-1], self.groups) for axes in (self.layout.origin, self.below.axes)]
    mine, theirs = found
    if mine is None or theirs is None or sizes(mine) != sizes(theirs):
      return None
    return mine, theirs

  def _spatial(self, summed: set[Atom]) -> list[int]:
    """Returns the two axes of the source that a centred convolution runs along.

    Returns [] if the convolution is different.
    """
    head, moved = self.group.head, []
    for axis in head.others:
      window, size = self.group.windows[axis], head.source.shape[axis]
      if {*self.below.origin[axis]} & summed:
        moved.append(axis)
        if window.taps % 2 == 0 or window != Window(size, window.taps, low=window.taps // 2):
          return []
      elif not window.plain(size):
        return []
    return moved if len(moved) == 2 else []

  def _atoms(
    self, axes: Axes, origin: Axes, spatial: list[int], groups: Atoms, summed: set[Atom]
  ) -> list[Atom] | None:
    """Returns the atoms of the kernel in the order of `conv_to_dense`, by axes of the value."""
    if not spatial:
      return None
    inputs = [atom for atom in origin[self.channel] if atom in summed]
    outputs = [atom for atom in axes[self.channel] if atom not in groups]
    rows, columns = ([*each[spatial[0]], *each[spatial[1]]] for each in (origin, axes))
    first, last = [*groups, *inputs], [*groups, *outputs]
    ordered = first == [*origin[self.channel]] and last == [*axes[self.channel]]
    same = all(math.prod(sizes(origin[axis])) == math.prod(sizes(axes[axis])) for axis in spatial)
    return [*groups, *rows, *inputs, *columns, *outputs] if ordered and same else None


def _leading(atoms: Atoms, count: int) -> Atoms | None:
  """Returns the first atoms whose sizes multiply to a count, None if no number of them does."""
  for stop in range(len(atoms) + 1):
    if math.prod(sizes(atoms[:stop])) == count:
      return atoms[:stop]
  return None


RULES: dict[str, Rule] = {
  **{name: functools.partial(through, rule) for name, rule in arithmetic.ELEMENTWISE.items()},
  "conv_general_dilated": convolve,
  "dot_general": multiply_matrices,
}
