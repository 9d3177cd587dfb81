"""Lays out the picture of a run: curves, speed, class maps, and kernels with their branches.

Needs matplotlib.
"""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from repjax.report import curves, map_panels
from repjax.report import kernels as kernel_panels
from repjax.report.branches import Kernels, choose
from repjax.report.history import History
from repjax.report.maps import Maps

_WIDTH, _DPI = 12.0, 100

_Section = tuple[float, Callable[[Any], None]]
"""The height of a horizontal strip in inches, and the function that draws into the strip."""


def draw(
  histories: Sequence[History],
  kernels: Kernels | None,
  notes: Sequence[str] = (),
  maps: Maps | None = None,
) -> Figure:
  """Draws the curves of runs and, below them, the kernels of a model into one figure.

  Args:
    histories: runs to draw into the same panels; runs without curves are left out.
    kernels: kernels of the first run; None draws none.
    notes: lines at the bottom.
    maps: class maps of the first run, if it is a segmentation; None draws none.
  """
  runs = [history for history in histories if history.curves]
  headline = _headline(histories[0], kernels, len(runs))
  lines = [curves.plain(line) for note in notes for line in textwrap.wrap(note, 150)]

  def top(strip: Any) -> None:
    strip.text(0.5, 0.4, headline, fontsize=14, fontweight="bold", ha="center", va="center")

  def bottom(strip: Any) -> None:
    strip.text(0.01, 0.5, "\n".join(lines), fontsize=9, va="center", color="#555555")

  sections = [
    (0.45, top),
    *_curve_sections(runs),
    *(_map_sections(maps) if maps else []),
    *(_kernel_sections(kernels) if kernels else []),
    (0.1 + 0.22 * len(lines), bottom),
  ]
  heights = [height for height, _ in sections]
  figure = Figure((_WIDTH, sum(heights)), dpi=_DPI, layout="constrained")
  strips: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
  for strip, (_, section) in zip(strips, sections):
    section(strip)
  return figure


def save(figure: Figure, target: Any) -> None:
  """Writes a figure as PNG. Equal figures give equal bytes."""
  figure.savefig(target, format="png", dpi=_DPI, metadata={"Software": None})


def _headline(first: History, kernels: Kernels | None, runs: int) -> str:
  if runs > 1:
    return f"{runs} runs compared"
  what = first.title or (f"{kernels.model}, weights only" if kernels else "")
  steps = max((curve.steps[-1] for curve in first.curves.values()), default=0)
  length = f", {steps:,} steps of {first.batch_size:,} images" if first.batch_size else ""
  return f"{curves.plain(curves.clipped(first.name, 50))}: {what}{length}"


def _curve_sections(runs: Sequence[History]) -> list[_Section]:
  if not runs:
    return []
  rows = -(-len(runs) // curves.LEGEND_COLUMNS) if len(runs) > 1 else 0
  return [
    *([(0.15 + 0.25 * rows, lambda strip: curves.legend(strip, runs))] if rows else []),
    (3.1, lambda strip: curves.results(strip, runs)),
    (2.5, lambda strip: curves.speed(strip, runs)),
  ]


def _map_sections(maps: Maps) -> list[_Section]:
  images = (map_panels.height_of(maps), lambda strip: map_panels.maps(strip, maps))
  if not any(value is not None for value in maps.iou):
    return [images]
  return [(2.4, lambda strip: map_panels.iou(strip, maps)), images]


def _kernel_sections(kernels: Kernels) -> list[_Section]:
  rows = 1 + len({name for layer in choose(kernels.layers) for name in layer.branches})
  maps = (1.15 + 1.35 * rows, lambda strip: kernel_panels.heat_maps(strip, kernels))
  if not any(layer.branches for layer in kernels.layers):
    return [maps]
  height = 2.4 if kernel_panels.level_labels(kernels) else 3.4
  return [(height, lambda strip: kernel_panels.shares(strip, kernels)), maps]
