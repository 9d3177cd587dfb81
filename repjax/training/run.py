"""A run from its config to its deploy form."""

import contextlib
from pathlib import Path
from typing import Any

import jax

from repjax import runs
from repjax.cache import use_compilation_cache
from repjax.config import Config
from repjax.errors import InputError
from repjax.models import init
from repjax.report import draw_at_end
from repjax.runs import lock
from repjax.training import (
  continuing,
  finetune,
  loop,
  parallel,
  planning,
  processes,
  quantization,
  schedules,
)
from repjax.training.checkpoint import Bookmark, read_bookmark, restore_newest
from repjax.training.conversion import convert, format_report
from repjax.training.interruption import Interruption
from repjax.training.recalibration import format_recalibration, recalibrate
from repjax.training.step import TrainState, create_state


@processes.first_prints()
def train(config: Config, workdir: str | Path, *, resume: str = "auto") -> dict[str, Any]:
  """Trains a model from a config, or continues where the workdir's run stopped, and converts it.

  In the main thread, SIGTERM and Ctrl-C end a run behind the step in hand, which is saved. Where
  `processes.initialize` has joined several processes, all call this with the same arguments: config
  and workdir are those of the first, each reads the data set, and a signal to one of them ends all
  at the next step that is logged.

  Args:
    config: with the fields of `repjax.config`.
    workdir: folder of the run, see `repjax.runs`.
    resume: "auto" continues what there is, "must" insists on it, "never" on a new run.

  Returns:
    The report of `convert`.

  Raises:
    InputError: a config that cannot be run, a workdir of another model, way to learn or other
      images, or in use by another process, a folder that cannot be started from or is not what
      `resume` says, a loss that is not finite or a file that cannot be written (checkpoints stay
      intact), or forms that differ by more than the tolerance.
    Preempted: SIGTERM came; the same call continues.
    KeyboardInterrupt: Ctrl-C, likewise.
  """
  workdir = Path(workdir)
  print(f"workdir: {workdir}", flush=True)
  with Interruption() as interruption, contextlib.ExitStack() as held:
    processes.first(held.enter_context, lock.hold(workdir))
    processes.first(continuing.check_resume, workdir, resume)
    processes.first(runs.sweep, workdir)
    return _run(config, workdir, interruption)


def _run(config: Config, workdir: Path, interruption: Interruption) -> dict[str, Any]:
  """Does the whole of a run, or what is left of it."""
  use_compilation_cache()
  config = processes.first(finetune.resolve, config, workdir)
  plan = processes.together(planning.make_plan, config)
  fingerprints = {"train": plan.train.fingerprint, "eval": plan.eval.fingerprint}
  processes.check_equal("the data set", fingerprints)
  processes.first(continuing.check_data, workdir, fingerprints)
  processes.first(continuing.check_workdir, workdir, plan.spec)
  processes.first(continuing.check_continuing, workdir, config)
  schedule = planning.make_schedule(config, plan)
  sgd = planning.make_optimizer(config, schedule)
  state, bookmark = processes.first(_first_state, config, plan, sgd, workdir)
  rounding = None
  if config.qat:
    rounding = processes.first(quantization.begin, config, plan, state, workdir)
  # Only now that a state that fits was read.
  processes.first(continuing.claim_workdir, workdir, config, plan.spec, fingerprints)
  print(_headline(config, plan), flush=True)
  if int(state.step) < plan.total_steps or not bookmark.evaluated:
    start = parallel.place(state)
    network = None
    if rounding:
      network = quantization.network(plan.spec, state.variables, rounding)
    loop.fit(config, plan, schedule, sgd, start, workdir, bookmark, interruption, network)
  else:
    print(f"all {plan.total_steps} steps were done already", flush=True)
  if config.recalibrate_batches and (config.backbone_rate == 0 or config.qat):
    kept = "the frozen backbone" if config.backbone_rate == 0 else "the network in 8 bits"
    print(f"{kept} keeps its statistics; they are not re-estimated", flush=True)
  elif config.recalibrate_batches:
    print("re-estimating the batch norms of the best checkpoint", flush=True)
    record = recalibrate(config, workdir, num_batches=config.recalibrate_batches)
    print(format_recalibration(record), flush=True)
  print("re-parameterizing the best checkpoint and comparing both forms", flush=True)
  report = convert(config, workdir)
  print(format_report(report) + f"\nsaved: {workdir / 'deploy'}", flush=True)
  if rounding:
    print("writing the network in 8 bits and running it in ONNX Runtime", flush=True)
    facts = processes.first(quantization.write_int8, config, plan, rounding, workdir)
    print(quantization.format_int8(facts) + f"\nsaved: {workdir / 'int8'}", flush=True)
  processes.first(draw_at_end, workdir)
  return report


