"""Random programs over maps, channels last or first, as functions of parameters and a map.

A program is a list of steps. Each step takes one of the last three values, and adds a value. The
parameters are drawn while a program runs for the first time.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CHANNELS = 4
STEPS = [
  *("conv", "conv", "conv", "conv", "conv", "norm", "norm", "norm", "add", "add", "add", "relu"),
  *("pad", "cut", "pool", "blocks", "scale", "transposed", "shift", "negative", "dense"),
  *("branches", "branches", "branches", "unit axis", "concatenate", "channels", "tap", "reflect"),
  "mean",
]


class Layout(NamedTuple):
  """The places of the axes of a map."""

  spec: tuple[str, str, str]
  spatial: tuple[int, int]
  channel: int

  def along(self, vector: jax.Array) -> jax.Array:
    """Returns a vector of channels with as many axes as a map."""
    return vector.reshape([-1 if axis == self.channel else 1 for axis in range(4)])


LAYOUTS = (
  Layout(("NHWC", "HWIO", "NHWC"), (1, 2), 3),
  Layout(("NCHW", "OIHW", "NCHW"), (2, 3), 1),
)


class Program(NamedTuple):
  """A random program.

  Attributes:
    function: takes parameters and a map, and returns a list of maps.
    params: random parameters.
    layout: of the maps.
  """

  function: Callable[[dict, jax.Array], list[jax.Array]]
  params: dict[str, jax.Array]
  layout: Layout

  def images(self, batch: int, height: int, width: int) -> jax.Array:
    """Returns random maps of a size."""
    shape = [batch, height, width]
    shape.insert(self.layout.channel, CHANNELS)
    return jnp.asarray(np.random.default_rng(7).normal(size=shape))


def random_program(seed: int, size: tuple[int, int, int] = (2, 12, 11)) -> Program:
  """Returns the program of a seed, with parameters for maps of a size or near it."""
  rng = np.random.default_rng(seed)
  layout = LAYOUTS[int(rng.integers(2))]
  steps = [
    (str(rng.choice(STEPS)), int(rng.integers(1 << 30))) for _ in range(int(rng.integers(5, 15)))
  ]
  params: dict[str, jax.Array] = {}
  function = functools.partial(_run, steps, layout, None)
  program = Program(function, params, layout)
  shape = program.images(*size)
  jax.eval_shape(lambda x: _run(steps, layout, np.random.default_rng(seed), params, x), shape)
  program.params.update({name: jnp.asarray(value) for name, value in params.items()})
  return program


class _Parameters:
  """Parameters in the order in which a program asks for them, drawn if `rng` is given."""

  def __init__(self, params: dict[str, Any], rng: np.random.Generator | None):
    self._params, self._rng, self._count = params, rng, 0

  def __call__(self, *shape: int, positive: bool = False) -> Any:
    name = f"p{self._count}"
    self._count += 1
    if self._rng is not None:
      drawn = self._rng.uniform(0.5, 1.5, shape) if positive else self._rng.normal(size=shape)
      self._params[name] = drawn / 2 if len(shape) > 1 else drawn
    return self._params[name]


def _run(steps, layout, rng, params, x):
  """Runs a program, and draws its parameters if `rng` is given."""
  values, taps, draw = [x], [], _Parameters(params, rng)
  for name, seed in steps:
    own = np.random.default_rng(seed)
    recent = int(own.integers(max(0, len(values) - 3), len(values)))
    y = values[-1] if own.integers(3) else values[recent]
    if name == "tap":
      taps.append(y)
    elif name in ("add", "concatenate"):
      values.append(_joined(name, y, values, layout, own))
    else:
      y = globals()[f"_{name.replace(' ', '_')}"](y, layout, draw, own)
      if min(y.shape) >= 1 and max(y.shape) <= 64:
        values.append(y)
  return [values[-1], *values[-2:-1], *taps]


def _joined(name, y, values, layout, own):
  if name == "add":
    same = [value for value in values if value.shape == y.shape]
    other = same[int(own.integers(len(same)))]
    return y + other if own.integers(3) else y - other
  axes = layout.spatial
  same = [value for value in values if [value.shape[a] for a in axes] == [y.shape[a] for a in axes]]
  return jnp.concatenate([y, same[int(own.integers(len(same)))]], layout.channel)


def _conv(y, layout, draw, own):
  features = y.shape[layout.channel]
  groups = int(own.choice([1, 1, 2, features if features % 2 == 0 else 1]))
  groups = groups if features % groups == 0 else 1
  outputs = int(own.choice([4, 4, 4, 8]))
  outputs = outputs if outputs % groups == 0 else groups
  size = [int(own.choice([1, 1, 2, 3, 3])) for _ in range(2)]
  stride, dilation = int(own.choice([1, 1, 1, 2])), int(own.choice([1, 1, 1, 2]))
  centred = [((each - 1) * dilation // 2,) * 2 for each in size]
  padding = [[(0, 0)] * 2, centred, "SAME", [(1, 0), (0, 2)]][int(own.integers(4))]
  return lax.conv_general_dilated(
    y,
    _kernel(layout, draw, size, features // groups, outputs),
    (stride, stride),
    padding,
    rhs_dilation=(dilation, dilation),
    dimension_numbers=layout.spec,
    feature_group_count=groups,
  )


def _branches(y, layout, draw, own):
  """Convolutions of several sizes side by side, as the networks of this package have them."""
  stride, results = int(own.choice([1, 1, 2])), []
  for size in (1, 3, 3)[: int(own.integers(2, 4))]:
    kernel = _kernel(layout, draw, [size] * 2, y.shape[layout.channel], 4)
    padding = [(size // 2, size // 2)] * 2
    conv = lax.conv_general_dilated(
      y, kernel, (stride, stride), padding, dimension_numbers=layout.spec
    )
    results.append(_norm(conv, layout, draw, own) if own.integers(2) else conv)
  return sum(results[1:], results[0])


def _kernel(layout, draw, size, inputs, outputs):
  return draw(outputs, inputs, *size) if layout.channel == 1 else draw(*size, inputs, outputs)


def _transposed(y, layout, draw, own):
  kernel = _kernel(layout, draw, [int(own.integers(1, 4))] * 2, y.shape[layout.channel], 4)
  padding = [(int(own.integers(0, 3)), int(own.integers(0, 3)))] * 2
  return lax.conv_general_dilated(
    y, kernel, (1, 1), padding, lhs_dilation=(2, 2), dimension_numbers=layout.spec
  )


def _norm(y, layout, draw, own):
  features = y.shape[layout.channel]
  mean, variance = draw(features), draw(features, positive=True)
  scale, bias = layout.along(draw(features)), layout.along(draw(features))
  if own.integers(2):
    return (y - layout.along(mean)) * lax.rsqrt(layout.along(variance)) * scale + bias
  return (y - layout.along(mean)) / jnp.sqrt(layout.along(variance)) * scale + bias


def _relu(y, layout, draw, own):
  return jax.nn.relu(y) if own.integers(2) else y


def _pad(y, layout, draw, own):
  config = [(0, 0, 0)] * 4
  for axis in layout.spatial:
    config[axis] = (int(own.integers(-1, 3)), int(own.integers(-1, 3)), 0)
  if any(size + low + high < 0 for size, (low, high, _) in zip(y.shape, config)):
    return y
  return lax.pad(y, jnp.zeros((), y.dtype), config)


def _reflect(y, layout, draw, own):
  if min(y.shape[axis] for axis in layout.spatial) < 3:
    return y
  mode = ["reflect", "symmetric", "edge"][int(own.integers(3))]
  widths = [(1, 2) if axis in layout.spatial else (0, 0) for axis in range(4)]
  return jnp.pad(y, widths, mode=mode)


def _cut(y, layout, draw, own):
  stride, places = int(own.integers(1, 3)), [slice(None)] * 4
  for axis in layout.spatial:
    places[axis] = slice(int(own.integers(0, 2)), None, stride)
  return y[tuple(places)]


def _channels(y, layout, draw, own):
  places = [slice(None)] * 4
  places[layout.channel] = slice(int(own.integers(0, 2)), None)
  return y[tuple(places)]


def _pool(y, layout, draw, own):
  size, stride = int(own.integers(2, 4)), int(own.integers(1, 3))
  window, strides = [1] * 4, [1] * 4
  for axis in layout.spatial:
    window[axis], strides[axis] = size, stride
  padding = "SAME" if own.integers(2) else "VALID"
  return lax.reduce_window(y, 0.0, lax.add, window, strides, padding) / size**2


def _blocks(y, layout, draw, own):
  height, width = (y.shape[axis] for axis in layout.spatial)
  if height % 2 or width % 2:
    return y
  shape = list(y.shape)
  shape[layout.spatial[1] : layout.spatial[1] + 1] = [width // 2, 2]
  shape[layout.spatial[0] : layout.spatial[0] + 1] = [height // 2, 2]
  return y.reshape(shape).mean((layout.spatial[0] + 1, layout.spatial[1] + 2))


def _mean(y, layout, draw, own):
  means = y.mean(layout.spatial, keepdims=True)
  return means if own.integers(2) else y * jax.nn.sigmoid(means)


def _scale(y, layout, draw, own):
  return y * 1.5 if own.integers(2) else layout.along(draw(y.shape[layout.channel])) * y


def _shift(y, layout, draw, own):
  return y + 0.5 if own.integers(2) else layout.along(draw(y.shape[layout.channel])) - y


def _negative(y, layout, draw, own):
  return -y


def _unit_axis(y, layout, draw, own):
  return y[:, None].reshape(y.shape)


def _dense(y, layout, draw, own):
  y = jnp.tensordot(y, draw(y.shape[layout.channel], 4), (layout.channel, 0))
  return jnp.moveaxis(y, -1, layout.channel)
