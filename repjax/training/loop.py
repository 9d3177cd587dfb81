"""The training loop: steps, records, evaluations and checkpoints.

`fit` takes a run that is ready (`Prepared`) and trains to the last step.

Terms.
- A step is one update of the parameters. Steps are counted from 1, and the state holds the number
  of steps that are done.
- The journal writes the records of the run and the checkpoints, and shows the progress. A record is
  a line of metrics. Logging means to write the record of a step.
- The bookmark is the position of the loop at a checkpoint: what was recorded, and whether the step
  was evaluated.
- An interruption is a signal, SIGTERM or Ctrl-C, that stops the run. While the loop runs, the first
  signal is only noted. The loop looks at the note after each step, saves, and ends. Several
  processes look only at logged steps and in evaluations. A Ctrl-C after the first signal raises at
  once.

Several processes may train one run. Each runs this loop on its share of every batch. Only the first
process has a real journal; in the others, its methods do nothing.
"""

import contextlib
import math
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from repjax.config import Config
from repjax.data import train_batches
from repjax.errors import InputError
from repjax.quantization.roundings import Roundings
from repjax.reparam import reparameterize
from repjax.runs import Bookmark
from repjax.training import evaluation, parallel, planning, processes, tasks
from repjax.training.interruption import Interruption
from repjax.training.journal import Journal
from repjax.training.planning import Plan
from repjax.training.prefetch import ReadAhead
from repjax.training.state import TrainState
from repjax.training.step import Network, make_train_step
from repjax.training.tasks import Task

# Asking all processes whether to stop takes time. An evaluation asks once in this many batches.
_ASK_EVERY = 8


class Prepared(NamedTuple):
  """A run that is ready for its first step, the same in every process.

  Attributes:
    config: complete config.
    plan: facts that follow from the config and the data.
    schedule: function of a step, counted from 0, that returns the learning rate.
    optimizer: optimizer of the config.
    state: state to start from.
    bookmark: position of the loop at this state.
    roundings: how the network in 8 bits rounds; None: the run is not quantization-aware.
  """

  config: Config
  plan: Plan
  schedule: Callable[[int], Any]
  optimizer: optax.GradientTransformation
  state: TrainState
  bookmark: Bookmark
  roundings: Roundings | None

  @property
  def task(self) -> Task:
    """The task, with the values of the config."""
    return tasks.create(self.plan.spec.task, self.config)

  @property
  def score(self) -> str:
    """The name of the score by which checkpoints are compared."""
    return self.task.scores[0]


class AbandonedError(Exception):
  """An error that ends an evaluation early, because the run has to stop."""


Evaluate = Callable[[TrainState, Interruption], Mapping[str, Mapping[str, Any]]]
"""A function that evaluates a state.

It returns the results of the variables as "eval", and of their average, if the run averages, as
"eval_ema". It raises AbandonedError if the run has to stop.
"""


def fit(
  run: Prepared, workdir: Path, interruption: Interruption, network: Network | None = None
) -> None:
  """Trains until the last step, or until a signal stops the run. The last step done is saved.

  Args:
    run: the prepared run.
    workdir: folder of the run.
    interruption: listens to signals; already entered by the caller.
    network: function that learns in place of the model, see `make_train_step`.

  Raises:
    InputError: a loss, gradient, parameter or statistic is not finite, or a file cannot be read or
      written.
    KeyboardInterrupt: a signal stopped the run.
  """
  train_step, evaluate = _make_train_step(run, network), _make_evaluate(run, network)
  state, done = parallel.place(run.state), int(run.state.step)
  # Inside `deferred` the first signal is only noted, and a Ctrl-C after it raises at once. The
  # blocks close in reverse order: the thread that reads data stops first, then the journal waits
  # for its last save, then a noted signal is raised.
  with interruption.deferred():
    with (
      contextlib.closing(_open_journal(run, workdir)) as journal,
      contextlib.closing(_read_ahead(run)) as batches,
    ):
      if run.plan.evaluates(done) and not run.bookmark.evaluated:
        # The run was stopped after this step was saved and before the step was evaluated.
        score = _evaluate_and_record(run.score, evaluate, state, interruption, journal)
        if score is not None:
          journal.set_score(done, score)
      if not is_to_stop(interruption) and done < run.plan.total_steps:
        print("compiling the first step", flush=True)
        done = _take_steps(run, state, train_step, evaluate, batches, journal, interruption)
      journal.show_data_waiting()
    if interruption.noted is not None and done:
      interruption.saved = f"step {done}/{run.plan.total_steps}"
      print(f"{interruption.saved} is saved", flush=True)


