"""SkipConv: a depthwise convolution and its input, whose sum is one convolution."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from repjax.algebra import ConvParams, add, identity_kernel, wide_dtype
from repjax.layers.base import (
  RepLayer,
  kernel_and_bias,
  leading_axes,
  read_notes,
  refuse_training,
)
from repjax.layers.convolution import depthwise

_SKIP = "skip"


class SkipConv(RepLayer):
  """A depthwise convolution with bias, plus its input; the deploy form is the convolution alone.

  y = x + conv(x). There is no norm. FastViT has such a layer in front of attention, which it tells
  the places of pixels: at the border of the map the convolution sees zeros.

  A layer with a `skip` notes it beside the statistics, and so does this layer, which has no other
  statistics. The note tells the training form from the deploy form.

  Scope of the training form: `inner`. Deploy form: `conv`.

  Attributes:
    size: height and width of the kernel in taps, an odd number.

  References:
    Chu et al., Conditional Positional Encodings for Vision Transformers, ICLR 2023.
      https://arxiv.org/abs/2102.10882
    Vasu et al., FastViT, ICCV 2023, section 3.2. https://arxiv.org/abs/2303.14189
  """

  size: int = 7

  mark = "SkipConv"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to the same shape.

    Raises:
      InputError: the size is no odd number.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    conv = depthwise(x.shape[-1], self.size, **self.dtypes())
    if self.deploy:
      return conv(name="conv")(x)
    self.write_notes()
    return x.astype(self.dtype) + conv(name="inner")(x)

  @nn.nowrap
  def notes(self) -> dict[str, float]:
    """Returns the notes of `RepLayer`, and the skip."""
    return {**super().notes(), _SKIP: 1.0}


def recognize_skip_conv(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope could be a SkipConv in training form, else None.

  Any scope with nothing but a convolution `inner` with a bias could be one.
  """
  if params.keys() != {"inner"} or leading_axes(params, ("inner", "bias"), 1) is None:
    return None
  return leading_axes(params, ("inner", "kernel"), 4)


def fold_skip_conv(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a SkipConv: the input becomes the identity in the kernel, K' = K + I.

  Args:
    params: {inner: {kernel (H, W, 1, C), bias (C,)}}.
    stats: the note of the skip.
    epsilon: not used.

  Returns:
    {conv: {kernel (H, W, 1, C), bias (C,)}} in the dtype of the kernel.

  Raises:
    ValueError: the two trees do not belong together.
  """
  stats, _ = read_notes(stats, epsilon, SkipConv.mark)
  if params.keys() != {"inner"} or stats.keys() != {_SKIP}:
    raise ValueError(
      f"a SkipConv holds inner, and the note {_SKIP} beside it; got parameters of {sorted(params)} "
      f"and statistics of {sorted(stats)}"
    )
  conv = ConvParams(params["inner"]["kernel"], params["inner"]["bias"])
  whole = add(conv, _identity(conv))
  return {"conv": kernel_and_bias(whole, conv.kernel.dtype)}


def _identity(conv: ConvParams) -> ConvParams:
  """Returns the depthwise convolution of the same size that returns its input."""
  (height, width, _, features), dtype = conv.kernel.shape, wide_dtype(conv.kernel.dtype)
  kernel = identity_kernel(features, features, (height, width), dtype)
  return ConvParams(kernel, kernel[0, 0, 0] * 0)


def expand_skip_conv(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a SkipConv: the identity leaves the kernel; the inverse of `fold_skip_conv`.

  Args:
    deploy: {conv: {kernel (H, W, 1, C), bias (C,)}}.
    shapes: not used.
    stats: not used.
    epsilon: not used.
    key: not used.

  Returns:
    {inner: {kernel, bias}}, which folds into `deploy`.
  """
  del shapes, stats, epsilon, key
  conv = ConvParams(deploy["conv"]["kernel"], deploy["conv"]["bias"])
  return {"inner": {"kernel": conv.kernel - _identity(conv).kernel, "bias": conv.bias}}
