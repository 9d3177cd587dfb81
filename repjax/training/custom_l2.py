"""RepVGG's custom L2: a penalty on the kernels that the branches become, not on the branches."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repjax.algebra import bn_affine
from repjax.errors import InputError
from repjax.reparam import layer_name

Tree = Mapping[str, Any]

_BRANCHES = ("conv3x3", "conv1x1")


def custom_l2(params: Tree, batch_stats: Tree, epsilon: float = 1e-5) -> jax.Array:
  """The sum over all blocks of a 3x3 and a 1x1 branch of what the authors penalise in each.

  With t3 and t1 the scales gamma / sqrt(var + epsilon) of the two branches' batch norms,

    sum K3^2 - sum K3c^2 + sum (K3c t3 + K1 t1)^2 / (t3^2 + t1^2),

  where K3c is the centre tap of K3: eight taps of the 3x3 as they are, and the ninth as it is
  after fusion, divided by what scales would make of kernels of size one. No gradient flows through
  t3 and t1. The identity is no part of it. A loss gets 0.5 * weight times the sum, and kernels in
  it no other decay: see `all_but_penalised_kernels` in `repjax.training.decay`.

  Args:
    params: of a network in training form.
    batch_stats: its running statistics; the authors use those that the same step has updated.
    epsilon: of the batch norms.

  Returns:
    A scalar in at least float32.

  Raises:
    InputError: the network has no such block.

  References:
    https://github.com/DingXiaoH/RepVGG, get_custom_L2 in repvgg.py; deprecated there.
  """
  values = [
    _of_block(_at(params, path), _at(batch_stats, path), epsilon) for path in _blocks(params)
  ]
  if not values:
    raise InputError(
      "config.custom_l2 penalises layers of a 3x3 and a 1x1 branch, and this model has none; set "
      "it to 0, and config.weight_decay_rule to another one than all_but_penalised_kernels"
    )
  return sum(values[1:], values[0])


def penalised_kernels(params: Tree) -> frozenset[tuple[str, ...]]:
  """The paths of the kernels that `custom_l2` penalises."""
  return frozenset(
    (*path, name, "conv", "kernel") for path in _blocks(params) for name in _BRANCHES
  )


def _blocks(params: Tree, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
  """The paths of every RepConv that holds both branches."""
  for name, value in params.items():
    if isinstance(value, Mapping):
      if layer_name(name) != "RepConv":
        yield from _blocks(value, (*path, name))
      elif value.keys() >= set(_BRANCHES):
        yield (*path, name)


def _at(tree: Tree, path: tuple[str, ...]) -> Tree:
  return functools.reduce(lambda scope, name: scope[name], path, tree)


def _of_block(params: Tree, stats: Tree, epsilon: float) -> jax.Array:
  t3, t1 = (
    jax.lax.stop_gradient(bn_affine(params[name]["bn"], stats[name]["bn"], epsilon).scale)[None]
    for name in _BRANCHES
  )  # (1, O)
  k3, k1 = (params[name]["conv"]["kernel"].astype(t3.dtype) for name in _BRANCHES)
  centre, k1 = k3[1, 1], k1[0, 0]  # (I/g, O)
  fused = (centre * t3 + k1 * t1) ** 2 / (t3**2 + t1**2)
  return jnp.sum(k3**2) - jnp.sum(centre**2) + jnp.sum(fused)
