"""Draws the panels that show what branches contribute to kernels. Needs matplotlib."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm

from repjax.layers.grammar import POOLED, branch_order, parse
from repjax.report.branches import FoldedLayer, Kernels, choose
from repjax.report.curves import plain, tidy

_BRANCH_COLORS = {"3x3": "#0072B2", "1x1": "#E69F00", "identity": "#009E73"}
_OTHER_COLORS = ("#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
_LETTERS_IN_A_ROW = 130
_LABELLED_BARS = 60
_LABELLED_TAPS = 25
_NAMED = 4  # Branches in a title.


def shares(figure: Any, kernels: Kernels) -> None:
  """Draws a bar for each layer, stacked from the shares of its branches."""
  layers = _bars(kernels)
  axes = figure.subplots()
  bottom = np.zeros(len(layers))
  names = branch_order({name for layer in layers for name in layer.branches})
  for name, color in _branch_colors(names).items():
    heights = np.asarray([100 * layer.shares().get(name, 0.0) for layer in layers])
    axes.bar(range(len(layers)), heights, 0.8, bottom, color=color, label=_shown(name))
    bottom += heights
  every = -(-len(layers) // _LABELLED_BARS)
  places = range(0, len(layers), every)
  labels = [_short(layers[place].path) for place in places]
  axes.set_xticks(places, labels, rotation=0 if level_labels(kernels) else 90)
  axes.set_xlim(-0.6, len(layers) - 0.4)
  axes.set(ylim=(0, 100), ylabel="share of norms, %", title=_shares_title(layers, names))
  tidy(axes)
  axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=9, frameon=False, reverse=True)


def _bars(kernels: Kernels) -> list[FoldedLayer]:
  return [layer for layer in kernels.layers if len(layer.branches) > 1] or kernels.layers


def level_labels(kernels: Kernels) -> bool:
  """Returns whether the labels of all bars fit side by side."""
  labels = [_short(layer.path) for layer in _bars(kernels)]
  return len(labels) * max(map(len, labels)) <= _LETTERS_IN_A_ROW


def _shares_title(layers: Sequence[FoldedLayer], names: Sequence[str]) -> str:
  means = {name: np.mean([layer.shares().get(name, 0.0) for layer in layers]) for name in names}
  parts = ", ".join(f"{_shown(name)} {mean:.0%}" for name, mean in list(means.items())[:_NAMED])
  parts += ", ..." if len(names) > _NAMED else ""
  # One line holds the short names of three branches.
  end = "\n" if len(parts) > 40 else " "
  return (
    f"What fused kernels are made of, by the norms of the branches' kernels, first to last layer;"
    f"{end}on average {parts}"
  )


def _branch_colors(names: Sequence[str]) -> dict[str, str]:
  others = iter(_OTHER_COLORS * len(names))
  return {name: _BRANCH_COLORS.get(_shown(name)) or next(others) for name in names}


def _shown(name: str) -> str:
  """Returns the name of a branch for a legend: "conv3x3" becomes "3x3".

  "conv1x1_avg3x3" becomes "1x1 + average 3x3", and "conv3x3_d2" becomes "3x3 dilated 2".
  """
  if parse(name).kind == POOLED:
    return name.replace("avg2x2_conv", "pooled ")
  shown = name.replace("_conv", " + ").replace("_avg", " + average ").replace("_d", " dilated ")
  return re.sub("^avg", "average ", shown.removeprefix("conv"))


def _short(path: str) -> str:
  """Shortens a path: "stage1/block0/RepConv_0" becomes "stage1.block0".

  A named layer keeps its name: ".../RepConv_conv1" becomes "stage1.block0.conv1". The scope of a
  segmentation's backbone is left out, since its stages have names of their own.
  """
  *scopes, last = path.removeprefix("backbone/").split("/")
  layer = last.removeprefix("RepConv").removeprefix("ScaledConv").lstrip("_") if scopes else last
  return ".".join(scopes if layer.isdigit() or not layer else [*scopes, layer])


def heat_maps(figure: Any, kernels: Kernels) -> None:
  """Draws the taps of the fused kernel and of each branch as rows, for layers as columns.

  All maps share one colour scale.
  """
  layers = choose(kernels.layers)
  names = branch_order({name for layer in layers for name in layer.branches})
  grid = figure.subplots(1 + len(names), len(layers), squeeze=False)
  percents = {
    (row, column): 100 * stats.taps / (layer.fused.taps.sum() or 1.0)
    for column, layer in enumerate(layers)
    for row, stats in enumerate([layer.fused, *map(layer.branches.get, names)])
    if stats is not None
  }
  # The square root keeps small taps visible beside a large centre.
  norm = PowerNorm(0.5, 0, max(values.max() for values in percents.values()))
  image = None
  for (row, column), axes in np.ndenumerate(grid):
    axes.set(xticks=[], yticks=[])
    if (row, column) in percents:
      image = _heat_map(axes, percents[row, column], norm)
    else:
      axes.text(0.5, 0.5, "none", transform=axes.transAxes, ha="center", va="center")
      axes.spines[:].set_visible(False)
      axes.set_box_aspect(1)
    layer = layers[column]
    if row == 0:
      axes.set_title(f"{_short(layer.path)}\n{layer.channels:,} channels", fontsize=10)
    elif names[row - 1] in layer.branches:
      axes.set_xlabel(f"{layer.shares()[names[row - 1]]:.0%} of norms", fontsize=9)
    if column == 0:
      text = _shown(names[row - 1]) if row else "fused kernel"
      axes.set_ylabel(text, fontsize=10, fontweight="bold", rotation=0, ha="right", va="center")
  bar = figure.colorbar(image, ax=grid, shrink=0.8, aspect=30)
  bar.ax.set_title("%", fontsize=9)
  figure.suptitle(
    f"Where fused kernels get their weight, in layers of all depths: {_origin(kernels)}\n"
    "a number is the mean |weight| of a tap over channels, in % of the sum over the fused kernel; "
    "weights of opposite signs cancel",
    fontsize=11,
  )


def _origin(kernels: Kernels) -> str:
  """Says in words where the kernels were read."""
  if kernels.step is None:
    return f"{plain(kernels.name)}, a deploy form: its branches are merged already"
  which = f"best checkpoint, step {kernels.step:,}" if kernels.step else "as imported"
  return f"{plain(kernels.name)}, {which}"


def _heat_map(axes: Axes, values: np.ndarray, norm: PowerNorm) -> Any:
  """Draws the taps of one kernel, with numbers in small kernels."""
  image = axes.imshow(values, cmap="Blues", norm=norm)
  if values.size <= _LABELLED_TAPS:
    for (row, column), value in np.ndenumerate(values):
      color = "white" if norm(value) > 0.6 else "black"
      text = f"{value:.0f}" if value >= 9.5 or value == 0 else f"{value:.1f}"
      axes.text(column, row, text, ha="center", va="center", color=color, fontsize=9)
  return image
