"""Batches, by Grain. The step number is the whole state of the training pipeline."""

import functools
import math
import multiprocessing
import os
import threading
from collections.abc import Generator, Iterator
from typing import Any

import cv2
import grain
import numpy as np
from absl import flags

from repjax.data import augmentation
from repjax.data.decode import Picture
from repjax.data.sources import Examples
from repjax.data.transforms import resize_and_crop
from repjax.data.transforms import ten_crop as ten_crops

Batch = dict[str, np.ndarray]


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
  """Endless shuffled, augmented batches from step `start_step` on.

  Each epoch shows every example once, in an order of its own. The epochs follow one another without
  a gap: where a batch size does not divide their length, a batch holds the last examples of one
  epoch and then the first of the next, which may be the same images in another augmentation.
  (seed, step) alone fix the examples of a batch and how they are augmented: neither the number of
  workers nor where a run was interrupted changes them.

  Args:
    examples: of the split.
    batch_size: images a step, over all shards.
    image_size: side of the images in pixels.
    augment: a line that `augmentation.parse` reads.
    interpolation: a key of INTERPOLATIONS.
    seed: of the order and the augmentations.
    start_step: the step that the first batch is for.
    shard: (index, count): which part of each batch this process reads; neighbours stay together.
    num_workers: worker processes; 0 reads in threads of this process.

  Yields:
    {"image": uint8 (B, S, S, 3), "label": int32 (B,)}, B = batch_size / count.

  Raises:
    InputError: an image that cannot be decoded; the text names it.
  """
  index, count = shard
  transform = functools.partial(_augmented, augment, image_size, interpolation)
  batches = (
    grain.MapDataset.source(examples)
    .seed(seed)
    .shuffle()
    .repeat()
    .random_map(transform)
    .batch(batch_size // count)[index::count][start_step:]
  )
  return _iterate(batches, num_workers)


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
  """Every example exactly once, in order, in batches of one size with a mask over the padding.

  All shards yield the same number of batches, the last ones padded with black images where the
  examples do not divide.

  Args: as in `train_batches`, and
    resize_size: length of the shorter side before the central crop, in pixels.
    ten_crop: ten crops of each image in place of the central one.

  Yields:
    {"image": uint8 (B, S, S, 3), "label": int32 (B,), "mask": bool (B,)}, B = batch_size / count;
    with `ten_crop`, images are (B, 10, S, S, 3).

  Raises:
    InputError: an image that cannot be decoded; the text names it.
  """
  index, count = shard
  size = batch_size // count
  crop = ten_crops if ten_crop else resize_and_crop
  transform = functools.partial(_resized, crop, image_size, resize_size, interpolation)
  batches = _iterate(
    grain.MapDataset.source(examples).map(transform).batch(size)[index::count], num_workers
  )
  nothing = {
    "image": np.zeros((0, *[10] * ten_crop, image_size, image_size, 3), np.uint8),
    "label": np.zeros((0,), np.int32),
  }
  for _ in range(-(-len(examples) // (size * count))):
    batch = next(batches, nothing)
    missing = size - len(batch["label"])
    padded = {
      name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1))
      for name, values in batch.items()
    }
    yield {**padded, "mask": np.arange(size) < size - missing}


def _augmented(
  augment: str, size: int, interpolation: str, example: dict[str, Any], rng: np.random.Generator
) -> Batch:
  augmented = augmentation.parse(augment)  # reads a line once per process; the rest is cached
  return _example(augmented(_picture(example), size, interpolation, rng), example)


def _resized(
  crop: Any, size: int, resize_size: int, interpolation: str, example: dict[str, Any]
) -> Batch:
  return _example(crop(_picture(example), size, resize_size, interpolation), example)


def _picture(example: dict[str, Any]) -> Picture:
  return Picture(example["image"], example.get("name", "the image"))


def _example(pixels: np.ndarray, example: dict[str, Any]) -> Batch:
  return {"image": np.ascontiguousarray(pixels), "label": np.asarray(example["label"], np.int32)}


def _iterate(batches: grain.MapDataset, num_workers: int) -> Generator[Batch]:
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()  # Grain reads its flags, which only an absl program has parsed
  # More threads than cores only wait for one another. The buffer counts whole batches, and every
  # worker process has one.
  threads = min(16, math.ceil(_cores() / max(1, num_workers)))
  options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
  iterable = batches.to_iter_dataset(options)
  _one_thread_each()
  if num_workers:
    workers = grain.MultiprocessingOptions(num_workers=num_workers)
    iterable = iterable.mp_prefetch(workers, _prepare_worker)
  iterator = iter(iterable)
  try:
    yield from iterator
  finally:
    iterator.close()  # stops threads and worker processes


def _cores() -> int:
  """How many this process may use."""
  return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _one_thread_each() -> None:
  """Keeps OpenCV to one thread a call: images are what is worked on in parallel."""
  cv2.setNumThreads(1)


def _prepare_worker(*worker: int) -> None:
  """What a worker process does first: it also ends with the process that started it."""
  del worker
  _one_thread_each()
  threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
  """A parent that was killed can stop nobody, and its workers would wait for ever."""
  parent = multiprocessing.parent_process()
  if parent is not None:
    parent.join()
    os._exit(1)
