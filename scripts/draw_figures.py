"""Draws the figures of the documentation from the functions of the package itself.

The files are SVG on white. The site inverts them in its dark scheme, so that one file serves both.

Example:
  python scripts/draw_figures.py   # docs/assets/*.svg, and photographs.jpg
"""

import tempfile
from pathlib import Path
from typing import Any

import example_folder
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib import pyplot
from matplotlib.patches import Ellipse
from PIL import Image, ImageOps

from repjax.algebra import ConvParams, add, bn_affine, compose, fuse_bn, identity_kernel, pad_kernel

ASSETS = Path(__file__).resolve().parents[1] / "docs" / "assets"
EPSILON = 1e-5
CHANNELS = 4
INK, BLUE, RED = "#222222", "#2458b3", "#b3382c"
STYLE: Any = {
  "svg.fonttype": "none",  # text stays text: small files, and the reader's fonts
  "svg.hashsalt": "repjax",  # the same bytes at every run
  "font.family": "sans-serif",
  "font.size": 10,
  "axes.edgecolor": INK,
  "axes.labelcolor": INK,
  "text.color": INK,
}


def main() -> None:
  matplotlib.use("svg")
  pyplot.rcParams.update(STYLE)
  for name, draw in (("fold", fold), ("borders", borders), ("strides", strides), ("norm", norm)):
    save(draw(), name)
  save(covariance(), "covariance")
  photographs().save(ASSETS / "photographs.jpg", quality=85)


def save(figure: Any, name: str) -> None:
  figure.savefig(ASSETS / f"{name}.svg", bbox_inches="tight", metadata={"Date": None})
  pyplot.close(figure)
  print(ASSETS / f"{name}.svg")


def statistics(rng: np.random.Generator) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
  """Returns parameters and statistics of a norm, drawn at random."""
  bn = {"scale": rng.uniform(0.5, 1.5, CHANNELS), "bias": rng.normal(0, 0.5, CHANNELS)}
  stats = {"mean": rng.normal(0, 0.5, CHANNELS), "var": rng.uniform(0.5, 2, CHANNELS)}
  as_arrays = {name: jnp.asarray(value, jnp.float32) for name, value in (bn | stats).items()}
  return (
    {name: as_arrays[name] for name in bn},
    {name: as_arrays[name] for name in stats},
  )


def mosaic(kernel: Any) -> np.ndarray:
  """Returns the kernels of all pairs of channels side by side, input channels down the rows."""
  height, width, inputs, outputs = kernel.shape
  framed = np.full((inputs, outputs, height + 1, width + 1), np.nan)
  framed[:, :, :height, :width] = np.moveaxis(np.asarray(kernel), (0, 1), (2, 3))
  rows = framed.transpose(0, 2, 1, 3).reshape(inputs * (height + 1), outputs * (width + 1))
  return rows[:-1, :-1]


