"""Re-estimating batch-norm statistics for parameters that no longer change ("precise batch norm").

Running statistics are a moving average over steps in which the parameters changed too. Statistics
of many batches under the final parameters, each batch with the same weight, describe the network
that is shipped.

References:
  Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3. https://arxiv.org/abs/2105.07576
  Izmailov et al., Averaging Weights Leads to Wider Optima and Better Generalization, UAI 2018,
    section 3.2: re-estimation for averaged weights, to which no running statistics belong.
    https://arxiv.org/abs/1803.05407
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from flax import linen as nn

from repjax import names, runs
from repjax.cache import use_compilation_cache
from repjax.config import (
  EVALUATION_FIELDS,
  SCORES,
  Config,
  check_evaluation,
  check_fields,
  default_of,
)
from repjax.data import Source, train_batches
from repjax.errors import InputError, listed
from repjax.spec import ModelSpec, Preprocessing
from repjax.training import evaluation, parallel, planning, processes, tasks
from repjax.training.display import named, title

# The config of an import describes no training, so there these fields have their defaults.
_TRAINING = ("train_split", "augment", "seed", "sync_batch_norm")


def recalibrate(
  config: Config, workdir: str | Path, *, num_batches: int, verify: bool = True
) -> dict[str, Any]:
  """Re-estimates the running statistics of a workdir's best checkpoint from training batches.

  The first batches of the training pipeline run through the training form in training mode, with
  fixed parameters and without dropout. Let (m_i, v_i) be the mean and variance of each batch on
  each device, all of equally many activations. Then

    mean = avg m_i;  var = avg (v_i + m_i^2) - mean^2

  are mean and variance over all activations seen, for any momentum. They are written to
  `workdir/recalibrated`. The checkpoint stays as it is, and a run that continues ignores them.

  Args:
    config: config of the run or import, which names the data sets of both splits.
    workdir: folder of a run or an import.
    num_batches: number of batches of `config.batch_size` images, at least 1. A line says so if the
      split has fewer images, which are then seen once.
    verify: compare every file that is read with its checksum.

  Returns:
    The content of recalibration.json: `step`, `batches`, `batch_size`, `images`, `dataset`,
    `split`, `eval_split`, and the scores of the task and `loss` on the evaluation split, such as
    `accuracy`, each `before` and `after`.

  Raises:
    InputError: no batches, a run with `qat`, a data set of different classes, no whole checkpoint
      in training form, or statistics that are not finite; nothing is written.
  """
  workdir = names.folder(workdir)
  if num_batches < 1:
    raise InputError(f"statistics need at least 1 batch, got {num_batches}")
  use_compilation_cache()
  config, is_import, spec, step, variables = processes.first(_read, config, workdir, verify)
  train, held_out = processes.together(_open_splits, config, is_import, spec)
  model = spec.create_model(
    axis_name=parallel.AXIS if config.sync_batch_norm else None,
    running_variance="biased",  # v_i above
  )
  num_batches = _at_most_an_epoch(num_batches, config, train)
  with contextlib.closing(_training_batches(config, train, spec.preprocessing)) as batches:
    first = itertools.islice(batches, num_batches)
    hidden = None if processes.is_first() else True
    shown = tqdm.tqdm(first, "re-estimating", num_batches, leave=False, disable=hidden)
    batch_stats = pooled_statistics(model, variables, spec.preprocessing, shown)
  _check_finite(batch_stats, step)
  trees = {"before": variables, "after": {**variables, "batch_stats": batch_stats}}
  results = _evaluate(config, held_out, spec, trees)
  facts = {
    "batches": num_batches,
    "batch_size": config.batch_size,
    "images": num_batches * config.batch_size,
    "dataset": config.dataset,
    "split": config.train_split,
    "eval_split": config.eval_split,
    **{
      value: {name: result[value] for name, result in results.items()}
      for value in (*tasks.TASKS[spec.task].scores, "loss")
    },
  }
  return processes.first(
    runs.write_recalibrated, workdir, step, variables["batch_stats"], batch_stats, facts
  )


def pooled_statistics(
  model: nn.Module,
  variables: Mapping[str, Any],
  preprocessing: Preprocessing,
  batches: Iterable[dict[str, np.ndarray]],
) -> Any:
  """Returns statistics over all activations of some batches.

  Each device normalises its part of a batch with the statistics of this part, as in training.

  Args:
    model: model in training form, whose running variances are biased. Its dropout does nothing.
    variables: parameters of the model, and statistics whose values are not read.
    preprocessing: how uint8 images become inputs.
    batches: at least one {"image": uint8 (B, S, S, 3), ...}, all of one size B.

  Returns:
    A tree like `variables["batch_stats"]`, accumulated in float64.

  Raises:
    ValueError: a running variance is not biased.
  """
  step = parallel.data_parallel(_make_statistics_step(model, preprocessing))
  placed = parallel.place(dict(variables))
  shares = _shares(model, variables, preprocessing.image_size)
  totals, count = None, 0
  for batch in batches:
    rows = jax.device_get(step(placed, parallel.split({"image": batch["image"]})))
    sums = _map_norms(lambda path, norm: _sum_of_moments(norm, shares[path]), rows)
    totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    count += len(jax.tree.leaves(rows)[0])
  pooled = _map_norms(lambda _, moments: _from_moments(moments, count), totals)
  return _in_place_of(variables["batch_stats"], pooled)


def is_better(record: Mapping[str, Any]) -> bool:
  """Tells if a network is at least as good on the evaluation split with re-estimated statistics.

  The first score of the record counts, such as accuracy, and the loss where the scores are equal.
  """
  changes = {name: value for name, value in record.items() if isinstance(value, Mapping)}
  score = changes[next(name for name in changes if name != "loss")]
  before, after = ((score[when], -changes["loss"][when]) for when in ("before", "after"))
  return after >= before


def format_recalibration(record: Mapping[str, Any]) -> str:
  """Returns two lines for people: what was re-estimated, and what it changed."""
  metrics = (*(score for score in SCORES if score in record), "loss")
  changes = [
    f"{named(metric, record[metric]['before'])} -> "
    f"{named(metric, record[metric]['after']).removeprefix(f'{title(metric)} ')}"
    for metric in metrics
  ]
  return (
    f"batch norms of step {record['step']} re-estimated over {record['batches']:,} batches of "
    f"{record['batch_size']:,} images of {record['dataset']}'s {record['split']} split\n"
    f"{record['eval_split']} {', '.join(changes)}"
  )


def _read(
  config: Config, workdir: Path, verify: bool
) -> tuple[Config, bool, ModelSpec, int, dict[str, Any]]:
  """Checks a config, and reads the best checkpoint; in the first process.

  Returns:
    The config with every field, whether the workdir is that of an import, the spec, and step and
    variables of the checkpoint.
  """
  is_import = runs.import_file(workdir).exists()
  config = _with_defaults(config, workdir, is_import)
  spec = ModelSpec.read(workdir, verify=verify)
  like = {"variables": spec.variable_shapes()}
  step, items = runs.read_checkpoint(workdir, like, best=True, verify=verify)
  return config, is_import, spec, step, items["variables"]


def _with_defaults(config: Config, workdir: Path, is_import: bool) -> Config:
  """Returns the config with the fields that an import lacks; raises InputError for a bad one."""
  if config.get("qat") or runs.rounding_file(workdir).exists():
    raise InputError(
      f"{workdir} was trained in 8 bits (config.qat) with fixed statistics, to which its ranges "
      "and its int8/ belong. Recalibrate the run that config.init_from names, and train in 8 bits "
      "from there"
    )
  if is_import:
    defaults = {name: default_of(name) for name in _TRAINING}
    config = type(config)({**defaults, **config.to_dict()})
  check_fields(config, (*EVALUATION_FIELDS, *_TRAINING))
  check_evaluation(config)
  parallel.check_batch_size(config.batch_size)
  return config


def _open_splits(config: Config, is_import: bool, spec: ModelSpec) -> tuple[Source, Source]:
  """Opens the training and the evaluation split.

  Raises:
    InputError: their classes are not those of the model, or the training split is smaller than a
      batch.
  """
  train, held_out = (
    planning.open_split(config, split, spec) for split in (config.train_split, config.eval_split)
  )
  # Imports and TFDS name the same classes differently, so only names from a run are compared.
  comparable = not is_import and config.dataset != "synthetic"
  if comparable and spec.class_names and train.class_names != spec.class_names:
    raise InputError(
      f"{config.dataset} has other classes than the model: {listed(train.class_names, 3)} "
      f"instead of {listed(spec.class_names, 3)}; name the data set of its training"
    )
  planning.check_batch_fits(config, train)
  return train, held_out


def _training_batches(config: Config, source: Source, preprocessing: Preprocessing) -> Any:
  """Returns the batches of the training pipeline from step 0 on, this process's part of them."""
  return train_batches(
    source.examples,
    batch_size=config.batch_size,
    image_size=_training_size(config, preprocessing),
    augment=config.augment,
    interpolation=preprocessing.interpolation,
    mean=preprocessing.mean,
    seed=config.seed,
    shard=parallel.shard(),
    num_workers=config.num_workers,
  )


