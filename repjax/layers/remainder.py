"""Branches whose sum is a given convolution: small ones are drawn, the largest takes the remainder.

Many sums of branches are the same convolution. This file chooses one of them, which trains well:

- A small branch is drawn as `init` draws it. It is scaled so that the norm of its kernel is `SHARE`
  of the norm of the whole kernel, for each output channel.
- The largest branch gets the rest of the kernel, and the rest of the bias.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repjax.algebra import AffineParams, ConvParams, affine_bn
from repjax.errors import InputError
from repjax.layers.base import read_notes
from repjax.layers.branches import branch_parts, merge_branches
from repjax.layers.drawing import draw
from repjax.layers.grammar import find

Tree = Mapping[str, Any]

SHARE = 0.1
"""Ratio of the norms of a small branch's kernel and of the whole kernel.

Large branches that nearly cancel would amplify the noise of training. A branch of zeros would learn
slowly at first.
"""


def expand_rep_conv(
  deploy: Tree, shapes: Tree, stats: Tree, epsilon: Any, key: jax.Array
) -> dict[str, Any]:
  """Expands a RepConv: one convolution becomes branches; the inverse of `fold_rep_conv`.

  Args:
    deploy: {conv: {kernel (H, W, I/g, O), bias (O,)}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by batch norms.
    key: a JAX random key for the small branches.

  Returns:
    Parameters of the training form that fold into `deploy` with these statistics.

  Raises:
    InputError: no branch is as large as the kernel.
  """
  conv = ConvParams(deploy["conv"]["kernel"], deploy["conv"]["bias"])
  return expand_branches(conv, shapes, stats, epsilon, key)


def expand_branches(
  conv: ConvParams, shapes: Tree, stats: Tree, epsilon: Any, key: jax.Array
) -> dict[str, Any]:
  """Finds branches that `merge_branches` merges into a convolution.

  Args:
    conv: kernel (H, W, I/g, O), bias (O,).
    shapes, stats, epsilon, key: as in `expand_rep_conv`.

  Returns:
    Parameters of all branches.

  Raises:
    InputError: no branch is as large as the kernel.
  """
  largest = _largest(shapes, conv.kernel.shape)
  zero = ConvParams(jnp.zeros_like(conv.kernel), jnp.zeros_like(conv.bias))
  params = draw({name: held for name, held in shapes.items() if name != largest}, key)
  params = _put(zero, params, largest, shapes, stats, epsilon)
  for name, part in branch_parts(params, stats, epsilon).branches.items():
    if name in params and name != largest:  # a skip holds nothing that could be scaled
      params[name] = scaled_branch(params[name], share_of(conv.kernel, part.kernel))
  rest = merge_branches(params, stats, epsilon)
  kernel, bias = (leaf.astype(rest.kernel.dtype) for leaf in conv)
  remainder = ConvParams(kernel - rest.kernel, bias - rest.bias)
  params = _put(remainder, params, largest, shapes, stats, epsilon)
  return {name: params[name] for name in shapes}


def identity_norm(
  stats: Tree, epsilon: Any, shapes: Tree, shift: Any = None
) -> dict[str, jax.Array]:
  """Returns scale and bias with which a batch norm adds a shift and changes nothing else.

  Args:
    stats: `mean` and `var` of the norm.
    epsilon: number added to the variance.
    shapes: shapes and dtypes of scale and bias.
    shift: number to add to each channel; None for nothing.
  """
  ones = jnp.ones_like(stats["var"])
  shift = jnp.zeros_like(ones) if shift is None else shift
  return cast(affine_bn(AffineParams(ones, shift), stats, epsilon), shapes)


def cast(values: Tree, shapes: Tree) -> dict[str, Any]:
  """Returns a tree in the dtypes of a tree of shapes."""
  return {
    name: cast(value, shapes[name])
    if isinstance(value, Mapping)
    else value.astype(shapes[name].dtype)
    for name, value in values.items()
  }


def share_of(whole: jax.Array, part: jax.Array) -> jax.Array:
  """Returns the factors that give each output of a kernel `SHARE` of the norm of a whole kernel.

  A kernel of zeros gets factors of zero.

  Args:
    whole: (..., O).
    part: (..., O); the axes before the last may differ from those of `whole`.

  Returns:
    (O,), in the dtype of `part`.
  """
  wanted, held = (
    jnp.sqrt(jnp.square(kernel.astype(part.dtype)).sum(tuple(range(kernel.ndim - 1))))
    for kernel in (whole, part)
  )
  return jnp.where(held > 0, SHARE * wanted / jnp.where(held > 0, held, 1), 0)


def scaled_branch(held: Tree, factors: jax.Array) -> dict[str, Any]:
  """Multiplies the output of a branch: in its norm, or without a norm in its convolution."""
  # The steps of a branch are called `first` and `second`. Only the last one may lack parameters.
  name = next(name for name in ("second", "first", "bn", "conv") if name in held)
  if name in ("second", "first"):
    return {**held, name: scaled_branch(held[name], factors)}

  def scaled(leaf: jax.Array) -> jax.Array:
    # A norm has scale and bias, a convolution kernel and perhaps bias. All have outputs last.
    over_outputs = factors.reshape((1,) * (leaf.ndim - 1) + factors.shape)
    return (leaf.astype(factors.dtype) * over_outputs).astype(leaf.dtype)

  return {**held, name: {key: scaled(leaf) for key, leaf in held[name].items()}}


def _largest(shapes: Tree, kernel_shape: tuple[int, ...]) -> str:
  """Returns the name of the first branch that is one convolution with a kernel of this shape."""
  for name, held in shapes.items():
    branch = find(name)
    is_plain = branch is not None and branch.kind == "conv" and not branch.two_steps
    if is_plain and held["conv"]["kernel"].shape == kernel_shape:
      return name
  height, width = kernel_shape[:2]
  raise InputError(
    f"none of the branches {', '.join(shapes)} is a {height}x{width} convolution, which could take "
    f"what remains of the kernel. Give the layer a branch conv{height}x{width}"
  )


def _put(
  conv: ConvParams, params: Tree, largest: str, shapes: Tree, stats: Tree, epsilon: Any
) -> dict[str, Any]:
  """Puts a convolution into the largest branch, between norms that change nothing else.

  The bias is that of the branch's norm, or of its convolution, or of the norm after the sum.
  """
  stats, epsilon = read_notes(stats, epsilon)
  own, shift = shapes[largest], conv.bias
  branch = {"conv": {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in own["conv"].items()}}
  branch["conv"]["kernel"] = conv.kernel.astype(own["conv"]["kernel"].dtype)
  if "bn" in own:
    branch["bn"], shift = identity_norm(stats[largest]["bn"], epsilon, own["bn"], shift), None
  elif "bias" in own["conv"]:
    branch["conv"]["bias"], shift = shift.astype(own["conv"]["bias"].dtype), None
  result = {**params, largest: branch}
  if "bn" in shapes:
    result["bn"] = identity_norm(stats["bn"], epsilon, shapes["bn"], shift)
  return result
