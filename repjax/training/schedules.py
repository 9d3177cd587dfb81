"""The learning rate and the weight decay as functions of the step."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

BASE_BATCH_SIZE = 256
CURVES = ("cosine", "step", "poly")


def learning_rate_schedule(
  learning_rate: float,
  batch_size: int,
  warmup_steps: int,
  total_steps: int,
  *,
  curve: str = "cosine",
  warmup_rate: float = 0.0,
  warmup_overlaps: bool = False,
  final_rate: float = 0.0,
  drop_steps: int = 1,
  drop_factor: float = 0.1,
  power: float = 0.9,
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
  """Builds a linear warm-up to the peak, followed by a curve down to `final_rate`.

  After the curve, the rate stays at `final_rate`. With t the part of the curve that is done, from 0
  to 1:

    cosine: final + (peak - final) (1 + cos(pi t)) / 2;  poly: final + (peak - final) (1 - t)^power;
    step: max(final, peak * drop_factor^floor(step / drop_steps)), counted from the first step.

  The first step of the run is number 0. By default a curve begins when the warm-up ends, as in the
  strong recipe of the RepVGG paper. With `warmup_overlaps` the curve begins with the run, and the
  warm-up hides its start. The rate then drops a little when the warm-up ends, as in the authors'
  later script. That script applies each rate one step late, which is not copied.

  Args:
    learning_rate: peak for a batch of 256. All rates are scaled linearly with the batch size.
    batch_size: images in an update, over all devices.
    warmup_steps: length of the warm-up, counted in the total.
    total_steps: step at which the curve ends. A run may be longer.
    curve: one of CURVES.
    warmup_rate: rate of step 0 in a warm-up.
    warmup_overlaps: see above.
    final_rate: see above.
    drop_steps: steps between two drops of "step".
    drop_factor: factor of each drop of "step".
    power: power of "poly".

  Returns:
    A function from step to learning rate, float32 ().

  References:
    Goyal et al., Accurate, Large Minibatch SGD, 2017, section 2.1. https://arxiv.org/abs/1706.02677
    Loshchilov and Hutter, SGDR, ICLR 2017, eq. 5. https://arxiv.org/abs/1608.03983
    Chen et al., DeepLab, 2016, section 4.1.1 ("poly"). https://arxiv.org/abs/1606.00915
  """
  peak, first, final = (
    rate * batch_size / BASE_BATCH_SIZE for rate in (learning_rate, warmup_rate, final_rate)
  )
  begin = 0 if warmup_overlaps or curve == "step" else warmup_steps
  length = max(1, total_steps - begin)
  # At the end of the curve, rounding may make 1 - t negative, and its power NaN. From there on the
  # final rate is taken directly.
  poly = optax.polynomial_schedule(peak, final, power, length)
  falling = {
    "cosine": optax.cosine_decay_schedule(peak, length, final / peak),
    "step": optax.exponential_decay(peak, drop_steps, drop_factor, staircase=True, end_value=final),
    "poly": lambda step: jnp.where(step < length, poly(step), final),
  }[curve]
  rising = optax.linear_schedule(first, peak, warmup_steps) if warmup_steps else None

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    # Optax divides the step by a float. Strict dtype promotion refuses this for an integer step.
    step = jnp.asarray(step, jnp.float32)
    rate = jnp.asarray(falling(step - begin))
    return rate if rising is None else jnp.where(step < warmup_steps, rising(step), rate)

  return schedule


def weight_decay_schedule(
  weight_decay: float, final_factor: float, total_steps: int
) -> Callable[[jax.typing.ArrayLike], jax.Array]:
  """Builds a weight decay w that falls, or rises, along a cosine: w at first, then factor * w.

  With t the part of the steps that is done, from 0 to 1, it is

    w (factor + (1 - factor) (1 + cos(pi t)) / 2).

  There is no warm-up: the curve begins with the run. After the last step it stays at factor * w.

  Args:
    weight_decay: w.
    final_factor: see above.
    total_steps: step at which the curve ends. A run may be longer.

  Returns:
    A function from step to weight decay, float32 ().

  References:
    Vasu et al., MobileOne, CVPR 2023, section 3.3. https://arxiv.org/abs/2206.04040
  """
  curve = optax.cosine_decay_schedule(weight_decay, max(1, total_steps), final_factor)

  def schedule(step: jax.typing.ArrayLike) -> jax.Array:
    # As for rates, an integer step is refused by strict dtype promotion.
    return jnp.asarray(curve(jnp.asarray(step, jnp.float32)))

  return schedule
