"""RepConv: a sum of convolution branches that folds into one convolution.

RepConv is the linear layer of which all networks are made. The name of a branch says what the
branch is made of. The forward pass and the fold read the same name. The table lists the names.

| name             | branch                                              |
|------------------|-----------------------------------------------------|
| `convHxW`        | HxW convolution, batch norm                         |
| `identity`       | batch norm of the input                             |
| `avg2x2_conv1x1` | 2x2 average pool at stride 2, 1x1 convolution, batch norm |
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
from repjax.layers.base import RepLayer, leading_axes, read_notes, refuse_training
from repjax.layers.linear import bias_init, kernel_init
from repjax.layers.one_channel import OneChannelConv, is_one_channel

_BRANCH = re.compile(r"(?:conv([1-9]\d*)x([1-9]\d*)|identity|(avg2x2_conv1x1))(?:_\d+)?")
_PADDING_MODES = ("constant", "edge", "reflect", "wrap")


def branch_size(name: str) -> tuple[int, int] | None:
  """Returns the kernel size (H, W) of a branch: (2, 2) for a pooled branch, None for an identity.

  Raises:
    ValueError: `name` is not in the grammar at the top of this file.
  """
  match = _BRANCH.fullmatch(name)
  if match is None:
    raise ValueError(
      f"unknown branch {name!r}; a branch is called convHxW (conv3x3, conv1x1, conv1x3, ...), "
      "identity or avg2x2_conv1x1. Repeated names end with _1, _2, ..."
    )
  if match[3]:
    return 2, 2
  return (int(match[1]), int(match[2])) if match[1] else None


def _is_pooled(name: str) -> bool:
  """Tells if a branch pools before it convolves."""
  return name.startswith("avg2x2")


def _layer_size(branches: Iterable[str]) -> tuple[int, int]:
  """Returns the size of the one kernel into which all branches fold."""
  sizes = [branch_size(name) for name in branches]
  if not any(sizes):
    raise ValueError(
      f"a RepConv needs at least one convolution among its branches, got {list(branches)}; "
      "a batch norm alone is a RepNorm"
    )
  return max(s[0] for s in sizes if s), max(s[1] for s in sizes if s)


def pair(value: int | Sequence[int]) -> tuple[int, int]:
  """Returns (vertical, horizontal) from one number for both, or from two numbers."""
  return (value, value) if isinstance(value, int) else (value[0], value[1])


def _pad(x: jax.Array, padding: tuple[int, int], mode: str = "constant") -> jax.Array:
  """Adds pixels on each side of (N, H, W, C), or removes them where `padding` is negative."""
  if padding == (0, 0):
    return x
  if mode != "constant":
    rows, columns = ((pad, pad) for pad in padding)
    return jnp.pad(x, ((0, 0), rows, columns, (0, 0)), mode=mode)
  edges = [(0, 0, 0), *((pad, pad, 0) for pad in padding), (0, 0, 0)]
  return jax.lax.pad(x, jnp.zeros((), x.dtype), edges)


def _mean_pool(x: jax.Array) -> jax.Array:
  """Averages 2x2 windows at stride 2.

  An odd edge is filled with zeros that count, so that every mean is over four pixels. The pool is
  then a convolution with four taps of 1/4 at every size of the map.
  """
  n, height, width, channels = x.shape
  down, across = -(-height // 2), -(-width // 2)
  edges = [(0, 0, 0), (0, height % 2, 0), (0, width % 2, 0), (0, 0, 0)]
  x = jax.lax.pad(x, jnp.zeros((), x.dtype), edges)
  return x.reshape(n, down, 2, across, 2, channels).mean((2, 4))  # (N, ceil(H/2), ceil(W/2), C)


class _Branch(nn.Module):
  """A convolution and the batch norm after it.

  Attributes:
    conv: builds the convolution, given its name. An identity branch has None.
    norm: applies the batch norm in the current scope.
  """

  conv: Callable[..., nn.Module] | None
  norm: Callable[[jax.Array, bool], jax.Array]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    if self.conv is not None:
      x = self.conv(name="conv")(x)
    return self.norm(x, train)


class RepConv(RepLayer):
  """A sum of conv-BN branches over one input; its deploy form is one convolution with bias.

  y = sum_b BN_b(conv_b(x)). The deploy form is exact for every stride, dilation, group count,
  padding and padding mode. Smaller kernels sit at the centre of the largest kernel, and the
  identity is a 1x1 kernel. The pooled branch is the last 2x2 taps of a 3x3 kernel at stride 2, at
  every size of the map. The sum of the branches is computed in at least float32.

  Attributes:
    features: number of output channels O.
    branches: names of the branches, see the table at the top of this file.
    strides: stride of every branch, one number or (vertical, horizontal).
    groups: number of groups of every convolution.
    dilation: dilation of every convolution, one number or (vertical, horizontal).
    padding: pixels added on each side for the largest kernel, one number or (vertical, horizontal).
      None keeps the size of the map at stride 1.
    padding_mode: "constant" (zeros), "edge", "reflect" or "wrap", as in `jnp.pad`.
    conv_bias: give convolutions a bias in training form too, as some checkpoints do.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.2. https://arxiv.org/abs/2101.03697
    Ding et al., ACNet, ICCV 2019, for the 1x3 and 3x1 branches. https://arxiv.org/abs/1908.03930
    Goyal et al., Non-deep Networks, NeurIPS 2022, for the pooled branch. https://arxiv.org/abs/2110.07641
  """

  features: int
  branches: Sequence[str] = ("conv3x3", "conv1x1", "identity")
  strides: int | Sequence[int] = 1
  groups: int = 1
  dilation: int | Sequence[int] = 1
  padding: int | Sequence[int] | None = None
  padding_mode: str = "constant"
  conv_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, I) to (N, H', W', O).

    Raises:
      InputError: the branches do not fit the input or each other.
      ValueError: a branch's name is not in the grammar, or `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    size = _layer_size(self.branches)
    self._check(x, size)
    padding = self._padding(size)
    if self.padding_mode != "constant":
      # A convolution pads with zeros alone, so the map is padded here for the largest kernel.
      # Smaller kernels then crop the padded map.
      x = _pad(x, padding, self.padding_mode)
      padding = (0, 0)

    def centred_padding(kernel_size: tuple[int, int]) -> tuple[int, int]:
      """Returns the padding of a smaller kernel, so that its centre lies under the largest's.

      Negative padding crops the input.
      """
      dilation = pair(self.dilation)
      margins = [(big - small) // 2 for big, small in zip(size, kernel_size)]
      return padding[0] - dilation[0] * margins[0], padding[1] - dilation[1] * margins[1]

    if self.deploy:
      return self._conv(size, padding, x.shape[-1], use_bias=True)(name="conv")(x)
    outputs = []
    for name in self.branches:
      kernel_size = branch_size(name)
      if kernel_size is None:
        branch, source = _Branch(None, self.norm, name=name), _pad(x, centred_padding((1, 1)))
      elif _is_pooled(name):
        # The pool has the stride already, and its zeros at an odd edge are the only padding.
        conv = self._conv((1, 1), (0, 0), x.shape[-1], self.conv_bias, strides=(1, 1))
        branch, source = _Branch(conv, self.norm, name=name), _mean_pool(x)
      else:
        conv = self._conv(kernel_size, centred_padding(kernel_size), x.shape[-1], self.conv_bias)
        branch, source = _Branch(conv, self.norm, name=name), x
      outputs.append(branch(source, train))
    return sum(outputs[1:], outputs[0]).astype(self.dtype)

  def _padding(self, size: tuple[int, int]) -> tuple[int, int]:
    """Returns the pixels (vertical, horizontal) added on each side for the largest kernel."""
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
    """Returns a function that builds a convolution, given its name.

    Without `strides`, the convolution has the strides of the layer.
    """
    built = functools.partial(
      OneChannelConv if is_one_channel(self.dtype, inputs, self.features) else nn.Conv,
      self.features,
      size,
      strides=strides or pair(self.strides),
      padding=[(pad, pad) for pad in padding],
      kernel_dilation=pair(self.dilation),
      use_bias=use_bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      bias_init=bias_init((*size, inputs // self.groups, self.features)),
    )
    if built.func is OneChannelConv:
      return built
    return functools.partial(built, feature_group_count=self.groups, kernel_init=kernel_init)

  def _check(self, x: jax.Array, size: tuple[int, int]) -> None:
    """Raises InputError if a branch cannot be part of this layer."""
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
          f"kernel {size[0]}x{size[1]}. Leave the branch out: branches=('conv3x3', 'conv1x1')"
        )

  def _check_pooled(self, where: str, name: str, size: tuple[int, int]) -> None:
    """Raises InputError if a pooled branch is not four taps of the layer's kernel."""
    shape = size, pair(self.strides), self._padding(size), pair(self.dilation)
    if shape != ((3, 3), (2, 2), (1, 1), (1, 1)) or self.padding_mode != "constant":
      raise InputError(
        f"{where}: {name} lies beside a 3x3 convolution at stride 2 with one pixel of zeros around "
        f"the map and no dilation; got kernel {size[0]}x{size[1]}, strides {self.strides}, padding "
        f"{self.padding} of mode {self.padding_mode!r}, dilation {self.dilation}. Use conv1x1"
      )


