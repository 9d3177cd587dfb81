"""Draws the panels of a segmentation: images with their class maps, and IoU. Needs matplotlib."""

from typing import Any

import numpy as np
from matplotlib.patches import Patch

from repjax.data.masks import IGNORED, Color
from repjax.report.curves import clipped, plain, tidy
from repjax.report.maps import Example, Maps

_NAMED = 30  # classes in the legend
_BLANK = (255, 255, 255)  # where no class counts
_COLUMNS = ("image", "truth", "training form", "deploy form", "deploy form wrong", "forms differ")


def iou(figure: Any, maps: Maps) -> None:
  """Draws a bar for each class, as high as the class's IoU."""
  axes = figure.subplots()
  values = [100 * (value or 0.0) for value in maps.iou]
  colors = [_of_matplotlib(color) for color in maps.colors]
  axes.bar(range(len(values)), values, 0.8, color=colors, edgecolor="black", lw=0.5)
  for place, value in enumerate(maps.iou):
    text = "absent" if value is None else f"{100 * value:.0f}"
    axes.annotate(text, (place, values[place]), ha="center", va="bottom", fontsize=9)
  names = [plain(clipped(name, 14)) for name in maps.class_names]
  turned = sum(map(len, names)) > 100
  axes.set_xticks(range(len(names)), names, rotation=90 if turned else 0)
  axes.set_xlim(-0.6, len(names) - 0.4)
  found = [value for value in maps.iou if value is not None]
  title = f"IoU of each class in deploy form, over the whole split: on average {np.mean(found):.2%}"
  axes.set(ylim=(0, 110), ylabel="IoU, %", title=title)
  tidy(axes)


def maps(figure: Any, maps: Maps) -> None:
  """Draws a row for each image: the image, the truth, both forms, and where these differ."""
  grid = figure.subplots(len(maps.examples), len(_COLUMNS), squeeze=False)
  for row, example in zip(grid, maps.examples):
    for axes, panel in zip(row, _panels(example, maps.colors)):
      axes.imshow(panel, interpolation="nearest")
      axes.set(xticks=[], yticks=[])
    wrong, differs = example.wrong(), example.differs()
    counted = np.count_nonzero(example.truth != IGNORED)
    row[-2].set_xlabel(f"{np.count_nonzero(wrong) / max(1, counted):.1%} of pixels", fontsize=9)
    row[-1].set_xlabel(f"{np.count_nonzero(differs):,} of {differs.size:,} pixels", fontsize=9)
  for axes, title in zip(grid[0], _COLUMNS):
    axes.set_title(title, fontsize=10)
  handles = [
    Patch(fc=_of_matplotlib(color), ec="black", lw=0.5, label=plain(clipped(name, 20)))
    for name, color in zip(maps.class_names[:_NAMED], maps.colors)
  ]
  figure.legend(handles=handles, loc="outside lower center", ncols=11, fontsize=9, frameon=False)
  figure.suptitle(_title(maps), fontsize=11)


def height_of(maps: Maps) -> float:
  """Returns the height of the strip of images in inches."""
  shapes = [example.truth.shape for example in maps.examples]
  rows = sum(min(2.0, 1.85 * height / width) + 0.3 for height, width in shapes)
  return rows + 0.6 + 0.25 * -(-min(len(maps.class_names), _NAMED) // 11)


def _title(maps: Maps) -> str:
  differing = sum(np.count_nonzero(example.differs()) for example in maps.examples)
  where = f"both forms agree on all but {differing:,} pixels" if differing else "both forms agree"
  return f"Images of the evaluation split: {where}"


def _panels(example: Example, colors: tuple[Color, ...]) -> list[np.ndarray]:
  """Returns the pixels of each column, uint8 (H, W, 3)."""
  table = np.full((IGNORED + 1, 3), _BLANK, np.uint8)
  table[: len(colors)] = colors
  shown = [
    example.pixels,
    *(table[each] for each in (example.truth, example.train, example.deploy)),
  ]
  marks = [np.where(where[..., None], 0, 255) for where in (example.wrong(), example.differs())]
  return [*shown, *(np.broadcast_to(mark, (*mark.shape[:2], 3)).astype(np.uint8) for mark in marks)]


def _of_matplotlib(color: Color) -> Any:
  return tuple(value / 255 for value in color)
