"""RepMLP-ResNet by its definition in NumPy, read from state dicts in the authors' names."""

import re
from collections.abc import Sequence

import numpy as np

from tests.helpers import convolve
from tests.models.plain import State, conv, max_pool, relu


def resnet(state: State, x: np.ndarray, stage_sizes: Sequence[int], tile: int) -> np.ndarray:
  """Logits of images (N, H, W, 3), from a state dict of either form."""
  x = max_pool(relu(_conv_bn(state, x, "stage0.0", strides=2)), size=3, padding=1)
  for stage, size in enumerate(stage_sizes, 1):
    for block in range(size):
      prefix = f"stage{stage}.{block}."
      x = _residual(state, x, prefix, tile, strides=2 if stage > 1 and block == 0 else 1)
  return x.mean((1, 2)) @ state["linear.weight"].T + state["linear.bias"]


def _residual(state: State, x: np.ndarray, prefix: str, tile: int, strides: int) -> np.ndarray:
  layers = {
    "light_": ("light_conv1", "light_repmlp", "light_conv3"),
    "btnk_": ("btnk_conv1", "btnk_conv2", "btnk_repmlp", "btnk_conv4", "btnk_conv5"),
    "": ("conv1", "conv2", "conv3"),
  }
  kind = next(kind for kind in layers if f"{prefix}{kind}conv1.conv.weight" in state)
  y = x
  for number, layer in enumerate(layers[kind]):
    y = relu(y) if number else y
    if layer.endswith("repmlp"):
      y = repmlp(state, y, f"{prefix}{layer}.", (tile, tile))
    else:
      y = _conv_bn(state, y, f"{prefix}{layer}", strides if layer == "conv2" else 1)
  if f"{prefix}shortcut.conv.weight" in state:
    x = _conv_bn(state, x, f"{prefix}shortcut", strides)
  return relu(x + y)


def repmlp(state: State, x: np.ndarray, prefix: str, tile: tuple[int, int]) -> np.ndarray:
  """Computes a block on maps (N, H, W, C); tiles are flattened channel by channel."""
  (height, width), (count, rows, columns, channels) = tile, x.shape
  rows, columns = rows // height, columns // width
  x = x.reshape(count, rows, height, columns, width, channels)
  if f"{prefix}fc1_fc2.fc1.weight" in state:
    means = _norm(state, x.mean((2, 4)), f"{prefix}avg.bn").transpose(0, 3, 1, 2)
    hidden = relu(_dense(state, means.reshape(count, -1), f"{prefix}fc1_fc2.fc1"))
    added = _dense(state, hidden, f"{prefix}fc1_fc2.fc2").reshape(means.shape)
    x = x + added.transpose(0, 2, 3, 1)[:, :, None, :, None]
  x = x.transpose(0, 1, 3, 2, 4, 5).reshape(-1, height, width, channels)

  weight = state[f"{prefix}fc3.weight"]
  groups = channels * height * width // weight.shape[1]
  flat = x.transpose(0, 3, 1, 2).reshape(len(x), groups, -1)
  y = np.einsum("ngi,goi->ngo", flat, weight.reshape(groups, -1, weight.shape[1]))
  y = y.reshape(len(x), -1) + state.get(f"{prefix}fc3.bias", 0)
  y = _norm(state, y, f"{prefix}fc3_bn").reshape(len(x), -1, height, width).transpose(0, 2, 3, 1)
  for name in sorted(state):
    if re.fullmatch(rf"{re.escape(prefix)}repconv\d+\.conv\.weight", name):
      kernel = state[name].transpose(2, 3, 1, 0)
      pad = kernel.shape[0] // 2
      local = convolve(x, kernel, padding=(pad, pad), groups=groups)
      y = y + _norm(state, local, name.replace("conv.weight", "bn"))
  y = y.reshape(count, rows, columns, height, width, -1).transpose(0, 1, 3, 2, 4, 5)
  return y.reshape(count, rows * height, columns * width, -1)


def _conv_bn(state: State, x: np.ndarray, name: str, strides: int = 1) -> np.ndarray:
  return conv(state, x, f"{name}.conv", f"{name}.bn", strides)


def _dense(state: State, x: np.ndarray, name: str) -> np.ndarray:
  return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def _norm(state: State, x: np.ndarray, name: str) -> np.ndarray:
  """A batch norm over the last axis, where the state dict has it."""
  if f"{name}.running_var" not in state:
    return x
  leaves = ("weight", "bias", "running_mean", "running_var")
  weight, bias, mean, var = (state[f"{name}.{leaf}"] for leaf in leaves)
  return (x - mean) / np.sqrt(var + 1e-5) * weight + bias
