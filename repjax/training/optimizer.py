"""The optimizers, which turn gradients into updates, and the rules of weight decay.

| `config.weight_decay_rule`  | decays                                            | rate of biases |
|-----------------------------|---------------------------------------------------|----------------|
| `kernels_and_fast_biases`   | kernels, identity scales                          | twice          |
| `all_but_penalised_kernels` | the same without the kernels in `custom_l2`       | twice          |
| `more_than_one_axis`        | arrays with at least two axes, identity scales    | once           |
| `no_vectors`                | arrays with at least two axes                     | once           |

The first two rules are in the RepVGG authors' script of June 2021, without and with its custom L2.
The third rule is in their later script. For RepVGG, the third rule decays the same parameters as
the first. An identity scale is the scale of the batch norm in an identity branch. The scripts call
this norm `rbr_identity`. They exempt names with "bias" or "bn" from decay, so this scale decays,
and scales of other norms do not.

The last rule is that of timm's scripts, in which no norm decays.

References:
  https://github.com/DingXiaoH/RepVGG at 9a1de4a, train.py; at eae7c52, train/optimizer.py
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import optax

from repjax.training import clipping
from repjax.training.custom_l2 import penalised_kernels
from repjax.training.multipliers import Scales, multiplied

OPTIMIZERS = ("sgd", "adamw", "repoptimizer", "repoptimizer_adamw")

Path = tuple[str, ...]
_DEFAULT_RULE = "kernels_and_fast_biases"
# Names of scopes of a `Segmenter`: a classifier without its head, and the heads beside the head.
_BACKBONE, _AUXILIARY = "backbone", "AuxHead"


class DecayRule(NamedTuple):
  """A row of the table of rules.

  Attributes:
    decays: whether a parameter decays, from its path and its number of axes.
    bias_rate: factor on the learning rate of biases.
    spares_penalised: kernels that `custom_l2` penalises do not decay.
  """

  decays: Callable[[Path, int], bool]
  bias_rate: float
  spares_penalised: bool = False


def is_identity_scale(path: Path) -> bool:
  """Returns whether a parameter is the scale of the batch norm in an identity branch."""
  return path[-1] == "scale" and any(name.startswith("identity") for name in path)


def is_bias(path: Path) -> bool:
  """Returns whether a parameter is a bias."""
  return path[-1] == "bias"


def _is_kernel_or_identity_scale(path: Path, axes: int) -> bool:
  del axes
  return path[-1] == "kernel" or is_identity_scale(path)


def _is_no_vector(path: Path, axes: int) -> bool:
  # The rule counts axes in PyTorch, where norms have vectors. Here the norms of layers over tiles
  # have arrays (g, h, w, O/g), so the name decides as well.
  return axes > 1 and path[-1] not in ("bias", "scale")


def _has_axes_or_is_identity_scale(path: Path, axes: int) -> bool:
  return _is_no_vector(path, axes) or is_identity_scale(path)


DECAY_RULES = {
  "kernels_and_fast_biases": DecayRule(_is_kernel_or_identity_scale, 2.0),
  "all_but_penalised_kernels": DecayRule(_is_kernel_or_identity_scale, 2.0, spares_penalised=True),
  "more_than_one_axis": DecayRule(_has_axes_or_is_identity_scale, 1.0),
  "no_vectors": DecayRule(_is_no_vector, 1.0),
}
"""Name to rule."""


def decay_mask(rule: DecayRule, params: Any) -> Any:
  """Returns a tree like `params` with True where a parameter decays."""
  spared = penalised_kernels(params) if rule.spares_penalised else ()
  return map_by_path(lambda path, leaf: rule.decays(path, leaf.ndim) and path not in spared, params)


def bias_mask(params: Any) -> Any:
  """Returns a tree like `params` with True where a parameter is a bias."""
  return map_by_path(lambda path, _: is_bias(path), params)


def map_by_path(function: Callable[[Path, Any], Any], tree: Any) -> Any:
  """Returns a tree like `tree` with the values function(path, leaf)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: function(tuple(entry.key for entry in path), leaf), tree
  )


