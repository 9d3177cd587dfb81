"""RepAttention: self-attention over the pixels of a map, with a batch norm in front of it."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import absorb_affine, bn_affine, wide_dtype
from repjax.errors import InputError
from repjax.layers.base import (
  RepLayer,
  dtypes_of,
  holds_arrays,
  kernel_and_bias,
  leading_axes,
  read_notes,
  refuse_training,
)
from repjax.layers.layer_scale import LayerScale, holds_layer_scale, ones_like_scale, scale_outputs
from repjax.layers.linear import linear
from repjax.layers.remainder import identity_norm

_SCOPES = {"bn", "dense", "layer_scale"}


class _Attention(nn.Module):
  """Multi-head self-attention over pixels: the layers `qkv` and `proj`.

  Attributes:
    head_features: number of channels of each head.
    use_bias: give `qkv` a bias.
    dtype: dtype of the computation and of the result. The softmax is in at least float32.
    param_dtype: dtype of the parameters.
  """

  head_features: int
  use_bias: bool
  dtype: Any
  param_dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n, height, width, channels = x.shape
    pixels, dtypes = height * width, dtypes_of(self)
    rows = x.reshape(n, pixels, channels)
    joint = linear(rows, 3 * channels, name="qkv", use_bias=self.use_bias, **dtypes)
    # PyTorch's order of the outputs: queries, keys, values, each head by head.
    joint = joint.reshape(n, pixels, 3, -1, self.head_features).transpose(2, 0, 3, 1, 4)
    query, key, value = joint[0], joint[1], joint[2]  # (N, heads, pixels, head_features)
    scores = jnp.einsum("nhpd,nhqd->nhpq", query * self.head_features**-0.5, key)
    shares = jax.nn.softmax(scores.astype(wide_dtype(scores.dtype)), -1).astype(self.dtype)
    mixed = jnp.einsum("nhpq,nhqd->nhpd", shares, value)
    mixed = mixed.transpose(0, 2, 1, 3).reshape(n, pixels, channels)  # heads after one another
    return linear(mixed, channels, name="proj", **dtypes).reshape(x.shape)


class RepAttention(RepLayer):
  """A batch norm, self-attention over all pixels of a map, and factors.

  y = gamma proj(attention(qkv(BN(x)))). The norm comes in front of a fully connected layer over
  channels, and folds into it. The factors fold into proj. The deploy form holds two fully connected
  layers with bias. Between them attention stays, which multiplies maps with each other.

  Scopes of the training form: `bn`, `dense` with `qkv` and `proj`, and `layer_scale`. Deploy form:
  `dense`, in which `qkv` has a bias.

  Attributes:
    head_features: number of channels of each head; divides the number of channels.

  References:
    Vasu et al., FastViT, ICCV 2023, section 3.2. https://arxiv.org/abs/2303.14189
    Vaswani et al., Attention Is All You Need, NeurIPS 2017. https://arxiv.org/abs/1706.03762
  """

  head_features: int = 32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to the same shape.

    Raises:
      InputError: the channels do not divide into heads.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    if self.head_features < 1 or x.shape[-1] % self.head_features:
      raise InputError(
        f"RepAttention {'/'.join(self.path)}: {x.shape[-1]} channels do not divide into heads of "
        f"{self.head_features}. Change the widths or head_features"
      )
    attention = _Attention(self.head_features, self.deploy, **self.dtypes(), name="dense")
    if self.deploy:
      return attention(x)
    y = attention(self.norm(x, train).astype(self.dtype))
    return LayerScale(self.param_dtype, name="layer_scale")(y)


def recognize_rep_attention(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope is a RepAttention in training form, else None.

  A RepAttention holds the norm `bn`, `dense` with `qkv` and `proj`, and `layer_scale`.
  """
  if params.keys() != _SCOPES or not holds_arrays(params["bn"]):
    return None
  dense = params["dense"]
  if not holds_layer_scale(params["layer_scale"]) or not isinstance(dense, Mapping):
    return None
  if dense.keys() != {"qkv", "proj"}:
    return None
  return leading_axes(dense, ("qkv", "kernel"), 2)


def fold_rep_attention(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepAttention: the norm goes into qkv, and the factors go into proj.

  Args:
    params: {bn: {scale, bias}, dense: {qkv: {kernel (C, 3 C)}, proj: {kernel (C, C), bias (C,)}},
      layer_scale: {gamma (C,)}}.
    stats: {bn: {mean, var}}.
    epsilon: number added to the variance by the batch norm.

  Returns:
    {dense: {qkv: {kernel, bias}, proj: {kernel, bias}}} in the dtypes of the kernels.

  Raises:
    ValueError: the two trees do not belong together.
  """
  stats, epsilon = read_notes(stats, epsilon)
  if params.keys() != _SCOPES or stats.keys() != {"bn"}:
    raise ValueError(
      f"a RepAttention holds {', '.join(sorted(_SCOPES))}, with statistics of bn; got parameters "
      f"of {sorted(params)} and statistics of {sorted(stats)}"
    )
  kernel, proj = params["dense"]["qkv"]["kernel"], params["dense"]["proj"]
  affine = bn_affine(params["bn"], stats["bn"], epsilon)
  bias = params["dense"]["qkv"].get("bias", jnp.zeros(kernel.shape[-1:], kernel.dtype))
  joint = absorb_affine(affine, kernel, bias)
  last = scale_outputs(params["layer_scale"]["gamma"], proj["kernel"], proj["bias"])
  return {
    "dense": {
      "qkv": kernel_and_bias(joint, kernel.dtype),
      "proj": kernel_and_bias(last, proj["kernel"].dtype),
    }
  }


def expand_rep_attention(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a RepAttention: the norm adds a shift that gives qkv its bias, and factors are 1.

  The training form has the bias W t of qkv, with the shift t of the norm, and no other. So `deploy`
  must be the fold of a training form.

  Args:
    deploy: {dense: {qkv: {kernel (C, 3 C), bias (3 C,)}, proj: {kernel, bias}}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by the batch norm.
    key: not used.

  Returns:
    {bn, dense, layer_scale}, which folds into `deploy` with these statistics.
  """
  del key
  stats, epsilon = read_notes(stats, epsilon)
  held = deploy["dense"]
  dtype = wide_dtype(held["qkv"]["kernel"].dtype, held["qkv"]["bias"].dtype)
  kernel, bias = (held["qkv"][name].astype(dtype) for name in ("kernel", "bias"))
  # 3 C equations for C numbers, which agree if the bias comes from a norm.
  shift = jnp.linalg.lstsq(kernel.T, bias)[0]
  return {
    "bn": identity_norm(stats["bn"], epsilon, shapes["bn"], shift),
    "dense": {"qkv": {"kernel": kernel}, "proj": held["proj"]},
    "layer_scale": ones_like_scale(shapes["layer_scale"]),
  }
