"""Activations by name: configs and model.json can hold a string, but not a function."""

import functools
from collections.abc import Callable

import jax

from repjax.errors import unknown

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  # By default `jax.nn.gelu` is the tanh approximation; the papers use the exact function.
  "gelu": functools.partial(jax.nn.gelu, approximate=False),
}


def activation(name: str) -> Callable[[jax.Array], jax.Array]:
  """Returns the element-wise function called `name`: "relu", "silu" or "gelu".

  Raises:
    InputError: `name` is not one of the three.
  """
  if name not in ACTIVATIONS:
    raise unknown("activation", name, ACTIVATIONS)
  return ACTIVATIONS[name]
