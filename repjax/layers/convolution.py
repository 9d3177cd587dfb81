"""The one place that chooses the Linen module of a convolution."""

import functools
from collections.abc import Callable
from typing import Any

from flax import linen as nn

from repjax.errors import InputError
from repjax.layers.composition import Conv
from repjax.layers.dirac import DiracConv
from repjax.layers.linear import bias_init, kernel_init
from repjax.layers.one_channel import OneChannelConv, is_one_channel


def convolution(conv: Conv, dtype: Any, param_dtype: Any) -> Callable[..., nn.Module]:
  """Returns a function that builds a convolution, given its name.

  Args:
    conv: the convolution.
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.
  """
  if conv.is_dirac:
    return functools.partial(DiracConv, conv, dtype=dtype, param_dtype=param_dtype)
  is_one = is_one_channel(dtype, conv.inputs, conv.features)
  built = functools.partial(
    OneChannelConv if is_one else nn.Conv,
    conv.features,
    conv.size,
    strides=conv.strides,
    padding=[(pad, pad) for pad in conv.padding],
    kernel_dilation=conv.dilation,
    use_bias=conv.use_bias,
    bias_init=bias_init((*conv.size, conv.inputs // conv.groups, conv.features)),
    dtype=dtype,
    param_dtype=param_dtype,
  )
  if is_one:
    return built
  return functools.partial(built, feature_group_count=conv.groups, kernel_init=kernel_init)


def depthwise(features: int, size: int, dtype: Any, param_dtype: Any) -> Callable[..., nn.Module]:
  """Returns a function that builds a depthwise convolution with bias, given its name.

  The convolution has stride 1 and keeps the size of the map.

  Args:
    features: number of channels, in and out.
    size: height and width of the kernel in taps, an odd number.
    dtype: dtype of the computation and of the result.
    param_dtype: dtype of the parameters.

  Raises:
    InputError: the size is no odd number, so that the map would not keep its size.
  """
  if size < 1 or size % 2 == 0:
    raise InputError(
      f"the size of a depthwise convolution is an odd number of taps such as 3 or 7, got {size}"
    )
  pad = size // 2
  sides = (size, size), (1, 1), (pad, pad), (1, 1)
  conv = Conv(features, features, *sides, groups=features, use_bias=True)
  return convolution(conv, dtype, param_dtype)