def _take_steps(
  run: Prepared,
  state: TrainState,
  train_step: Callable[..., Any],
  evaluate: Evaluate,
  batches: ReadAhead,
  journal: Journal,
  interruption: Interruption,
) -> int:
  """Takes every step that is left, and logs, evaluates and saves when the config asks for it.

  JAX returns from `train_step` before the devices are done. To fetch metrics is to wait for the
  devices. The loop therefore leaves the metrics on the devices, in `pending`, and fetches them only
  when metrics are to be written or shown.

  Args:
    run: the prepared run.
    state: state to start from, on the devices. Its memory is reused, so the caller must not read
      the state again.
    train_step: function of a state and a batch that returns the next state and metrics.
    evaluate: function that evaluates a state.
    batches: batches on the devices, beginning with the batch of the first step to take.
    journal: takes records and checkpoints.
    interruption: listens to signals.

  Returns:
    The last step that was done.
  """
  config, plan = run.config, run.plan
  learning_rate = jax.jit(run.schedule)
  first_step = int(run.state.step) + 1
  pending = []  # metrics of the steps since the last fetch
  train_step = _announced(train_step, journal)
  for step in range(first_step, plan.total_steps + 1):
    # Waits for the second newest step, so at most two steps are under way. Without the wait,
    # batches would pile up on the devices. Steps before the last fetch are done.
    jax.block_until_ready(pending[-2:-1])
    # `running`: time counts as waiting only once the previous step is done.
    state, metrics = train_step(state, batches.take(running=pending[-1:]))
    pending.append(metrics)
    evaluates = plan.evaluates(step)
    logs = evaluates or step % config.log_every_steps == 0
    # Processes ask each other at steps that are logged. These are the same steps in every process.
    stops = is_to_stop(interruption, ask=logs)
    saves = evaluates or stops or journal.is_overdue(config.save_every_minutes)
    if saves or logs or step == first_step:
      rows, pending = _fetch(pending, step), []  # metrics of each step since the last fetch
      journal.add(rows)
      if step == first_step and not logs:
        # Shown and not recorded: records must not depend on where a run was interrupted.
        journal.show(step, rows[0], batches.waited)
    if logs:
      # The schedule counts steps from 0.
      journal.log(step, float(learning_rate(step - 1)), batches.waited)
    if saves:
      score = None
      if evaluates and not stops:
        score = _evaluate_and_record(run.score, evaluate, state, interruption, journal)
        stops = is_to_stop(interruption)  # a signal may have come meanwhile
      # If an evaluation that is due was left out or abandoned, `fit` evaluates this step first when
      # the run continues.
      journal.save(state, score)
    if stops:
      return step
  return plan.total_steps


def _announced(train_step: Callable[..., Any], journal: Journal) -> Callable[..., Any]:
  """Returns a step that says when it is compiled again, for images of a new size.

  The time of the compilation does not count as training. The first compilation is announced by
  `fit`, before there is a batch.
  """
  compiled = set()

  def step(state: TrainState, batch: Mapping[str, jax.Array]) -> Any:
    size = batch["image"].shape[-2]
    is_first, is_new = not compiled, size not in compiled
    compiled.add(size)
    if is_first or not is_new:
      return train_step(state, batch)
    jax.block_until_ready(state)  # The steps before this one do count as training.
    start = time.perf_counter()
    journal.note(f"compiling the step for images of {size} px")
    results = train_step(state, batch)
    journal.pause(time.perf_counter() - start)
    return results

  return step


