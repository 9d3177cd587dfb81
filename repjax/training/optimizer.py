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


def is_classifier(path: tuple[str, ...]) -> bool:
  """Whether the parameter at `path` belongs to a classifier, the auxiliary heads' own included.

  These are the parameters whose shapes depend on the number of classes.
  """
  return "head" in path[:-1]


def classifier_only(params: Any) -> Any:
  """The part of a network's parameters that learns while its backbone is frozen: the classifier.

  Auxiliary heads, whose only use is to teach the backbone, are frozen with it.
  """
  return {"head": params["head"]}


def sgd(
  schedule: optax.Schedule,
  *,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
  backbone_rate: float = 1.0,
) -> optax.GradientTransformation:
  """SGD as PyTorch has it: weight decay joins the gradient before the momentum.

  Args:
    schedule: step to learning rate.
    momentum: of the gradient's trace.
    nesterov: look ahead.
    weight_decay: times the parameters that `decayed` names.
    backbone_rate: factor on the updates of all that `is_classifier` does not name. At 0 the
      optimizer holds, takes and returns nothing but what `classifier_only` selects.

  References:
    https://github.com/DingXiaoH/RepVGG at 9a1de4a, train.py
  """
  inner = optax.chain(
    optax.add_decayed_weights(weight_decay, mask=lambda params: _by_path(decayed, params)),
    optax.masked(optax.scale(2.0), lambda params: _by_path(is_bias, params)),
    optax.sgd(schedule, momentum, nesterov),
  )
  if backbone_rate == 1:
    return inner

  if backbone_rate == 0:
    return optax.GradientTransformation(
      lambda params: inner.init(classifier_only(params)),
      lambda updates, state, params=None: inner.update(updates, state, classifier_only(params)),
    )

  # Not another link of the chain: the state in a checkpoint must fit whatever the factor.
  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = inner.update(updates, state, params)
    classifier = _by_path(is_classifier, updates)
    return jax.tree.map(lambda u, own: u if own else u * backbone_rate, updates, classifier), state

  return optax.GradientTransformation(inner.init, update)


def _by_path(rule: Any, params: Any) -> Any:
  """A tree like `params` of rule(path)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: rule(tuple(entry.key for entry in path)), params
  )
