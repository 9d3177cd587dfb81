"""Weights in 8 bits: whole numbers with one scale for each output channel, symmetric around 0."""

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Array: TypeAlias = Any
"""An array of NumPy, which compiles nothing for each shape, or of JAX."""

LEVELS = {8: 127, 7: 64}
"""Bits to the largest whole number, of both signs, as in ONNX Runtime's quantizer."""

_INPUTS = {2: (0,), 4: (0, 1, 2), 7: (1, 2, 3)}
"""Rank of a kernel in a deploy tree to the axes that an output is a sum over."""


def quantized(kernel: Array, inputs: tuple[int, ...], bits: int = 8) -> tuple[Array, Array]:
  """Splits a kernel into whole numbers and a scale for each output.

  q = round(K / scale), scale = max|K| / L over the inputs, where L is 127, or 64 with 7 bits;
  |q scale - K| <= scale / 2.

  Args:
    kernel: of any rank, floating, of NumPy or JAX.
    inputs: axes that an output is a sum over.
    bits: 8 or 7.

  Returns:
    int8 of the kernel's shape, and the scales in the kernel's dtype, of size 1 along `inputs`. The
    scale of zeros is 1, and so is that of numbers too small to have a scale: they become zeros.
  """
  xp, levels = kernel.__array_namespace__(), LEVELS[bits]
  scale = xp.abs(kernel).max(inputs, keepdims=True) / levels
  scale = xp.where(scale < jnp.finfo(kernel.dtype).tiny, xp.ones_like(scale), scale)
  return xp.round(kernel / scale).astype(xp.int8), scale


def rounded(kernel: Array, inputs: tuple[int, ...], bits: int = 8) -> Array:
  """Rounds a kernel to the numbers that 8 or 7 bits can store, in the kernel's dtype."""
  whole, scale = quantized(kernel, inputs, bits)
  return whole.astype(kernel.dtype) * scale


def round_weights(params: Mapping[str, Any]) -> dict[str, Any]:
  """Returns a deploy tree whose kernels are rounded to 8 bits, with all else unchanged.

  Pure, and with the same structure, shapes and dtypes. It shows in JAX what int8 weights cost.

  Args:
    params: parameters of a deploy form.

  Example:
    logits = model.apply({"params": repjax.quantization.round_weights(params)}, images)
  """

  def leaf(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
    is_kernel = getattr(path[-1], "key", None) == "kernel" and jnp.ndim(value) in _INPUTS
    return rounded(jnp.asarray(value), _INPUTS[jnp.ndim(value)]) if is_kernel else value

  return jax.tree_util.tree_map_with_path(leaf, dict(params))
