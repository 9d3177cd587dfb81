"""Draws the panels of the curves and of the speed of runs. Needs matplotlib."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from repjax.report.history import History, thinned, value_at

# The colours of Okabe and Ito, which people with any kind of colour vision can tell apart.
# https://jfly.uni-koeln.de/color/
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES = ("-", "--", ":", "-.")
_MARKED_POINTS = 40
LEGEND_COLUMNS = 3


def legend(figure: Any, runs: Sequence[History]) -> None:
  """Draws the legend that gives the colour of each run."""
  handles = [Line2D([], [], lw=3, **_style(number)) for number in range(len(runs))]
  names = [plain(clipped(run.name, 36)) for run in runs]
  figure.legend(handles, names, loc="center", ncols=LEGEND_COLUMNS, frameon=False)


def clipped(name: str, length: int) -> str:
  """Shortens a long name to its end."""
  return name if len(name) <= length else f"...{name[3 - length :]}"


def plain(text: str) -> str:
  """Returns a text that matplotlib draws as it is; a $ would begin a formula otherwise."""
  return text.replace("$", r"\$")


def _style(number: int) -> dict[str, Any]:
  dashes = _DASHES[number // len(_COLORS) % len(_DASHES)]
  return {"color": _COLORS[number % len(_COLORS)], "linestyle": dashes}


def results(figure: Any, runs: Sequence[History]) -> None:
  """Draws the panels of the loss, and of the score by which checkpoints are compared."""
  loss, score = figure.subplots(1, 2)
  # Every task has an accuracy, so that runs of different tasks can be drawn together.
  name = runs[0].score if len({run.score for run in runs}) == 1 else "accuracy"
  _panel(loss, runs, "loss", 1.0)
  _panel(score, runs, name, 100.0)
  values = np.concatenate([y for _, y in _drawn(loss)] or [np.zeros(0)])
  if values.size and values.min() > 0 and values.max() > 20 * values.min():
    loss.set_yscale("log")
    loss.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    loss.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    loss.yaxis.set_minor_locator(NullLocator())
  logarithmic = ", logarithmic" if loss.get_yscale() == "log" else ""
  loss.set(title=_loss_title(runs), ylabel=f"cross-entropy{logarithmic}")
  title = {"miou": "Mean IoU"}.get(name, name.capitalize())
  score.set(title=_score_title(runs, name, title), ylabel=f"{title[0].lower()}{title[1:]}, %")
  for axes, corner in ((loss, "upper right"), (score, "lower right")):
    if axes.lines:
      axes.legend(loc=corner, fontsize=9)


def _panel(axes: Axes, runs: Sequence[History], ending: str, factor: float) -> None:
  """Draws every curve whose name ends in `ending`, such as "loss" and "eval_loss".

  Args:
    axes: the panel.
    runs: the runs to draw.
    ending: "loss", or a score such as "accuracy".
    factor: factor on the values.
  """
  labels = {}
  for number, run in enumerate(runs):
    for name, curve in run.curves.items():
      if name.split("_")[-1] == ending:
        label = _label(name, ending)
        curve = thinned(curve) if label == "training" else curve
        style = _line(label, len(curve.steps), number if len(runs) > 1 else None)
        labels.setdefault(label, style)
        shown = label if len(runs) == 1 else "_"
        axes.plot(_places(curve.steps, run, runs), curve.values * factor, label=shown, **style)
    value = value_at(run.curves.get(f"eval_{ending}"), run.best)
    if value is not None:
      place = _places(np.asarray([run.best]), run, runs)
      _mark_best(axes, place, value * factor, number if len(runs) > 1 else None)
  if len(runs) > 1 and labels:
    # Colours stand for runs here, so the legend of the panel shows the kinds of curves in grey.
    for label, style in labels.items():
      axes.plot([], [], **{**style, "color": "#555555"}, label=label)
    if "evaluation" in labels:
      axes.plot([], [], "*", color="white", ms=14, mec="black", label="best evaluation")
  _finish(axes, runs)


def _line(label: str, points: int, run: int | None) -> dict[str, Any]:
  """Returns the style of a curve. The colour shows the run, or the kind of curve in a single run.

  Args:
    label: kind of curve, from `_label`.
    points: number of points of the curve.
    run: number of the run; None for a single run.
  """
  kinds = ("training", "evaluation", label)
  style = _style(kinds.index(label) if run is None else run)
  if label == "training":
    style |= {"lw": 1.2, "alpha": 1.0 if run is None else 0.6}
    return style | {"marker": "o", "ms": 0 if points > 1 else 3}
  if label != "evaluation":
    style["linestyle"] = (0, (4, 2))
  return {**style, "lw": 1.8, "marker": "o", "ms": 4 if points <= _MARKED_POINTS else 0}


def _label(name: str, ending: str) -> str:
  """Returns the kind of a curve: "loss" is "training", "eval_ema_loss" is "evaluation, ema"."""
  words = name.removesuffix(ending).strip("_").split("_")
  words = ["evaluation" if word == "eval" else word for word in words if word]
  return ", ".join(words) or "training"


def _mark_best(axes: Axes, place: np.ndarray, value: float, run: int | None) -> None:
  """Draws a star, in the colour of its run if there are several runs."""
  color = "black" if run is None else _style(run)["color"]
  label = "best evaluation" if run is None else "_"
  axes.plot(place, [value], "*", color=color, ms=14, mec="black", label=label, zorder=5)


def _places(steps: np.ndarray, run: History, runs: Sequence[History]) -> np.ndarray:
  """Returns the horizontal places of points: steps, or images if the runs' batch sizes differ."""
  return steps * run.batch_size if _by_images(runs) and run.batch_size else steps


