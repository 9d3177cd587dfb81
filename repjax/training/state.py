"""The training state: what a step changes, and how a checkpoint holds the state."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from repjax import runs


@struct.dataclass
class TrainState:
  """The values that a step changes, without a device axis.

  Attributes:
    step: steps taken, int32 ().
    params: parameters of the model.
    batch_stats: running statistics of the batch norms.
    opt_state: state of the optimizer.
    ema: moving average {"params", "batch_stats"}; None in a run without an average.
  """

  step: jax.Array
  params: Any
  batch_stats: Any
  opt_state: optax.OptState
  ema: Any = None

  @property
  def variables(self) -> dict[str, Any]:
    """The variables of the model that learn, not their average."""
    return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
  variables: Any, optimizer: optax.GradientTransformation, *, ema: bool = False
) -> TrainState:
  """Builds the state at step 0 from the variables of a model.

  Args:
    variables: {"params", "batch_stats"}.
    optimizer: initialised with the parameters.
    ema: the state holds a moving average, which starts as a copy.
  """
  held = {"params": variables["params"], "batch_stats": variables["batch_stats"]}
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    **held,
    opt_state=optimizer.init(variables["params"]),
    # A step donates the memory of its state, so no array may appear in the state twice.
    ema=jax.tree.map(jnp.copy, held) if ema else None,
  )


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
  damaged = [number for number in found if number > step]
  if runs.newest_finished(workdir) != step:
    # A kill came before the note about this checkpoint, or newer ones are damaged and go now.
    runs.note_newest(workdir, step)
  for newer in damaged:
    target = runs.set_aside(workdir, newer)
    print(f"the damaged checkpoint of step {newer} is now in {target}", flush=True)
  return from_items(items)
