"""From gradients to updates: SGD and AdamW, weight decay by rule, clipping, a backbone's rate."""

from collections.abc import Mapping
from typing import Any

import jax
import optax

from repjax.training.decay import DECAY_RULES, bias_mask, decay_mask, map_by_path

OPTIMIZERS = ("sgd", "adamw")
_RULE = "kernels_and_fast_biases"


def is_classifier(path: tuple[str, ...]) -> bool:
  """Whether the parameter at `path` belongs to a classifier, the auxiliary heads' own included.

  These are the parameters whose shapes depend on the number of classes. A norm in front of them
  belongs to the backbone.
  """
  return "head" in path[:-1] and "bn" not in path


def classifier_only(params: Any) -> Any:
  """The part of a network's parameters that learns while its backbone is frozen: the classifier.

  Auxiliary heads, whose only use is to teach the backbone, are frozen with it.
  """

  def without_norms(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    return {name: without_norms(value) for name, value in tree.items() if name != "bn"}

  return {"head": without_norms(params["head"])}


def overlay(params: Any, part: Any) -> Any:
  """The parameters with those of a part of their tree, as `classifier_only` is, in their place."""
  if not isinstance(part, Mapping):
    return part
  return {**params, **{name: overlay(params[name], value) for name, value in part.items()}}


def sgd(
  schedule: optax.Schedule,
  *,
  momentum: float,
  nesterov: bool,
  weight_decay: float,
  weight_decay_rule: str = _RULE,
  clip_norm: float = 0.0,
  backbone_rate: float = 1.0,
) -> optax.GradientTransformation:
  """SGD as PyTorch has it: weight decay joins the gradient before the momentum.

  Args:
    schedule: update to learning rate.
    momentum: of the gradient's trace.
    nesterov: look ahead.
    weight_decay: times the parameters that decay.
    weight_decay_rule: which do, and how fast biases learn: a key of DECAY_RULES.
    clip_norm: the largest norm of all gradients together, before weight decay; 0: no limit.
    backbone_rate: factor on the updates of all that `is_classifier` does not name. At 0 the
      optimizer holds, takes and returns nothing but what `classifier_only` selects.

  References:
    https://github.com/DingXiaoH/RepVGG at 9a1de4a, train.py
  """
  rule = DECAY_RULES[weight_decay_rule]
  inner = optax.chain(
    optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(rule, params)),
    optax.masked(optax.scale(rule.bias_rate), bias_mask),
    optax.sgd(schedule, momentum, nesterov),
  )
  return _for_backbone(_clipped(inner, clip_norm), backbone_rate)


def adamw(
  schedule: optax.Schedule,
  *,
  momentum: float,
  weight_decay: float,
  weight_decay_rule: str = _RULE,
  clip_norm: float = 0.0,
  backbone_rate: float = 1.0,
) -> optax.GradientTransformation:
  """AdamW as PyTorch has it: p -= rate (m / (sqrt(v) + 1e-8) + weight_decay p), v's beta 0.999.

  Args: as in `sgd`, and
    momentum: the first beta.

  References:
    Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
      https://arxiv.org/abs/1711.05101
  """
  rule = DECAY_RULES[weight_decay_rule]
  inner = optax.chain(
    _scale_by_adam(momentum),
    optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(rule, params)),
    # Behind Adam, which would undo a factor on the gradient.
    optax.masked(optax.scale(rule.bias_rate), bias_mask),
    optax.scale_by_learning_rate(schedule),
  )
  return _for_backbone(_clipped(inner, clip_norm), backbone_rate)


def _scale_by_adam(momentum: float) -> optax.GradientTransformation:
  """Optax's own, which takes a number to the power of an integer; strict promotion refuses that."""
  adam = optax.scale_by_adam(momentum)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):
      return adam.update(updates, state, params)

  return optax.GradientTransformation(adam.init, update)


def _clipped(inner: optax.GradientTransformation, clip_norm: float) -> optax.GradientTransformation:
  """`inner` behind a limit to the norm of all gradients."""
  return optax.chain(optax.clip_by_global_norm(clip_norm), inner) if clip_norm else inner


def _for_backbone(
  inner: optax.GradientTransformation, backbone_rate: float
) -> optax.GradientTransformation:
  """`inner` with a factor on the updates of all but the classifier."""
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
    classifier = map_by_path(lambda path, _: is_classifier(path), updates)
    return jax.tree.map(lambda u, own: u if own else u * backbone_rate, updates, classifier), state

  return optax.GradientTransformation(inner.init, update)