def show(axes: Any, kernel: Any, title: str, limit: float = 1.2) -> None:
  axes.imshow(mosaic(kernel), cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
  axes.set_title(title, fontsize=10)
  axes.set_xticks([])
  axes.set_yticks([])


def fold() -> Any:
  """Draws the branches of a RepVGG block, their kernels after each step, and the sum."""
  rng = np.random.default_rng(3)
  zero = jnp.zeros(CHANNELS)
  kernels = {
    "conv3x3": jnp.asarray(rng.normal(0, 0.35, (3, 3, CHANNELS, CHANNELS)), jnp.float32),
    "conv1x1": jnp.asarray(rng.normal(0, 0.5, (1, 1, CHANNELS, CHANNELS)), jnp.float32),
    "identity": identity_kernel(CHANNELS, 1, (1, 1), jnp.float32),
  }
  figure, grid = pyplot.subplots(3, 4, figsize=(9, 6.8))
  folded = []
  for axes, (name, kernel) in zip(grid, kernels.items()):
    large = pad_kernel(kernel, (3, 3))
    folded.append(fuse_bn(ConvParams(large, zero), *statistics(rng), EPSILON))
    show(axes[0], kernel, name)
    show(axes[1], large, "with zeros around" if name != "conv3x3" else "unchanged")
    show(axes[2], folded[-1].kernel, "times scale of norm")
    axes[3].axis("off")
  grid[1, 3].axis("on")
  show(grid[1, 3], add(*folded).kernel, "sum: ready to ship")
  return figure


def norm() -> Any:
  """Draws what a norm does to the kernels and biases of one convolution."""
  rng = np.random.default_rng(1)
  conv = ConvParams(
    jnp.asarray(rng.normal(0, 0.4, (3, 3, CHANNELS, CHANNELS)), jnp.float32), jnp.zeros(CHANNELS)
  )
  bn, stats = statistics(rng)
  fused, affine = fuse_bn(conv, bn, stats, EPSILON), bn_affine(bn, stats, EPSILON)
  figure, (left, middle, right, bars) = pyplot.subplots(
    1, 4, figsize=(9, 2.4), layout="constrained"
  )
  show(left, conv.kernel, "kernel K")
  middle.imshow(np.asarray(affine.scale)[None], cmap="RdBu_r", vmin=-1.2, vmax=1.2)
  for channel, scale in enumerate(np.asarray(affine.scale)):
    middle.text(channel, 0, f"{scale:.2f}", ha="center", va="center", fontsize=8, color="white")
  middle.set_title("scale of outputs", fontsize=10)
  middle.set_xticks([])
  middle.set_yticks([])
  show(right, fused.kernel, "K times scale")
  bars.bar(range(CHANNELS), np.asarray(fused.bias), color=BLUE)
  bars.axhline(0, color=INK, linewidth=0.8)
  bars.set_title("new bias", fontsize=10)
  bars.set_xticks(range(CHANNELS))
  bars.set_xlabel("output channel", fontsize=9)
  bars.spines[["top", "right"]].set_visible(False)
  return figure


def convolve(x: Any, kernel: Any, padding: int) -> jax.Array:
  dims = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=dims, precision="highest"
  )


