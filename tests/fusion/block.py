"""A block of two branches and a norm as a plain function, for tests of `repjax.fuse`."""

import jax
import jax.numpy as jnp
import numpy as np

import repjax
from tests.fusion.nets import convolved, normalised, randomised, shapes
from tests.helpers import relative_error

IMAGES = jax.ShapeDtypeStruct((2, 8, 9, 3), jnp.float32)
BRANCHES = {"wide": (3, 3, 3, 4), "point": (1, 1, 3, 4), "norm": (4,)}


def branches(params, x, strides=(1, 1), padding=((1, 1), (1, 1))):
  """Returns a 3x3 and a 1x1 side by side, with a norm after the sum."""
  point = "SAME" if padding == "SAME" else "VALID"
  y = convolved(x, params["wide"], padding, strides=strides)
  y = y + convolved(x, params["point"], point, strides=strides)
  return jax.nn.relu(normalised(y, params["norm"]))


def drawn(dtype=jnp.float32, **kernels):
  """Returns random parameters of shapes, in a dtype."""
  tree = randomised(shapes(**(kernels or BRANCHES)))
  return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def random(*shape, dtype=jnp.float32, seed=3):
  """Returns random numbers."""
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def fused_error(function, params, *args, **settings):
  """Returns the relative error of the fused function, and the fused function."""
  # The caller compares the whole function, so that the check of each merge would add nothing.
  fused = repjax.fuse(function, params, *args, check=False, **settings)
  return relative_error(fused(fused.fold(params), *args), function(params, *args)), fused
