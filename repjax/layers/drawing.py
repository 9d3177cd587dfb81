"""Initial values of a layer, drawn from the shapes of its leaves."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax.layers.dirac import DIRAC_GAIN
from repjax.layers.grammar import is_skip
from repjax.layers.layer_scale import FIRST_GAMMA
from repjax.layers.linear import is_orthogonal, tile_kernel_init, uniform_bound

Tree = Mapping[str, Any]
Random = Callable[[tuple[str, ...], jax.ShapeDtypeStruct, tuple[int, ...]], jax.Array]


def fill(shapes: Tree, random: Random, path: tuple[str, ...] = ()) -> dict[str, Any]:
  """Builds a tree of initial values; the name of a leaf tells its distribution.

  Args:
    shapes: tree of shapes and dtypes.
    random: function of (path, leaf, shape of the kernel) that draws a kernel or the bias of one.
    path: place of the tree, with which the paths that `random` gets begin.

  Raises:
    ValueError: a leaf is of a kind that no layer of repjax has.
  """
  values = {}
  for name, leaf in shapes.items():
    here = (*path, name)
    if isinstance(leaf, Mapping):
      values[name] = fill(leaf, random, here)
    elif name == "kernel" or (name == "bias" and "kernel" in shapes):
      values[name] = random(here, leaf, shapes["kernel"].shape)
    elif name in ("scale", "var", "diagonal") or is_skip(name):
      values[name] = jnp.ones(leaf.shape, leaf.dtype)
    elif name == "gamma":
      values[name] = jnp.full(leaf.shape, FIRST_GAMMA, leaf.dtype)
    elif name == "gain":
      values[name] = jnp.full(leaf.shape, DIRAC_GAIN, leaf.dtype)
    elif name in ("bias", "mean"):
      values[name] = jnp.zeros(leaf.shape, leaf.dtype)
    else:
      raise ValueError(
        f"repjax.init does not know how {'/'.join(here)} is distributed; use model.init"
      )
  return values


def draw(shapes: Tree, key: jax.Array) -> dict[str, Any]:
  """Draws the leaves of a layer with the distributions of `init`; also where the key is traced.

  Each leaf has a key of its own, made from its path in the layer.
  """

  def random(path: tuple[str, ...], leaf: Any, kernel_shape: tuple[int, ...]) -> jax.Array:
    own = jax.random.fold_in(key, np.uint32(zlib.crc32("/".join(path).encode())))
    if path[-1] == "kernel" and is_orthogonal(leaf.shape):
      return tile_kernel_init(own, leaf.shape, leaf.dtype)
    bound = uniform_bound(kernel_shape)
    return jax.random.uniform(own, leaf.shape, leaf.dtype, -bound, bound)

  return fill(shapes, random)
