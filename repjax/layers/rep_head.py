"""RepHead: a batch norm, the mean over all pixels, and a linear classifier."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn

from repjax.algebra import absorb_affine, bn_affine
from repjax.layers.base import (
  RepLayer,
  holds_arrays,
  kernel_and_bias,
  leading_axes,
  read_notes,
  refuse_training,
)
from repjax.layers.linear import linear
from repjax.layers.remainder import identity_norm


class RepHead(RepLayer):
  """A classifier: batch norm, mean over pixels, dropout, fully connected layer.

  y = W mean(BN(x)) + b. A batch norm at inference is a per-channel affine map. Such a map may
  change places with the mean over pixels, and then folds into W and b. The deploy form is the mean
  and the fully connected layer. In training the norm sees all pixels, not their means.

  Scopes of the training form: `bn` and `dense`. Deploy form: `dense`.

  Attributes:
    num_classes: number of outputs.
    dropout: dropout rate in front of the fully connected layer.

  References:
    Ding et al., RepMLPNet, CVPR 2022, section 3. https://arxiv.org/abs/2112.11081
  """

  num_classes: int
  dropout: float = 0.0

  mark = "RepHead"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to logits (N, num_classes).

    Raises:
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    if not self.deploy:
      x = self.norm(x, train).astype(self.dtype)
    x = x.mean((1, 2))  # (N, C)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    return linear(x, self.num_classes, name="dense", **self.dtypes())


def recognize_rep_head(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope could be a RepHead in training form, else None.

  Any scope with nothing but `bn` and a fully connected layer `dense` with a bias could be one.
  """
  if params.keys() != {"bn", "dense"} or not holds_arrays(params["bn"]):
    return None
  if leading_axes(params, ("dense", "bias"), 1) is None:
    return None
  return leading_axes(params, ("dense", "kernel"), 2)


def fold_rep_head(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepHead: its norm goes into its fully connected layer.

  Args:
    params: {bn: {scale, bias}, dense: {kernel (C, O), bias (O,)}}.
    stats: {bn: {mean, var}}.
    epsilon: number added to the variance by the batch norm.

  Returns:
    {dense: {kernel (C, O), bias (O,)}} in the dtype of the kernel.

  Raises:
    ValueError: the two trees do not belong together.
  """
  stats, epsilon = read_notes(stats, epsilon, RepHead.mark)
  if params.keys() != {"bn", "dense"} or stats.keys() != {"bn"}:
    raise ValueError(
      f"a RepHead holds bn and dense, with statistics of bn; got parameters of {sorted(params)} "
      f"and statistics of {sorted(stats)}"
    )
  held = params["dense"]
  affine = bn_affine(params["bn"], stats["bn"], epsilon)
  folded = absorb_affine(affine, held["kernel"], held["bias"])
  return {"dense": kernel_and_bias(folded, held["kernel"].dtype)}


def expand_rep_head(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a RepHead: its norm changes nothing; an inverse of `fold_rep_head`.

  Args:
    deploy: {dense: {kernel (C, O), bias (O,)}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by the batch norm.
    key: not used.

  Returns:
    {bn: {scale, bias}, dense: {kernel, bias}}, which folds into `deploy` with these statistics.
  """
  del key
  stats, epsilon = read_notes(stats, epsilon, RepHead.mark)
  return {"bn": identity_norm(stats["bn"], epsilon, shapes["bn"]), "dense": deploy["dense"]}