def borders() -> Any:
  """Draws the errors of two ways to merge a 1x1 convolution with bias and a 3x3 after it."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(1, 12, 12, CHANNELS)), jnp.float32)
  first = fuse_bn(
    ConvParams(
      jnp.asarray(rng.normal(0, 0.5, (1, 1, CHANNELS, CHANNELS)), jnp.float32), jnp.zeros(CHANNELS)
    ),
    *statistics(rng),
    EPSILON,
  )
  second = ConvParams(
    jnp.asarray(rng.normal(0, 0.4, (3, 3, CHANNELS, CHANNELS)), jnp.float32), jnp.zeros(CHANNELS)
  )
  merged = compose(first, second)
  short = convolve(x, merged.kernel, 1) + merged.bias
  middle = convolve(x, first.kernel, 0) + first.bias
  with_zeros = convolve(middle, second.kernel, 1)
  ring = jnp.broadcast_to(first.bias, (1, 14, 14, CHANNELS)).at[:, 1:-1, 1:-1].set(middle)
  with_bias = convolve(ring, second.kernel, 0)
  figure, panels = pyplot.subplots(1, 3, figsize=(9, 3.4), layout="constrained")
  for axes, values, title in (
    (panels[0], with_zeros, "1x1, then 3x3: one channel"),
    (panels[1], short - with_zeros, "error: 1x1 padded with 0"),
    (panels[2], short - with_bias, "error: 1x1 padded with b"),
  ):
    limit = float(jnp.abs(with_zeros if axes is panels[0] else short - with_zeros).max())
    axes.imshow(np.asarray(values)[0, :, :, 0], cmap="RdBu_r", vmin=-limit, vmax=limit)
    axes.set_title(title, fontsize=10)
    if axes is not panels[0]:
      error = float(jnp.abs(values).max() / jnp.abs(with_zeros).max())
      axes.set_xlabel(f"largest relative error {error:.0e}", fontsize=9)
    axes.set_xticks([])
    axes.set_yticks([])
  return figure


def strides() -> Any:
  """Draws where the taps of a 3x3 and of a 1x1 lie at stride 2, for both ways to pad."""
  figure, panels = pyplot.subplots(2, 1, figsize=(7.5, 3.2))
  for axes, before, title in (
    (panels[0], 1, "equal padding (1, 1): the 1x1 reads the centre of the 3x3"),
    (panels[1], 0, '"SAME" on an even size pads (0, 1): the 1x1 reads the first tap'),
  ):
    for pixel in range(-1, 9):
      inside = 0 <= pixel < 8
      axes.plot(pixel, 0, "s", markersize=15, color="#dddddd" if inside else "white",
                markeredgecolor="#999999")  # fmt: skip
    for step in range(4):
      start = 2 * step - before
      height = 0.55 + 0.3 * (step % 2)
      axes.plot([start, start + 2], [height] * 2, "o-", color=BLUE, linewidth=2, markersize=4)
      axes.plot(start + 1, height, "o", color=BLUE, markersize=4)
      axes.plot(2 * step, -0.55, "^", color=RED, markersize=8)
    axes.set_title(title, fontsize=10)
    axes.text(9.2, 0.55, "taps of the 3x3", va="center", color=BLUE, fontsize=9)
    axes.text(9.2, -0.55, "tap of the 1x1", va="center", color=RED, fontsize=9)
    axes.set_xlim(-1.8, 12)
    axes.set_ylim(-1, 1.2)
    axes.axis("off")
  figure.tight_layout()
  return figure


def covariance() -> Any:
  """Draws how the variance of a 1x1 convolution's output follows from its input's covariance."""
  rng = np.random.default_rng(2)
  mixing = np.array([[1.3, 0.0], [0.8, 0.6]])
  pixels = rng.normal(size=(300, 2)) @ mixing.T + [0.6, 0.3]
  covariance_of = np.cov(pixels.T, bias=True)
  weights = np.array([0.9, 0.5])
  figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6))
  left.plot(*pixels.T, ".", color="#888888", markersize=3)
  values, vectors = np.linalg.eigh(covariance_of)
  angle = float(np.degrees(np.arctan2(vectors[1, 1], vectors[0, 1])))
  width, height = 4 * np.sqrt(values[::-1])
  left.add_patch(
    Ellipse(tuple(pixels.mean(0)), width, height, angle=angle, fill=False, color=BLUE, linewidth=2)
  )
  left.annotate("", pixels.mean(0) + 2 * weights, pixels.mean(0),
                arrowprops={"arrowstyle": "->", "color": RED, "linewidth": 2})  # fmt: skip
  left.set_title("pixels x of two channels: mean m, covariance S", fontsize=10)
  left.set_aspect("equal")
  outputs = pixels @ weights
  mean, deviation = pixels.mean(0) @ weights, np.sqrt(weights @ covariance_of @ weights)
  right.hist(outputs, 30, density=True, color="#bbbbbb")
  line = np.linspace(outputs.min(), outputs.max(), 200)
  curve = np.exp(-(((line - mean) / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi))
  right.plot(line, curve, color=RED, linewidth=2)
  right.set_title("outputs w'x: mean w'm, variance w'Sw", fontsize=10)
  right.text(
    0.02,
    0.95,
    f"counted: {outputs.var():.4f}\nw'Sw: {weights @ covariance_of @ weights:.4f}",
    transform=right.transAxes,
    va="top",
    fontsize=9,
  )
  for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
  right.set_yticks([])
  return figure


def photographs() -> Image.Image:
  """Returns crops of the classes of the tutorial with photographs side by side."""
  classes = ["brick", "cat", "coffee", "coins", "grass", "rocket"]
  side, gap = 128, 8
  sheet = Image.new("RGB", (len(classes) * (side + gap) - gap, side), "white")
  with tempfile.TemporaryDirectory() as folder:
    example_folder.write_photographs(Path(folder), 1, 0, classes)
    for number, name in enumerate(classes):
      crop = ImageOps.fit(Image.open(Path(folder) / "train" / name / "000.jpg"), (side, side))
      sheet.paste(crop, (number * (side + gap), 0))
  return sheet


if __name__ == "__main__":
  main()