def _first_state(
  config: Config, plan: planning.Plan, sgd: Any, workdir: Path
) -> tuple[TrainState, Bookmark]:
  """Of the newest checkpoint, else from `config.init_from`, else drawn; and where the loop was."""
  variables = init(
    plan.spec.create_model(), jax.random.key(config.seed), plan.spec.preprocessing.image_size
  )
  fresh = create_state(variables, sgd, ema=config.ema_decay > 0)
  restored = restore_newest(workdir, fresh)
  if restored is not None:
    own = "; config.init_from is not read again" if config.init_from else ""
    print(f"continuing from the checkpoint of step {int(restored.step)}{own}", flush=True)
    bookmark = read_bookmark(workdir, int(restored.step))
    if bookmark.devices not in (None, jax.device_count()):
      print(
        f"it was trained on {bookmark.devices} devices and goes on with {jax.device_count()}, so "
        "it ends otherwise than it would there: batch norms see other parts of a batch",
        flush=True,
      )
    return restored, bookmark
  start = Bookmark(0, [], True)
  if not config.init_from and config.backbone_rate == 0:
    raise InputError(
      "config.backbone_rate = 0 would freeze weights that nothing has trained; name a folder to "
      "start from, --config.init_from=FOLDER, or set another rate"
    )
  if not config.init_from and config.qat:
    raise InputError(
      "config.qat fine-tunes a network that was trained in float; name its folder, "
      "--config.init_from=FOLDER"
    )
  if not config.init_from:
    return fresh, start
  variables, text = finetune.first_variables(config.init_from, plan.spec, variables)
  print(text, flush=True)
  return create_state(variables, sgd, ema=config.ema_decay > 0), start


def _headline(config: Config, plan: planning.Plan) -> str:
  """What is about to be trained, and at what rate."""
  peak = config.learning_rate * config.batch_size / schedules.BASE_BATCH_SIZE
  backbone = ""
  if config.backbone_rate != 1:
    backbone = f", {config.backbone_rate:g} times that for all but the classifier"
  if config.backbone_rate == 0:
    backbone = "; the classifier alone learns, all else is frozen and runs as in evaluation"
  size, evaluated = f"{config.image_size} px", plan.spec.preprocessing.image_size
  if evaluated != config.image_size:
    size += f" ({evaluated} in evaluation)"
  devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
  if jax.process_count() > 1:
    devices += f" of {jax.process_count()} processes"
  return (
    f"{config.model} on {config.dataset}: {len(plan.train.examples):,} images, "
    f"{config.num_classes} classes, {size}, on {devices}\n"
    f"{plan.total_steps:,} steps of {config.batch_size} images; learning rate "
    f"{config.learning_rate} x {config.batch_size}/{schedules.BASE_BATCH_SIZE} = {peak:g}{backbone}"
    + f"; gradients of {config.accumulate_steps} parts of a batch are averaged"
    * (config.accumulate_steps > 1)
    + f"\nquantization-aware: weights of {config.qat_weight_bits} bits, activations in "
    f"{config.qat_activations}; accuracies are those in 8 bits" * config.qat
  )
