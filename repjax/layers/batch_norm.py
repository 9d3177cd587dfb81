"""The batch norm of all layers: its statistics, its running statistics, and its affine map."""

import math
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

MOMENTUM = 0.9  # the weight of the old running value; PyTorch calls the same rule 0.1
RUNNING_VARIANCES = ("unbiased", "biased")
"""The variances of a batch that a running variance can average."""
STATISTICS = ("auto", "covariance", "outputs")
"""The ways to find the statistics of 1x1 branches, see `repjax.layers.base.RepLayer`."""


class Moments(NamedTuple):
  """Statistics of a batch: those of all devices, where a norm shares its statistics.

  Attributes:
    mean: mean of each feature.
    var: mean squared distance from the mean, the variance that normalises.
    values: number of values that were averaged for each feature.
  """

  mean: jax.Array
  var: jax.Array
  values: int


class BatchNorm(nn.BatchNorm):
  """The batch norm of Flax, with the running variance of PyTorch.

  y = (x - mean) * scale / sqrt(var + epsilon) + bias. In training, mean and var are those of the
  batch, and running statistics r move towards them: r <- momentum r + (1 - momentum) s. Both
  frameworks normalise with the mean of squares, v. For the running variance, PyTorch takes
  s = v n / (n - 1) of n values, whose expectation is the variance of the data. Flax takes s = v.

  Attributes:
    shape: number of features, one for each axis in `axis`.
    running_variance: "unbiased" as PyTorch, or "biased" as Flax.
  """

  shape: tuple[int, ...] = ()
  running_variance: str = "unbiased"

  def setup(self):
    kept = jnp.float32 if self.force_float32_reductions else self.param_dtype
    self.mean = self.variable("batch_stats", "mean", jnp.zeros, self.shape, kept)
    self.var = self.variable("batch_stats", "var", jnp.ones, self.shape, kept)
    self.scale = self.param("scale", self.scale_init, self.shape, self.param_dtype)
    self.bias = self.param("bias", self.bias_init, self.shape, self.param_dtype)

  # The base class has two more arguments, which no layer uses.
  def __call__(self, x: jax.Array) -> jax.Array:  # pyright: ignore[reportIncompatibleMethodOverride]
    """Normalises an array, and updates the running statistics in training."""
    averaged = self.averaged_axes(x.ndim)
    mean, var = self.mean.value, self.var.value
    if not self.use_running_average:
      moments = self.moments(x, averaged)
      self.update(moments)
      mean, var, _ = moments
    mean, factor, bias = (
      jnp.expand_dims(leaf, averaged) for leaf in (mean, self.factor(var), self.bias)
    )
    return jnp.asarray((x - mean) * factor + bias, self.dtype)

  def of_moments(self, moments: Moments) -> tuple[jax.Array, jax.Array]:
    """Returns factor and bias of the norm in training, and updates the running statistics.

    A norm computes (x - mean) * factor + bias, so that the caller can merge these steps.

    Args:
      moments: statistics of the array to normalise, of all devices where the norm shares them.
    """
    self.update(moments)
    return self.factor(moments.var), self.bias

  @nn.nowrap
  def averaged_axes(self, rank: int) -> tuple[int, ...]:
    """Returns the axes of an array over which the norm averages."""
    axes = self.axis if isinstance(self.axis, tuple) else (self.axis,)
    return tuple(sorted(set(range(rank)) - {axis % rank for axis in axes}))

  @nn.nowrap
  def moments(self, x: jax.Array, averaged: tuple[int, ...]) -> Moments:
    """Returns the statistics of an array, of all devices where the norm shares them."""
    mean, square = self.shared(x.mean(averaged), lax.square(x).mean(averaged))
    count = math.prod(x.shape[axis] for axis in averaged) * self.devices()
    # Rounding can make the difference negative.
    return Moments(mean, jnp.maximum(0.0, square - lax.square(mean)), count)

  @nn.nowrap
  def shared(self, *means: jax.Array) -> tuple[jax.Array, ...]:
    """Averages arrays of one shape over the devices, where the norm shares its statistics."""
    if not self._shares():
      return means
    return tuple(lax.pmean(jnp.stack(means), self.axis_name))

  @nn.nowrap
  def devices(self) -> int:
    """Returns the number of devices that share their statistics."""
    return lax.axis_size(self.axis_name) if self._shares() else 1

  @nn.nowrap
  def _shares(self) -> bool:
    # The axis need not exist while variables are made.
    return self.axis_name is not None and not self.is_initializing()

  @nn.nowrap
  def update(self, moments: Moments) -> None:
    """Moves the running statistics towards those of a batch.

    One value has no unbiased variance. The running variance then stays as it is.
    """
    if self.is_initializing():
      return
    mean, var, values = moments
    self._move(self.mean, mean)
    if self.running_variance == "biased":
      self._move(self.var, var)
    elif values > 1:
      self._move(self.var, var * (values / (values - 1)))
    else:
      warnings.warn(
        f"the batch norm {'/'.join(self.path)} trains on one value of each channel, so that its "
        "output is its bias, whatever the input. Take a larger batch or larger images, or share "
        "the statistics of all devices: sync_batch_norm in a config, axis_name of a model",
        stacklevel=2,
      )

  @nn.nowrap
  def _move(self, running: Any, batch: jax.Array) -> None:
    """Moves one running statistic, in its dtype."""
    moved = self.momentum * running.value + (1 - self.momentum) * batch
    running.value = moved.astype(running.value.dtype)

  @nn.nowrap
  def factor(self, var: jax.Array) -> jax.Array:
    """Returns scale / sqrt(var + epsilon)."""
    return lax.rsqrt(var + self.epsilon) * self.scale
