"""The Global Perceptron of RepMLP (2021), which lets every tile of a map see all tiles."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn

from repjax.algebra import absorb_affine, bn_affine
from repjax.errors import InputError
from repjax.layers.base import (
  RepLayer,
  holds_arrays,
  kernel_and_bias,
  leading_axes,
  read_notes,
  refuse_training,
)
from repjax.layers.composition import pair
from repjax.layers.linear import TwoLayers
from repjax.layers.remainder import identity_norm
from repjax.layers.rep_dense import check_tiles


class GlobalPerceptron(RepLayer):
  """A number for each tile and channel, computed from the means of all tiles, and added.

  y = x + fc2(relu(fc1(BN(mean over each tile)))). Each number is added to all pixels of its tile.
  The norm folds into fc1, so the deploy form holds two fully connected layers. This layer adds; the
  gate of RepMLPNet, which multiplies, is `SqueezeExcite`.

  fc1 reads one number for each tile and channel of the map. Parameters therefore fit one image
  size.

  Scopes of the training form: `bn`, and `dense` with `fc1` and `fc2`. Deploy form: `dense`.

  Attributes:
    tile: height and width of a tile in pixels, one number or (h, w).
    reduction: ratio of the width of fc1's input to the hidden layer's width.

  References:
    Ding et al., RepMLP, 2021, section 3.2. https://arxiv.org/abs/2105.01883
  """

  tile: int | Sequence[int]
  reduction: int = 1

  mark = "GlobalPerceptron"

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to the same shape.

    Parameters fit one arrangement of tiles. A map with as many tiles in a different arrangement,
    2x1 instead of 1x2, has parameters of the same shapes and is not noticed. The output is then
    meaningless.

    Raises:
      InputError: H or W is no multiple of the tile's, the number of tiles differs from the number
        that the parameters were made for, or the reduction leaves no hidden unit.
      ValueError: `train` in deploy form.
    """
    refuse_training(self.deploy, train)
    tile, where = pair(self.tile), f"GlobalPerceptron {'/'.join(self.path)}"
    check_tiles(where, x.shape, tile)
    down, across, channels = x.shape[1] // tile[0], x.shape[2] // tile[1], x.shape[3]
    self._check(where, x.shape, down * across * channels)
    tiled = x.reshape(-1, down, tile[0], across, tile[1], channels)
    means = tiled.mean((2, 4))  # (N, H/h, W/w, C)
    if not self.deploy:
      # The norm has one scale and one shift for each channel, shared by all tiles.
      means = self.norm(means, train).astype(self.dtype)
    # All tiles of a channel lie next to each other, as in PyTorch, so that fc1 holds the weights of
    # official checkpoints in their order. The fold relies on this order too: each entry of the
    # norm's scale repeats once for each tile. The array is small, so the transposition is cheap.
    flat = means.transpose(0, 3, 1, 2).reshape(x.shape[0], -1)  # (N, C * H/h * W/w)
    hidden = flat.shape[1] // self.reduction
    added = TwoLayers(hidden, ("fc1", "fc2"), "relu", **self.dtypes(), name="dense")(flat)
    added = added.reshape(-1, channels, down, across).transpose(0, 2, 3, 1)  # (N, H/h, W/w, C)
    tiled = tiled.astype(self.dtype) + added[:, :, None, :, None, :]  # (N, H/h, h, W/w, w, C)
    return tiled.reshape(x.shape)

  def _check(self, where: str, shape: tuple[int, ...], inputs: int) -> None:
    """Raises InputError if the layer does not fit its input."""
    if not 0 < self.reduction <= inputs:
      raise InputError(
        f"{where}: {inputs} inputs (tiles times channels) reduced {self.reduction} times leave no "
        "hidden unit. Lower the reduction or widen the network"
      )
    if self.has_variable("params", "dense"):
      held = self.get_variable("params", "dense")["fc1"]["kernel"].shape[0]
      if held != inputs:
        raise InputError(
          f"{where}: maps {shape} give {inputs} inputs (tiles times channels), but the parameters "
          f"were made for {held}. Use images of the size with which the model was initialised"
        )


def recognize_global_perceptron(params: Mapping[str, Any]) -> int | None:
  """Returns the number of leading axes if a scope could be a GlobalPerceptron in training form.

  Returns None for all other scopes. Any scope with nothing but a norm `bn`, and `dense` with `fc1`
  and `fc2`, could be one.
  """
  dense = params.get("dense")
  if params.keys() != {"bn", "dense"} or not isinstance(dense, Mapping):
    return None
  if not holds_arrays(params["bn"]):
    return None
  if dense.keys() != {"fc1", "fc2"} or leading_axes(dense, ("fc1", "bias"), 1) is None:
    return None
  return leading_axes(dense, ("fc1", "kernel"), 2)


def fold_global_perceptron(
  params: Mapping[str, Any], stats: Mapping[str, Any], epsilon: float
) -> dict[str, Any]:
  """Folds a GlobalPerceptron: its norm goes into fc1, and two fully connected layers remain.

  Args:
    params: {bn: {scale, bias}, dense: {fc1: {kernel, bias}, fc2: {kernel, bias}}}; fc1's kernel is
      (C * tiles, hidden), with all tiles of a channel next to each other.
    stats: {bn: {mean, var}}.
    epsilon: number added to the variance by the batch norm.

  Returns:
    {dense: {fc1: {kernel, bias}, fc2: {kernel, bias}}} in the dtype of fc1's kernel.

  Raises:
    ValueError: the two trees do not belong together.

  References:
    Ding et al., RepMLP, 2021, section 3.2. https://arxiv.org/abs/2105.01883
  """
  stats, epsilon = read_notes(stats, epsilon, GlobalPerceptron.mark)
  if params.keys() != {"bn", "dense"} or stats.keys() != {"bn"}:
    raise ValueError(
      f"a GlobalPerceptron holds bn and dense, with statistics of bn; got parameters of "
      f"{sorted(params)} and statistics of {sorted(stats)}"
    )
  fc1 = params["dense"]["fc1"]
  affine = bn_affine(params["bn"], stats["bn"], epsilon)
  folded = absorb_affine(affine, fc1["kernel"], fc1["bias"])
  merged = kernel_and_bias(folded, fc1["kernel"].dtype)
  return {"dense": {"fc1": merged, "fc2": params["dense"]["fc2"]}}


def expand_global_perceptron(
  deploy: Mapping[str, Any],
  shapes: Mapping[str, Any],
  stats: Mapping[str, Any],
  epsilon: Any,
  key: jax.Array,
) -> dict[str, Any]:
  """Expands a GlobalPerceptron: its norm changes nothing; an inverse of `fold_global_perceptron`.

  Args:
    deploy: {dense: {fc1: {kernel, bias}, fc2: {kernel, bias}}}.
    shapes: shapes and dtypes of the parameters of the training form.
    stats: fresh statistics of the training form.
    epsilon: number added to the variance by the batch norm.
    key: not used.

  Returns:
    {bn: {scale, bias}, dense: the same}, which folds into `deploy` with these statistics.
  """
  del key
  stats, epsilon = read_notes(stats, epsilon)
  return {"bn": identity_norm(stats["bn"], epsilon, shapes["bn"]), "dense": deploy["dense"]}
