"""The training state as a checkpoint holds it."""

from pathlib import Path
from typing import Any

from repjax import runs
from repjax.training.step import TrainState


def to_items(state: TrainState) -> dict[str, Any]:
  """Returns a state as the items of a checkpoint, `variables` and `training`.

  Inference reads `variables` alone. Where a run averages its variables, the average is evaluated
  and converted, so `variables` hold the average. The variables that learn are then an entry of
  `training`.
  """
  training = {"step": state.step, "opt_state": state.opt_state}
  if state.ema is None:
    return {"variables": state.variables, "training": training}
  return {"variables": state.ema, "training": {**training, "learning": state.variables}}


def from_items(items: dict[str, Any]) -> TrainState:
  """Returns the state that `to_items` made into items."""
  training = dict(items["training"])
  learning = training.pop("learning", None)
  if learning is None:
    return TrainState(**items["variables"], **training)
  return TrainState(**learning, **training, ema=items["variables"])


def restore_newest(workdir: Path, like: TrainState) -> TrainState | None:
  """Returns the state of the newest whole checkpoint, None where the workdir has no checkpoint.

  Newer checkpoints that turn out to be damaged are moved into `workdir/damaged`, out of the way of
  the run that continues. Nothing is deleted.

  Args:
    workdir: folder of the run.
    like: a state of the same structure, shapes and dtypes.

  Raises:
    InputError: there are checkpoints, and all of them are damaged.
  """
  found = runs.checkpoints(workdir)
  if not found:
    return None
  step, items = runs.read_checkpoint(workdir, to_items(like))
  for newer in (number for number in found if number > step):
    target = runs.set_aside(workdir, newer)
    print(f"the damaged checkpoint of step {newer} is now in {target}", flush=True)
  return from_items(items)
