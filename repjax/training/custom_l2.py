"""RepVGG's custom L2: a penalty on the fused kernels in place of weight decay on the branches."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repjax.algebra import bn_affine
from repjax.errors import InputError
from repjax.layers import recognize_rep_conv
from repjax.layers.base import read_notes

Tree = Mapping[str, Any]

_BRANCHES = ("conv3x3", "conv1x1")


def custom_l2(params: Tree, batch_stats: Tree, epsilon: float = 1e-5) -> jax.Array:
  """Returns the sum of the penalty over all layers with a 3x3 and a 1x1 branch.

  With t3 and t1 the scales gamma / sqrt(var + epsilon) of the two branches' batch norms, the
  penalty of a layer is

    sum K3^2 - sum K3c^2 + sum (K3c t3 + K1 t1)^2 / (t3^2 + t1^2),

  where K3c is the centre tap of K3. The first two terms are the eight outer taps of the 3x3 kernel.
  The last term is the square of the centre tap after fusion, normalised by the squared scales. No
  gradient flows through t3 and t1. The identity branch takes no part.

  A loss adds 0.5 * weight * penalty. The penalised kernels must not decay in addition, see the rule
  `all_but_penalised_kernels` in `repjax.training.optimizer`.

  Args:
    params: parameters of a network in training form.
    batch_stats: running statistics. The authors use those that the same step has updated.
    epsilon: added to the variance by batch norms, for layers without a note of theirs.

  Returns:
    A scalar, in float32 or wider.

  Raises:
    InputError: the network has no such layer.

  References:
    https://github.com/DingXiaoH/RepVGG, get_custom_L2 in repvgg.py; deprecated there.
  """
  values = [
    _penalty(_scope(params, path), _scope(batch_stats, path), epsilon) for path in _layers(params)
  ]
  if not values:
    raise InputError(
      "config.custom_l2 penalises layers with a 3x3 and a 1x1 branch, each with its norm, and this "
      "model has none. Set it to 0, and config.weight_decay_rule to a rule other than "
      "all_but_penalised_kernels"
    )
  return sum(values[1:], values[0])


def penalised_kernels(params: Tree) -> frozenset[tuple[str, ...]]:
  """Returns the paths of the kernels that `custom_l2` penalises."""
  return frozenset(
    (*path, name, "conv", "kernel") for path in _layers(params) for name in _BRANCHES
  )


def _layers(params: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  """Yields the path of every RepConv that holds both branches, with their norms."""
  for name, value in params.items():
    if isinstance(value, Mapping):
      if recognize_rep_conv(value) is None:
        yield from _layers(value, (*path, name))
      elif value.keys() >= set(_BRANCHES) and _are_scaled(value):
        yield (*path, name)


def _are_scaled(params: Tree) -> bool:
  """Tells if the scales of a RepConv are those of the norms in its branches."""
  return "bn" not in params and all("bn" in params[name] for name in _BRANCHES)


def _scope(tree: Tree, path: tuple[str, ...]) -> Tree:
  return functools.reduce(lambda scope, name: scope[name], path, tree)


def _penalty(params: Tree, stats: Tree, epsilon: float) -> jax.Array:
  """Returns the penalty of one RepConv."""
  stats, epsilon = read_notes(stats, epsilon)
  # The scales count as constants, as in the authors' code: the penalty shrinks kernels only. Their
  # axis of input channels has size one, to broadcast against kernels.
  t3, t1 = (
    jax.lax.stop_gradient(bn_affine(params[name]["bn"], stats[name]["bn"], epsilon).scale)[None]
    for name in _BRANCHES
  )  # (1, O)
  k3, k1 = (params[name]["conv"]["kernel"].astype(t3.dtype) for name in _BRANCHES)
  centre, k1 = k3[1, 1], k1[0, 0]  # (I/g, O)
  fused = (centre * t3 + k1 * t1) ** 2 / (t3**2 + t1**2)
  return jnp.sum(k3**2) - jnp.sum(centre**2) + jnp.sum(fused)
