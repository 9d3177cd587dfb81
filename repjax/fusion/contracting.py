"""Rules for products over several axes, and for what follows them. See `contractions`."""

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from repjax.fusion.arithmetic import Given, inverse, opposite
from repjax.fusion.contractions import Contraction
from repjax.fusion.expressions import Expression, derived
from repjax.fusion.layouts import Atom, Layout, atoms_of, layout_of, reshaped, sizes, split_axes
from repjax.fusion.products import settings_of
from repjax.fusion.tiles import with_convolution
from repjax.fusion.values import Affine, Node, affine_of

Rule = Callable[[Given], Contraction | Layout | None]


def is_open(node: Node) -> bool:
  """Checks if a node is a product that is not computed yet, or a norm that was reshaped."""
  if node.product is not None:
    return True
  source = None if node.layout is None or node.computed else node.layout.source
  return source is not None and source.affine is not None and not source.computed


def reshape(given: Given) -> Contraction | Layout | None:
  """Applies the rule of any reshape."""
  node = given.node()
  if node is None or math.prod(given.shape) != math.prod(node.shape) or 0 in node.shape:
    return None
  if node.product is not None:
    return node.product.with_shape(given.shape)
  layout = layout_of(node)
  found = reshaped(layout.axes, given.shape)
  if found is None:
    return None
  axes, splits = found
  return Layout(layout.source, split_axes(layout.origin, splits), axes)


def transpose(given: Given) -> Contraction | Layout | None:
  """Applies the rule of a transposition."""
  node, order = given.node(), given.params["permutation"]
  if node is None:
    return None
  if node.product is not None:
    return node.product.with_order(order)
  layout = layout_of(node)
  return dataclasses.replace(layout, axes=tuple(layout.axes[place] for place in order))


def multiply_matrices(given: Given) -> Contraction | None:
  """Applies the rule of a product with weights."""
  place = 0 if isinstance(given.operands[0], Node) else 1
  node, weights = given.operands[place], given.precise[1 - place]
  if not isinstance(node, Node) or not isinstance(weights, Expression):
    return None  # a product of two values, as in attention
  contract, batch = given.params["dimension_numbers"]
  layout = layout_of(node)
  matched = dict(zip((*contract[1 - place], *batch[1 - place]), (*contract[place], *batch[place])))
  weight_axes = tuple(
    layout.axes[matched[axis]] if axis in matched else ((Atom(size),) if size != 1 else ())
    for axis, size in enumerate(weights.shape)
  )
  free = [layout.axes[axis] for axis in range(len(node.shape)) if axis not in matched.values()]
  added = [weight_axes[axis] for axis in range(len(weights.shape)) if axis not in matched]
  shared = [layout.axes[axis] for axis in batch[place]]
  rows = (free, added) if place == 0 else (added, free)
  atoms = atoms_of(weight_axes)
  return Contraction(
    layout=dataclasses.replace(layout, axes=(*shared, *rows[0], *rows[1])),
    atoms=atoms,
    kernel=derived(_reshaped, weights, shape=sizes(atoms)),
    bias=None,
    dtype=node.dtype,
    settings=settings_of(given.params, node.dtype),
    equations=frozenset([given.equation]),
  )


def _reshaped(value, shape: tuple[int, ...]):
  return value.reshape(shape)


def multiply(given: Given) -> Contraction | None:
  """Applies the rule of a scale after a product."""
  return _scaled(given, lambda scale: scale)


def divide(given: Given) -> Contraction | None:
  """Applies the rule of a quotient after a product."""
  return None if given.node(1) else _scaled(given, lambda scale: derived(inverse, scale))


def _scaled(given: Given, change: Callable[[Expression], Expression]) -> Contraction | None:
  product, other, _ = _sides(given)
  if product is None or not isinstance(other, Expression):
    return None
  scale = product.spread(other)
  return None if scale is None else product.scaled(change(scale)).replacing(given.equation)


def _sides(given: Given):
  """Returns the product among two operands, the other operand, and if the product is first."""
  for place in (0, 1):
    node = given.node(place)
    if node is not None and node.product is not None and node.shape == given.shape:
      return node.product, given.compact[1 - place], place == 0
  return None, None, True


def negate(given: Given) -> Contraction | None:
  """Applies the rule of a negative."""
  node = given.node()
  if node is None or node.product is None:
    return None
  return _negated(node.product, given).replacing(given.equation)


def _negated(product: Contraction, given: Given) -> Contraction:
  one = given.table.constant(np.float32(-1))
  scale = product.spread(one)
  assert scale is not None
  return product.scaled(scale)


def add(given: Given) -> Contraction | None:
  """Applies the rule of a shift, or of a convolution over the same tiles beside a product."""
  product, other, _ = _sides(given)
  if product is None:
    return None
  if isinstance(other, Expression):
    shift = product.spread(other)
    return None if shift is None else product.shifted(shift).replacing(given.equation)
  return _beside(product, affine_of(other), given) if isinstance(other, Node) else None


def _beside(product: Contraction, affine: Affine, given: Given) -> Contraction | None:
  result = with_convolution(product, affine, given.table)
  return None if result is None else result.replacing(given.equation)


def subtract(given: Given) -> Contraction | None:
  """Applies the rule of a difference."""
  product, other, first = _sides(given)
  if product is None or not isinstance(other, Expression):
    return None
  shift = product.spread(other)
  if shift is None:
    return None
  if first:
    return product.shifted(derived(opposite, shift)).replacing(given.equation)
  return _negated(product, given).shifted(shift).replacing(given.equation)


def convert(given: Given) -> Contraction | None:
  """Applies the rule of a cast between floating-point dtypes."""
  node = given.node()
  floating = node is not None and jnp.issubdtype(given.params["new_dtype"], jnp.floating)
  return node.product if floating and node is not None else None


RULES: dict[str, Rule] = {
  "add": add,
  "add_any": add,
  "broadcast_in_dim": reshape,
  "convert_element_type": convert,
  "div": divide,
  "dot_general": multiply_matrices,
  "mul": multiply,
  "neg": negate,
  "reshape": reshape,
  "squeeze": reshape,
  "sub": subtract,
  "transpose": transpose,
}
