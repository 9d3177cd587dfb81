"""The training loop."""

import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repjax.data import train_batches
from repjax.errors import InputError
from repjax.models import init
from repjax.training import claims, evaluation, finetune, parallel, recipe, schedules, settings
from repjax.training.checkpoint import CheckpointWriter, restore_newest
from repjax.training.conversion import convert, format_report
from repjax.training.metrics import MetricsFile, Progress
from repjax.training.recalibration import format_recalibration, recalibrate
from repjax.training.report import draw_at_end
from repjax.training.settings import Config
from repjax.training.step import TrainState, create_state, make_eval_step, make_train_step
from repjax.training.watch import Watch


def train(config: Config, workdir: str | Path) -> dict[str, Any]:
  """Trains a model from a config, or continues where the workdir's run stopped, and converts it.

  Args:
    config: with the fields of configs/common.py.
    workdir: folder of the run, see `repjax.store`.

  Returns:
    The report of `convert`.

  Raises:
    InputError: a config that cannot be run, a workdir of another model or other images, a folder
      that cannot be started from, a loss that is not finite (checkpoints stay intact), or forms
      that differ by more than the tolerance.
  """
  workdir = Path(workdir)
  print(f"workdir: {workdir}", flush=True)
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
  if int(state.step) < plan.total_steps:
    _train(config, plan, schedule, sgd, parallel.place(state), workdir)
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
  config: Config, plan: settings.Plan, schedule: Any, sgd: Any, state: TrainState, workdir: Path
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
    contextlib.closing(parallel.prefetch(read)) as batches,
    contextlib.closing(CheckpointWriter(workdir)) as checkpoints,
    contextlib.closing(MetricsFile(workdir / "metrics.jsonl", first_step)) as records,
    contextlib.closing(Watch(workdir, first_step, tensorboard=config.tensorboard)) as watch,
  ):
    pending = []  # metrics still on the devices, one entry a step
    print("compiling the first step", flush=True)
    for step in range(first_step + 1, plan.total_steps + 1):
      # At most two steps are under way, so that no batches pile up on the devices.
      jax.block_until_ready(pending[-2:-1])
      state, metrics = train_step(state, batches.take(running=pending[-1:]))
      pending.append(metrics)
      pause = step % plan.eval_every_steps == 0 or step == plan.total_steps
      if step == first_step + 1:  # shown alone: what is written may not depend on where a run began
        progress.update(step, *_settle(pending, step), batches.waited)
      if pause or step % config.log_every_steps == 0:
        loss, accuracy = _settle(pending, step)
        pending = []
        pace = progress.update(step, loss, accuracy, batches.waited)
        values = {"loss": loss, "accuracy": accuracy}
        values["learning_rate"] = float(learning_rate(step - 1))
        records.write(step=step, **values)
        watch.write(step, values, pace)
      if pause:
        start = time.perf_counter()
        result, text = _evaluate(
          state,
          lambda variables: evaluation.run(
            eval_step, variables, evaluation.batches(config, plan.eval, preprocessing)
          ),
        )
        records.write(step=step, **result)
        watch.write(step, result)
        # The average, where there is one, is what the checkpoint is for.
        checkpoints.save(state, result.get("eval_ema_accuracy", result["eval_accuracy"]))
        progress.note(
          f"step {step}/{plan.total_steps}  evaluation: {text}", seconds=time.perf_counter() - start
        )
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


def _settle(pending: list[dict[str, jax.Array]], step: int) -> tuple[float, float]:
  """Mean loss and accuracy of the steps that end at `step`.

  Raises:
    InputError: one of the steps was not finite.
  """
  rows = jax.device_get(pending)
  for number, row in enumerate(rows, start=step - len(rows) + 1):
    for name in ("loss", "grad_norm"):
      _check_finite(name, row[name], number)
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
