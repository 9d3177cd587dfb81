"""The folder of a run: its checkpoints read back, its statistics re-estimated, its litter swept.

runs/digits/
config.json  model.json  data.json  metrics.jsonl  timing.jsonl  report.png
checkpoints/<step>/       variables and training state: the newest and the best
recalibrated/             re-estimated batch_stats/ of one checkpoint, recalibration.json
deploy/                   model.json, report.json, params/
rounding.json  int8/      of quantization-aware training: how it rounds; its ONNX file
"""

import json
import shutil
import time
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repjax import disk
from repjax.errors import InputError


def sweep(workdir: Path) -> None:
  """Removes what writers that were killed have left in a workdir, which nobody else writes to."""
  checkpoints = workdir / "checkpoints"
  left = [
    *(
      workdir / f"{name}.draft" for name in ("deploy", "int8", "recalibrated", "metrics", "timing")
    ),
    *workdir.glob("*.json.*.draft"),
    *workdir.glob("report.png.*.draft"),
    *checkpoints.glob("*.draft"),
    *checkpoints.glob("*/metrics/*.draft"),
    *checkpoints.glob("*.orbax-checkpoint-tmp*"),
    *(workdir / f"{n}.old" for n in ("deploy", "int8", "recalibrated") if (workdir / n).exists()),
  ]
  for path in left:
    if path.is_dir():
      _remove(path)
    else:
      path.unlink(missing_ok=True)


def _remove(folder: Path, seconds: float = 10.0) -> None:
  """Removes a folder into which threads of a save that failed may still be writing."""
  deadline = time.monotonic() + seconds
  while folder.exists():
    shutil.rmtree(folder, ignore_errors=time.monotonic() < deadline)


def metrics_file(workdir: Path, step: int) -> Path:
  """Where Orbax keeps the accuracy of a checkpoint."""
  return workdir / "checkpoints" / str(step) / "metrics" / "metrics"


def checkpoints(workdir: Path) -> dict[int, float]:
  """Step to accuracy of each finished checkpoint in a workdir; -1 where no accuracy is known."""
  folder = workdir / "checkpoints"
  found = {}
  for path in folder.iterdir() if folder.exists() else ():
    if path.name.isdigit():
      try:
        text = metrics_file(workdir, int(path.name)).read_text()
        found[int(path.name)] = json.loads(text)["accuracy"]
      except (OSError, ValueError, KeyError):
        found[int(path.name)] = -1.0
  return found


def read_checkpoint(
  workdir: Path, items: dict[str, Any], *, best: bool = False
) -> tuple[int, dict[str, Any]]:
  """Reads the newest or the best checkpoint that is whole, and says so where one is not.

  Args:
    workdir: the folder of a run.
    items: item name to the tree that it should be like.
    best: the most accurate first, not the newest.

  Returns:
    The step, and item name to tree.

  Raises:
    InputError: no checkpoint is whole.
  """
  found = checkpoints(workdir)
  if not found and (disk.current_folder(workdir / "deploy") / "params").exists():
    raise InputError(f"{workdir} holds a deploy form only; the training form cannot be had from it")
  order = sorted(found, key=lambda step: (found[step] if best else 0, step), reverse=True)
  problems = []
  for step in order:
    folder = workdir / "checkpoints" / str(step)
    try:
      return step, {item: disk.read_tree(folder / item, like) for item, like in items.items()}
    except InputError as error:
      problems.append(str(error))
      print(f"checkpoint of step {step} is damaged, trying another: {error}", flush=True)
  raise InputError(
    f"{workdir / 'checkpoints'} holds no whole checkpoint"
    + (f": {'; '.join(problems)}" if problems else "; has this run saved one yet?")
  )


def read_best(
  workdir: Path, shapes: dict[str, Any]
) -> tuple[int, dict[str, Any], dict[str, Any] | None]:
  """Reads the best whole checkpoint as it is used: with re-estimated statistics where it has some.

  Continuing a run reads its newest checkpoint by `read_checkpoint`, which knows nothing of them.

  Args:
    workdir: the folder of a run or an import.
    shapes: the tree of its variables.

  Returns:
    The step, the variables, and what `write_recalibrated` was told about their statistics; None
    where they are the checkpoint's own, as they are where `recalibrated` belongs to another one.

  Raises:
    InputError: no checkpoint is whole, or the statistics are damaged.
  """
  step, items = read_checkpoint(workdir, {"variables": shapes}, best=True)
  variables = items["variables"]
  folder = disk.current_folder(workdir / "recalibrated")
  if not folder.exists():
    return step, variables, None
  try:
    record = disk.read_json(folder / "recalibration.json")
    if not isinstance(record, dict) or not {"step", "checkpoint", "batches"} <= record.keys():
      raise InputError(f"{folder / 'recalibration.json'} is damaged: fields are missing")
    if (record["step"], record["checkpoint"]) != (step, _checksum(variables["batch_stats"])):
      return step, variables, None
    batch_stats = disk.read_tree(folder / "batch_stats", shapes["batch_stats"])
  except InputError as error:
    raise InputError(
      f"{error}. To use the checkpoint's own statistics again: "
      f"repjax recalibrate --workdir {workdir} --undo"
    ) from error
  return step, {**variables, "batch_stats": batch_stats}, record


def write_recalibrated(
  workdir: Path, step: int, replaced: Any, batch_stats: Any, facts: dict[str, Any]
) -> dict[str, Any]:
  """Writes re-estimated statistics beside a checkpoint, whole or not at all.

  Args:
    workdir: the folder of a run or an import.
    step: of the checkpoint.
    replaced: its own statistics, by which it is known if another one of that step takes its place.
    batch_stats: the re-estimated ones.
    facts: about them, `batches` among them.

  Returns:
    What recalibration.json says: the facts with `step` and `checkpoint`, a checksum of `replaced`.
  """
  record = {"step": step, "checkpoint": _checksum(replaced), **facts}
  draft = workdir / "recalibrated.draft"
  shutil.rmtree(draft, ignore_errors=True)
  draft.mkdir(parents=True)
  disk.write_tree(draft / "batch_stats", batch_stats)
  disk.write_json(draft / "recalibration.json", record)
  disk.replace_folder(draft, workdir / "recalibrated")
  return record


def remove_recalibrated(workdir: Path) -> None:
  """Removes re-estimated statistics.

  Raises:
    InputError: there are none.
  """
  folder = workdir / "recalibrated"
  if not disk.current_folder(folder).exists():
    raise InputError(f"{workdir} holds no re-estimated statistics, so there is nothing to undo")
  # What `current_folder` would fall back to goes first.
  for path in (folder.with_name("recalibrated.old"), folder):
    if path.exists():
      disk.remove_folder(path)


def _checksum(tree: Any) -> int:
  """Of every array in a tree, in the order of their paths."""
  checksum = 0
  for leaf in jax.tree.leaves(jax.device_get(tree)):
    checksum = zlib.crc32(np.asarray(leaf).tobytes(), checksum)
  return checksum
