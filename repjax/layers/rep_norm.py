"""RepNorm: a batch norm that becomes a per-channel affine map where no convolution absorbs it."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from repjax.algebra import AffineParams, affine_bn, bn_affine, wide_dtype
from repjax.layers.base import RepLayer, leading_axes, read_notes, refuse_training


class Affine(nn.Module):
  """A scale and a shift for each channel: y = x * scale + bias.

  Attributes:
    param_dtype: dtype of the parameters. The result has the dtype of x.
  """

  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps (..., C) to the same shape."""
    shape = (x.shape[-1],)
    scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
    bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
    # The rank is written out because strict rank promotion refuses (..., C) times (C,).
    over_pixels = (1,) * (x.ndim - 1) + shape
    scale, bias = (leaf.astype(x.dtype).reshape(over_pixels) for leaf in (scale, bias))
    return x * scale + bias


class RepNorm(RepLayer):
  """A batch norm that stands alone; its deploy form is a scale and a shift for each channel.

  Scope of the training form: `bn`. Deploy form: `affine`. Attributes are those of `RepLayer`.
  """

  mark = "RepNorm"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (..., C) to the same shape.

    Raises:
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    if self.deploy:
      wide = wide_dtype(x.dtype)
      return Affine(self.param_dtype, name="affine")(x.astype(wide)).astype(self.dtype)
    return self.norm(x, train).astype(self.dtype)


def recognize_rep_norm(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope could be a RepNorm in training form, else None.

  Any scope with nothing but a batch norm called `bn` could be one.
  """
  return leading_axes(params, ("bn", "scale"), 1) if params.keys() == {"bn"} else None


def fold_rep_norm(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepNorm: a batch norm with its statistics becomes a scale and a shift.

  Args:
    params: {bn: {scale (C,), bias (C,)}}.
    stats: {bn: {mean (C,), var (C,)}}.
    epsilon: number added to the variance.

  Returns:
    {affine: {scale (C,), bias (C,)}} in the dtype of the norm's scale.

  Raises:
    ValueError: `bn` is missing from either tree, or the two do not belong together.
  """
  stats, epsilon = read_notes(stats, epsilon, RepNorm.mark)
  if stats.keys() - {"bn"}:
    raise ValueError(f"a RepNorm has the statistics of one norm, bn; got {sorted(stats)}")
  affine = bn_affine(params.get("bn", {}), stats.get("bn", {}), epsilon)
  dtype = params["bn"]["scale"].dtype
  return {"affine": {"scale": affine.scale.astype(dtype), "bias": affine.bias.astype(dtype)}}


def expand_rep_norm(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a RepNorm: a scale and a shift become a batch norm; the inverse of `fold_rep_norm`.

  Args:
    deploy: {affine: {scale (C,), bias (C,)}}.
    shapes: not used.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance.
    key: not used.

  Returns:
    {bn: {scale (C,), bias (C,)}}, which folds into `deploy` with these statistics.
  """
  del shapes, key
  stats, epsilon = read_notes(stats, epsilon, RepNorm.mark)
  affine = AffineParams(deploy["affine"]["scale"], deploy["affine"]["bias"])
  return {"bn": affine_bn(affine, stats["bn"], epsilon)}
