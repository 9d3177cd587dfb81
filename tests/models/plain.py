"""ResNet and VGG by their definition in NumPy, read from state dicts in torchvision's names."""

from collections.abc import Mapping, Sequence

import numpy as np

from tests.helpers import convolve

State = Mapping[str, np.ndarray]


def resnet(state: State, x: np.ndarray, stage_sizes: Sequence[int]) -> np.ndarray:
  """Logits of images (N, H, W, 3); stride on the first 3x3 of a block."""
  x = max_pool(relu(conv(state, x, "conv1", "bn1", strides=2)), size=3, padding=1)
  for stage, size in enumerate(stage_sizes, 1):
    for block in range(size):
      prefix = f"layer{stage}.{block}."
      x = _residual(state, x, prefix, strides=2 if stage > 1 and block == 0 else 1)
  return x.mean((1, 2)) @ state["fc.weight"].T + state["fc.bias"]


def _residual(state: State, x: np.ndarray, prefix: str, strides: int) -> np.ndarray:
  names = [(f"{prefix}conv{i}", f"{prefix}bn{i}") for i in (1, 2, 3)]
  names = [pair for pair in names if f"{pair[0]}.weight" in state]
  y = x
  for number, pair in enumerate(names):
    first_3x3 = 0 if len(names) == 2 else 1
    y = conv(state, relu(y) if number else y, *pair, strides if number == first_3x3 else 1)
  if f"{prefix}downsample.0.weight" in state:
    x = conv(state, x, f"{prefix}downsample.0", f"{prefix}downsample.1", strides)
  return relu(x + y)


def vgg(state: State, x: np.ndarray, stage_sizes: Sequence[int], norms: bool) -> np.ndarray:
  """Logits of images (N, H, W, 3) whose last map is 7x7; layers are numbered with or without BN."""
  number = 0
  for size in stage_sizes:
    for _ in range(size):
      norm = f"features.{number + 1}" if norms else None
      x = relu(conv(state, x, f"features.{number}", norm))
      number += 3 if norms else 2
    x = max_pool(x, size=2, padding=0)
    number += 1
  x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # (N, C * 7 * 7)
  for layer in (0, 3, 6):
    x = relu(x) if layer else x
    x = x @ state[f"classifier.{layer}.weight"].T + state[f"classifier.{layer}.bias"]
  return x


def conv(state: State, x: np.ndarray, name: str, norm: str | None, strides: int = 1) -> np.ndarray:
  """A convolution that keeps the size at stride 1, and a batch norm where there is one."""
  kernel = state[f"{name}.weight"].transpose(2, 3, 1, 0)
  pad = kernel.shape[0] // 2
  y = convolve(x, kernel, state.get(f"{name}.bias"), (strides, strides), (pad, pad))
  if norm is None or f"{norm}.running_var" not in state:
    return y
  weight, bias, mean, var = (
    state[f"{norm}.{leaf}"] for leaf in ("weight", "bias", "running_mean", "running_var")
  )
  return (y - mean) / np.sqrt(var + 1e-5) * weight + bias


def relu(x: np.ndarray) -> np.ndarray:
  return np.maximum(x, 0)


def max_pool(x: np.ndarray, size: int, padding: int) -> np.ndarray:
  """At stride 2; what does not fill a window is left out."""
  sides = ((0, 0), (padding, padding), (padding, padding), (0, 0))
  x = np.pad(x, sides, constant_values=-np.inf)
  windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (1, 2))
  return windows[:, ::2, ::2].max((-2, -1))
