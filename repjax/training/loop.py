"""The training loop."""

import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repjax import store
from repjax.data import train_batches
from repjax.errors import InputError
from repjax.models import init
from repjax.training import (
  claims,
  evaluation,
  finetune,
  lock,
  parallel,
  recipe,
  schedules,
  settings,
)
from repjax.training.checkpoint import Bookmark, CheckpointWriter, read_bookmark, restore_newest
from repjax.training.conversion import convert, format_report
from repjax.training.interruption import AbandonedError, Interruption
from repjax.training.metrics import MetricsFile, Progress
from repjax.training.recalibration import format_recalibration, recalibrate
from repjax.training.report import draw_at_end
from repjax.training.settings import Config
from repjax.training.step import TrainState, create_state, make_eval_step, make_train_step
from repjax.training.watch import Watch


def train(config: Config, workdir: str | Path, *, resume: str = "auto") -> dict[str, Any]:
  """Trains a model from a config, or continues where the workdir's run stopped, and converts it.

  In the main thread, SIGTERM and Ctrl-C end a run behind the step in hand, which is saved.

  Args:
    config: with the fields of configs/common.py.
    workdir: folder of the run, see `repjax.store`.
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
  claims.check_resume(workdir, resume)
  with Interruption() as interruption:
    if parallel.shard()[0]:  # another process writes
      return _run(config, workdir, interruption)
    with lock.hold(workdir):
      store.sweep(workdir)
      return _run(config, workdir, interruption)


def _run(config: Config, workdir: Path, interruption: Interruption) -> dict[str, Any]:
  """Does the whole of a run, or what is left of it."""
  parallel.use_compilation_cache()
  config = finetune.resolve(config, workdir)
  plan = settings.make_plan(config)
  fingerprints = {"train": plan.train.fingerprint, "eval": plan.eval.fingerprint}
  claims.check_data(workdir, fingerprints)
  claims.check_workdir(workdir, plan.spec)
  claims.check_continuing(workdir, config)
  schedule = recipe.make_schedule(config, plan)
  sgd = recipe.make_optimizer(config, schedule)
  state = _first_state(config, plan, sgd, workdir)
  claims.claim_workdir(
    workdir, config, plan.spec, fingerprints
  )  # only now: a state that fits was read
  print(_headline(config, plan), flush=True)
  bookmark = read_bookmark(workdir, int(state.step)) if state.step else Bookmark(0, [], True)
  if int(state.step) < plan.total_steps or not bookmark.evaluated:
    _train(config, plan, schedule, sgd, parallel.place(state), workdir, bookmark, interruption)
  else:
    print(f"all {plan.total_steps} steps were done already", flush=True)
  if config.recalibrate_batches and config.backbone_rate == 0:
    print("the frozen backbone keeps its statistics; they are not re-estimated", flush=True)
  elif config.recalibrate_batches:
    print("re-estimating the batch norms of the best checkpoint", flush=True)
    record = recalibrate(config, workdir, num_batches=config.recalibrate_batches)
    print(format_recalibration(record), flush=True)
  print("re-parameterizing the best checkpoint and comparing both forms", flush=True)
  report = convert(config, workdir)
  print(format_report(report) + f"\nsaved: {workdir / 'deploy'}", flush=True)
  draw_at_end(workdir)
  return report


def _first_state(config: Config, plan: settings.Plan, sgd: Any, workdir: Path) -> TrainState:
  """Of the newest checkpoint, else from `config.init_from`, else drawn."""
  variables = init(
    plan.spec.create_model(), jax.random.key(config.seed), plan.spec.preprocessing.image_size
  )
  fresh = create_state(variables, sgd, ema=config.ema_decay > 0)
  restored = restore_newest(workdir, fresh)
  if restored is not None:
    own = "; config.init_from is not read again" if config.init_from else ""
    print(f"continuing from the checkpoint of step {int(restored.step)}{own}", flush=True)
    return restored
  if not config.init_from and config.backbone_rate == 0:
    raise InputError(
      "config.backbone_rate = 0 would freeze weights that nothing has trained; name a folder to "
      "start from, --config.init_from=FOLDER, or set another rate"
    )
  if not config.init_from:
    return fresh
  variables, text = finetune.first_variables(config.init_from, plan.spec, variables)
  print(text, flush=True)
  return create_state(variables, sgd, ema=config.ema_decay > 0)


def _headline(config: Config, plan: settings.Plan) -> str:
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
  return (
    f"{config.model} on {config.dataset}: {len(plan.train.examples):,} images, "
    f"{config.num_classes} classes, {size}, on {devices}\n"
    f"{plan.total_steps:,} steps of {config.batch_size} images; learning rate "
    f"{config.learning_rate} x {config.batch_size}/{schedules.BASE_BATCH_SIZE} = {peak:g}{backbone}"
    + f"; gradients of {config.accumulate_steps} parts of a batch are averaged"
    * (config.accumulate_steps > 1)
  )


def _train(
  config: Config,
  plan: settings.Plan,
  schedule: Any,
  sgd: Any,
  state: TrainState,
  workdir: Path,
  bookmark: Bookmark,
  interruption: Interruption,
) -> None:
  """Steps, logs, evaluates and saves until the last step."""
  preprocessing = plan.spec.preprocessing
  model = plan.spec.create_model(
    dtype=settings.DTYPES[config.dtype],
    axis_name=parallel.AXIS if config.sync_batch_norm else None,
  )
  train_step = parallel.data_parallel(
    make_train_step(
      model,
      sgd,
      preprocessing,
      label_smoothing=config.label_smoothing,
      mixup=config.mixup,
      cutmix=config.cutmix,
      aux_weight=config.aux_weight,
      custom_l2=config.custom_l2,
      accumulate_steps=config.accumulate_steps,
      ema_decay=config.ema_decay,
      ema_start=plan.warmup_steps,
      seed=config.seed,
      axis_name=parallel.AXIS,
      frozen=config.backbone_rate == 0,
    ),
    donate=True,
  )
  eval_step = parallel.data_parallel(
    make_eval_step(plan.spec.create_model(), preprocessing, axis_name=parallel.AXIS)
  )
  learning_rate = jax.jit(schedule)
  first_step = int(state.step)
  read = train_batches(
    plan.train.examples,
    batch_size=config.batch_size,
    image_size=config.image_size,
    augment=config.augment,
    interpolation=preprocessing.interpolation,
    seed=config.seed,
    start_step=first_step,
    shard=parallel.shard(),
    num_workers=config.num_workers,
  )
  progress = Progress(first_step, plan.total_steps, config.batch_size)
  with (
    interruption.deferred(),
    contextlib.closing(parallel.prefetch(read)) as batches,
    contextlib.closing(CheckpointWriter(workdir)) as checkpoints,
    contextlib.closing(
      MetricsFile(workdir / "metrics.jsonl", first_step, bookmark.records)
    ) as records,
    contextlib.closing(Watch(workdir, first_step, tensorboard=config.tensorboard)) as watch,
  ):

    def evaluate(step: int) -> float | None:
      """Shows and records how good the state is; None where the run is to stop."""
      start = time.perf_counter()

      def run(variables: Any) -> dict[str, float]:
        split = evaluation.batches(config, plan.eval, preprocessing)
        return evaluation.run(eval_step, variables, interruption.watch(split))

      try:
        result, text = _evaluate(state, run)
      except AbandonedError:
        return None
      records.write(step=step, **result)
      watch.write(step, result)
      progress.note(
        f"step {step}/{plan.total_steps}  evaluation: {text}", seconds=time.perf_counter() - start
      )
      # The average, where there is one, is what the checkpoint is for.
      return result.get("eval_ema_accuracy", result["eval_accuracy"])

    def is_due(step: int) -> bool:
      return step % plan.eval_every_steps == 0 or step == plan.total_steps

    if is_due(first_step) and not bookmark.evaluated:
      accuracy = evaluate(first_step)
      if accuracy is not None:
        checkpoints.rate(first_step, accuracy)
    pending = []  # metrics still on the devices, one entry a step
    rows = list(bookmark.pending)  # those of the steps before since the last record
    saved_at = time.monotonic()
    last_step = plan.total_steps if interruption.noted is None else first_step
    if first_step < last_step:
      print("compiling the first step", flush=True)
    for step in range(first_step + 1, last_step + 1):
      # At most two steps are under way, so that no batches pile up on the devices.
      jax.block_until_ready(pending[-2:-1])
      state, metrics = train_step(state, batches.take(running=pending[-1:]))
      pending.append(metrics)
      minutes = (time.monotonic() - saved_at) / 60
      saves = (
        is_due(step) or interruption.noted is not None or 0 < config.save_every_minutes <= minutes
      )
      logs = is_due(step) or step % config.log_every_steps == 0
      if saves or logs or step == first_step + 1:
        rows += _settle(pending, step)
        pending = []
        checkpoints.poll()
      if step == first_step + 1:  # shown alone: what is written may not depend on where a run began
        progress.update(step, *_means(rows[-1:]), batches.waited)
      if logs:
        loss, accuracy = _means(rows)
        rows = []
        pace = progress.update(step, loss, accuracy, batches.waited)
        values = {"loss": loss, "accuracy": accuracy}
        values["learning_rate"] = float(learning_rate(step - 1))
        records.write(step=step, **values)
        watch.write(step, values, pace)
      if saves:
        accuracy = evaluate(step) if is_due(step) else None
        records.sync()  # before the checkpoint that counts them
        checkpoints.save(state, accuracy, records=records.count, pending=rows)
        saved_at = time.monotonic()
        if interruption.noted is not None:
          break
    progress.finish()


def _evaluate(
  state: TrainState, run: Callable[[Any], dict[str, float]]
) -> tuple[dict[str, float], str]:
  """Evaluates what learns and, where there is one, its average: for the metrics, and in words.

  Raises:
    InputError: a loss is not finite.
  """
  step, result, texts = int(state.step), {}, []
  trees = {"eval": state.variables} | ({"eval_ema": state.ema} if state.ema is not None else {})
  for name, variables in trees.items():
    found = run(variables)
    _check_finite("the evaluation's loss", found["loss"], step)
    result |= {f"{name}_accuracy": found["accuracy"], f"{name}_loss": found["loss"]}
    texts.append(f"accuracy {found['accuracy']:.2%}, loss {found['loss']:.4f}")
    texts[0] += f" on {found['count']:,} images" if name == "eval" else ""
  return result, "; average over the steps: ".join(texts)


def _settle(pending: list[dict[str, jax.Array]], step: int) -> list[dict[str, float]]:
  """Loss and accuracy of each of the steps that end at `step`.

  Raises:
    InputError: one of the steps was not finite.
  """
  rows = jax.device_get(pending)
  for number, row in enumerate(rows, start=step - len(rows) + 1):
    for name in ("loss", "grad_norm"):
      _check_finite(name, row[name], number)
  return [{name: float(row[name]) for name in ("loss", "accuracy")} for row in rows]


def _means(rows: Sequence[Mapping[str, float]]) -> tuple[float, float]:
  """Mean loss and accuracy of some steps."""
  loss, accuracy = (float(np.mean([row[name] for row in rows])) for name in ("loss", "accuracy"))
  return loss, accuracy


def _check_finite(name: str, value: float, step: int) -> None:
  """Raises InputError where a value that must be finite is not."""
  if not math.isfinite(value):
    raise InputError(
      f"{name} is {value} at step {step}; training stopped and saved nothing since the last "
      "checkpoint, from which the same command continues. A lower --config.learning_rate or a "
      "longer --config.warmup_epochs usually helps"
    )
