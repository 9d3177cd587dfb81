"""Batches, made by Grain. The step number is the whole state of the training pipeline.

Grain's operations are pure functions of an index: batch n of a pipeline is computed, not reached by
reading the batches before it. Therefore a run continues at any step, on any number of workers.
"""

import contextlib
import functools
import math
import os
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags

from repjax import signals
from repjax.data import augmentation, processes, transforms
from repjax.data.decode import image_errors
from repjax.data.examples import Examples
from repjax.data.masks import IGNORED
from repjax.data.pairs import WAY_OUT, color_of, name_of, on_canvas, pair_of, picture_of
from repjax.data.repeats import Repeats
from repjax.devices import refuse_iterator_of_parent
from repjax.errors import InputError
from repjax.timing import cpus

Batch = dict[str, np.ndarray]


def train_batches(
  examples: Examples,
  *,
  batch_size: int,
  image_size: int,
  augment: str,
  interpolation: str,
  seed: int,
  repeats: int = 1,
  mean: Sequence[float] = (0.0, 0.0, 0.0),
  start_step: int = 0,
  stop_step: int | None = None,
  shard: tuple[int, int] = (0, 1),
  num_workers: int = 0,
) -> Generator[Batch]:
  """Yields shuffled, augmented batches, from step `start_step` on, to an end or without end.

  Each epoch shows every example once, in an order of its own. Epochs follow each other without a
  gap. Where the batch size does not divide the number of examples, a batch holds the last examples
  of an epoch and the first of the next. It may then hold an image twice, augmented differently.

  With `repeats` above 1, an epoch has as many places as there are examples. It shows a part of the
  examples, drawn anew for each epoch, `repeats` times each. See `repjax.data.repeats`.

  Seed and step alone fix the examples of a batch and how they are augmented. Neither the number of
  workers nor an interruption of the run changes them. The image size and the line of augmentations
  do not change which examples a batch holds.

  Args:
    examples: the examples of the split. They may have a mask in place of the label.
    batch_size: images per step, over all shards.
    image_size: side of the images in pixels.
    augment: a line that `augmentation.parse` reads, for the task of the examples.
    interpolation: a key of INTERPOLATIONS.
    seed: fixes the order and the augmentations.
    repeats: times that an epoch shows an image, each time augmented differently.
    mean: the colour around images with a mask, (red, green, blue) in 0 ... 1.
    start_step: the step that the first batch is for, counted from 0.
    stop_step: the step after the last batch; None: there is no last batch.
    shard: (index, count): the share of each batch that this process reads. Shards are contiguous.
    num_workers: worker processes; 0 reads in threads of this process.

  Yields:
    {"image": uint8 (B, S, S, 3), "label": int32 (B,)}, B = batch_size / count. The label of an
    example with a mask is uint8 (B, S, S), with 255 where no class counts.

  Raises:
    InputError: an image cannot be decoded; the text names the image. Or there is too little shared
      memory for the workers, or a worker has died.
  """
  index, count = shard
  transform = functools.partial(_augmented, augment, image_size, interpolation, color_of(mean))
  shuffled = grain.MapDataset.source(examples).seed(seed).shuffle()
  if repeats == 1:
    order = shuffled.repeat()
  else:
    order = Repeats(shuffled, repeats=repeats, batch_size=batch_size)
  augmented = order.random_map(transform)
  # Small batches in a row make up a batch over all shards: shard i takes every count-th from i.
  batches = augmented.batch(batch_size // count)[index::count][start_step:stop_step]
  channels = 3 + (num_workers > 0 and "mask" in examples[0])
  return _iterate(batches, num_workers, batch_size // count * channels * image_size**2)


def eval_batches(
  examples: Examples,
  *,
  batch_size: int,
  image_size: int,
  resize_size: int,
  interpolation: str,
  ten_crop: bool = False,
  canvas: tuple[int, int] | None = None,
  mean: Sequence[float] = (0.0, 0.0, 0.0),
  shard: tuple[int, int] = (0, 1),
  num_workers: int = 0,
) -> Iterator[Batch]:
  """Yields every example exactly once, in order, in batches of one size with a mask.

  All shards yield the same number of batches. Where the examples do not divide, the last batches
  are padded with black images, which the mask marks as False.

  An example with a mask in place of the label keeps its full resolution. It lies at the top left of
  the canvas; the rest has the colour `mean`, and no class that counts.

  Args: as in `train_batches`, and
    resize_size: length of the shorter side before the central crop, in pixels.
    ten_crop: yields ten crops of each image in place of the central crop.
    canvas: (height, width) in pixels for examples with masks, from `Source.canvas`; None for
      examples with labels. With a canvas, the sizes and the interpolation have no effect.

  Yields:
    {"image": uint8 (B, S, S, 3), "label": int32 (B,), "mask": bool (B,)}, B = batch_size / count.
    With `ten_crop`, images are (B, 10, S, S, 3). With a canvas, images are (B, height, width, 3),
    and labels are uint8 (B, height, width), which are 255 where no class counts and in padding.

  Raises:
    InputError: an image cannot be decoded, or is larger than the canvas; the text names the image.
      Or there is too little shared memory for the workers, or a worker has died.
  """
  if canvas is not None:
    if ten_crop:
      raise InputError("ten crops are for classification; an image with a mask is seen as a whole")
    transform = functools.partial(_laid_out, canvas, color_of(mean))
    empty = {
      "image": np.zeros((0, *canvas, 3), np.uint8),
      "label": np.zeros((0, *canvas), np.uint8),
    }
    return _once(examples, transform, empty, batch_size, shard, num_workers)
  crop = transforms.ten_crop if ten_crop else transforms.resize_and_crop
  transform = functools.partial(_resized, crop, image_size, resize_size, interpolation)
  empty = {
    "image": np.zeros((0, *[10] * ten_crop, image_size, image_size, 3), np.uint8),
    "label": np.zeros((0,), np.int32),
  }
  return _once(examples, transform, empty, batch_size, shard, num_workers)


def _once(
  examples: Examples,
  transform: Callable[[dict[str, Any]], Batch],
  empty: Batch,
  batch_size: int,
  shard: tuple[int, int],
  num_workers: int,
) -> Iterator[Batch]:
  """Yields every example exactly once, in order, in batches of one size with a mask.

  Args: as in `train_batches`, and
    transform: makes the arrays of an example.
    empty: a batch without examples, which tells shapes and types.
  """
  index, count = shard
  size = batch_size // count
  batches = _iterate(
    grain.MapDataset.source(examples).map(transform).batch(size)[index::count],
    num_workers,
    size * sum(math.prod(each.shape[1:]) for each in empty.values() if each.ndim > 1),
  )
  for _ in range(math.ceil(len(examples) / (size * count))):
    batch = next(batches, empty)  # a shard may run out a batch before the other shards do
    missing = size - len(batch["label"])
    padded = {
      name: np.pad(
        values,
        [(0, missing)] + [(0, 0)] * (values.ndim - 1),
        constant_values=IGNORED if name == "label" and values.ndim > 1 else 0,
      )
      for name, values in batch.items()
    }
    yield {**padded, "mask": np.arange(size) < size - missing}


def _augmented(
  augment: str,
  size: int,
  interpolation: str,
  fill: tuple[int, int, int],
  example: dict[str, Any],
  rng: np.random.Generator,
) -> Batch:
  """Makes a training example.

  `augment` is the line, not what `parse` returns: crops are closures, which cannot be pickled for
  worker processes.
  """
  # `parse` reads a line once per process; the rest is cached.
  if "mask" not in example:
    augmented = augmentation.parse(augment)
    return _example(augmented(picture_of(example), size, interpolation, rng), example)
  augmented = augmentation.parse(augment, "segmentation")
  pair = augmented(pair_of(example, fill), size, interpolation, rng)
  return _labelled(pair.pixels, pair.classes)


def _resized(
  crop: Any, size: int, resize_size: int, interpolation: str, example: dict[str, Any]
) -> Batch:
  """Makes an evaluation example."""
  with image_errors(name_of(example), WAY_OUT):
    return _example(crop(picture_of(example), size, resize_size, interpolation), example)


def _laid_out(
  canvas: tuple[int, int], fill: tuple[int, int, int], example: dict[str, Any]
) -> Batch:
  """Makes an evaluation example with a mask."""
  pair = pair_of(example, fill)
  with image_errors(name_of(example), WAY_OUT):
    return _labelled(*on_canvas(pair, canvas))


def _example(pixels: np.ndarray, example: dict[str, Any]) -> Batch:
  return _labelled(pixels, np.asarray(example["label"], np.int32))


def _labelled(pixels: np.ndarray, label: np.ndarray) -> Batch:
  return {"image": np.ascontiguousarray(pixels), "label": np.asarray(label, order="C")}


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
