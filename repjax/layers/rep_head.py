"""RepHead, a linear classifier behind a batch norm and the mean over all pixels."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import absorb_affine, bn_affine
from repjax.layers.linear import linear
from repjax.layers.rep_norm import EPSILON, batch_norm, refuse_training


class RepHead(nn.Module):
  """Batch norm, mean over pixels, dropout, fully connected layer.

  y = W mean(BN(x)) + b. The mean over pixels of a per-channel affine map is that map of the mean,
  so the norm folds into W and b, and the deploy form is mean and fully connected layer. In
  training the norm sees all pixels, not their means.

  Scopes of the training form: `bn` and `dense`. Deploy form: `dense`.

  Attributes:
    num_classes: outputs.
    dropout: rate in front of the fully connected layer.
    epsilon: of the batch norm.
    axis_name: of the pmapped axis over which batch statistics are shared.
    deploy: build the deploy form.
    dtype: of the computation and the result; the norm is in at least float32.
    param_dtype: of the parameters.

  References:
    Ding et al., RepMLPNet, CVPR 2022, section 3. https://arxiv.org/abs/2112.11081
  """

  num_classes: int
  dropout: float = 0.0
  epsilon: float = EPSILON
  axis_name: str | None = None
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to logits (N, num_classes).

    Raises:
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    if not self.deploy:
      x = batch_norm(
        x,
        train,
        epsilon=self.epsilon,
        axis_name=self.axis_name,
        param_dtype=self.param_dtype,
      ).astype(self.dtype)
    x = x.mean((1, 2))  # (N, C)
    x = nn.Dropout(self.dropout, deterministic=not train)(x)
    dtypes = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    return linear(x, self.num_classes, name="dense", **dtypes)


def fold_rep_head(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a RepHead: its norm goes into its fully connected layer.

  Args:
    params: {bn: {scale, bias}, dense: {kernel (C, O), bias (O,)}}.
    stats: {bn: {mean, var}}.
    epsilon: of the batch norm.

  Returns:
    {dense: {kernel (C, O), bias (O,)}} in the dtype of the kernel.

  Raises:
    ValueError: the two trees do not belong together.
  """
  if params.keys() != {"bn", "dense"} or stats.keys() != {"bn"}:
    raise ValueError(
      f"a RepHead holds bn and dense, with statistics of bn; got parameters of {sorted(params)} "
      f"and statistics of {sorted(stats)}"
    )
  held = params["dense"]
  affine = bn_affine(params["bn"], stats["bn"], epsilon)
  kernel, bias = absorb_affine(affine, held["kernel"], held["bias"])
  dtype = held["kernel"].dtype
  return {"dense": {"kernel": kernel.astype(dtype), "bias": bias.astype(dtype)}}
