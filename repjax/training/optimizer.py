"""Schedule, weight-decay rule and optimizer of the RepVGG authors' training script."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

BASE_BATCH_SIZE = 256


def learning_rate_schedule(
  learning_rate: float, batch_size: int, warmup_steps: int, total_steps: int
) -> optax.Schedule:
  """Linear warm-up from zero, then a half cosine to zero at `total_steps`.

  Args:
    learning_rate: the peak for a batch of 256, scaled linearly with the batch.
    batch_size: over all devices.
    warmup_steps: length of the warm-up, which counts towards the total.
    total_steps: of the run.

  References:
    Goyal et al., Accurate, Large Minibatch SGD, 2017, section 2.1. https://arxiv.org/abs/1706.02677
  """
  peak = learning_rate * batch_size / BASE_BATCH_SIZE
  schedule = optax.cosine_decay_schedule(peak, max(1, total_steps - warmup_steps))
  if warmup_steps:
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    schedule = optax.join_schedules([warmup, schedule], [warmup_steps])
  # Optax divides the step by a number, which strict dtype promotion refuses to an integer.
  return lambda step: schedule(jnp.asarray(step, jnp.float32))


def decayed(path: tuple[str, ...]) -> bool:
  """Whether weight decay applies to the parameter at `path`: kernels and the identity's scale.

  In the authors' script of June 2021 every parameter decays whose name holds neither "bias" nor
  "bn"; the batch norm of the identity branch is called `rbr_identity` there, so its scale does.
  """
  identity_scale = path[-1] == "scale" and any(name.startswith("identity") for name in path)
  return path[-1] == "kernel" or identity_scale


def is_bias(path: tuple[str, ...]) -> bool:
  """Whether the parameter at `path` is a bias; the authors let those learn twice as fast."""
  return path[-1] == "bias"


def sgd(
  schedule: optax.Schedule, *, momentum: float, nesterov: bool, weight_decay: float
) -> optax.GradientTransformation:
  """SGD as PyTorch has it: weight decay joins the gradient before the momentum.

  Args:
    schedule: step to learning rate.
    momentum: of the gradient's trace.
    nesterov: look ahead.
    weight_decay: times the parameters that `decayed` names.

  References:
    https://github.com/DingXiaoH/RepVGG at 9a1de4a, train.py
  """
  return optax.chain(
    optax.add_decayed_weights(weight_decay, mask=lambda params: _by_path(decayed, params)),
    optax.masked(optax.scale(2.0), lambda params: _by_path(is_bias, params)),
    optax.sgd(schedule, momentum, nesterov),
  )


def _by_path(rule: Any, params: Any) -> Any:
  """A tree like `params` of rule(path)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rule(tuple(entry.key for entry in path)), params
  )
