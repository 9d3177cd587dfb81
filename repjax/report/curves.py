"""What a run wrote about itself while it went on, read back as curves."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from repjax import disk, runs


class Curve(NamedTuple):
  """A value over the steps at which it was recorded, both (N,), N at least 1."""

  steps: np.ndarray
  values: np.ndarray


class History(NamedTuple):
  """The curves of a run.

  Attributes:
    name: what to call the run, after its folder.
    title: what it is, in a few words; empty where that is not known.
    batch_size: over all devices; None where it is not known.
    curves: by the names in metrics.jsonl (loss, accuracy, learning_rate, eval_loss, ...), and of
      timing.jsonl `images_per_second`, `waiting`, the share of time without data, and `seconds`.
    best: the step of the evaluation with the highest accuracy, the last of several; None without.
    notes: lines that could not be used.
  """

  name: str
  title: str
  batch_size: int | None
  curves: dict[str, Curve]
  best: int | None
  notes: tuple[str, ...]


def read_history(workdir: Path, name: str | None = None) -> History:
  """Reads what there is; damaged lines are left out and counted, missing files are empty.

  Args:
    workdir: of a run, or of an import, which has no curves.
    name: what to call it; None: as its folder.
  """
  notes, curves = [], {}
  for file in (runs.metrics_file(workdir), runs.timing_file(workdir)):
    rows, damaged = _read_lines(file)
    if damaged:
      notes.append(f"{file}: {damaged} damaged line{'s' * (damaged > 1)} left out")
    curves |= _curves(rows if file == runs.metrics_file(workdir) else [_speed(row) for row in rows])
  best = None
  judged = "eval_ema_accuracy" if "eval_ema_accuracy" in curves else "eval_accuracy"
  if judged in curves:  # of the average, where there is one: as checkpoints are chosen
    steps, values = curves[judged]
    best = int(steps[values == values.max()].max())
  path = runs.config_file(workdir)
  config = disk.read_json(path) if path.exists() else {}
  return History(
    workdir.absolute().name if name is None else name,
    f"{config['model']} on {config['dataset']}" if config.get("dataset") and curves else "",
    config.get("batch_size") if curves else None,
    curves,
    best,
    tuple(notes),
  )


def distinct_names(workdirs: Sequence[Path]) -> list[str]:
  """A name for each folder: its last part, with as many in front as tell all apart."""
  paths = [Path(os.path.abspath(workdir)).parts[1:] for workdir in workdirs]
  lengths = range(1, max(map(len, paths)) + 1)
  choices = [["/".join(parts[-length:]) for parts in paths] for length in lengths]
  return next((names for names in choices if len(set(names)) == len(names)), choices[-1])


def thinned(curve: Curve, most: int = 300) -> Curve:
  """Means over equally many neighbouring points, so that at most about `most` are left."""
  length = -(-len(curve.steps) // most)
  if length == 1:
    return curve
  starts = np.arange(0, len(curve.steps), length)
  counts = np.diff(starts, append=len(curve.steps))
  ends = starts + counts - 1
  return Curve(curve.steps[ends], np.add.reduceat(curve.values, starts) / counts)


def value_at(curve: Curve | None, step: int | None) -> float | None:
  """The value that was recorded at a step, None where there is none."""
  values = [] if curve is None else curve.values[curve.steps == step]
  return float(values[-1]) if len(values) else None


def _read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
  """The records of a file, and how many lines hold none."""
  lines = path.read_text(errors="replace").splitlines() if path.exists() else []
  rows = [row for row in map(_parse, lines) if row is not None]
  return rows, len(lines) - len(rows)


def _parse(line: str) -> dict[str, Any] | None:
  """A record whose values are finite numbers and whose step is whole, else None."""
  try:
    row = json.loads(line)
  except ValueError:
    return None
  if not isinstance(row, dict) or not isinstance(row.get("step"), int):
    return None
  numbers = [value for value in row.values() if isinstance(value, int | float)]
  return row if len(numbers) == len(row) and all(map(math.isfinite, numbers)) else None


def _curves(rows: list[dict[str, Any]]) -> dict[str, Curve]:
  names = dict.fromkeys(name for row in rows for name in row if name != "step")
  found = {}
  for name in names:
    points = [(row["step"], float(row[name])) for row in rows if name in row]
    points.sort(key=lambda point: point[0])
    found[name] = Curve(*map(np.asarray, zip(*points)))
  return found


def _speed(row: dict[str, Any]) -> dict[str, Any]:
  """A line of timing.jsonl as what it says about the speed."""
  seconds = row.get("seconds", 0)
  if not seconds > 0:
    return {"step": row["step"]}
  return {
    "step": row["step"],
    "images_per_second": row.get("images", 0) / seconds,
    "waiting": row.get("waited", 0) / seconds,
    "seconds": seconds,
  }
