"""Activations by name: a string travels through configs and model.json, a function does not."""

import functools
from collections.abc import Callable

import jax

from repjax.errors import unknown

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  # The exact one; jax.nn.gelu's default is the tanh approximation.
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """The element-wise function called `name`: "relu", "silu" or "gelu".

  Raises:
    ValueError: another name.
  """
  if name not in ACTIVATIONS:
    raise unknown("activation", name, ACTIVATIONS)
  return ACTIVATIONS[name]
