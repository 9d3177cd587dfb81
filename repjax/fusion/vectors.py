"""Arithmetic on vectors and kernels that come later, in float32 or wider."""

from typing import Any

import jax.numpy as jnp

from repjax.algebra import wide_dtype
from repjax.fusion.expressions import Expression, derived


def widened(value: Expression) -> Expression:
  """Returns the value in float32, or float64 if it is in float64."""
  wide = wide_dtype(value.dtype)
  return value if value.dtype == wide else derived(_cast, value, dtype=wide)


def times(value: Expression, vector: Expression) -> Expression:
  """Returns a product of two values in their wider dtype. Trailing axes are matched."""
  return derived(_times, value, vector)


def plus(value: Expression | None, vector: Expression) -> Expression:
  """Returns a sum of two values in their wider dtype, the second one if the first is None."""
  return vector if value is None else derived(_plus, value, vector)


def _cast(array: Any, dtype: Any) -> Any:
  return array.astype(dtype)


def _times(first: Any, second: Any) -> Any:
  first, second = _matched(first, second)
  return first * second


def _plus(first: Any, second: Any) -> Any:
  first, second = _matched(first, second)
  return first + second


def _matched(first: Any, second: Any) -> tuple[Any, Any]:
  """Returns two arrays of one dtype and of the same number of axes."""
  dtype, rank = wide_dtype(first.dtype, second.dtype), max(first.ndim, second.ndim)
  return tuple(
    each.astype(dtype).reshape((1,) * (rank - each.ndim) + each.shape) for each in (first, second)
  )


def at_channels(value: Expression, start: int, features: int, length: int) -> Expression:
  """Returns a value of some channels, (..., features) or (), as one of all channels.

  Channels before `start` and after `start + features` are zero.
  """
  if features == length:
    return value
  return derived(_at_channels, value, start=start, features=features, length=length)


def _at_channels(value: Any, start: int, features: int, length: int) -> Any:
  value = jnp.broadcast_to(value, (*value.shape[:-1], features))
  config = [(0, 0)] * (value.ndim - 1) + [(start, length - start - features)]
  return jnp.pad(value, config)