def _by_images(runs: Sequence[History]) -> bool:
  return len({run.batch_size for run in runs} - {None}) > 1


def _finish(axes: Axes, runs: Sequence[History]) -> None:
  """Sets the horizontal axis, and the look that all panels share."""
  axes.set_xlabel("images seen in training" if _by_images(runs) else "step")
  axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
  axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
  axes.set_xlim(0, 1.04 * max((x[-1] for x, _ in _drawn(axes)), default=1))
  tidy(axes)
  if not axes.lines:
    axes.set(xticks=[], yticks=[])
    axes.text(0.5, 0.5, "not recorded", transform=axes.transAxes, ha="center", color="#555555")


def _count(number: float) -> str:
  """Formats a number: 1500 as "1,500", 150000 as "150k", 30000000 as "30M"."""
  for size, letter in ((1e6, "M"), (1e3, "k")):
    if number >= 10 * size:
      return f"{number / size:,g}{letter}"
  return f"{number:,.0f}"


def _drawn(axes: Axes) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns the points of each line that has points."""
  points = [(np.asarray(line.get_xdata()), np.asarray(line.get_ydata())) for line in axes.lines]
  return [(x, y) for x, y in points if x.size]


def tidy(axes: Axes) -> None:
  """Gives a panel thin grid lines, and no border at the top and on the right."""
  axes.grid(axis="y", color="#DDDDDD", lw=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right"]].set_visible(False)
  axes.tick_params(labelsize=9)
  axes.title.set(fontsize=11)


def _loss_title(runs: Sequence[History]) -> str:
  if len(runs) > 1:
    return "Loss"
  ends = [
    f"{runs[0].curves[name].values[-1]:.3g} in {what}"
    for name, what in (("loss", "training"), ("eval_loss", "evaluation"))
    if name in runs[0].curves
  ]
  return f"Loss: at the end {', '.join(ends)}" if ends else "Loss: not recorded yet"


def _score_title(runs: Sequence[History], score: str, title: str) -> str:
  best = [
    (value, run)
    for run in runs
    if (value := value_at(run.curves.get(f"eval_{score}"), run.best)) is not None
  ]
  if not best:
    return f"{title}: not evaluated yet"
  value, run = max(best, key=lambda pair: pair[0])
  if len(runs) > 1:
    return f"{title}: best evaluation {value:.2%}, by {plain(clipped(run.name, 20))}"
  return f"{title}: best evaluation {value:.2%}, at step {run.best:,}"


def speed(figure: Any, runs: Sequence[History]) -> None:
  """Draws the panels of learning rate, throughput and waiting for data."""
  rate, pace, waiting = figure.subplots(1, 3)
  for axes, name, factor, label in (
    (rate, "learning_rate", 1.0, "learning rate"),
    (pace, "images_per_second", 1.0, "images a second"),
    (waiting, "waiting", 100.0, "share of training time, %"),
  ):
    for number, run in enumerate(runs):
      if name in run.curves:
        curve = thinned(run.curves[name])
        style = {"lw": 1.5, "marker": "o", "ms": 3 if len(curve.steps) <= _MARKED_POINTS else 0}
        places = _places(curve.steps, run, runs)
        axes.plot(places, curve.values * factor, clip_on=False, **style, **_style(number))
    axes.set(ylabel=label, title=_speed_title(name, runs))
    axes.set_ylim(0, max([10.0 if name == "waiting" else 0.0, 1.1 * _highest(axes)]) or 1.0)
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if name == "images_per_second":
      axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _count(y)))
    _finish(axes, runs)


def _highest(axes: Axes) -> float:
  return max((float(y.max()) for _, y in _drawn(axes)), default=0.0)


def _speed_title(name: str, runs: Sequence[History]) -> str:
  words = {
    "learning_rate": "Learning rate",
    "images_per_second": "Throughput",
    "waiting": "Waiting for data",
  }[name]
  if len(runs) > 1 or name not in runs[0].curves:
    return words
  values = runs[0].curves[name].values
  if name == "learning_rate":
    return f"{words}: up to {values.max():.3g}"
  if name == "images_per_second":
    return f"{words}: {np.median(values):,.0f} images/s (median)"
  return f"{words}: {np.average(values, weights=runs[0].curves['seconds'].values):.1%} of the time"
