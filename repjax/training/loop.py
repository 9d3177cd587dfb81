"""The training loop: steps, records, evaluations, saves."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from repjax.config import Config
from repjax.data import train_batches
from repjax.errors import InputError
from repjax.training import evaluation, parallel, planning, processes
from repjax.training.checkpoint import Bookmark
from repjax.training.interruption import Interruption
from repjax.training.journal import Journal
from repjax.training.planning import Plan
from repjax.training.prefetch import ReadAhead
from repjax.training.step import Network, TrainState, make_eval_step, make_train_step

Results = Mapping[str, Mapping[str, float]]
Evaluate = Callable[[TrainState, Interruption], Results]


class AbandonedError(Exception):
  """An evaluation is not worth finishing: the run is to stop."""


_ASK_EVERY = 8  # batches of an evaluation


def fit(
  config: Config,
  plan: Plan,
  schedule: Callable[[int], Any],
  tx: Any,
  state: TrainState,
  workdir: Path,
  bookmark: Bookmark,
  interruption: Interruption,
  network: Network | None = None,
) -> None:
  """Steps, logs, evaluates and saves until the last step, or until the run is to stop.

  Args:
    config: of the run.
    plan: that follows from it.
    schedule: step to learning rate.
    tx: the optimizer.
    state: placed on the devices; it is donated.
    workdir: of the run.
    bookmark: of the checkpoint from which it continues.
    interruption: entered.
    network: what learns and is evaluated instead of the model, see `make_train_step`.

  Raises:
    InputError: a loss is not finite, or a file cannot be read or written.
    KeyboardInterrupt: the run was to stop; what was done is saved.
  """
  train_step, evaluate = (
    _make_train_step(config, plan, tx, network),
    _make_evaluate(config, plan, network),
  )
  learning_rate = jax.jit(schedule)
  first_step = int(state.step)
  with (
    interruption.deferred(),
    contextlib.closing(_open_journal(config, plan, workdir, first_step, bookmark)) as journal,
    contextlib.closing(_read_ahead(config, plan, first_step)) as batches,
  ):
    if plan.evaluates(first_step) and not bookmark.evaluated:
      accuracy = _evaluate(evaluate, state, interruption, journal)
      if accuracy is not None:
        journal.rate(first_step, accuracy)
    stops = is_to_stop(interruption)
    last_step = first_step if stops else plan.total_steps
    if first_step < last_step:
      print("compiling the first step", flush=True)
    pending = []  # metrics still on the devices, one entry a step
    for step in range(first_step + 1, last_step + 1):
      # At most two steps are under way, so that no batches pile up on the devices.
      jax.block_until_ready(pending[-2:-1])
      state, metrics = train_step(state, batches.take(running=pending[-1:]))
      pending.append(metrics)
      logs = plan.evaluates(step) or step % config.log_every_steps == 0
      stops = is_to_stop(interruption, ask=logs)
      saves = plan.evaluates(step) or stops or journal.is_overdue(config.save_every_minutes)
      if saves or logs or step == first_step + 1:
        rows, pending = _settle(pending, step), []
        journal.steps(rows)
        if step == first_step + 1:
          # Shown alone: what is written may not depend on where a run began.
          journal.show(step, rows[0], batches.waited)
      if logs:
        journal.log(step, float(learning_rate(step - 1)), batches.waited)
      if saves:
        accuracy = None
        if plan.evaluates(step) and not stops:
          accuracy = _evaluate(evaluate, state, interruption, journal)
          stops = is_to_stop(interruption)
        journal.save(state, accuracy)
      if stops:
        break
    journal.finish()


def is_to_stop(interruption: Interruption, *, ask: bool = True) -> bool:
  """Whether a signal came: to any process, where all of them ask at once.

  Args:
    interruption: of this process.
    ask: all processes ask now. They stop together or not at all, and to ask costs them time.
  """
  if jax.process_count() == 1:
    return interruption.noted is not None
  if ask and processes.anywhere(interruption.noted is not None):
    interruption.agree()
  return interruption.agreed


def _evaluate(
  evaluate: Evaluate, state: TrainState, interruption: Interruption, journal: Journal
) -> float | None:
  """Evaluates and records a state; the accuracy, None where the run is to stop."""
  start, step = time.perf_counter(), int(state.step)
  try:
    results = evaluate(state, interruption)
  except AbandonedError:
    return None
  journal.evaluated(step, results, time.perf_counter() - start)
  # The average, where there is one, is what the checkpoint is for.
  return results.get("eval_ema", results["eval"])["accuracy"]


def _open_journal(
  config: Config, plan: Plan, workdir: Path, first_step: int, bookmark: Bookmark
) -> Journal:
  """The journal of the first process; in the others something that takes its calls."""
  return processes.writer(
    Journal,
    workdir,
    first_step,
    bookmark,
    total_steps=plan.total_steps,
    batch_size=config.batch_size,
    tensorboard=config.tensorboard,
  )


def _make_train_step(
  config: Config, plan: Plan, tx: Any, network: Network | None
) -> Callable[..., Any]:
  """The step of a config, on all devices."""
  model = plan.spec.create_model(
    dtype=planning.DTYPES[config.dtype],
    axis_name=parallel.AXIS if config.sync_batch_norm else None,
  )
  step = make_train_step(
    model,
    tx,
    plan.spec.preprocessing,
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
    network=network,
  )
  return parallel.data_parallel(step, donate=True)


def _make_evaluate(config: Config, plan: Plan, network: Network | None) -> Evaluate:
  """A function that evaluates what learns and, where there is one, its average."""
  preprocessing = plan.spec.preprocessing
  eval_step = parallel.data_parallel(
    make_eval_step(
      network or plan.spec.create_model().apply, preprocessing, axis_name=parallel.AXIS
    )
  )

  def evaluate(state: TrainState, interruption: Interruption) -> Results:
    trees = {"eval": state.variables} | ({} if state.ema is None else {"eval_ema": state.ema})
    results = {}
    for name, variables in trees.items():
      split = _until_stopped(evaluation.batches(config, plan.eval, preprocessing), interruption)
      results[name] = evaluation.run(eval_step, variables, split)
      _check_finite("the evaluation's loss", results[name]["loss"], int(state.step))
    return results

  return evaluate


def _until_stopped(
  batches: Generator[Any, None, None], interruption: Interruption
) -> Iterator[Any]:
  """The batches of an evaluation, of which all processes have as many.

  Raises:
    AbandonedError: the run is to stop; what yields them is closed.
  """
  with contextlib.closing(batches):
    for number, batch in enumerate(batches):
      if is_to_stop(interruption, ask=number % _ASK_EVERY == 0):
        raise AbandonedError
      yield batch


def _read_ahead(config: Config, plan: Plan, first_step: int) -> ReadAhead:
  """The batches of the steps behind `first_step`, on the devices."""
  return parallel.prefetch(
    train_batches(
      plan.train.examples,
      batch_size=config.batch_size,
      image_size=config.image_size,
      augment=config.augment,
      interpolation=plan.spec.preprocessing.interpolation,
      seed=config.seed,
      start_step=first_step,
      shard=parallel.shard(),
      num_workers=config.num_workers,
    )
  )


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


def _check_finite(name: str, value: float, step: int) -> None:
  """Raises InputError where a value that must be finite is not."""
  if not math.isfinite(value):
    raise InputError(
      f"{name} is {value} at step {step}; training stopped and saved nothing since the last "
      "checkpoint, from which the same command continues. A lower --config.learning_rate or a "
      "longer --config.warmup_epochs usually helps"
    )
