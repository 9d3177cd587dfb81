"""Adaptive clipping: a limit to the gradient of each unit that follows from its parameters."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

# Axes of the inputs in the kernel (g, h, w, I, h, w, O) of a fully connected layer over tiles.
_TILE_AXES, _TILE_INPUTS = 7, (1, 2, 3)


def adaptive_clip(
  factor: float, *, least_norm: float = 1e-3, division_epsilon: float = 1e-6
) -> optax.GradientTransformation:
  """Limits the norm of each unit's gradient to a part of the norm of the unit's parameters.

  With parameters p and gradient g of a unit, g becomes g * min(1, limit / |g|), where
  limit = factor * max(|p|, least_norm). The norms are those of `unit_norm`.

  The units are those of timm's `adaptive_clip_grad`. `optax.adaptive_grad_clip` differs for one
  shape: there, a depthwise 1x1 kernel (1, 1, 1, O) is a single unit.

  Args:
    factor: largest ratio of the two norms.
    least_norm: smaller norms of parameters count as this one, so that zeros can learn.
    division_epsilon: smaller norms of gradients count as this one in the division.

  References:
    Brock et al., High-Performance Large-Scale Image Recognition Without Normalization, ICML 2021,
      section 4.1. https://arxiv.org/abs/2102.06171
    https://github.com/huggingface/pytorch-image-models at 15d1dbc, timm/utils/agc.py
  """

  def clipped(path: Any, gradient: jax.Array, param: jax.Array) -> jax.Array:
    is_kernel = path[-1].key == "kernel"
    limit = factor * jnp.maximum(unit_norm(param, is_kernel=is_kernel), least_norm)
    norm = unit_norm(gradient, is_kernel=is_kernel)
    shortened = gradient * (limit / jnp.maximum(norm, division_epsilon))
    return jnp.where(norm < limit, gradient, shortened)

  def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    return jax.tree_util.tree_map_with_path(clipped, updates, params), state

  return optax.GradientTransformation(optax.init_empty_state, update)


def unit_norm(x: jax.Array, *, is_kernel: bool) -> jax.Array:
  """Returns the norm of each unit, with axes of length 1 where it sums.

  In a kernel, a unit is the weights of one output: (H, W, I) of HWIO, also where I is 1, and I of
  (I, O). Every other array, such as a bias or a scale, is one unit.

  Args:
    x: parameters or their gradient.
    is_kernel: `x` belongs to a kernel.
  """
  axes = None
  if is_kernel:
    axes = _TILE_INPUTS if x.ndim == _TILE_AXES else tuple(range(x.ndim - 1))
  return jnp.sqrt(jnp.sum(jnp.square(x), axis=axes, keepdims=True))
