"""`init`: draws fresh variables without compiling a program for every shape."""

import math
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax.devices import need_devices
from repjax.layers.drawing import fill
from repjax.layers.linear import from_orthogonal, is_orthogonal, uniform_bound
from repjax.models.base import Network
from repjax.models.checks import check_image_size, check_key


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
    InputError: the image size is too small for the model, or the key is no random key.
    ValueError: a leaf is of a kind that no model of repjax has.
  """
  need_devices()
  check_image_size(image_size)
  check_key(key)
  height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  variables = draw(jax.eval_shape(model.init, key, images), key)
  return model.start(variables) if isinstance(model, Network) else variables


def draw(shapes: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
  """Draws values as `init` does for a tree of shapes, or for a part of one under its full paths."""
  raw_key = key if jnp.issubdtype(key.dtype, jnp.uint32) else jax.random.key_data(key)
  seed = np.asarray(raw_key).ravel().tolist()

  def random(path: tuple[str, ...], leaf: Any, kernel_shape: tuple[int, ...]) -> jax.Array:
    # A stream for each path: the values of a leaf do not depend on which other leaves there are.
    rng = np.random.default_rng([*seed, zlib.crc32("/".join(path).encode())])
    if path[-1] == "kernel" and is_orthogonal(leaf.shape):
      return _orthogonal(rng, leaf)
    # The bias of a layer has the bound of the kernel beside it.
    return _uniform(rng, uniform_bound(kernel_shape), leaf)

  return fill(shapes, random)


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
