"""Branches of a RepConv by their definition, in NumPy, with nothing of the package but names."""

import re

import numpy as np

from tests.helpers import convolve


def two(value):
  """Returns (vertical, horizontal)."""
  return (value, value) if isinstance(value, int) else tuple(value)


def normalise(y, bn, stats, epsilon):
  """Applies a batch norm with its running statistics."""
  scale = np.asarray(bn["scale"]) / np.sqrt(np.asarray(stats["var"]) + epsilon)
  return (y - np.asarray(stats["mean"])) * scale + np.asarray(bn["bias"])


def crop(x, rows, columns):
  """Removes pixels on each side."""
  return x[:, rows : x.shape[1] - rows, columns : x.shape[2] - columns]


def dirac(kernel, diagonal, gain, bias=None):
  """Returns the kernel of DiracNet, output by output."""
  del bias  # which is no part of the kernel
  result = np.zeros_like(kernel)
  for output in range(kernel.shape[3]):
    own = kernel[..., output]
    result[..., output] = gain[output] * own / np.linalg.norm(own)
    if output < kernel.shape[2]:
      result[kernel.shape[0] // 2, kernel.shape[1] // 2, output, output] += diagonal[output]
  return result


def step(x, held, stats, epsilon, **how):
  """Applies the convolution and the norm that a scope holds, without padding."""
  if "conv" in held and "gain" in held["conv"]:
    x = convolve(x, dirac(**held["conv"]), held["conv"].get("bias"), **how)
  elif "conv" in held:
    x = convolve(x, held["conv"]["kernel"], held["conv"].get("bias"), **how)
  return normalise(x, held["bn"], stats["bn"], epsilon) if "bn" in held else x


def pool(x, size, strides, dilation):
  """Averages windows, as a convolution of each channel with equal taps."""
  kernel = np.full((*size, 1, x.shape[-1]), 1 / (size[0] * size[1]))
  return convolve(x, kernel, strides=strides, dilation=dilation, groups=x.shape[-1])


def branch(name, x, held, stats, layer, size):
  """Computes one branch.

  The map is padded for the layer's kernel first, and then cropped for the smaller kernel. Steps
  run on the padded map, so that the border needs no thought.

  Args:
    name: name of the branch, without a repeat.
    x: (N, H, W, I), float64.
    held, stats: parameters and statistics of the branch.
    layer: attributes of the layer: strides, dilation, padding, padding_mode, groups, epsilon.
    size: size of the layer's kernel.
  """
  groups, epsilon = layer.get("groups", 1), layer.get("epsilon", 1e-5)
  strides, rate = two(layer.get("strides", 1)), two(layer.get("dilation", 1))
  pads = layer.get("padding")
  pads = [d * ((taps - 1) // 2) for d, taps in zip(rate, size)] if pads is None else two(pads)
  edges = ((0, 0), *((pad, pad) for pad in pads), (0, 0))
  padded = np.pad(x, edges, mode=layer.get("padding_mode", "constant"))
  if name == "avg2x2_conv1x1":
    even = np.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, x.shape[2] % 2), (0, 0)))
    return step(pool(even, (2, 2), (2, 2), (1, 1)), held, stats, epsilon, groups=groups)

  def centred(y, taps, own):
    return crop(y, *(d * (big - (t - 1) * own - 1) // 2 for d, big, t in zip(rate, size, taps)))

  if name in ("identity", "skip"):
    y = centred(padded, (1, 1), 1)
    return step(y, held, stats, epsilon)
  _, _, last = name.rpartition("conv1x1_")
  parts = last.split("_d")
  own = int(parts[1]) if parts[1:] else 1
  kind = re.match("[a-z]+", last)[0]
  taps = tuple(map(int, parts[0].removeprefix(kind).split("x")))
  y = padded
  if "first" in held:
    y = step(y, held["first"], stats["first"], epsilon, groups=groups)
    held, stats = held.get("second", {}), stats.get("second", {})
  y = centred(y, taps, own)
  if kind == "avg":
    return step(pool(y, taps, strides, rate), held, stats, epsilon)
  dilation = (own * rate[0], own * rate[1])
  return step(y, held, stats, epsilon, strides=strides, dilation=dilation, groups=groups)


def layer(x, variables, size, branches, **attributes):
  """Computes the sum of all branches, and the norm after it if there is one."""
  params, stats = variables["params"], variables["batch_stats"]
  plain = {name: name.rpartition("_")[0] if name[-2:-1] == "_" else name for name in branches}
  total = sum(
    branch(
      short,
      x,
      params.get(name, {}),
      stats.get(name, {}) if name in params else {},
      attributes,
      size,
    )
    for name, short in plain.items()
  )
  if "bn" in params:
    total = normalise(total, params["bn"], stats["bn"], attributes.get("epsilon", 1e-5))
  return total