def is_to_stop(interruption: Interruption, *, ask: bool = True) -> bool:
  """Returns True if a signal came here. With several processes, True once they agreed to stop.

  Processes agree only with `ask`. If a process stopped alone, the other processes would wait for
  this process in the middle of a step.

  Args:
    interruption: listens to the signals of this process.
    ask: ask all processes whether a signal came, which takes time. All processes must ask at the
      same step. No effect in a single process.
  """
  if jax.process_count() == 1:
    return interruption.noted is not None
  if ask and processes.anywhere(interruption.noted is not None):
    interruption.agree()
  return interruption.agreed


def _evaluate_and_record(
  score: str, evaluate: Evaluate, state: TrainState, interruption: Interruption, journal: Journal
) -> float | None:
  """Evaluates a state, and records the results.

  Args:
    score: name of the score by which checkpoints are compared.
    evaluate: function that evaluates a state.
    state: state on the devices.
    interruption: listens to signals.
    journal: takes the record.

  Returns:
    The score by which checkpoints are compared; None if the evaluation was abandoned because the
    run has to stop.
  """
  start, step = time.perf_counter(), int(state.step)
  try:
    results = evaluate(state, interruption)
  except AbandonedError:
    return None
  journal.evaluated(step, results, time.perf_counter() - start)
  # With an average, the checkpoint is judged by the average's score.
  return results.get("eval_ema", results["eval"])[score]


def _open_journal(run: Prepared, workdir: Path) -> Journal:
  """Opens the journal in the first process; in the others returns an object that does nothing."""
  return processes.writer(
    Journal,
    workdir,
    int(run.state.step),
    run.bookmark,
    total_steps=run.plan.total_steps,
    batch_size=run.config.batch_size,
    score=run.score,
    tensorboard=run.config.tensorboard,
  )


