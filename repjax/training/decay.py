"""Which parameters weight decay applies to, and whether biases learn faster: rules by tree path.

| `config.weight_decay_rule`  | decays                                          | rate of biases |
|-----------------------------|-------------------------------------------------|----------------|
| `kernels_and_fast_biases`   | kernels, the identity's scale                   | twice          |
| `all_but_penalised_kernels` | the same without what `custom_l2` penalises     | twice          |
| `more_than_one_axis`        | what has two axes or more, the identity's scale | as all         |

The first two are those of the RepVGG authors' script of June 2021, without and with its custom L2;
the third is that of their later script. On RepVGG the third decays what the first does. In the
scripts the batch norm of the identity branch is called `rbr_identity`, which says neither "bias"
nor "bn", so its scale decays where other norms' do not.

References:
  https://github.com/DingXiaoH/RepVGG at 9a1de4a, train.py; at eae7c52, train/optimizer.py
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from repjax.training.custom_l2 import penalised_kernels

Path = tuple[str, ...]


class DecayRule(NamedTuple):
  """A row of the table.

  Attributes:
    decays: whether a parameter does, from its path and its number of axes.
    bias_rate: factor on the learning rate of biases.
    spares_penalised: what `custom_l2` penalises does not decay.
  """

  decays: Callable[[Path, int], bool]
  bias_rate: float
  spares_penalised: bool = False


def is_identity_scale(path: Path) -> bool:
  """Whether the parameter at `path` is the scale of an identity branch's batch norm."""
  return path[-1] == "scale" and any(name.startswith("identity") for name in path)


def is_bias(path: Path) -> bool:
  """Whether the parameter at `path` is a bias."""
  return path[-1] == "bias"


def _is_kernel_or_identity_scale(path: Path, axes: int) -> bool:
  del axes
  return path[-1] == "kernel" or is_identity_scale(path)


def _has_axes_or_is_identity_scale(path: Path, axes: int) -> bool:
  # PyTorch's norms have vectors, ours over tiles (g, h, w, O/g).
  is_vector = axes == 1 or path[-1] in ("bias", "scale")
  return not is_vector or is_identity_scale(path)


DECAY_RULES = {
  "kernels_and_fast_biases": DecayRule(_is_kernel_or_identity_scale, 2.0),
  "all_but_penalised_kernels": DecayRule(_is_kernel_or_identity_scale, 2.0, spares_penalised=True),
  "more_than_one_axis": DecayRule(_has_axes_or_is_identity_scale, 1.0),
}
"""Name to rule."""


def decay_mask(rule: DecayRule, params: Any) -> Any:
  """A tree like `params` of whether each decays."""
  spared = penalised_kernels(params) if rule.spares_penalised else ()
  return map_by_path(lambda path, leaf: rule.decays(path, leaf.ndim) and path not in spared, params)


def bias_mask(params: Any) -> Any:
  """A tree like `params` of whether each is a bias."""
  return map_by_path(lambda path, _: is_bias(path), params)


def map_by_path(function: Callable[[Path, Any], Any], tree: Any) -> Any:
  """A tree like `tree` of function(path, leaf)."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: function(tuple(entry.key for entry in path), leaf), tree
  )
