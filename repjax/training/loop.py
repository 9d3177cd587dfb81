"""The training loop: steps, records, evaluations and checkpoints."""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import optax

from repjax.config import Config
from repjax.data import train_batches
from repjax.errors import InputError
from repjax.quantization.roundings import Roundings
from repjax.runs import Bookmark
from repjax.training import evaluation, parallel, planning, processes
from repjax.training.interruption import Interruption
from repjax.training.journal import Journal
from repjax.training.planning import Plan
from repjax.training.prefetch import ReadAhead
from repjax.training.state import TrainState
from repjax.training.step import Network, make_eval_step, make_train_step

_ASK_EVERY = 8  # batches of an evaluation between two questions whether to stop


class Prepared(NamedTuple):
  """A run that is ready for its first step, the same in every process.

  Attributes:
    config: complete config.
    plan: facts that follow from the config and the data.
    schedule: function of a step, counted from 0, that returns the learning rate.
    optimizer: optimizer of the config.
    state: state to start from.
    bookmark: position of the loop at that state.
    roundings: how the network in 8 bits rounds; None: the run is not quantization-aware.
  """

  config: Config
  plan: Plan
  schedule: Callable[[int], Any]
  optimizer: optax.GradientTransformation
  state: TrainState
  bookmark: Bookmark
  roundings: Roundings | None


class AbandonedError(Exception):
  """An evaluation is not worth finishing, because the run has to stop."""


Evaluate = Callable[[TrainState, Interruption], Mapping[str, Mapping[str, float]]]
"""A function that evaluates a state; it raises AbandonedError where the run has to stop."""


def fit(
  run: Prepared, workdir: Path, interruption: Interruption, network: Network | None = None
) -> None:
  """Trains until the last step, or until a signal stops the run; what was done is then saved.

  Args:
    run: the prepared run.
    workdir: folder of the run.
    interruption: listens to signals; it is entered.
    network: function that learns in place of the model, see `make_train_step`.

  Raises:
    InputError: a loss is not finite, or a file cannot be read or written.
    KeyboardInterrupt: a signal stopped the run.
  """
  train_step, evaluate = _make_train_step(run, network), _make_evaluate(run, network)
  state, first_step = parallel.place(run.state), int(run.state.step)
  # A signal is noted and looked at after each step. On the way out the data thread stops first,
  # then the journal waits for its last save, and then the signal is raised.
  with (
    interruption.deferred(),
    contextlib.closing(_open_journal(run, workdir)) as journal,
    contextlib.closing(_read_ahead(run)) as batches,
  ):
    if run.plan.evaluates(first_step) and not run.bookmark.evaluated:
      # The run was stopped after it had saved this step and before it had evaluated it.
      accuracy = _evaluate_and_record(evaluate, state, interruption, journal)
      if accuracy is not None:
        journal.rate(first_step, accuracy)
    if not is_to_stop(interruption) and first_step < run.plan.total_steps:
      print("compiling the first step", flush=True)
      _take_steps(run, state, train_step, evaluate, batches, journal, interruption)
    journal.finish()


def _take_steps(
  run: Prepared,
  state: TrainState,
  train_step: Callable[..., Any],
  evaluate: Evaluate,
  batches: ReadAhead,
  journal: Journal,
  interruption: Interruption,
) -> None:
  """Takes every step that is left, and records, evaluates and saves where it is due.

  JAX returns from `train_step` before the devices are done. The loop therefore keeps the metrics on
  the devices, in `pending`, and fetches them only when something is to be written or shown.

  Args:
    run: the prepared run.
    state: state to start from, on the devices; its memory is reused.
    train_step: function of a state and a batch that returns the next state and metrics.
    evaluate: function that evaluates a state.
    batches: batches on the devices, beginning with that of the first step to take.
    journal: takes records and checkpoints.
    interruption: listens to signals.
  """
  config, plan = run.config, run.plan
  learning_rate = jax.jit(run.schedule)
  first_step = int(run.state.step) + 1
  pending = []  # metrics of the steps since the last fetch
  for step in range(first_step, plan.total_steps + 1):
    # The step before the last one must be done. So at most two steps are under way, and batches do
    # not pile up on the devices.
    jax.block_until_ready(pending[-2:-1])
    state, metrics = train_step(state, batches.take(running=pending[-1:]))
    pending.append(metrics)
    evaluates = plan.evaluates(step)
    logs = evaluates or step % config.log_every_steps == 0
    # All processes agree on stopping at steps that are logged, which all of them reach.
    stops = is_to_stop(interruption, ask=logs)
    saves = evaluates or stops or journal.is_overdue(config.save_every_minutes)
    if saves or logs or step == first_step:
      rows, pending = _fetch(pending, step), []
      journal.add(rows)
      if step == first_step:
        # Shown and not recorded: records may not depend on where a run was interrupted.
        journal.show(step, rows[0], batches.waited)
    if logs:
      journal.log(step, float(learning_rate(step - 1)), batches.waited)
    if saves:
      accuracy = None
      if evaluates and not stops:
        accuracy = _evaluate_and_record(evaluate, state, interruption, journal)
        stops = is_to_stop(interruption)
      journal.save(state, accuracy)
    if stops:
      break