def classifier_mask(tree: Any) -> Any:
  """Returns a tree with True for each parameter whose shape depends on the number of classes.

  These are the classifier, and the classifiers of auxiliary heads. A batch norm before a classifier
  is no part of it.

  Args:
    tree: parameters, or statistics, of a whole network.
  """
  if _BACKBONE in tree:
    return map_by_path(lambda path, _: path[0] != _BACKBONE and "classifier" in path, tree)
  return map_by_path(lambda path, _: "head" in path[:-1] and "bn" not in path, tree)


def head_mask(params: Any) -> Any:
  """Returns a tree with True for each parameter that does not belong to the backbone.

  The head of a classifier is the classifier, with those of auxiliary heads. The head of a network
  for segmentation is everything above its backbone, batch norms and auxiliary heads included.
  """
  if _BACKBONE in params:
    return map_by_path(lambda path, _: path[0] != _BACKBONE, params)
  return classifier_mask(params)


def head_only(params: Any) -> Any:
  """Selects the head: the parameters that learn while the backbone is frozen.

  Auxiliary heads are left out. They only serve to teach the backbone, so they are frozen with it.
  """
  if _BACKBONE in params:
    return {
      name: scope
      for name, scope in params.items()
      if name != _BACKBONE and not name.startswith(_AUXILIARY)
    }

  def without_norms(tree: Any) -> Any:
    if not isinstance(tree, Mapping):
      return tree
    return {name: without_norms(value) for name, value in tree.items() if name != "bn"}

  return {"head": without_norms(params["head"])}


def overlay(params: Any, part: Any) -> Any:
  """Returns parameters in which the leaves of a partial tree replace those at the same paths.

  Args:
    params: the whole tree.
    part: some of its scopes, such as the result of `head_only`.
  """
  if not isinstance(part, Mapping):
    return part
  return {**params, **{name: overlay(params[name], value) for name, value in part.items()}}


def sgd(
  schedule: optax.Schedule,
  *,
  momentum: float,
  nesterov: bool,
  weight_decay: optax.ScalarOrSchedule,
  weight_decay_rule: str = _DEFAULT_RULE,
  clip_norm: float = 0.0,
  adaptive_clip: float = 0.0,
  backbone_rate: float = 1.0,
  scales: Scales | None = None,
) -> optax.GradientTransformation:
  """Builds SGD as in PyTorch: weight decay is added to the gradient before the momentum.

  With gradient g, momentum m and weight decay w: v <- m v + (g + w p);  p <- p - rate v.

  Args:
    schedule: update to learning rate.
    momentum: decay of the accumulated gradient.
    nesterov: use Nesterov momentum.
    weight_decay: factor on the parameters that decay, or a function from update to factor.
    weight_decay_rule: a key of DECAY_RULES.
    clip_norm: largest norm of the whole gradient, before weight decay; 0: no limit.
    adaptive_clip: largest norm of a unit's gradient as a part of the norm of its parameters, before
      weight decay, see `repjax.training.clipping`; 0: no limit.
    backbone_rate: factor on the updates of all parameters outside of `head_mask`. With 0, the
      optimizer holds, takes and returns only the parameters in `head_only`.
    scales: multiply the gradients g of plain kernels as RepOptimizer does, see
      `repjax.training.multipliers`. None multiplies none.

  References:
    https://github.com/DingXiaoH/RepVGG at 9a1de4a, train.py
  """
  rule = DECAY_RULES[weight_decay_rule]
  inner = optax.chain(
    _decayed_weights(weight_decay, rule),
    optax.masked(optax.scale(rule.bias_rate), bias_mask),
    optax.sgd(schedule, momentum, nesterov),
  )
  if scales is not None:
    inner = multiplied(inner, scales, adaptive=False)
  return _for_backbone(_clipped(inner, clip_norm, adaptive_clip), backbone_rate)


