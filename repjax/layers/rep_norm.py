"""Batch norm, and the per-channel affine map that it becomes where no convolution can absorb it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import bn_affine, wide_dtype

EPSILON = 1e-5
MOMENTUM = 0.9  # of the old value: 0.1 in PyTorch's terms


def batch_norm(
  x: jax.Array,
  train: bool,
  *,
  epsilon: float,
  axis_name: str | None,
  param_dtype: jax.typing.DTypeLike,
  axis: int | tuple[int, ...] = -1,
) -> jax.Array:
  """Normalises over all axes but the last, in a scope called `bn`; for use in a compact method.

  Args:
    x: (N, H, W, C), or of any rank.
    train: normalise with the batch's statistics and update the running ones, or use the latter.
    epsilon: added to the variance.
    axis_name: of the pmapped axis over which batch statistics are shared; None keeps them local.
    param_dtype: of scale and bias.
    axis: those that keep statistics of their own, if not the last alone; ascending.

  Returns:
    Of the shape of `x`, in its dtype widened to at least float32.
  """
  wide = wide_dtype(x.dtype)
  feature_axes: Any = axis  # annotated as one number, but read as one or several
  norm = nn.BatchNorm(
    use_running_average=not train,
    axis=feature_axes,
    momentum=MOMENTUM,
    epsilon=epsilon,
    axis_name=axis_name,
    dtype=wide,
    param_dtype=param_dtype,
    # True would keep the statistics of a float64 model in float32.
    force_float32_reductions=jnp.dtype(param_dtype) != jnp.float64,
    name="bn",
  )
  with jax.numpy_dtype_promotion("standard"):  # it mixes float32 statistics and other parameters
    return norm(x.astype(wide))


def refuse_training(deploy: bool, train: bool) -> None:
  """Raises ValueError for a deploy form asked to train: it has no statistics and no branches."""
  if deploy and train:
    raise ValueError(
      "the deploy form cannot train: its batch norms and branches are gone, and such a network "
      "does not converge; train or fine-tune the training form and re-parameterize again"
    )


class Affine(nn.Module):
  """y = x * scale + bias per channel."""

  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
    over_pixels = (1,) * (x.ndim - 1) + shape
    return x * scale.astype(x.dtype).reshape(over_pixels) + bias.astype(x.dtype).reshape(
      over_pixels
    )


class RepNorm(nn.Module):
  """A batch norm that stands alone; its deploy form is a per-channel scale and bias.

  Attributes:
    epsilon: added to the variance.
    axis_name: of the pmapped axis over which batch statistics are shared.
    deploy: build the deploy form.
    dtype: of the result.
    param_dtype: of the parameters.
  """

  epsilon: float = EPSILON
  axis_name: str | None = None
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    refuse_training(self.deploy, train)
    if self.deploy:
      wide = wide_dtype(x.dtype)
      return Affine(self.param_dtype, name="affine")(x.astype(wide)).astype(self.dtype)
    y = batch_norm(
      x,
      train,
      epsilon=self.epsilon,
      axis_name=self.axis_name,
      param_dtype=self.param_dtype,
    )
    return y.astype(self.dtype)


def fold_rep_norm(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepNorm: {bn} with statistics {bn} becomes {affine: {scale, bias}}.

  Raises:
    ValueError: `bn` is missing from either, or does not belong to the other.
  """
  if stats.keys() - {"bn"}:
    raise ValueError(f"a RepNorm has the statistics of one norm, bn; got {sorted(stats)}")
  affine = bn_affine(params.get("bn", {}), stats.get("bn", {}), epsilon)
  dtype = params["bn"]["scale"].dtype
  return {"affine": {"scale": affine.scale.astype(dtype), "bias": affine.bias.astype(dtype)}}
