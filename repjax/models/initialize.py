"""`init`: draws fresh variables without compiling a program for every shape."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax import forks
from repjax.layers.dirac import DIRAC_GAIN
from repjax.layers.grammar import is_skip
from repjax.layers.linear import from_orthogonal, is_orthogonal, uniform_bound
from repjax.models.base import Classifier
from repjax.models.checks import check_image_size


def init(model: nn.Module, key: jax.Array, image_size: int | tuple[int, int]) -> dict[str, Any]:
  """Draws fresh variables of a model, with the tree and the distributions of `model.init`.

  `model.init` compiles one random program for each shape, which can take minutes. Here
  `jax.eval_shape` gives the shapes, and NumPy draws the values in seconds. Each leaf has a random
  stream of its own, seeded by the key and the path of the leaf. The values therefore differ from
  those of `model.init` with the same key.

  Args:
    model: model made by `create_model`, in either form. For other modules use their own `init`,
      since their distributions differ.
    key: a JAX random key.
    image_size: pixels, one number or (height, width).

  Returns:
    {"params", "batch_stats"}, or {"params"} in deploy form.

  Raises:
    InputError: the image size is too small for the model.
    ValueError: a leaf is of a kind that no model of repjax has.
  """
  forks.refuse_lost_devices()
  check_image_size(image_size)
  height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  variables = draw(jax.eval_shape(model.init, key, images), key)
  return model.start(variables) if isinstance(model, Classifier) else variables


def draw(shapes: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
  """Draws values as `init` does for a tree of shapes, or for a part of one under its full paths."""
  raw_key = key if jnp.issubdtype(key.dtype, jnp.uint32) else jax.random.key_data(key)
  return _draw(shapes, (), np.asarray(raw_key).ravel().tolist())


def _draw(shapes: Mapping[str, Any], path: tuple[str, ...], seed: list[int]) -> dict[str, Any]:
  """Draws a tree of shapes that lies at a path; the name of a leaf tells its distribution."""
  values = {}
  for name, leaf in shapes.items():
    here = (*path, name)
    if isinstance(leaf, Mapping):
      values[name] = _draw(leaf, here, seed)
    elif name == "kernel" or (name == "bias" and "kernel" in shapes):
      # A stream for each path: the values of a leaf do not depend on which other leaves there are.
      rng = np.random.default_rng([*seed, zlib.crc32("/".join(here).encode())])
      if name == "kernel" and is_orthogonal(leaf.shape):
        values[name] = _orthogonal(rng, leaf)
      else:
        # The bias of a layer has the bound of the kernel beside it.
        values[name] = _uniform(rng, uniform_bound(shapes["kernel"].shape), leaf)
    elif name in ("scale", "var", "diagonal") or is_skip(name):
      values[name] = jnp.ones(leaf.shape, leaf.dtype)
    elif name == "gain":
      values[name] = jnp.full(leaf.shape, DIRAC_GAIN, leaf.dtype)
    elif name in ("bias", "mean"):
      values[name] = jnp.zeros(leaf.shape, leaf.dtype)
    else:
      raise ValueError(
        f"repjax.init does not know how {'/'.join(here)} is distributed; use model.init"
      )
  return values


def _uniform(rng: np.random.Generator, bound: float, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Draws values between -bound and bound; in place, because kernels of VGG are large."""
  dtype = np.float64 if leaf.dtype == jnp.float64 else np.float32
  values = rng.random(math.prod(leaf.shape), dtype)
  values *= 2 * bound
  values -= bound
  return jnp.asarray(values.reshape(leaf.shape), leaf.dtype)


def _orthogonal(rng: np.random.Generator, leaf: jax.ShapeDtypeStruct) -> jax.Array:
  """Draws a kernel over tiles whose matrix has orthonormal rows or columns, whichever are fewer.

  The Q of the QR decomposition of a normal matrix is a random rotation, cut to the shape.
  """
  dtype = np.float64 if leaf.dtype == jnp.float64 else np.float32
  inputs = math.prod(leaf.shape[1:4])
  shape = (math.prod(leaf.shape) // inputs, inputs)
  normal = rng.standard_normal((max(shape), min(shape)), dtype)
  if max(shape) >= 2 * min(shape):
    # The Cholesky factor of A^T A is the transposed R of QR, so that A R^-1 is the Q below, several
    # times faster. Squaring A doubles the loss of digits, which is mild for a matrix this narrow.
    # SciPy is imported here because the import takes long and few models need it.
    import scipy.linalg

    lower = scipy.linalg.cholesky(normal.T @ normal, lower=True, check_finite=False)
    q = scipy.linalg.solve_triangular(lower, normal.T, lower=True, check_finite=False).T
  else:
    q, r = np.linalg.qr(normal)
    # QR leaves the signs of R's diagonal open. With positive signs, Q is a uniform random rotation.
    q *= np.where(np.diag(r) < 0, -1, 1).astype(dtype)
  matrix = q if shape[0] >= shape[1] else q.T
  return jnp.asarray(from_orthogonal(matrix, leaf.shape), leaf.dtype)