def is_to_stop(interruption: Interruption, *, ask: bool = True) -> bool:
  """Checks whether a signal came to this process or, if they are asked, to any process.

  Several processes stop together or not at all: one that stopped alone would leave the others
  waiting for it in the middle of a step.

  Args:
    interruption: listens to the signals of this process.
    ask: ask the other processes, which takes time. All of them must ask at the same step.
  """
  if jax.process_count() == 1:
    return interruption.noted is not None
  if ask and processes.anywhere(interruption.noted is not None):
    interruption.agree()
  return interruption.agreed


def _evaluate_and_record(
  evaluate: Evaluate, state: TrainState, interruption: Interruption, journal: Journal
) -> float | None:
  """Evaluates and records a state; returns the accuracy, None where the run has to stop."""
  start, step = time.perf_counter(), int(state.step)
  try:
    results = evaluate(state, interruption)
  except AbandonedError:
    return None
  journal.evaluated(step, results, time.perf_counter() - start)
  # Where the run averages its variables, the checkpoint stands for the average.
  return results.get("eval_ema", results["eval"])["accuracy"]


def _open_journal(run: Prepared, workdir: Path) -> Journal:
  """Opens the journal in the first process; in the others returns an object that does nothing."""
  return processes.writer(
    Journal,
    workdir,
    int(run.state.step),
    run.bookmark,
    total_steps=run.plan.total_steps,
    batch_size=run.config.batch_size,
    tensorboard=run.config.tensorboard,
  )


def _make_train_step(run: Prepared, network: Network | None) -> Callable[..., Any]:
  """Builds the training step of a config, on all devices."""
  config, plan = run.config, run.plan
  model = plan.spec.create_model(
    dtype=planning.DTYPES[config.dtype],
    axis_name=parallel.AXIS if config.sync_batch_norm else None,
  )
  step = make_train_step(
    model,
    run.optimizer,
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


def _make_evaluate(run: Prepared, network: Network | None) -> Evaluate:
  """Builds a function that evaluates the variables that learn and, if there is one, the average."""
  plan = run.plan
  preprocessing = plan.spec.preprocessing
  eval_step = parallel.data_parallel(
    make_eval_step(
      network or plan.spec.create_model().apply, preprocessing, axis_name=parallel.AXIS
    )
  )

  def evaluate(state: TrainState, interruption: Interruption) -> Mapping[str, Mapping[str, float]]:
    trees = {"eval": state.variables} | ({} if state.ema is None else {"eval_ema": state.ema})
    results = {}
    for name, variables in trees.items():
      batches = evaluation.batches(run.config, plan.eval, preprocessing)
      results[name] = evaluation.run(eval_step, variables, _until_stopped(batches, interruption))
      _check_finite("the evaluation's loss", results[name]["loss"], int(state.step))
    return results

  return evaluate


def _until_stopped(
  batches: Generator[Any, None, None], interruption: Interruption
) -> Iterator[Any]:
  """Yields the batches of an evaluation; every process has equally many of them.

  Raises:
    AbandonedError: the run has to stop; `batches` is closed.
  """
  with contextlib.closing(batches):
    for number, batch in enumerate(batches):
      if is_to_stop(interruption, ask=number % _ASK_EVERY == 0):
        raise AbandonedError
      yield batch


def _read_ahead(run: Prepared) -> ReadAhead:
  """Starts reading the batches of the steps that are left onto the devices."""
  config, plan = run.config, run.plan
  return parallel.prefetch(
    train_batches(
      plan.train.examples,
      batch_size=config.batch_size,
      image_size=config.image_size,
      augment=config.augment,
      interpolation=plan.spec.preprocessing.interpolation,
      seed=config.seed,
      start_step=int(run.state.step),
      shard=parallel.shard(),
      num_workers=config.num_workers,
    )
  )


def _fetch(pending: list[dict[str, jax.Array]], step: int) -> list[dict[str, float]]:
  """Fetches loss and accuracy of the steps up to and including `step`, one row for each.

  Raises:
    InputError: the loss or the gradient of a step is not finite.
  """
  rows = jax.device_get(pending)
  for number, row in enumerate(rows, start=step - len(rows) + 1):
    for name in ("loss", "grad_norm"):
      _check_finite(name, row[name], number)
  return [{name: float(row[name]) for name in ("loss", "accuracy")} for row in rows]


def _check_finite(name: str, value: float, step: int) -> None:
  """Raises InputError where a value of a step is not finite."""
  if not math.isfinite(value):
    raise InputError(
      f"{name} is {value} at step {step}; training stopped and saved nothing since the last "
      "checkpoint, from which the same command continues. A lower --config.learning_rate or a "
      "longer --config.warmup_epochs usually helps"
    )