def convolution_branches(params: Mapping[str, Any]) -> list[str]:
  """Returns the names in a scope that look like convolution branches of a RepConv."""
  return [
    name
    for name, held in params.items()
    if _BRANCH.fullmatch(str(name)) and branch_size(name) and _holds_branch(held)
  ]


def _holds_branch(held: Any) -> bool:
  """Tells if a scope holds a convolution or a batch norm, or both, and nothing else."""
  return isinstance(held, Mapping) and bool(held) and held.keys() <= {"conv", "bn"}


def recognize_rep_conv(params: Mapping[str, Any]) -> int | None:
  """Tells if a scope holds a RepConv in training form.

  Such a scope holds branches alone, and at least one of them is a convolution.

  Args:
    params: parameters of the scope.

  Returns:
    The number of leading axes of the kernels, from `nn.vmap` or `nn.scan`; None for other scopes.
  """
  convs = convolution_branches(params)
  if not convs or not all(
    _BRANCH.fullmatch(str(name)) and _holds_branch(held) for name, held in params.items()
  ):
    return None
  counts = [leading_axes(params[name], ("conv", "kernel"), 4) for name in convs]
  # A branch without a kernel is for the fold to refuse.
  return max((count for count in counts if count is not None), default=0)


def fold_rep_conv(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepConv: its branches with their statistics become one convolution.

  K = sum_b pad(K_b * scale_b);  b = sum_b bias_b.

  K_b of an identity is the one-hot 1x1 kernel. A pooled branch has a quarter of its 1x1 kernel at
  each of four taps, the last 2x2 taps of the 3x3 kernel.

  Args:
    params: {branch: {conv: {kernel[, bias]}, bn: {scale, bias}}}; an identity has no conv.
    stats: {branch: {bn: {mean, var}}}.
    epsilon: number added to the variance by batch norms.

  Returns:
    {conv: {kernel (H, W, I/g, O), bias (O,)}} in the dtype of the branches' kernels.

  Raises:
    ValueError: the two trees do not hold the same branches, or shapes do not fit.

  References:
    Ding et al., RepVGG, CVPR 2021, section 3.3. https://arxiv.org/abs/2101.03697
  """
  kernel, bias = merge_branches(params, stats, epsilon)
  dtype = next(params[name]["conv"]["kernel"].dtype for name in params if branch_size(name))
  return {"conv": {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}}


def merge_branches(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> ConvParams:
  """Merges branches as `fold_rep_conv` does, without rounding to the dtype of the kernels.

  Args:
    params: {branch: {conv: {kernel, ...}, bn: {scale, bias}}}; an identity has `bn` alone.
    stats: {branch: {bn: {mean, var}}}.
    epsilon: number added to the variance by the batch norms.

  Returns:
    kernel (H, W, I/g, O), bias (O,), in the widest dtype involved, at least float32.

  Raises:
    ValueError: the two trees do not hold the same branches, or shapes do not fit.
  """
  stats, epsilon = read_notes(stats, epsilon)
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
  # I/g and O. Beside an identity I = O, so that the number of groups is O / (I/g).
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
      # The pool acts on pixels and the 1x1 on channels, so the two may change places. With the pool
      # second, `compose` applies, and the pool is a depthwise convolution: one group per channel.
      pool = average_pool_kernel(features, features, (2, 2), kernel.dtype)
      # The bias is not pooled: zeros added at an odd edge come before the 1x1 and its bias.
      pooled, _ = compose(ConvParams(kernel, bias), ConvParams(pool, jnp.zeros_like(bias)))
      # A 3x3 at stride 2 starts one pixel before the window, so taps 1 and 2 of 0, 1, 2 pool.
      fused.append(ConvParams(pad_kernel(pooled, size, before=(1, 1)), bias))
    else:
      fused.append(ConvParams(pad_kernel(kernel, size), bias))
  return add(*fused)
