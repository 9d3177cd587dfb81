"""Reads what a run has recorded in its folder, as curves over its steps."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from repjax import runs


class Curve(NamedTuple):
  """A value at each of the steps that recorded the value; two arrays (N,), N at least 1."""

  steps: np.ndarray
  values: np.ndarray


class History(NamedTuple):
  """The curves of a run.

  Attributes:
    name: name of the run, from its folder.
    title: model and data set; empty if unknown.
    batch_size: images in a step, over all devices; None if unknown.
    curves: name to curve. Names in metrics.jsonl are kept (loss, accuracy, learning_rate,
      eval_loss, ...). From timing.jsonl come `images_per_second`, `waiting`, which is the share of
      time without data, and `seconds`.
    best: step of the evaluation with the highest score, the last of several; None without any.
    score: name of the score by which checkpoints are compared.
    notes: messages about lines that could not be read.
  """

  name: str
  title: str
  batch_size: int | None
  curves: dict[str, Curve]
  best: int | None
  notes: tuple[str, ...]
  score: str = "accuracy"


def read_history(workdir: Path, name: str | None = None) -> History:
  """Reads the curves of a run. Damaged lines are left out and counted; missing files are empty.

  Args:
    workdir: folder of a run, or of an import, which has no curves.
    name: name of the run; None: the name of its folder.
  """
  notes, curves = [], {}
  metrics = runs.metrics_file(workdir)
  for file in (metrics, runs.timing_file(workdir)):
    rows, damaged = runs.read_records(file)
    if damaged:
      notes.append(f"{file}: {damaged} damaged line{'s' * (damaged > 1)} left out")
    curves |= _curves(rows if file == metrics else [_speed(row) for row in rows])
  best = None
  judged = runs.judged(curves)
  if judged is not None:
    steps, values = curves[judged]
    best = int(steps[values == values.max()].max())
  config = runs.read_config_json(workdir) if runs.config_file(workdir).exists() else {}
  return History(
    workdir.absolute().name if name is None else name,
    f"{config['model']} on {config['dataset']}"
    if {"model", "dataset"} <= config.keys() and config["dataset"] and curves
    else "",
    config.get("batch_size") if curves else None,
    curves,
    best,
    tuple(notes),
    *([judged.removeprefix("eval_").removeprefix("ema_")] if judged is not None else []),
  )


def distinct_names(workdirs: Sequence[Path]) -> list[str]:
  """Returns the last parts of each path, as many as it takes to tell all folders apart."""
  paths = [Path(os.path.abspath(workdir)).parts[1:] for workdir in workdirs]
  lengths = range(1, max(map(len, paths)) + 1)
  choices = [["/".join(parts[-length:]) for parts in paths] for length in lengths]
  return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def thinned(curve: Curve, most: int = 300) -> Curve:
  """Averages neighbouring points in groups of one size, so that about `most` points remain."""
  length = -(-len(curve.steps) // most)
  if length == 1:
    return curve
  starts = np.arange(0, len(curve.steps), length)
  counts = np.diff(starts, append=len(curve.steps))
  ends = starts + counts - 1
  return Curve(curve.steps[ends], np.add.reduceat(curve.values, starts) / counts)


def value_at(curve: Curve | None, step: int | None) -> float | None:
  """Returns the value recorded at a step, or None without any."""
  values = [] if curve is None else curve.values[curve.steps == step]
  return float(values[-1]) if len(values) else None


def _curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
  """Turns records into one curve for each name, sorted by step."""
  names = dict.fromkeys(name for row in rows for name in row if name != "step")
  found = {}
  for name in names:
    points = [(row["step"], float(row[name])) for row in rows if name in row]
    points.sort(key=lambda point: point[0])
    found[name] = Curve(*map(np.asarray, zip(*points)))
  return found


def _speed(row: dict[str, Any]) -> dict[str, Any]:
  """Returns the speed that a line of timing.jsonl measured."""
  seconds = row.get("seconds", 0)
  if not seconds > 0:
    return {"step": row["step"]}
  return {
    "step": row["step"],
    "images_per_second": row.get("images", 0) / seconds,
    "waiting": row.get("waited", 0) / seconds,
    "seconds": seconds,
  }
