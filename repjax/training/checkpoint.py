"""Writing checkpoints: the newest and the best are kept. Reading is in `repjax.store`."""

import tempfile
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from repjax import store
from repjax.training.step import TrainState


class CheckpointWriter:
  """Saves training states into `workdir/checkpoints`, in the background."""

  def __init__(self, workdir: Path):
    def accuracy(metrics):
      return metrics["accuracy"]

    for step, value in store.checkpoints(workdir).items():
      if value < 0:  # unreadable, which Orbax would stop at; the rest may be whole
        store.write_json(store.metrics_file(workdir, step), {"accuracy": value})

    # `best_fn` alone would drop the newest checkpoint.
    keep = checkpoint_managers.AnyPreservationPolicy(
      [checkpoint_managers.LatestN(1), checkpoint_managers.BestN(get_metric_fn=accuracy, n=1)]
    )
    options = ocp.CheckpointManagerOptions(preservation_policy=keep, best_fn=accuracy)
    self._manager = ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)

  def save(self, state: TrainState, accuracy: float) -> None:
    """Starts saving; the state may be donated to the next step as soon as this returns."""
    # From one device's copy: Orbax would save a slice from each device and compile programs for it.
    trees = jax.device_get(to_items(state))
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    self._manager.save(
      int(state.step), args=ocp.args.Composite(**items), metrics={"accuracy": accuracy}
    )

  def close(self) -> None:
    """Waits until everything is on disk."""
    self._manager.wait_until_finished()
    self._manager.close()


def to_items(state: TrainState) -> dict:
  """A state as the items of a checkpoint: `variables` alone suffice for inference.

  Where a run averages its variables, the average is what is evaluated, converted and started from,
  so that is what `variables` are; those that learn are then part of `training`.
  """
  training = {"step": state.step, "opt_state": state.opt_state}
  if state.ema is None:
    return {"variables": state.variables, "training": training}
  return {"variables": state.ema, "training": {**training, "learning": state.variables}}


def from_items(items: dict) -> TrainState:
  """The inverse of `to_items`."""
  training = dict(items["training"])
  learning = training.pop("learning", None)
  if learning is None:
    return TrainState(**items["variables"], **training)
  return TrainState(**learning, **training, ema=items["variables"])


def restore_newest(workdir: Path, like: TrainState) -> TrainState | None:
  """The state of the newest whole checkpoint, None where there is none at all.

  Checkpoints that turn out to be damaged are moved to `workdir/damaged`, out of the way of the
  run that continues; nothing is deleted.

  Raises:
    InputError: there are checkpoints, and all are damaged.
  """
  found = store.checkpoints(workdir)
  if not found:
    return None
  step, items = store.read_checkpoint(workdir, to_items(like))
  for newer in (number for number in found if number > step):
    (workdir / "damaged").mkdir(exist_ok=True)
    target = Path(tempfile.mkdtemp(prefix=f"{newer}-", dir=workdir / "damaged"))
    (workdir / "checkpoints" / str(newer)).replace(target)
    print(f"the damaged checkpoint of step {newer} is now in {target}", flush=True)
  return from_items(items)
