"""The Global Perceptron of RepMLP (2021): what each tile learns of all others."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.algebra import absorb_affine, bn_affine
from repjax.errors import InputError
from repjax.layers.linear import TwoLayers
from repjax.layers.rep_conv import pair
from repjax.layers.rep_dense import check_tiles
from repjax.layers.rep_norm import EPSILON, batch_norm, refuse_training


class GlobalPerceptron(nn.Module):
  """Adds to each tile and channel a number computed from the means of all tiles and channels.

  y = x + fc2(relu(fc1(BN(mean over each tile)))), each number added to all pixels of its tile. The
  norm folds into fc1, so the deploy form holds two fully connected layers. It adds; the gate of
  RepMLPNet, which multiplies, is `SqueezeExcite`. Layers are as wide as the map has tiles times
  channels, so parameters belong to one image size.

  Scopes of the training form: `bn` and `dense` with `fc1` and `fc2`. Deploy form: `dense`.

  Attributes:
    tile: h and w in pixels, one number or (h, w).
    reduction: how many times narrower the hidden layer is.
    epsilon: of the batch norm.
    axis_name: of the pmapped axis over which batch statistics are shared.
    deploy: build the deploy form.
    dtype: of the computation and the result; the norm is in at least float32.
    param_dtype: of the parameters.

  References:
    Ding et al., RepMLP, 2021, section 3.2. https://arxiv.org/abs/2105.01883
  """

  tile: int | Sequence[int]
  reduction: int = 1
  epsilon: float = EPSILON
  axis_name: str | None = None
  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to the same shape.

    Raises:
      ValueError: H or W is no multiple of the tile's, the map has another number of tiles than
        those that the parameters were made for, the reduction leaves no hidden number, or `train`
        in deploy form. As many tiles in another arrangement, 2x1 for 1x2, have parameters of the
        same shapes and are not noticed: what is computed then has no meaning.
    """
    refuse_training(self.deploy, train)
    tile, where = pair(self.tile), f"GlobalPerceptron {'/'.join(self.path)}"
    check_tiles(where, x.shape, tile)
    down, across, channels = x.shape[1] // tile[0], x.shape[2] // tile[1], x.shape[3]
    self._check(where, x.shape, down * across * channels)
    tiled = x.reshape(-1, down, tile[0], across, tile[1], channels)
    means = tiled.mean((2, 4))  # (N, H/h, W/w, C)
    if not self.deploy:
      means = batch_norm(
        means,
        train,
        epsilon=self.epsilon,
        axis_name=self.axis_name,
        param_dtype=self.param_dtype,
      ).astype(self.dtype)
    # All tiles of a channel lie together, as in PyTorch; it is a small transposition.
    flat = means.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)
    hidden = flat.shape[1] // self.reduction
    layers = TwoLayers(hidden, ("fc1", "fc2"), "relu", self.dtype, self.param_dtype, name="dense")
    added = layers(flat)
    added = added.reshape(-1, channels, down, across).transpose(0, 2, 3, 1)
    tiled = tiled.astype(self.dtype) + added[:, :, None, :, None, :]
    return tiled.reshape(x.shape)

  def _check(self, where: str, shape: tuple[int, ...], inputs: int) -> None:
    """Raises InputError where the layer does not fit its input."""
    if not 0 < self.reduction <= inputs:
      raise InputError(
        f"{where}: {inputs} numbers (tiles times channels) reduced {self.reduction} times leave no "
        "hidden one; lower the reduction or widen the network"
      )
    if self.has_variable("params", "dense"):
      held = self.get_variable("params", "dense")["fc1"]["kernel"].shape[0]
      if held != inputs:
        raise InputError(
          f"{where}: maps {shape} have {inputs} numbers (tiles times channels), and the parameters "
          f"were made for {held}; a Global Perceptron takes images of the size that it was "
          "initialised with"
        )


def fold_global_perceptron(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a GlobalPerceptron: its norm goes into fc1, and {dense: {fc1, fc2}} is left.

  Args:
    params: {bn: {scale, bias}, dense: {fc1: {kernel, bias}, fc2: {kernel, bias}}}; fc1's kernel is
      (C * tiles, hidden), all tiles of a channel together.
    stats: {bn: {mean, var}}.
    epsilon: of the batch norm.

  Returns:
    {dense: {fc1: {kernel, bias}, fc2: {kernel, bias}}} in the dtype of fc1's kernel.

  Raises:
    ValueError: the two trees do not belong together.

  References:
    Ding et al., RepMLP, 2021, section 3.2. https://arxiv.org/abs/2105.01883
  """
  if params.keys() != {"bn", "dense"} or stats.keys() != {"bn"}:
    raise ValueError(
      f"a GlobalPerceptron holds bn and dense, with statistics of bn; got parameters of "
      f"{sorted(params)} and statistics of {sorted(stats)}"
    )
  fc1 = params["dense"]["fc1"]
  affine = bn_affine(params["bn"], stats["bn"], epsilon)
  folded = absorb_affine(affine, fc1["kernel"], fc1["bias"])
  kernel, bias = (leaf.astype(fc1["kernel"].dtype) for leaf in folded)
  return {"dense": {"fc1": {"kernel": kernel, "bias": bias}, "fc2": params["dense"]["fc2"]}}
