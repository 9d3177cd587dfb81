"""RepConv, the linear layer that everything is made of: a sum of branches that folds into one conv.

A branch's name says what it is made of. The forward pass and the fold read the same name.

| name             | branch                                              |
|------------------|-----------------------------------------------------|
| `convHxW`        | HxW convolution, batch norm                         |
| `identity`       | batch norm of the input                             |
| `avg2x2_conv1x1` | 2x2 mean-pool at stride 2, 1x1 convolution, batch norm |
| any + `_N`       | a repeat, for example `conv3x3_1`                   |
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import (
  ConvParams,
  add,
  average_pool_kernel,
  compose,
  fuse_bn,
  identity_kernel,
  pad_kernel,
)
from repjax.errors import InputError
from repjax.layers.linear import bias_init, kernel_init
from repjax.layers.rep_norm import EPSILON, batch_norm, refuse_training

_BRANCH = re.compile(r"(?:conv([1-9]\d*)x([1-9]\d*)|identity|(avg2x2_conv1x1))(?:_\d+)?")
_PADDING_MODES = ("constant", "edge", "reflect", "wrap")


def branch_size(name: str) -> tuple[int, int] | None:
  """The size (H, W) of the one kernel that the branch called `name` is, None for an identity.

  Raises:
    ValueError: `name` is not in the grammar.
  """
  match = _BRANCH.fullmatch(name)
  if match is None:
    raise ValueError(
      f"unknown branch {name!r}; a branch is called convHxW (conv3x3, conv1x1, conv1x3, ...), "
      "identity or avg2x2_conv1x1, with _1, _2, ... behind a repeated one"
    )
  if match[3]:
    return 2, 2
  return (int(match[1]), int(match[2])) if match[1] else None


def _is_pooled(name: str) -> bool:
  """Whether a branch pools before it convolves."""
  return name.startswith("avg2x2")


def _layer_size(branches: Iterable[str]) -> tuple[int, int]:
  """The size of the one kernel that holds all branches."""
  sizes = [branch_size(name) for name in branches]
  if not any(sizes):
    raise ValueError(
      f"a RepConv needs at least one convolution among its branches, got {list(branches)}; "
      "a batch norm alone is a RepNorm"
    )
  return max(s[0] for s in sizes if s), max(s[1] for s in sizes if s)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
  """(vertical, horizontal) of one number for both, or of two."""
  return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pad(x: jax.Array, padding: tuple[int, int], mode: str = "constant") -> jax.Array:
  """Adds pixels on each side of (N, H, W, C), or takes them away where `padding` is negative."""
  if padding == (0, 0):
    return x
  if mode != "constant":
    rows, columns = ((pad, pad) for pad in padding)
    return jnp.pad(x, ((0, 0), rows, columns, (0, 0)), mode=mode)
  edges = [(0, 0, 0), *((pad, pad, 0) for pad in padding), (0, 0, 0)]
  return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


def _mean_pool(x: jax.Array) -> jax.Array:
  """Means of 2x2 windows; zeros beyond an odd edge count, so that every window is of four."""
  n, height, width, channels = x.shape
  down, across = -(-height // 2), -(-width // 2)
  edges = [(0, 0, 0), (0, height % 2, 0), (0, width % 2, 0), (0, 0, 0)]
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
  return x.reshape(n, down, 2, across, 2, channels).mean((2, 4))  # (N, ceil(H/2), ceil(W/2), C)


class _Branch(nn.Module):
  """A convolution, absent in an identity branch, and the batch norm behind it."""

  conv: Callable[..., nn.Module] | None
  norm: Callable[[jax.Array, bool], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if self.conv is not None:
      x = self.conv(name="conv")(x)
    return self.norm(x, train)


class RepConv(nn.Module):
  """A sum of conv-BN branches over one input; its deploy form is one convolution with bias.

  y = sum_b BN_b(conv_b(x)). Exact in deploy form for every stride, dilation, group count, padding
  and padding mode: smaller kernels sit at the centre of the largest, and the identity is a 1x1. The
  pooled branch is the last 2x2 taps of a 3x3 at stride 2, at every size of the map.

  Attributes:
    features: output channels O.
    branches: their names, see the table at the top of this file.
    strides: of every branch, one number or (vertical, horizontal).
    groups: of every convolution.
    dilation: of every convolution, one number or (vertical, horizontal).
    padding: pixels added on each side for the largest kernel, one number or (vertical, horizontal);
      None keeps the size at stride 1.
    padding_mode: "constant" (zeros), "edge", "reflect" or "wrap", in the terms of `jnp.pad`.
    conv_bias: give convolutions a bias in training form too, which some checkpoints have.
    epsilon: of the batch norms.
    axis_name: of the pmapped axis over which batch statistics are shared.
    deploy: build the deploy form.
    dtype: of the convolutions and the result; norms and the sum are in at least float32.
    param_dtype: of the parameters.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.2. https://arxiv.org/abs/2101.03697
    Ding et al., ACNet, ICCV 2019, for the 1x3 and 3x1 branches. https://arxiv.org/abs/1908.03930
    Goyal et al., Non-deep Networks, NeurIPS 2022, for the pooled one. https://arxiv.org/abs/2110.07641
  """

  features: int
  branches: Sequence[str] = ("conv3x3", "conv1x1", "identity")
  strides: int | Sequence[int] = 1
  groups: int = 1
  dilation: int | Sequence[int] = 1
  padding: int | Sequence[int] | None = None
  padding_mode: str = "constant"
  conv_bias: bool = False
  epsilon: float = EPSILON
  axis_name: str | None = None
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, I) to (N, H', W', O).

    Raises:
      ValueError: branches that do not fit the input or one another, or `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    size = _layer_size(self.branches)
    self._check(x, size)
    padding = self._padding(size)
    if self.padding_mode != "constant":
      x = _pad(x, padding, self.padding_mode)
      padding = (0, 0)

    def own_padding(kernel_size: tuple[int, int]) -> tuple[int, int]:
      """Of a kernel at the centre of the largest; negative, which crops, where that pads little."""
      dilation = pair(self.dilation)
      margins = [(big - small) // 2 for big, small in zip(size, kernel_size)]
      return padding[0] - dilation[0] * margins[0], padding[1] - dilation[1] * margins[1]

    if self.deploy:
      return self._conv(size, padding, x.shape[-1], use_bias=True)(name="conv")(x)
    norm = functools.partial(
      batch_norm,
      epsilon=self.epsilon,
      axis_name=self.axis_name,
      param_dtype=self.param_dtype,
    )
    outputs = []
    for name in self.branches:
      kernel_size = branch_size(name)
      if kernel_size is None:
        branch, source = _Branch(None, norm, name=name), _pad(x, own_padding((1, 1)))
      elif _is_pooled(name):
        conv = self._conv((1, 1), (0, 0), x.shape[-1], self.conv_bias, strides=(1, 1))
        branch, source = _Branch(conv, norm, name=name), _mean_pool(x)
      else:
        conv = self._conv(kernel_size, own_padding(kernel_size), x.shape[-1], self.conv_bias)
        branch, source = _Branch(conv, norm, name=name), x
      outputs.append(branch(source, train))
    return sum(outputs[1:], outputs[0]).astype(self.dtype)

  def _padding(self, size: tuple[int, int]) -> tuple[int, int]:
    """Pixels on each side, (vertical, horizontal), for the largest kernel."""
    if self.padding is not None:
      return pair(self.padding)
    dilation = pair(self.dilation)
    return dilation[0] * ((size[0] - 1) // 2), dilation[1] * ((size[1] - 1) // 2)

  def _conv(
    self,
    size: tuple[int, int],
    padding: tuple[int, int],
    inputs: int,
    use_bias: bool,
    strides: tuple[int, int] | None = None,
  ) -> Callable[..., nn.Module]:
    """A convolution that lacks only its name; its strides are the layer's if not given."""
    return functools.partial(
      nn.Conv,
      self.features,
      size,
      strides=strides or pair(self.strides),
      padding=[(pad, pad) for pad in padding],
      kernel_dilation=pair(self.dilation),
      feature_group_count=self.groups,
      use_bias=use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      kernel_init=kernel_init,
      bias_init=bias_init((*size, inputs // self.groups, self.features)),
    )

  def _check(self, x: jax.Array, size: tuple[int, int]) -> None:
    """Raises ValueError where a branch cannot be part of this layer."""
    where = f"RepConv {'/'.join(self.path)}"
    if len(set(self.branches)) != len(self.branches):
      raise InputError(f"{where}: branch names must differ (conv3x3, conv3x3_1): {self.branches}")
    if x.shape[-1] % self.groups or self.features % self.groups:
      raise InputError(
        f"{where}: {x.shape[-1]} input and {self.features} output channels do not both divide into "
        f"{self.groups} groups"
      )
    if self.padding_mode not in _PADDING_MODES:
      raise InputError(f"{where}: padding_mode {self.padding_mode!r} is none of {_PADDING_MODES}")
    for name in self.branches:
      kernel_size = branch_size(name)
      if _is_pooled(name):
        self._check_pooled(where, name, size)
      elif kernel_size and any((big - small) % 2 for big, small in zip(size, kernel_size)):
        raise InputError(
          f"{where}: {name} has no centre in the layer's {size[0]}x{size[1]} kernel; "
          "heights must be all odd or all even, and widths too"
        )
      keeps_shape = x.shape[-1] == self.features and pair(self.strides) == (1, 1)
      if kernel_size is None and not (keeps_shape and size[0] % 2 and size[1] % 2):
        raise InputError(
          f"{where}: an identity branch needs stride 1, as many output as input channels and odd "
          f"kernels; got strides {self.strides}, {x.shape[-1]} -> {self.features} channels, "
          f"kernel {size[0]}x{size[1]}; leave it out: branches=('conv3x3', 'conv1x1')"
        )

  def _check_pooled(self, where: str, name: str, size: tuple[int, int]) -> None:
    """Raises ValueError where a pooled branch is not four taps of the layer's kernel."""
    shape = size, pair(self.strides), self._padding(size), pair(self.dilation)
    if shape != ((3, 3), (2, 2), (1, 1), (1, 1)) or self.padding_mode != "constant":
      raise InputError(
        f"{where}: {name} lies beside a 3x3 convolution at stride 2 with one pixel of zeros around "
        f"the map and no dilation; got kernel {size[0]}x{size[1]}, strides {self.strides}, padding "
        f"{self.padding} of mode {self.padding_mode!r}, dilation {self.dilation}; take conv1x1"
      )


def fold_rep_conv(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepConv: its branches with their statistics become {conv: {kernel, bias}}.

  K = sum_b pad(K_b * scale_b), b = sum_b bias_b; an identity's K_b is the one-hot 1x1, and a pooled
  1x1's is a quarter of it at each of four taps, the last 2x2 of the 3x3.

  Args:
    params: {branch: {conv: {kernel[, bias]}, bn: {scale, bias}}}, no conv in an identity.
    stats: {branch: {bn: {mean, var}}}.
    epsilon: of the batch norms.

  Returns:
    {conv: {kernel (H, W, I/g, O), bias (O,)}} in the dtype of the branches' kernels.

  Raises:
    ValueError: the two trees do not hold the same branches, or shapes that do not fit.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3. https://arxiv.org/abs/2101.03697
  """
  kernel, bias = merge_branches(params, stats, epsilon)
  dtype = next(params[name]["conv"]["kernel"].dtype for name in params if branch_size(name))
  return {"conv": {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}}


def merge_branches(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> ConvParams:
  """What `fold_rep_conv` returns, before it is rounded to the dtype of the branches' kernels."""
  norms = sorted(f"{name}/{norm}" for name in stats for norm in stats[name])
  if norms != sorted(f"{name}/bn" for name in params):
    raise ValueError(
      f"parameters have the branches {sorted(params)}, statistics are of {norms}; "
      "the two trees do not belong together"
    )
  size = _layer_size(params)
  for name, held in params.items():
    wanted = {"conv", "bn"} if branch_size(name) else {"bn"}
    if held.keys() != wanted:
      raise ValueError(f"{name} holds {sorted(wanted)}, got {sorted(held)}")
  shape, dtype = next(
    (params[name]["conv"]["kernel"].shape, params[name]["conv"]["kernel"].dtype)
    for name in params
    if branch_size(name)
  )
  inputs, features = shape[2:]
  if features % inputs and not all(map(branch_size, params)):
    raise ValueError(
      f"no identity lies beside a kernel {shape}: {inputs} does not divide {features}"
    )

  def conv(name: str) -> ConvParams:
    zeros = jnp.zeros((features,), dtype)
    if branch_size(name) is None:
      return ConvParams(identity_kernel(features, features // inputs, (1, 1), dtype), zeros)
    held = params[name]["conv"]
    return ConvParams(held["kernel"], held.get("bias", zeros))

  fused = []
  for name in params:
    kernel, bias = fuse_bn(conv(name), params[name]["bn"], stats[name].get("bn", {}), epsilon)
    if _is_pooled(name):
      # A pool and a 1x1 may change places: one acts on pixels and the other on channels.
      pool = average_pool_kernel(features, features, (2, 2), kernel.dtype)
      pooled, _ = compose(ConvParams(kernel, bias), ConvParams(pool, jnp.zeros_like(bias)))
      fused.append(ConvParams(pad_kernel(pooled, size, before=(1, 1)), bias))
    else:
      fused.append(ConvParams(pad_kernel(kernel, size), bias))
  return add(*fused)
