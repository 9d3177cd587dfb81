"""Batches, made by Grain. The step number is the whole state of the training pipeline.

Grain's operations are pure functions of an index: batch n of a pipeline is computed, not reached by
reading the batches before it. Therefore a run continues at any step, on any number of workers.
"""

import contextlib
import functools
import math
import os
from collections.abc import Generator, Iterator
from typing import Any

import grain
import numpy as np
from absl import flags

from repjax import signals
from repjax.data import augmentation, processes, transforms
from repjax.data.decode import Picture, image_errors
from repjax.data.sources import Examples
from repjax.devices import refuse_iterator_of_parent
from repjax.timing import cpus

Batch = dict[str, np.ndarray]

_WAY_OUT = "Repair or remove the file, and prepare the data set again"


def train_batches(
  examples: Examples,
  *,
  batch_size: int,
  image_size: int,
  augment: str,
  interpolation: str,
  seed: int,
  start_step: int = 0,
  shard: tuple[int, int] = (0, 1),
  num_workers: int = 0,
) -> Generator[Batch]:
  """Yields shuffled, augmented batches without end, from step `start_step` on.

  Each epoch shows every example once, in an order of its own. Epochs follow each other without a
  gap. Where the batch size does not divide the number of examples, a batch holds the last examples
  of an epoch and the first of the next. It may then hold an image twice, augmented differently.

  Seed and step alone fix the examples of a batch and how they are augmented. Neither the number of
  workers nor an interruption of the run changes them.

  Args:
    examples: the examples of the split.
    batch_size: images per step, over all shards.
    image_size: side of the images in pixels.
    augment: a line that `augmentation.parse` reads.
    interpolation: a key of INTERPOLATIONS.
    seed: fixes the order and the augmentations.
    start_step: the step that the first batch is for.
    shard: (index, count): the share of each batch that this process reads. Shards are contiguous.
    num_workers: worker processes; 0 reads in threads of this process.

  Yields:
    {"image": uint8 (B, S, S, 3), "label": int32 (B,)}, B = batch_size / count.

  Raises:
    InputError: an image cannot be decoded; the text names the image. Or there is too little shared
      memory for the workers, or a worker has died.
  """
  index, count = shard
  transform = functools.partial(_augmented, augment, image_size, interpolation)
  batches = (
    grain.MapDataset.source(examples)
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(transform)
    # Small batches in a row make up a batch over all shards: shard i takes every count-th from i.
    .batch(batch_size // count)[index::count][start_step:]
  )
  return _iterate(batches, num_workers, batch_size // count * 3 * image_size**2)


def eval_batches(
  examples: Examples,
  *,
  batch_size: int,
  image_size: int,
  resize_size: int,
  interpolation: str,
  ten_crop: bool = False,
  shard: tuple[int, int] = (0, 1),
  num_workers: int = 0,
) -> Iterator[Batch]:
  """Yields every example exactly once, in order, in batches of one size with a mask.

  All shards yield the same number of batches. Where the examples do not divide, the last batches
  are padded with black images, which the mask marks as False.

  Args: as in `train_batches`, and
    resize_size: length of the shorter side before the central crop, in pixels.
    ten_crop: yields ten crops of each image in place of the central crop.

  Yields:
    {"image": uint8 (B, S, S, 3), "label": int32 (B,), "mask": bool (B,)}, B = batch_size / count.
    With `ten_crop`, images are (B, 10, S, S, 3).

  Raises:
    InputError: an image cannot be decoded; the text names the image. Or there is too little shared
      memory for the workers, or a worker has died.
  """
  index, count = shard
  size = batch_size // count
  crop = transforms.ten_crop if ten_crop else transforms.resize_and_crop
  transform = functools.partial(_resized, crop, image_size, resize_size, interpolation)
  batches = _iterate(
    grain.MapDataset.source(examples).map(transform).batch(size)[index::count],
    num_workers,
    size * (10 if ten_crop else 1) * 3 * image_size**2,
  )
  empty = {
    "image": np.zeros((0, *[10] * ten_crop, image_size, image_size, 3), np.uint8),
    "label": np.zeros((0,), np.int32),
  }
  for _ in range(math.ceil(len(examples) / (size * count))):
    batch = next(batches, empty)  # a shard may run out a batch before the other shards do
    missing = size - len(batch["label"])
    padded = {
      name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))
      for name, values in batch.items()
    }
    yield {**padded, "mask": np.arange(size) < size - missing}


def _augmented(
  augment: str, size: int, interpolation: str, example: dict[str, Any], rng: np.random.Generator
) -> Batch:
  """Makes a training example.

  `augment` is the line, not what `parse` returns: crops are closures, which cannot be pickled for
  worker processes.
  """
  augmented = augmentation.parse(augment)  # reads a line once per process; the rest is cached
  return _example(augmented(_picture(example), size, interpolation, rng), example)


def _resized(
  crop: Any, size: int, resize_size: int, interpolation: str, example: dict[str, Any]
) -> Batch:
  """Makes an evaluation example."""
  with image_errors(_name(example), _WAY_OUT):
    return _example(crop(_picture(example), size, resize_size, interpolation), example)


def _picture(example: dict[str, Any]) -> Picture:
  return Picture(example["image"], _name(example), _WAY_OUT)


def _name(example: dict[str, Any]) -> str:
  return example.get("name", "the image")


def _example(pixels: np.ndarray, example: dict[str, Any]) -> Batch:
  return {"image": np.ascontiguousarray(pixels), "label": np.asarray(example["label"], np.int32)}


def _iterate(batches: grain.MapDataset, num_workers: int, batch_bytes: int) -> Generator[Batch]:
  """Yields batches that threads or worker processes make ahead of time.

  Args:
    batches: the batches.
    num_workers: worker processes; 0 reads in threads of this process.
    batch_bytes: bytes of the images in a batch.
  """
  process = os.getpid()
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags, which only an absl program has parsed
  # More threads than cores would only wait. The buffer counts whole batches, and every worker
  # process has a buffer of its own.
  threads = min(16, math.ceil(cpus() / max(1, num_workers)))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  iterable = batches.to_iter_dataset(options)
  processes.one_thread_each()
  if num_workers:
    processes.check_shared_memory(num_workers, batch_bytes)
    workers = grain.MultiprocessingOptions(num_workers=num_workers)
    iterable = iterable.mp_prefetch(workers, processes.prepare)
  iterator = iter(iterable)
  try:
    with processes.explained_death():
      # The first item starts the processes.
      with signals.kept_from_children() if num_workers else contextlib.nullcontext():
        batch = next(iterator, None)
      while batch is not None:
        yield batch
        refuse_iterator_of_parent(process)
        batch = next(iterator, None)
  finally:
    if process == os.getpid():
      iterator.close()  # stops the threads and the worker processes
    else:  # closing would wait for threads that only the parent has, also when it is collected
      _ABANDONED.append(iterator)


_ABANDONED: list[Any] = []
