"""Evaluation, which sees every example of a split exactly once on any number of devices.

The last batch is filled up with copies, and a mask says which examples count.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from repjax import names, runs
from repjax.cache import use_compilation_cache
from repjax.config import EVALUATION_FIELDS, Config, check_evaluation, check_task
from repjax.data import Source, eval_batches
from repjax.errors import InputError
from repjax.spec import ModelSpec, Preprocessing, load
from repjax.training import parallel, planning, processes, tasks
from repjax.training.step import Network, make_eval_step
from repjax.training.tasks import Task

# Starting processes takes as long as reading some thousand images.
_WORTH_PROCESSES = 10_000  # images


def batches(
  config: Config, source: Source, spec: ModelSpec, *, ten_crop: bool = False
) -> Generator[dict[str, jax.Array]]:
  """Yields a split as masked batches on this process's devices, with a bar on a terminal.

  Args:
    config: config with `batch_size`, over all devices and processes, `num_workers`, and the canvas
      of a segmentation.
    source: the split.
    spec: describes the model.
    ten_crop: yield ten crops of each image, see `repjax.data.transforms.ten_crop`.
  """
  batch_size = parallel.fitting_batch_size(config.batch_size)
  whole = host_batches(
    source,
    spec.preprocessing,
    batch_size=batch_size,
    num_workers=config.num_workers,
    ten_crop=ten_crop,
    canvas=planning.canvas(config, source, spec),
    shard=parallel.shard(),
  )
  count = -(-len(source.examples) // batch_size)
  with contextlib.closing(parallel.prefetch(whole)) as ready:
    hidden = None if processes.is_first() else True
    yield from tqdm.tqdm(ready, "evaluating", count, leave=False, disable=hidden)


def host_batches(
  source: Source,
  preprocessing: Preprocessing,
  *,
  batch_size: int,
  num_workers: int = 0,
  **rest: Any,
) -> Iterator[dict[str, np.ndarray]]:
  """Returns a split as masked batches in host memory, as `eval_batches` describes them.

  Args:
    source: the split.
    preprocessing: preprocessing of the model.
    batch_size: images in a batch, padding included.
    num_workers: processes that read a large split; a small one is read in this process.
    **rest: further arguments of `eval_batches`, such as the canvas of images with masks.
  """
  return eval_batches(
    source.examples,
    batch_size=batch_size,
    image_size=preprocessing.image_size,
    resize_size=preprocessing.resize_size,
    interpolation=preprocessing.interpolation,
    mean=preprocessing.mean,
    num_workers=num_workers if len(source.examples) >= _WORTH_PROCESSES else 0,
    **rest,
  )


def run(
  task: Task,
  eval_step: Callable[[Any, Any], dict[str, jax.Array]],
  variables: Any,
  split: Iterator[Any],
) -> dict[str, Any]:
  """Returns the results of a task over a split, see `Task.summary`.

  Args:
    task: the task.
    eval_step: data-parallel step from `make_eval_step`.
    variables: variables on the devices, from `parallel.place`.
    split: batches from `batches`.
  """
  sums = {}
  for batch in split:
    sums = add(sums, jax.device_get(eval_step(variables, batch)))
  return task.summary(sums)


def add(sums: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
  """Returns sums to which those of one more batch were added, in 64 bits.

  Args:
    sums: sums of the batches before; empty before the first batch.
    more: sums of a batch in host memory, by the same names.
  """
  wide = {name: _wide(value) for name, value in more.items()}
  return {name: sums[name] + value for name, value in wide.items()} if sums else wide


def _wide(value: np.ndarray) -> np.ndarray:
  """Returns an array with integers of 64 bits, or floats of 64 bits."""
  kind = np.float64 if np.issubdtype(np.asarray(value).dtype, np.floating) else np.int64
  return np.asarray(value).astype(kind)


def evaluate(
  config: Config,
  workdir: str | Path,
  *,
  deploy: bool = False,
  ten_crop: bool = False,
  verify: bool = True,
) -> dict[str, Any]:
  """Evaluates one form of a workdir's model over the whole evaluation split.

  Args:
    config: config that names the data set; the model and its preprocessing are read from the
      workdir.
    workdir: folder of a run or an import.
    deploy: evaluate the deploy form instead of the training form. The training form is that of the
      best checkpoint, and there the average, if the run averages parameters and statistics.
    ten_crop: average ten crops of each image, see `repjax.data.transforms.ten_crop`.
    verify: compare every file that is read with its checksum.

  Returns:
    `accuracy` in 0 ... 1, mean `loss`, `count` of images, and `parameters`. A segmentation also has
    `miou` and the list `iou`, see `Segmentation.summary`. If the training form has re-estimated
    statistics, also `recalibrated`, the number of batches that they come from.

  Raises:
    InputError: the workdir does not hold that form, the data set cannot be opened, or a field or
      `ten_crop` is for a different task.
  """
  use_compilation_cache()
  config, spec, variables, recalibrated = processes.first(
    _read, config, names.folder(workdir), deploy, verify
  )
  task = tasks.create(spec.task, config)
  if ten_crop and not task.ten_crop:
    raise InputError(
      f"ten crops are for classification, and the model in {workdir} is for {spec.task}. Leave "
      "--ten-crop out; --window and --flip average predictions for pixels"
    )
  source = processes.together(planning.open_split, config, config.eval_split, spec)
  model = spec.create_model(deploy=deploy)
  eval_step = make_step(task, model.apply, spec.preprocessing)
  split = batches(config, source, spec, ten_crop=ten_crop)
  result = run(task, eval_step, parallel.place(variables), split)
  result["parameters"] = count_parameters(variables["params"])
  return result | ({"recalibrated": recalibrated["batches"]} if recalibrated else {})


def make_step(task: Task, network: Network, preprocessing: Preprocessing) -> parallel.DataParallel:
  """Returns the data-parallel step that judges a network, for `run`."""
  return parallel.data_parallel(
    make_eval_step(network, preprocessing, task=task, axis_name=parallel.AXIS)
  )


def _read(
  config: Config, workdir: Path, deploy: bool, verify: bool
) -> tuple[Config, ModelSpec, Any, dict[str, Any] | None]:
  """Checks a config, and reads what is evaluated; in the first process.

  Returns:
    The config, the model's spec and variables, and how the statistics were re-estimated, or None.
  """
  check_evaluation(config)
  recalibrated = None
  if deploy:
    _, variables, spec = load(workdir, verify=verify)
  else:
    spec = ModelSpec.read(workdir, verify=verify)
    _, variables, recalibrated = runs.read_best(workdir, spec.variable_shapes(), verify=verify)
  check_task(config, spec.task, EVALUATION_FIELDS)
  return config, spec, variables, recalibrated


def count_parameters(params: Any) -> int:
  """Returns the number of numbers in a tree of arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