def _at_most_an_epoch(num_batches: int, config: Config, source: Source) -> int:
  """Returns a number of batches, reduced so far that no image is taken twice."""
  # The pipeline refuses a batch of more images than there are, and says so.
  most = max(len(source.examples) // config.batch_size, 1)
  if num_batches > most and processes.is_first():
    print(
      f"the {config.train_split} split has {len(source.examples):,} images: {most:,} batches of "
      f"{config.batch_size:,} instead of {num_batches:,}",
      flush=True,
    )
  return min(num_batches, most)


def _training_size(config: Config, preprocessing: Preprocessing) -> int:
  """Returns the image size of training; for an import, whose config lacks it, of evaluation."""
  return config.get("image_size") or preprocessing.image_size


def _evaluate(
  config: Config, source: Source, spec: ModelSpec, trees: Mapping[str, Any]
) -> dict[str, dict[str, Any]]:
  """Returns the results of a model for each of several trees of variables."""
  task = tasks.create(spec.task, config)
  eval_step = evaluation.make_step(task, spec.create_model().apply, spec.preprocessing)
  return {
    name: evaluation.run(
      task,
      eval_step,
      parallel.place(variables),
      evaluation.batches(config, source, spec),
    )
    for name, variables in trees.items()
  }


def _make_statistics_step(
  model: nn.Module, preprocessing: Preprocessing
) -> Callable[[Any, Any], Any]:
  """Builds a step that returns what a batch adds to running statistics of zero.

  A batch norm updates a running statistic r to (1 - share) r + share s, with s the statistic of the
  batch. From r = 0, the update is share s.

  Returns:
    A function for `parallel.data_parallel`, whose statistics have one row for each device.
  """

  def statistics_step(variables: Any, batch: Any) -> Any:
    held = variables["batch_stats"]
    zeros = _in_place_of(held, _map_norms(lambda _, norm: jax.tree.map(jnp.zeros_like, norm), held))
    # A network may drop in several places: before the classifier, in its blocks, in its backbone.
    with nn.intercept_methods(_without_dropout):
      _, updates = model.apply(
        {"params": variables["params"], "batch_stats": zeros},
        preprocessing.normalize(batch["image"]),
        train=True,
        mutable=["batch_stats"],
      )
    return jax.lax.all_gather(updates["batch_stats"], parallel.AXIS)

  return statistics_step


def _without_dropout(method: Any, arguments: Any, keywords: Any, context: Any) -> Any:
  """Runs a method of a module; a dropout returns its input."""
  is_dropout = isinstance(context.module, nn.Dropout) and context.method_name == "__call__"
  return arguments[0] if is_dropout else method(*arguments, **keywords)


def _shares(
  model: nn.Module, variables: Mapping[str, Any], image_size: int
) -> dict[tuple[str, ...], float]:
  """Returns the share that a batch has in the new statistics of each norm, by the norm's path.

  The share is 1 - momentum, rounded to float32, because the step multiplies in float32.
  """
  shares = {}

  def note(method: Any, arguments: Any, keywords: Any, context: Any) -> Any:
    if isinstance(context.module, nn.BatchNorm):
      if getattr(context.module, "running_variance", "biased") != "biased":
        raise ValueError('pooled statistics need a model with running_variance="biased"')
      shares[context.module.path] = float(np.float32(1 - context.module.momentum))
    return method(*arguments, **keywords)

  # Momentum is an attribute of a module, and not in the tree. A trace calls every module.
  with nn.intercept_methods(note):
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    jax.eval_shape(model.apply, dict(variables), images)
  return shares


def _map_norms(function: Callable[..., Any], tree: Any, path: tuple[str, ...] = ()) -> Any:
  """Calls `function(path, statistics)` for each norm of a tree, and returns the tree of results.

  A norm is a dictionary with a mean. Notes of layers, which lie beside norms, are left out.
  """
  if "mean" in tree and not isinstance(tree["mean"], Mapping):
    return function(path, tree)
  return {
    name: _map_norms(function, value, (*path, name))
    for name, value in tree.items()
    if isinstance(value, Mapping)
  }


def _in_place_of(held: Any, statistics: Any) -> Any:
  """Returns a tree of statistics with other values in the same dtypes, and with the same notes."""
  if not isinstance(held, Mapping):
    return held if statistics is None else statistics.astype(held.dtype)
  others = {} if statistics is None else statistics
  return {name: _in_place_of(value, others.get(name)) for name, value in held.items()}


def _sum_of_moments(rows: dict[str, np.ndarray], share: float) -> dict[str, np.ndarray]:
  """Returns sums over devices, in float64, of the means and second moments of a batch."""
  mean, var = (np.asarray(rows[name], np.float64) / share for name in ("mean", "var"))  # (D, C)
  return {"mean": mean.sum(0), "second": (var + mean**2).sum(0)}


def _from_moments(sums: dict[str, np.ndarray], count: int) -> dict[str, np.ndarray]:
  """Returns mean and variance from sums over `count` parts."""
  mean = sums["mean"] / count
  # Rounding can make the variance of a constant channel slightly negative.
  return {"mean": mean, "var": np.maximum(sums["second"] / count - mean**2, 0.0)}


def _check_finite(batch_stats: Any, step: int) -> None:
  """Raises InputError where a statistic is not finite."""
  if not runs.all_finite(batch_stats):
    raise InputError(
      f"the re-estimated statistics of step {step} are not finite, so nothing was written; has "
      "this run diverged?"
    )