def _make_train_step(run: Prepared, network: Network | None) -> Callable[..., Any]:
  """Builds the training step of a config.

  Returns:
    A function of a state and a batch on all devices, which returns the next state and metrics. It
    reuses the memory of the state.
  """
  config, plan = run.config, run.plan
  model = plan.spec.create_model(
    dtype=planning.DTYPES[config.dtype],
    axis_name=parallel.AXIS if config.sync_batch_norm else None,
    running_variance=config.running_variance,
  )
  step = make_train_step(
    model,
    run.optimizer,
    plan.spec.preprocessing,
    task=run.task,
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
  return parallel.data_parallel(step, donate=True, dtype=config.dtype)


def _make_evaluate(run: Prepared, network: Network | None) -> Evaluate:
  """Builds a function that evaluates the variables and, if the run averages them, the average."""
  plan = run.plan
  preprocessing = plan.spec.preprocessing
  fold, network = (_as_they_are, network) if network else _form(run)
  task = run.task
  eval_step = evaluation.make_step(task, network, preprocessing)

  def evaluate(state: TrainState, interruption: Interruption) -> Mapping[str, Mapping[str, Any]]:
    # `ema` holds the moving average of the variables over the steps.
    trees = {"eval": state.variables} | ({} if state.ema is None else {"eval_ema": state.ema})
    results = {}
    for name, variables in trees.items():
      batches = evaluation.batches(run.config, plan.eval, plan.spec)
      split = _until_stopped(batches, interruption)
      results[name] = evaluation.run(task, eval_step, fold(variables), split)
      _check_finite("the evaluation's loss", results[name]["loss"], int(state.step))
    return results

  return evaluate


def _form(run: Prepared) -> tuple[Callable[[Any], Any], Network]:
  """Returns a fold of variables on the devices, and the network that takes the result.

  An evaluation folds once and then computes a plain network for every batch. In inference both
  forms compute the same, up to rounding. The fold is float32 like the variables. A network with
  activations inside its branches has no deploy form, and is evaluated as it is.
  """

  # The name is that of the compiled program.
  @jax.jit
  def fold(variables: Any) -> Any:
    return {"params": reparameterize(variables["params"], variables["batch_stats"])}

  try:
    jax.eval_shape(fold, run.state.variables)
  except InputError:
    return _as_they_are, run.plan.spec.create_model().apply
  return fold, run.plan.spec.create_model(deploy=True).apply


def _as_they_are(variables: Any) -> Any:
  return variables


def _until_stopped(
  batches: Generator[Any, None, None], interruption: Interruption
) -> Iterator[Any]:
  """Yields the batches of an evaluation until the run has to stop.

  Raises:
    AbandonedError: the run has to stop; `batches` is closed.
  """
  # Every process has the same number of batches, so all ask at the same batch.
  with contextlib.closing(batches):
    for number, batch in enumerate(batches):
      if is_to_stop(interruption, ask=number % _ASK_EVERY == 0):
        raise AbandonedError
      yield batch


def training_batches(
  config: Config,
  plan: Plan,
  *,
  start_step: int = 0,
  shard: tuple[int, int] = (0, 1),
  num_workers: int = 0,
) -> Generator[dict[str, np.ndarray]]:
  """Yields the batches that a run trains on; arguments as in `repjax.data.train_batches`.

  Each part of the training has a pipeline of its own. All of them count steps from the first step
  of the run, so that a step has the same examples whatever the parts before it.
  """
  ends = [*(part.first_step for part in plan.parts[1:]), None]
  for part, end in zip(plan.parts, ends):
    if end is not None and end <= start_step:
      continue
    batches = train_batches(
      plan.train.examples,
      batch_size=config.batch_size,
      image_size=part.image_size,
      augment=part.augment,
      interpolation=plan.spec.preprocessing.interpolation,
      mean=plan.spec.preprocessing.mean,
      seed=config.seed,
      repeats=config.augment_repeats,
      start_step=max(start_step, part.first_step),
      stop_step=end,
      shard=shard,
      num_workers=num_workers,
    )
    with contextlib.closing(batches):
      yield from batches


def _read_ahead(run: Prepared) -> ReadAhead:
  """Starts a thread that reads the batches of the steps that are left onto the devices."""
  return parallel.prefetch(
    training_batches(
      run.config,
      run.plan,
      start_step=int(run.state.step),
      shard=parallel.shard(),
      num_workers=run.config.num_workers,
    )
  )


def _fetch(pending: list[dict[str, jax.Array]], step: int) -> list[dict[str, float]]:
  """Fetches metrics from the devices, and waits until they are computed.

  Args:
    pending: metrics of consecutive steps, as the training step returns them.
    step: number of the last of these steps.

  Returns:
    Loss and accuracy of each step.

  Raises:
    InputError: the loss or the gradient of a step is not finite.
  """
  rows = jax.device_get(pending)
  for number, row in enumerate(rows, start=step - len(rows) + 1):
    for name in ("loss", "grad_norm"):
      _check_finite(name, row[name], number)
  return [{name: float(row[name]) for name in ("loss", "accuracy")} for row in rows]


def _check_finite(name: str, value: float, step: int) -> None:
  """Raises InputError if a value is not finite.

  Args:
    name: name of the value in the message.
    value: the value.
    step: step at which the value was computed.
  """
  if not math.isfinite(value):
    raise InputError(
      f"{name} is {value} at step {step}; training stopped and saved nothing since the last "
      "checkpoint, from which the same command continues. A lower --config.learning_rate or a "
      "longer --config.warmup_epochs usually helps"
    )
