"""Small networks of several libraries as functions of parameters and of images (N, 16, 16, 3)."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from tests.fusion.nets import randomised

SIZE, CLASSES = 16, 5


def images(count: int = 3, size: int = SIZE) -> np.ndarray:
  """Returns random images."""
  return np.random.default_rng(1).standard_normal((count, size, size, 3)).astype(np.float32)


class Block(nn.Module):
  """A stem and two branches in the style of the examples of Flax: training is the default."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train: bool = True):
    conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype)
    norm = functools.partial(nn.BatchNorm, use_running_average=not train, dtype=self.dtype)
    x = nn.relu(norm()(conv(8, (3, 3))(x)))
    x = nn.relu(norm()(conv(8, (3, 3))(x)) + norm()(conv(8, (1, 1))(x)))
    return nn.Dense(CLASSES, dtype=self.dtype)(x.mean((1, 2)))


def linen() -> tuple[Callable[..., Any], Any]:
  """Returns the block of Flax Linen."""
  shapes = jax.eval_shape(Block().init, jax.random.key(0), images())
  return functools.partial(Block().apply, train=False), randomised(shapes)


class NnxBlock(nnx.Module):
  """The same in Flax NNX, with a random key among its variables."""

  def __init__(self, rngs: nnx.Rngs):
    conv = functools.partial(nnx.Conv, use_bias=False, rngs=rngs)
    self.convs = nnx.List([conv(3, 8, (3, 3)), conv(8, 8, (3, 3)), conv(8, 8, (1, 1))])
    self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs) for _ in range(3)])
    self.dropout, self.head = nnx.Dropout(0.5, rngs=rngs), nnx.Linear(8, CLASSES, rngs=rngs)

  def __call__(self, x):
    steps = [lambda x, c=c, n=n: n(c(x)) for c, n in zip(self.convs, self.norms)]
    x = nnx.relu(steps[0](x))
    x = nnx.relu(steps[1](x) + steps[2](x))
    return self.head(self.dropout(x.mean((1, 2))))


def of_nnx() -> tuple[Callable[..., Any], Any]:
  """Returns the block of Flax NNX."""
  model = NnxBlock(nnx.Rngs(0))
  model.eval()
  graph, state = nnx.split(model)
  numbers = nnx.filter_state(state, lambda path, value: path[0] != "dropout")
  keys = nnx.filter_state(state, lambda path, value: path[0] == "dropout")
  return (
    lambda state, images: nnx.merge(graph, state)(images),
    nnx.merge_state(randomised(numbers), keys),
  )


def equinox() -> tuple[Callable[..., Any], Any]:
  """Returns a block of Equinox, whose channels come first."""
  eqx = pytest.importorskip("equinox")
  keys = iter(jax.random.split(jax.random.key(0), 4))
  layers = {
    "stem": eqx.nn.Conv2d(3, 8, 3, padding=1, key=next(keys)),
    "wide": eqx.nn.Conv2d(8, 8, 3, padding=1, key=next(keys)),
    "narrow": eqx.nn.Conv2d(8, 8, 1, key=next(keys)),
    "head": eqx.nn.Linear(8, CLASSES, key=next(keys)),
  }
  params, static = eqx.partition(layers, eqx.is_array)

  def one(layers, x):
    x = jax.nn.relu(layers["stem"](x))
    x = jax.nn.relu(layers["wide"](x) + layers["narrow"](x))
    return layers["head"](x.mean((1, 2)))

  def function(params, images):
    layers = eqx.combine(params, static)
    return jax.vmap(functools.partial(one, layers))(images.transpose(0, 3, 1, 2))

  return function, params


def haiku() -> tuple[Callable[..., Any], Any]:
  """Returns a block of Haiku."""
  hk = pytest.importorskip("haiku")

  def block(x, train=False):
    norm = functools.partial(hk.BatchNorm, create_scale=True, create_offset=True, decay_rate=0.9)
    x = jax.nn.relu(norm()(hk.Conv2D(8, 3)(x), train))
    x = jax.nn.relu(norm()(hk.Conv2D(8, 3)(x), train) + norm()(hk.Conv2D(8, 1)(x), train))
    return hk.Linear(CLASSES)(x.mean((1, 2)))

  made = hk.transform_with_state(block)
  init = functools.partial(made.init, train=True)
  with jax.numpy_dtype_promotion("standard"):  # its averages divide by whole numbers
    variables = jax.eval_shape(init, jax.random.key(0), images())
  return lambda variables, images: made.apply(*variables, None, images)[0], randomised(variables)


def plain() -> tuple[Callable[..., Any], Any]:
  """Returns a block of JAX alone."""

  def function(params, x):
    spec = ("NHWC", "HWIO", "NHWC")
    for kernel, scale in zip(params["kernels"], params["scales"]):
      x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=spec)
      x = jnp.maximum(x * scale[None, None, None], 0)
    return x.mean((1, 2)) @ params["head"]

  shapes = {
    "kernels": [(3, 3, 3, 8), (3, 3, 8, 8)],
    "scales": [(8,), (8,)],
    "head": (8, CLASSES),
  }
  params = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    shapes,
    is_leaf=lambda each: isinstance(each, tuple),
  )
  return function, randomised(params)


LIBRARIES = {"linen": linen, "nnx": of_nnx, "equinox": equinox, "haiku": haiku, "plain": plain}
