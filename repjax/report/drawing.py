"""The picture of a run: curves, speed, and what the branches contribute. Needs matplotlib."""

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from repjax.report import draw_curves, draw_kernels
from repjax.report.contributions import Kernels, choose
from repjax.report.curves import History

_WIDTH, _DPI = 12.0, 100


def draw(
  histories: Sequence[History], kernels: Kernels | None, notes: Sequence[str] = ()
) -> Figure:
  """One figure of the runs' curves and, below them, of a model's kernels.

  Args:
    histories: of the runs to lay over one another; those without curves are left out.
    kernels: of the first of them; None draws none.
    notes: printed at the bottom.
  """
  runs = [history for history in histories if history.curves]
  headline, lines = (
    _headline(histories[0], kernels, len(runs)),
    [line for note in notes for line in textwrap.wrap(note, 150)],
  )

  def top(part: Any) -> None:
    part.text(0.5, 0.4, headline, fontsize=14, fontweight="bold", ha="center", va="center")

  def bottom(part: Any) -> None:
    part.text(0.01, 0.5, "\n".join(lines), fontsize=9, va="center", color="#555555")

  sections = [
    (0.45, top),
    *_curve_sections(runs),
    *(_kernel_sections(kernels) if kernels else []),
    (0.1 + 0.22 * len(lines), bottom),
  ]
  heights = [height for height, _ in sections]
  figure = Figure((_WIDTH, sum(heights)), dpi=_DPI, layout="constrained")
  parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
  for part, (_, section) in zip(parts, sections):
    section(part)
  return figure


def save(figure: Figure, target: Any) -> None:
  """Writes the figure as PNG; the same figure gives the same bytes."""
  figure.savefig(target, format="png", dpi=_DPI, metadata={"Software": None})


def _headline(first: History, kernels: Kernels | None, runs: int) -> str:
  if runs > 1:
    return f"{runs} runs compared"
  what = first.title or (f"{kernels.model}, weights only" if kernels else "")
  steps = max((curve.steps[-1] for curve in first.curves.values()), default=0)
  length = f", {steps:,} steps of {first.batch_size:,} images" if first.batch_size else ""
  return f"{draw_curves.clipped(first.name, 50)}: {what}{length}"


_Section = tuple[float, Callable[[Any], None]]


def _curve_sections(runs: Sequence[History]) -> list[_Section]:
  """Height in inches of each section, and what draws it."""
  if not runs:
    return []
  rows = -(-len(runs) // draw_curves.LEGEND_COLUMNS) if len(runs) > 1 else 0
  return [
    *([(0.15 + 0.25 * rows, lambda part: draw_curves.legend(part, runs))] if rows else []),
    (3.1, lambda part: draw_curves.results(part, runs)),
    (2.5, lambda part: draw_curves.speed(part, runs)),
  ]


def _kernel_sections(kernels: Kernels) -> list[_Section]:
  rows = 1 + len({name for layer in choose(kernels.layers) for name in layer.branches})
  maps = (1.15 + 1.35 * rows, lambda part: draw_kernels.heat_maps(part, kernels))
  if not any(layer.branches for layer in kernels.layers):
    return [maps]
  height = 2.4 if draw_kernels.level_labels(kernels) else 3.4
  return [(height, lambda part: draw_kernels.shares(part, kernels)), maps]
