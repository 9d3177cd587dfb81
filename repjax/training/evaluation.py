"""Evaluation, which sees every example of a split exactly once on any number of devices.

The last batch is filled up with copies, and a mask says which examples count.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

from repjax import names, runs
from repjax.cache import use_compilation_cache
from repjax.config import Config, check_evaluation
from repjax.data import Source, eval_batches
from repjax.spec import ModelSpec, Preprocessing, load
from repjax.training import parallel, planning, processes
from repjax.training.step import make_eval_step

# Starting processes takes as long as reading some thousand images.
_WORTH_PROCESSES = 10_000  # images


def batches(
  config: Config, source: Source, preprocessing: Preprocessing, *, ten_crop: bool = False
) -> Generator[dict[str, jax.Array]]:
  """Yields a split as masked batches on this process's devices, with a bar on a terminal.

  Args:
    config: config with `batch_size`, over all devices and processes, and `num_workers`.
    source: the split.
    preprocessing: preprocessing of the model.
    ten_crop: yield ten crops of each image, see `repjax.data.transforms.ten_crop`.
  """
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
  """Returns a split as masked batches in host memory, as `eval_batches` describes them.

  Args:
    source: the split.
    preprocessing: preprocessing of the model.
    batch_size: images in a batch, padding included.
    num_workers: processes that read a large split; a small one is read in this process.
    **rest: further arguments of `eval_batches`.
  """
  return eval_batches(
    source.examples,
    batch_size=batch_size,
    image_size=preprocessing.image_size,
    resize_size=preprocessing.resize_size,
    interpolation=preprocessing.interpolation,
    num_workers=num_workers if len(source.examples) >= _WORTH_PROCESSES else 0,
    **rest,
  )


def run(
  eval_step: Callable[[Any, Any], dict[str, jax.Array]], variables: Any, split: Iterator[Any]
) -> dict[str, float]:
  """Returns accuracy and mean loss over a split.

  Args:
    eval_step: data-parallel step from `make_eval_step`.
    variables: variables on the devices, from `parallel.place`.
    split: batches from `batches`.

  Returns:
    `accuracy` in 0 ... 1, `loss`, and `count`, the number of examples.
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
  config: Config,
  workdir: str | Path,
  *,
  deploy: bool = False,
  ten_crop: bool = False,
  verify: bool = True,
) -> dict[str, float]:
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
    `accuracy` in 0 ... 1, mean `loss`, `count` of images, and `parameters`. If the training form
    has re-estimated statistics, also `recalibrated`, the number of batches that they come from.

  Raises:
    InputError: the workdir does not hold that form, or the data set cannot be opened.
  """
  use_compilation_cache()
  config, spec, variables, recalibrated = processes.first(
    _read, config, names.folder(workdir), deploy, verify
  )
  source = processes.together(planning.open_split, config, config.eval_split, spec)
  model = spec.create_model(deploy=deploy)
  eval_step = parallel.data_parallel(
    make_eval_step(model.apply, spec.preprocessing, axis_name=parallel.AXIS)
  )
  split = batches(config, source, spec.preprocessing, ten_crop=ten_crop)
  result = run(eval_step, parallel.place(variables), split)
  result["parameters"] = count_parameters(variables["params"])
  return result | ({"recalibrated": recalibrated["batches"]} if recalibrated else {})


def _read(
  config: Config, workdir: Path, deploy: bool, verify: bool
) -> tuple[Config, ModelSpec, Any, dict[str, Any] | None]:
  """Checks a config, and reads what is evaluated; in the first process.

  Returns:
    The config, the model's spec and variables, and how the statistics were re-estimated, or None.
  """
  check_evaluation(config)
  if deploy:
    _, variables, spec = load(workdir, verify=verify)
    return config, spec, variables, None
  spec = ModelSpec.read(workdir, verify=verify)
  _, variables, recalibrated = runs.read_best(workdir, spec.variable_shapes(), verify=verify)
  return config, spec, variables, recalibrated


def count_parameters(params: Any) -> int:
  """Returns the number of numbers in a tree of arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