def adamw(
  schedule: optax.Schedule,
  *,
  momentum: float,
  weight_decay: optax.ScalarOrSchedule,
  weight_decay_rule: str = _DEFAULT_RULE,
  clip_norm: float = 0.0,
  adaptive_clip: float = 0.0,
  backbone_rate: float = 1.0,
  scales: Scales | None = None,
) -> optax.GradientTransformation:
  """Builds AdamW as in PyTorch: p <- p - rate (m / (sqrt(v) + 1e-8) + weight_decay p).

  The second moment v decays by 0.999.

  Args:
    schedule: update to learning rate.
    momentum: decay of the first moment m.
    weight_decay: factor on the parameters that decay, or a function from update to factor.
    weight_decay_rule: as in `sgd`.
    clip_norm: as in `sgd`.
    adaptive_clip: as in `sgd`.
    backbone_rate: as in `sgd`.
    scales: as in `sgd`.

  References:
    Loshchilov and Hutter, Decoupled Weight Decay Regularization, ICLR 2019.
      https://arxiv.org/abs/1711.05101
  """
  rule = DECAY_RULES[weight_decay_rule]
  adam = _scale_by_adam(momentum)
  if scales is not None:
    adam = multiplied(adam, scales, adaptive=True)
  inner = optax.chain(
    adam,
    _decayed_weights(weight_decay, rule),
    # Biases are scaled after Adam, which divides by the size of a gradient and would undo a factor.
    optax.masked(optax.scale(rule.bias_rate), bias_mask),
    optax.scale_by_learning_rate(schedule),
  )
  return _for_backbone(_clipped(inner, clip_norm, adaptive_clip), backbone_rate)


def _decayed_weights(
  weight_decay: optax.ScalarOrSchedule, rule: DecayRule
) -> optax.GradientTransformation:
  """Adds the parameters that decay to their updates, times the weight decay.

  A constant decay keeps no state, so that the checkpoints of such runs stay as they are.
  """
  return optax.add_decayed_weights(weight_decay, mask=lambda params: decay_mask(rule, params))


def _scale_by_adam(momentum: float) -> optax.GradientTransformation:
  """Wraps Optax's Adam for strict dtype promotion.

  Optax raises a float to the power of an integer count, which strict promotion refuses.
  """
  adam = optax.scale_by_adam(momentum)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    with jax.numpy_dtype_promotion("standard"):
      return adam.update(updates, state, params)

  return optax.GradientTransformation(adam.init, update)


def _clipped(
  inner: optax.GradientTransformation, clip_norm: float, factor: float
) -> optax.GradientTransformation:
  """Limits the gradient as a whole, or that of each unit, before `inner` sees the gradient."""
  if clip_norm:
    inner = optax.chain(optax.clip_by_global_norm(clip_norm), inner)
  return optax.chain(clipping.adaptive_clip(factor), inner) if factor else inner


def _for_backbone(
  inner: optax.GradientTransformation, backbone_rate: float
) -> optax.GradientTransformation:
  """Multiplies the updates of `inner` by a factor, for all parameters except the head's."""
  if backbone_rate == 1:
    return inner

  if backbone_rate == 0:
    # The state has no entries for the backbone, so that nothing of a frozen network is stored.
    return optax.GradientTransformation(
      lambda params: inner.init(head_only(params)),
      lambda updates, state, params=None: inner.update(updates, state, head_only(params)),
    )

  # A further link in an optax chain would change the tree of the state. Wrapping `inner` keeps the
  # tree, so that a checkpoint fits whatever the factor.
  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    updates, state = inner.update(updates, state, params)
    head = head_mask(updates)
    return jax.tree.map(lambda u, own: u if own else u * backbone_rate, updates, head), state

  return optax.GradientTransformation(inner.init, update)
