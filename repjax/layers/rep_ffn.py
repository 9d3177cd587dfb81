"""RepFFN: a feed-forward network over channels, with a batch norm in front of it."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from repjax.algebra import ConvParams, absorb_affine, bn_affine
from repjax.layers.activations import activation
from repjax.layers.base import (
  RepLayer,
  holds_arrays,
  kernel_and_bias,
  leading_axes,
  read_notes,
  refuse_training,
)
from repjax.layers.branches import merge_branches
from repjax.layers.linear import TwoLayers
from repjax.layers.remainder import expand_branches, identity_norm
from repjax.layers.rep_conv import RepConv, recognize_rep_conv


class RepFFN(RepLayer):
  """A batch norm, a 1x1 conv-BN to more channels, an activation, and a 1x1 conv-BN back.

  y = BN(conv(act(BN(conv(BN(x)))))). All three norms fold. The first norm folds into the
  convolution after it, which is exact at every pixel: a 1x1 convolution has no border that sees
  padding. The deploy form is two fully connected layers over channels with the activation between.

  Scopes of the training form: `bn`, `expand` and `project`; the last two are RepConvs of one
  branch. Deploy form: `dense` with `expand` and `project`.

  Attributes:
    expansion: ratio of the hidden layer's width to the input's.
    act: name of the activation: "relu", "silu" or "gelu".

  References:
    Ding et al., RepMLPNet, CVPR 2022, section 3. https://arxiv.org/abs/2112.11081
  """

  expansion: int = 4
  act: str = "gelu"

  mark = "RepFFN"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to the same shape.

    Raises:
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    hidden, features = self.expansion * x.shape[-1], x.shape[-1]
    if self.deploy:
      return TwoLayers(hidden, ("expand", "project"), self.act, **self.dtypes(), name="dense")(x)
    one_branch = {"branches": ("conv1x1",), **self.shared()}
    y = self.norm(x, train).astype(self.dtype)
    y = activation(self.act)(RepConv(hidden, **one_branch, name="expand")(y, train))
    return RepConv(features, **one_branch, name="project")(y, train)


def recognize_rep_ffn(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope could be a RepFFN in training form, else None.

  Any scope with nothing but a norm `bn`, and the RepConvs `expand` and `project` of one 1x1 branch,
  could be one.
  """
  if params.keys() != {"bn", "expand", "project"} or not holds_arrays(params["bn"]):
    return None
  layers = [params["expand"], params["project"]]
  if not all(isinstance(layer, Mapping) and layer.keys() == {"conv1x1"} for layer in layers):
    return None
  if any(recognize_rep_conv(layer) is None for layer in layers):
    return None
  return leading_axes(params, ("expand", "conv1x1", "conv", "kernel"), 4)


def fold_rep_ffn(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepFFN: its norms go into its two convolutions, which become fully connected layers.

  Args:
    params: {bn: {scale, bias}, expand: {conv1x1: {conv: {kernel}, bn}}, project: the same}; the
      kernels are (1, 1, C, M) and (1, 1, M, C).
    stats: {bn: {mean, var}, expand: {conv1x1: {bn: {mean, var}}}, project: the same}.
    epsilon: number added to the variance by batch norms.

  Returns:
    {dense: {expand: {kernel (C, M), bias (M,)}, project: {kernel (M, C), bias (C,)}}} in the dtype
    of the kernels.

  Raises:
    ValueError: the two trees do not belong together, or a kernel is not 1x1.
  """
  stats, epsilon = read_notes(stats, epsilon, RepFFN.mark)
  wanted = {"bn", "expand", "project"}
  if params.keys() != wanted or stats.keys() != wanted:
    raise ValueError(
      f"a RepFFN holds {', '.join(sorted(wanted))}; got parameters of {sorted(params)} and "
      f"statistics of {sorted(stats)}"
    )
  layers = {}
  for name in ("expand", "project"):
    conv = merge_branches(params[name], stats[name], epsilon)
    if conv.kernel.shape[:2] != (1, 1):
      raise ValueError(f"{name} of a RepFFN is 1x1, got a kernel {conv.kernel.shape}")
    layers[name] = conv.kernel[0, 0], conv.bias
  # The first norm acts on the input of `expand`; the norms after the convolutions are folded above.
  layers["expand"] = absorb_affine(bn_affine(params["bn"], stats["bn"], epsilon), *layers["expand"])
  dtype = params["expand"]["conv1x1"]["conv"]["kernel"].dtype
  return {"dense": {name: kernel_and_bias(layer, dtype) for name, layer in layers.items()}}


def expand_rep_ffn(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a RepFFN: its three norms change nothing; an inverse of `fold_rep_ffn`.

  Args:
    deploy: {dense: {expand: {kernel (C, M), bias (M,)}, project: {kernel (M, C), bias (C,)}}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by batch norms.
    key: a JAX random key, for branches besides `conv1x1`.

  Returns:
    {bn, expand, project}, which folds into `deploy` with these statistics.
  """
  outer, outer_epsilon = read_notes(stats, epsilon)
  params = {"bn": identity_norm(outer["bn"], outer_epsilon, shapes["bn"])}
  for name in ("expand", "project"):
    held = deploy["dense"][name]
    conv = ConvParams(held["kernel"][None, None], held["bias"])
    params[name] = expand_branches(conv, shapes[name], stats[name], epsilon, key)
  return params
