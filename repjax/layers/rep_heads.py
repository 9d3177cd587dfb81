"""RepHeads: the mean of several classifiers, each with a batch norm in front of it."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import absorb_affine, bn_affine, wide_dtype
from repjax.errors import InputError
from repjax.layers.base import RepLayer, kernel_and_bias, read_notes, refuse_training
from repjax.layers.drawing import draw
from repjax.layers.linear import linear
from repjax.layers.remainder import identity_norm, share_of
from repjax.layers.rep_head import recognize_rep_head

_HEAD = re.compile(r"head\d+", re.ASCII)


class _NormedHead(RepLayer):
  """A batch norm and a fully connected layer, in the scopes `bn` and `dense`.

  Attributes:
    num_classes: number of outputs.
  """

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    x = self.norm(x, train).astype(self.dtype)
    return linear(x, self.num_classes, name="dense", **self.dtypes())


class RepHeads(RepLayer):
  """The mean of several classifiers, each a batch norm and a fully connected layer.

  y = mean_k(W_k BN_k(x) + b_k). Each term is affine in x, and so is their mean. The deploy form is
  one fully connected layer. A network that learns from a teacher has two such classifiers: one
  learns the labels, the other the answers of the teacher. In training, too, this layer returns the
  mean of both.

  Scopes of the training form: `head0`, `head1`, ..., each with `bn` and `dense`. Deploy form:
  `dense`.

  Attributes:
    num_classes: number of outputs.
    heads: number of classifiers.

  References:
    Touvron et al., Training data-efficient image transformers (DeiT), ICML 2021, section 4, for two
      classifiers. https://arxiv.org/abs/2012.12877
    Wang et al., RepViT, CVPR 2024, section 3.3, for the norm. https://arxiv.org/abs/2307.09283
  """

  num_classes: int
  heads: int = 1

  mark = "RepHeads"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, C) to logits (N, num_classes).

    Raises:
      InputError: there are no heads.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    if self.heads < 1:
      raise InputError(
        f"RepHeads {'/'.join(self.path)}: heads must be at least 1, got {self.heads}"
      )
    if self.deploy:
      return linear(x, self.num_classes, name="dense", **self.dtypes())
    self.write_notes()  # the norms, which would write them, belong to the heads
    outputs = [
      _NormedHead(self.num_classes, **self.shared(), name=f"head{index}")(x, train)
      for index in range(self.heads)
    ]
    return sum(outputs[1:], outputs[0]) / self.heads


def recognize_rep_heads(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope could be RepHeads in training form, else None.

  Any scope with nothing but `head0`, `head1`, ..., each a norm `bn` and a fully connected layer
  `dense` with a bias, could be RepHeads.
  """
  if not params or not all(_holds_head(str(name), held) for name, held in params.items()):
    return None
  return recognize_rep_head(next(iter(params.values())))


def _holds_head(name: str, held: Any) -> bool:
  """Tells if a scope could be one of the classifiers."""
  if not _HEAD.fullmatch(name) or not isinstance(held, Mapping):
    return False
  return recognize_rep_head(held) is not None


def fold_rep_heads(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds RepHeads: norms go into the fully connected layers, and these into their mean.

  Args:
    params: {headK: {bn: {scale, bias}, dense: {kernel (C, O), bias (O,)}}}.
    stats: {headK: {bn: {mean, var}}}.
    epsilon: number added to the variance by batch norms.

  Returns:
    {dense: {kernel (C, O), bias (O,)}} in the dtype of the kernels.

  Raises:
    ValueError: the two trees do not belong together.
  """
  stats, epsilon = read_notes(stats, epsilon, RepHeads.mark)
  if not params or params.keys() != stats.keys():
    raise ValueError(
      f"RepHeads hold head0, head1, ..., each with statistics; got parameters of {sorted(params)} "
      f"and statistics of {sorted(stats)}"
    )
  folded = []
  for name, held in params.items():
    own, own_epsilon = read_notes(stats[name], epsilon)
    affine = bn_affine(held["bn"], own.get("bn", {}), own_epsilon)
    folded.append(absorb_affine(affine, held["dense"]["kernel"], held["dense"]["bias"]))
  kernel, bias = (jnp.stack(leaves).mean(0) for leaves in zip(*folded))
  dtype = next(iter(params.values()))["dense"]["kernel"].dtype
  return {"dense": kernel_and_bias((kernel, bias), dtype)}


def expand_rep_heads(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands RepHeads: classifiers differ by small kernels, which cancel in the mean.

  Equal classifiers would have equal gradients, and stay equal.

  Args:
    deploy: {dense: {kernel (C, O), bias (O,)}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by batch norms.
    key: a JAX random key for the differences.

  Returns:
    {headK: {bn, dense}}, which folds into `deploy` with these statistics.
  """
  stats, epsilon = read_notes(stats, epsilon, RepHeads.mark)
  first, *others = shapes
  kernel, bias = deploy["dense"]["kernel"], deploy["dense"]["bias"]
  wide = kernel.astype(wide_dtype(kernel.dtype))
  drawn = draw({name: {"kernel": shapes[name]["dense"]["kernel"]} for name in others}, key)
  apart = {name: drawn[name]["kernel"].astype(wide.dtype) for name in others}
  apart = {name: delta * share_of(wide, delta)[None] for name, delta in apart.items()}
  apart[first] = -sum(apart.values(), jnp.zeros_like(wide))
  params = {}
  for name in shapes:
    own, own_epsilon = read_notes(stats[name], epsilon)
    norm = identity_norm(own["bn"], own_epsilon, shapes[name]["bn"])
    params[name] = {"bn": norm, "dense": {"kernel": wide + apart[name], "bias": bias}}
  return params
