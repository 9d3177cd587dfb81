"""Rules for convolutions and matrix products whose weights depend on parameters alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from repjax.fusion.arithmetic import Given, Rule
from repjax.fusion.expressions import Expression, derived
from repjax.fusion.values import Affine, Node, Refusal, Term
from repjax.fusion.windows import Window


def convolve(given: Given) -> Affine:
  """Applies the rule of a convolution, transposed ones included."""
  params, node, kernel = given.params, given.operands[0], given.precise[1]
  if not isinstance(node, Node) or not isinstance(kernel, Expression):
    raise Refusal("a convolution whose kernel depends on the input")
  if params["batch_group_count"] != 1:
    raise Refusal("a convolution with groups of the batch")
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
  weights = derived(_taps_first, kernel, axes=tuple(axes), batch=batch - (batch > channel))
  size = "x".join(str(kernel.shape[axis]) for axis in spec.rhs_spec[2:])
  term = Term(
    source=node,
    view=tuple(view),
    windows=tuple(windows),
    channel=channel,
    dtype=node.dtype,
    kernel=weights,
    groups=params["feature_group_count"],
    batch=batch,
    settings=settings_of(given.params, node.dtype),
    names=(_name(size, params),),
  )
  return _product(given, term)


def _name(size: str, params) -> str:
  kind = "transposed " if set(params["lhs_dilation"]) != {1} else ""
  return f"{kind}conv{size}"


def _taps_first(kernel, axes: Sequence[int], batch: int):
  return jnp.expand_dims(kernel.transpose(axes), batch)


def settings_of(params: Mapping[str, Any], dtype: Any) -> tuple[Any, ...]:
  """Returns precision and preferred dtype of a product, None for the dtype of its operands."""
  preferred = params["preferred_element_type"]
  return params["precision"], None if preferred == dtype else preferred


def _product(given: Given, term: Term) -> Affine:
  assert term.channel is not None
  channel = term.view.index(term.channel)
  return Affine(given.shape, (term,), channel=channel, equations=frozenset([given.equation]))


def multiply_matrix(given: Given) -> Affine | None:
  """Applies the rule of a matrix product with a matrix of weights."""
  contract, batch = given.params["dimension_numbers"]
  place = 0 if isinstance(given.operands[0], Node) else 1
  node, weights = given.operands[place], given.precise[1 - place]
  if not isinstance(node, Node) or not isinstance(weights, Expression):
    return None  # a product of two values, as in attention
  if batch[0] or len(contract[0]) != 1 or len(weights.shape) != 2:
    raise Refusal("a product over several axes, or in a batch of matrices")
  channel, rows = contract[place][0], contract[1 - place][0]
  free = [axis for axis in range(len(node.shape)) if axis != channel]
  kernel = derived(_as_pointwise, weights, rows=rows, axes=len(free))
  term = Term(
    source=node,
    view=(*free, channel) if place == 0 else (channel, *free),
    windows=tuple(map(Window, node.shape)),
    channel=channel,
    dtype=node.dtype,
    kernel=kernel,
    settings=settings_of(given.params, node.dtype),
    names=("dense",),
  )
  return _product(given, term)


def _as_pointwise(matrix, rows: int, axes: int):
  matrix = matrix if rows == 0 else matrix.T
  return matrix.reshape(*(1 for _ in range(axes)), *matrix.shape)


RULES: dict[str, Rule] = {
  "conv_general_dilated": convolve,
  "dot_general": multiply_matrix,
}
