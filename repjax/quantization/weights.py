"""Weights in 8 bits: a whole number and one scale an output channel, symmetric around zero."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = Any
"""Of NumPy, which compiles nothing for each shape, or of JAX."""

LEVELS = {8: 127, 7: 64}
"""The largest whole number by bits, of both signs, as ONNX Runtime's quantizer has it."""

_INPUTS = {2: (0,), 4: (0, 1, 2), 7: (1, 2, 3)}
"""Rank of a kernel in a deploy tree to the axes that an output is a sum over."""


def quantized(kernel: Array, inputs: tuple[int, ...], bits: int = 8) -> tuple[Array, Array]:
  """A kernel as whole numbers times a scale for each output.

  q = round(K / scale), scale = max|K| / L over the inputs, where L is 127, or 64 with 7 bits;
  |q scale - K| <= scale / 2.

  Args:
    kernel: of any rank, floating, of NumPy or JAX.
    inputs: the axes that an output is a sum over.
    bits: 8 or 7.

  Returns:
    int8 of the kernel's shape, and the scales in its dtype, of size 1 along `inputs`; 1 for a
    kernel of zeros.
  """
  xp, levels = kernel.__array_namespace__(), LEVELS[bits]
  largest = xp.abs(kernel).max(inputs, keepdims=True)
  scale = xp.where(largest > 0, largest, levels) / levels
  return xp.round(kernel / scale).astype(xp.int8), scale


def rounded(kernel: Array, inputs: tuple[int, ...], bits: int = 8) -> Array:
  """A kernel as it is once it went through so few bits, in its own dtype."""
  whole, scale = quantized(kernel, inputs, bits)
  return whole.astype(kernel.dtype) * scale


def round_weights(params: Mapping[str, Any]) -> dict[str, Any]:
  """A deploy tree whose kernels went through 8 bits each; all else as it was.

  Pure, and the same structure, shapes and dtypes: it shows in JAX what weights in 8 bits cost.

  Args:
    params: of a deploy form.

  Example:
    logits = model.apply({"params": repjax.quantization.round_weights(params)}, images)
  """

  def leaf(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
    is_kernel = getattr(path[-1], "key", None) == "kernel" and jnp.ndim(value) in _INPUTS
    return rounded(jnp.asarray(value), _INPUTS[jnp.ndim(value)]) if is_kernel else value

  return jax.tree_util.tree_map_with_path(leaf, dict(params))
