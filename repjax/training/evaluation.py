"""Evaluation: every example of the split exactly once, on any number of devices."""

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from repjax import runs
from repjax.cache import use_compilation_cache
from repjax.config import Config, check_evaluation
from repjax.data import Source, eval_batches
from repjax.spec import ModelSpec, Preprocessing, load
from repjax.training import parallel, planning, processes
from repjax.training.step import make_eval_step

_WORTH_PROCESSES = 10_000  # images


def batches(
  config: Config, source: Source, preprocessing: Preprocessing, *, ten_crop: bool = False
) -> Generator[dict[str, jax.Array]]:
  """The split as masked batches on this process's devices, with a bar on a terminal."""
  batch_size = parallel.fitting_batch_size(config.batch_size)
  whole = host_batches(
    source,
    preprocessing,
    batch_size=batch_size,
    num_workers=config.num_workers,
    ten_crop=ten_crop,
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
  """The split as masked batches in the host's memory; `eval_batches` says what they hold.

  Args:
    source: the split.
    preprocessing: of the model.
    batch_size: images in each, padding included.
    num_workers: processes that read a large split.
    **rest: as in `eval_batches`.
  """
  return eval_batches(
    source.examples,
    batch_size=batch_size,
    image_size=preprocessing.image_size,
    resize_size=preprocessing.resize_size,
    interpolation=preprocessing.interpolation,
    # Starting processes takes as long as reading some thousand images.
    num_workers=num_workers if len(source.examples) >= _WORTH_PROCESSES else 0,
    **rest,
  )


def run(
  eval_step: Callable[[Any, Any], dict[str, jax.Array]], variables: Any, split: Iterator[Any]
) -> dict[str, float]:
  """Accuracy and mean loss over a split.

  Args:
    eval_step: made data-parallel.
    variables: placed on the devices.
    split: from `batches`.

  Returns:
    `accuracy` in 0 ... 1, `loss` and `count`.
  """
  sums = {"correct": 0.0, "loss": 0.0, "count": 0.0}
  for batch in split:
    for name, value in jax.device_get(eval_step(variables, batch)).items():
      sums[name] += float(value)
  return {
    "accuracy": sums["correct"] / sums["count"],
    "loss": sums["loss"] / sums["count"],
    "count": int(sums["count"]),
  }


def evaluate(
  config: Config, workdir: str | Path, *, deploy: bool = False, ten_crop: bool = False
) -> dict[str, float]:
  """Evaluates one form of a workdir's model over the whole evaluation split.

  Args:
    config: names the data set; the model and its preprocessing are read from the workdir.
    workdir: of a run.
    deploy: the plain form, otherwise the training form of the best checkpoint: where the run
      averages its parameters and statistics, of the average.
    ten_crop: average ten crops of each image, see `repjax.data.transforms.ten_crop`.

  Returns:
    `accuracy` in 0 ... 1, mean `loss`, `count` of images, `parameters` and, where the statistics
    are re-estimated ones, `recalibrated`: over how many batches.

  Raises:
    InputError: the workdir does not hold that form, or the data set cannot be opened.
  """
  config = processes.first(lambda: config)
  check_evaluation(config)
  use_compilation_cache()
  recalibrated = None
  if deploy:
    model, variables, spec = processes.first(load, workdir)
  else:
    spec = processes.first(ModelSpec.read, Path(workdir))
    model = spec.create_model()
    _, variables, recalibrated = processes.first(
      runs.read_best, Path(workdir), spec.variable_shapes()
    )
  source = processes.together(planning.open_split, config, config.eval_split, spec)
  eval_step = parallel.data_parallel(
    make_eval_step(model.apply, spec.preprocessing, axis_name=parallel.AXIS)
  )
  split = batches(config, source, spec.preprocessing, ten_crop=ten_crop)
  result = run(eval_step, parallel.place(variables), split)
  result["parameters"] = count_parameters(variables["params"])
  return result | ({"recalibrated": recalibrated["batches"]} if recalibrated else {})


def count_parameters(params: Any) -> int:
  """How many numbers a tree holds."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
