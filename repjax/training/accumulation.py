"""Gradients of a batch in parts, one after another, where the whole does not fit in memory."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Gradients = Callable[[Any, Any, jax.Array], tuple[Any, Any, Any]]


def accumulate(
  gradients_of: Gradients, variables: Any, batch: Any, rng: jax.Array, parts: int
) -> tuple[Any, Any, Any]:
  """The mean gradients and metrics of a batch's parts, all with the same parameters.

  A part is B / parts images that follow one another. Of a network without batch norm, the mean is
  what the whole batch gives. Batch norms normalise each part by itself; running statistics go from
  part to part, so that a step moves them `parts` times.

  Args:
    gradients_of: (variables, batch, rng) to (gradients, new collections of variables, metrics).
    variables: the model's.
    batch: arrays (B, ...).
    rng: each part gets a key of its own from it; a whole batch gets this one.
    parts: how many; divides B.

  Returns:
    As `gradients_of`, with the last part's collections.
  """
  if parts == 1:
    return gradients_of(variables, batch, rng)

  def one(carry: Any, numbered: Any) -> Any:
    collections, sums = carry
    number, part = numbered
    gradients, updates, metrics = gradients_of(
      {**variables, **collections}, part, jax.random.fold_in(rng, number)
    )
    return (updates, jax.tree.map(jnp.add, sums, (gradients, metrics))), None

  cut = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)  # (parts, B / parts, ...)
  first = jax.tree.map(lambda x: x[0], cut)
  gradients, updates, metrics = jax.eval_shape(gradients_of, variables, first, rng)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (gradients, metrics))
  held = {name: variables[name] for name in updates}
  (updates, sums), _ = jax.lax.scan(one, (held, zeros), (jnp.arange(parts), cut))
  gradients, metrics = jax.tree.map(lambda x: x / parts, sums)
  return gradients, updates, metrics
