"""A run from its config to its deploy form, in three acts: prepare, fit, finish.

Where several processes make one run, only the first one reads and writes the workdir. It does
everything that concerns the workdir in a few blocks, and sends each block's result to the others.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

from repjax import names, output, runs
from repjax.cache import use_compilation_cache
from repjax.config import Config
from repjax.deploy.canvases import stretching
from repjax.errors import InputError
from repjax.models import init
from repjax.quantization.roundings import Roundings
from repjax.report import draw_at_end
from repjax.runs import lock
from repjax.training import (
  continuing,
  finetune,
  loop,
  planning,
  processes,
  quantization,
  repoptimizer,
  schedules,
)
from repjax.training.conversion import convert, format_report
from repjax.training.interruption import Interruption
from repjax.training.loop import Prepared
from repjax.training.planning import Plan
from repjax.training.recalibration import format_recalibration, is_better, recalibrate
from repjax.training.scales import read_scales
from repjax.training.state import TrainState, create_state, restore_newest


@processes.first_prints()
def train(config: Config, workdir: str | Path, *, resume: str = "auto") -> dict[str, Any]:
  """Trains a model from a config, or continues the run in the workdir, and converts it.

  In the main thread, Ctrl-C, SIGTERM, SIGHUP, SIGUSR1 and SIGUSR2 end a run after the step in hand,
  which is saved. Where the output can no longer be written, training goes on without it.

  Where `processes.initialize` has joined several processes, every process calls this function with
  the same arguments. The config and the workdir are those of the first process. Each process reads
  the data set. A signal to one process ends all of them at the next step that is logged.

  Args:
    config: config with the fields of `repjax.config`.
    workdir: folder of the run, see `repjax.runs`.
    resume: "auto" continues a run if there is one, "must" requires a run, "never" refuses one.

  Returns:
    The report of `convert`.

  Raises:
    InputError: the config cannot be run; the workdir belongs to a different model, config or data
      set, is in use by another process, or is not what `resume` says; `config.init_from` cannot be
      started from; a loss is not finite or a file cannot be written (checkpoints stay intact); or
      the two forms differ by more than the tolerance.
    Preempted: SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2 came; the same call continues the run.
    KeyboardInterrupt: Ctrl-C was pressed; the same call continues the run.
  """
  workdir = names.folder(workdir)
  with (
    output.guarded(output.go_on),
    Interruption() as interruption,
    contextlib.ExitStack() as held,
  ):
    print(f"workdir: {workdir}", flush=True)
    use_compilation_cache()
    run = prepare(config, workdir, resume, held)
    _fit(run, workdir, interruption)
    return _finish(run, workdir)


def prepare(config: Config, workdir: Path, resume: str, held: contextlib.ExitStack) -> Prepared:
  """Reads and checks everything, and then writes what the run was started with.

  Nothing is written before everything has been checked, so that a mistake leaves a workdir as it
  was.

  Args:
    config: config as given; that of the first process counts.
    workdir: folder of the run.
    resume: see `train`.
    held: stack that releases the workdir's lock at the end.
  """
  config = processes.first(_lock_workdir, config, workdir, resume, held)
  plan = processes.together(planning.make_plan, config)
  fingerprints = {"train": plan.train.fingerprint, "eval": plan.eval.fingerprint}
  processes.check_equal("the data set", fingerprints)
  schedule = planning.make_schedule(config, plan)
  optimizer = planning.make_optimizer(config, plan, schedule, plan.scale_shapes)
  state, bookmark, roundings = processes.first(
    _begin, config, plan, optimizer, workdir, fingerprints
  )
  print(_headline(config, plan), flush=True)
  return Prepared(config, plan, schedule, optimizer, state, bookmark, roundings)


def _lock_workdir(config: Config, workdir: Path, resume: str, held: contextlib.ExitStack) -> Config:
  """Locks and sweeps the workdir, and returns the complete config; in the first process."""
  held.enter_context(lock.hold(workdir))
  continuing.check_resume(workdir, resume)
  runs.sweep(workdir)
  return continuing.keep_variance(finetune.resolve(config, workdir), workdir)


def _begin(
  config: Config,
  plan: Plan,
  optimizer: optax.GradientTransformation,
  workdir: Path,
  fingerprints: Mapping[str, Mapping[str, Any]],
) -> tuple[TrainState, runs.Bookmark, Roundings | None]:
  """Checks the workdir, reads the first state, and writes the config; in the first process.

  The files are written only after a state was read. Only then is it certain that the config fits
  the run in the workdir.

  Returns:
    The state, the position of the loop, and, for quantization-aware training, the roundings.
  """
  continuing.check_data(workdir, fingerprints)
  continuing.check_workdir(workdir, plan.spec)
  continuing.check_continuing(workdir, config)
  state, bookmark = _first_state(config, plan, optimizer, workdir)
  # A run that was killed after it had saved a checkpoint left one too many.
  runs.remove_superseded(workdir)
  roundings = quantization.begin(config, plan, state, workdir) if config.qat else None
  continuing.write_start_files(workdir, config, plan.spec, fingerprints)
  return state, bookmark, roundings


def _first_state(
  config: Config, plan: Plan, optimizer: optax.GradientTransformation, workdir: Path
) -> tuple[TrainState, runs.Bookmark]:
  """Returns the state to start from, and the position of the loop.

  The state is the newest checkpoint of the workdir. Before there is one, it is taken from
  `config.init_from`, and without such a folder it is initialised at random. RepOptimizer
  initialises kernels with the help of `config.scales`.

  Raises:
    InputError: no checkpoint is whole, the folder cannot be started from, or the config needs a
      folder to start from and names none.
  """
  key = jax.random.key(config.seed)
  variables = init(plan.spec.create_model(), key, plan.spec.preprocessing.image_size)
  fresh = create_state(variables, optimizer, ema=config.ema_decay > 0)
  restored = restore_newest(workdir, fresh)
  if restored is not None:
    return restored, _say_continuing(config, workdir, int(restored.step))
  start = runs.Bookmark(0, [], True)
  if plan.scale_shapes is not None:
    return _first_of_repoptimizer(config, plan, variables), start
  if not config.init_from:
    _check_needs_no_start(config)
    return fresh, start
  variables, text = finetune.first_variables(
    config.init_from, plan.spec, variables, key=key, images=lambda: _first_images(config, plan)
  )
  print(text, flush=True)
  return create_state(variables, optimizer, ema=config.ema_decay > 0), start


def _first_images(config: Config, plan: Plan) -> jax.Array:
  """Reads the images of the first step, all of them in this process, and normalises them."""
  with contextlib.closing(loop.training_batches(config, plan)) as batches:
    return plan.spec.preprocessing.normalize(jnp.asarray(next(batches)["image"]))


def _first_of_repoptimizer(config: Config, plan: Plan, variables: dict[str, Any]) -> TrainState:
  """Returns the state to start from with RepOptimizer, which holds the scales from now on.

  Raises:
    InputError: the scales cannot be read, or do not fit the model.
  """
  scales = read_scales(config.scales, plan.spec)
  print(f"scales and initial kernels from {config.scales}", flush=True)
  key = jax.random.key(config.seed)
  variables = repoptimizer.initial_variables(plan.spec, variables, scales, key)
  # The values of the scales decide the initial state of the optimizer, and nothing else in it.
  optimizer = planning.make_optimizer(config, plan, optax.constant_schedule(0.0), scales)
  return create_state(variables, optimizer, ema=config.ema_decay > 0)


def _say_continuing(config: Config, workdir: Path, step: int) -> runs.Bookmark:
  """Prints from where the run continues, and returns the position of the loop."""
  read_once = [name for name in ("init_from", "scales") if config[name]]
  unread = "".join(f"; config.{name} is not read again" for name in read_once)
  print(f"continuing from the checkpoint of step {step}{unread}", flush=True)
  bookmark = runs.read_bookmark(workdir, step)
  if bookmark.devices not in (None, jax.device_count()):
    print(
      f"the run had {bookmark.devices} devices so far and now has {jax.device_count()}. Batch "
      "norms see different parts of a batch, so the result differs from that of the same devices",
      flush=True,
    )
  return bookmark


def _check_needs_no_start(config: Config) -> None:
  """Raises InputError where a config makes sense for trained weights only."""
  if config.backbone_rate == 0:
    raise InputError(
      "config.backbone_rate = 0 would freeze weights that nothing has trained; name a folder to "
      "start from, --config.init_from=FOLDER, or set another rate"
    )
  if config.qat:
    raise InputError(
      "config.qat fine-tunes a network that was trained in float; name its folder, "
      "--config.init_from=FOLDER"
    )


def _fit(run: Prepared, workdir: Path, interruption: Interruption) -> None:
  """Trains until the last step; nothing is left to do where all steps were done before."""
  if int(run.state.step) >= run.plan.total_steps and run.bookmark.evaluated:
    print(f"all {run.plan.total_steps} steps were done already", flush=True)
    return
  network = None
  if run.roundings is not None:
    network = quantization.network(run.plan.spec, run.state.variables, run.roundings)
  loop.fit(run, workdir, interruption, network)


def _finish(run: Prepared, workdir: Path) -> dict[str, Any]:
  """Makes everything that follows from the best checkpoint; returns the report of `convert`."""
  config = run.config
  if config.recalibrate_batches and (config.backbone_rate == 0 or config.qat):
    kept = "the frozen backbone" if config.backbone_rate == 0 else "the network in 8 bits"
    print(f"{kept} keeps its statistics; they are not re-estimated", flush=True)
  elif config.recalibrate_batches:
    print("re-estimating the batch norms of the best checkpoint", flush=True)
    record = recalibrate(config, workdir, num_batches=config.recalibrate_batches)
    print(format_recalibration(record), flush=True)
    _keep_better(record, workdir)
  print("re-parameterizing the best checkpoint and comparing both forms", flush=True)
  report = convert(config, workdir)
  print(format_report(report) + f"\nsaved: {runs.deploy_folder(workdir)}", flush=True)
  processes.first(_finish_alone, run, workdir)
  return report


def _keep_better(record: Mapping[str, Any], workdir: Path) -> None:
  """Keeps the re-estimated statistics only if the evaluation split is not worse for them."""
  if is_better(record):
    print("kept: the re-estimated statistics", flush=True)
    return
  processes.first(runs.remove_recalibrated, workdir)
  print(
    "kept: the checkpoint's own statistics, which do better. To use the others all the same: "
    f"repjax recalibrate --workdir {workdir} --batches {record['batches']}",
    flush=True,
  )


def _finish_alone(run: Prepared, workdir: Path) -> None:
  """Writes the ONNX file in 8 bits, where the run rounds, and the picture; in the first process."""
  if run.roundings is not None:
    print("writing the network in 8 bits and running it in ONNX Runtime", flush=True)
    facts = quantization.write_int8(run.config, run.plan, run.roundings, workdir)
    print(quantization.format_int8(facts) + f"\nsaved: {runs.int8_folder(workdir)}", flush=True)
  draw_at_end(workdir)


def _headline(config: Config, plan: Plan) -> str:
  """Returns two lines that say what is trained, on what, and at which learning rate."""
  peak = config.learning_rate * config.batch_size / schedules.BASE_BATCH_SIZE
  backbone, head = "", "head" if config.task == "segmentation" else "classifier"
  if config.backbone_rate != 1:
    backbone = f", {config.backbone_rate:g} times that for all but the {head}"
  if config.backbone_rate == 0:
    backbone = f"; the {head} alone learns, all else is frozen and runs as in evaluation"
  sizes = dict.fromkeys(str(part.image_size) for part in plan.parts)
  size, evaluated = f"{', '.join(sizes)} px", str(plan.spec.preprocessing.image_size)
  if sizes.keys() != {evaluated}:
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
    f"{config.qat_activations}; accuracies are those in 8 bits"
    * config.qat
    + "".join(f"\nnote: {each}" for each in _misfits(config, plan))
  )


def _misfits(config: Config, plan: Plan) -> list[str]:
  """Returns a sentence for each size of images at which a segmentation loses mean IoU."""
  if config.task != "segmentation":
    return []
  model = plan.spec.create_model()
  sizes = dict.fromkeys(("crops", part.image_size) for part in plan.parts)
  if config.eval_window:
    sizes["windows", config.eval_window] = None
  found = (stretching(model, what, (side, side)) for what, side in sizes)
  return [sentence for sentence in found if sentence]
