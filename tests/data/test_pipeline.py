"""Batches: fixed by seed and step, complete, and made without an accelerator."""

import itertools
import sys

import numpy as np
import pytest

from repjax.data import eval_batches, train_batches
from repjax.errors import InputError
from tests.data.images import encoded
from tests.training import tiny

COUNT, BATCH = 20, 8
FULL = "random_resized_crop | flip | color_jitter | rand_augment(noise=0.5) | random_erasing(0.5)"


class Numbered:
  """Noise images whose labels are their numbers; at module level so that workers find it."""

  def __init__(self, count=COUNT):
    self.count = count

  def __len__(self):
    return self.count

  def __getitem__(self, index):
    pixels = np.random.default_rng(index).integers(1, 256, (24, 20, 3), np.uint8)
    return {"image": pixels, "label": index}


class Backends(Numbered):
  """Examples whose labels count what the reading process has set up: JAX backends, TensorFlow."""

  def __getitem__(self, index):
    return super().__getitem__(index) | {"label": backends_here()}


def backends_here():
  bridge = sys.modules.get("jax._src.xla_bridge")
  return len(bridge._backends if bridge else ()) + 100 * ("tensorflow" in sys.modules)


def train(steps, examples=None, **changes):
  """Returns the first batches of a training pipeline."""
  arguments = {
    "batch_size": BATCH,
    "image_size": 8,
    "augment": "random_resized_crop | flip",
    "interpolation": "bilinear",
    "seed": 0,
  }
  batches = train_batches(examples or Numbered(), **arguments | changes)
  result = list(itertools.islice(batches, steps))
  batches.close()
  return result


def evaluation(**changes):
  arguments = {"image_size": 8, "resize_size": 20, "interpolation": "bilinear"}
  return list(eval_batches(**arguments | changes))


def assert_equal(batches, others):
  assert len(batches) == len(others)
  for batch, other in zip(batches, others):
    assert batch.keys() == other.keys()
    for name in batch:
      np.testing.assert_array_equal(batch[name], other[name])


def joined(batches, name):
  return np.concatenate([batch[name] for batch in batches])


@pytest.fixture(scope="module")
def from_the_start():
  """Ten batches: four epochs."""
  return train(10)


@pytest.mark.parametrize(
  ("start", "num_workers"), [(3, 0), pytest.param(0, 1, marks=pytest.mark.proof), (3, 2)]
)
def test_seed_and_step_alone_fix_a_batch(from_the_start, start, num_workers):
  batches = train(10 - start, start_step=start, num_workers=num_workers)
  assert_equal(batches, from_the_start[start:])


def test_a_pipeline_stops_where_it_is_told_to(from_the_start):
  assert_equal(train(10, start_step=3, stop_step=5), from_the_start[3:5])


def test_a_training_batch_is_uint8_images_and_int32_labels(from_the_start):
  assert {name: (x.shape, x.dtype) for name, x in from_the_start[0].items()} == {
    "image": ((BATCH, 8, 8, 3), np.uint8),
    "label": ((BATCH,), np.int32),
  }


def test_each_epoch_shows_every_example_once_and_batches_straddle_epochs(from_the_start):
  # Neither batch 3 nor batch 8 lies in one epoch: 20 examples make two batches and a half.
  epochs = joined(from_the_start, "label").reshape(4, COUNT)
  np.testing.assert_array_equal(np.sort(epochs), [range(COUNT)] * 4)
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_an_example_is_augmented_anew_in_each_epoch(from_the_start):
  images, labels = joined(from_the_start, "image"), joined(from_the_start, "label")
  for number in range(COUNT):
    views = {image.tobytes() for image in images[labels == number]}
    assert len(views) == 4


def test_augmentation_draws_from_the_seed(from_the_start):
  others = train(5, seed=1)
  assert not np.array_equal(joined(others, "label"), joined(from_the_start[:5], "label"))
  ours, theirs = (
    {image.tobytes() for image in joined(batches, "image")}
    for batches in (from_the_start[:5], others)
  )
  assert not ours & theirs


@pytest.mark.parametrize("start", [0, 3])
def test_shards_together_are_the_whole_batch(from_the_start, start):
  shards = [train(4, shard=(index, 2), start_step=start) for index in (0, 1)]
  for whole, *parts in zip(from_the_start[start:], *shards):
    assert all(len(part["label"]) == BATCH // 2 for part in parts)
    for name in whole:
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


@pytest.fixture(scope="module")
def repeated():
  """Ten batches, which are four epochs, in which images come three times."""
  return train(10, repeats=3)


def test_an_epoch_of_repeats_shows_a_third_of_the_images_three_times(repeated):
  labels = joined(repeated, "label")
  assert len(labels) == 4 * COUNT  # as many steps as without repeats
  # The batches put the copies of a row apart. The order beneath them has epochs of one length.
  order = np.empty_like(labels)
  places = [place for copy in range(3) for place in range(copy, BATCH, 3)]
  order.reshape(10, BATCH)[:, places] = labels.reshape(10, BATCH)
  epochs = order.reshape(4, COUNT)
  for epoch in epochs:
    np.testing.assert_array_equal(epoch, np.repeat(epoch[::3], 3)[:COUNT])
    assert len(set(epoch)) == -(-COUNT // 3)
  assert len({tuple(sorted(set(epoch))) for epoch in epochs}) == 4  # a new third in each epoch


def test_copies_are_augmented_differently_and_are_not_neighbours(repeated):
  for batch in repeated:
    labels, images = batch["label"], batch["image"]
    assert (labels != np.roll(labels, 1)).all()  # Mixup blends neighbours
    assert len({image.tobytes() for image in images}) == BATCH
  everything = {image.tobytes() for image in joined(repeated, "image")}
  assert len(everything) == 4 * COUNT


def test_each_of_three_devices_gets_one_copy():
  (batch,) = train(1, repeats=3, batch_size=18)
  shares = [set(share) for share in batch["label"].reshape(3, 6)]
  assert shares[0] == shares[1] == shares[2]
  assert len(shares[0]) == 6


@pytest.mark.parametrize("start", [3, 5])  # in the middle of an epoch, and at the beginning of one
def test_repeats_continue_anywhere(repeated, start):
  assert_equal(train(10 - start, repeats=3, start_step=start), repeated[start:])


def test_repeats_divide_among_processes_and_workers(repeated):
  shards = [
    train(3, repeats=3, start_step=3, shard=(index, 2), num_workers=index) for index in (0, 1)
  ]
  for whole, *parts in zip(repeated[3:], *shards):
    for name in whole:
      np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), whole[name])


@pytest.mark.parametrize("augment", ["none", "pad_and_crop | flip", FULL])
def test_every_augmentation_goes_through_the_pipeline(augment):
  (batch,) = train(1, augment=augment)
  assert batch["image"].shape == (BATCH, 8, 8, 3)


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [6, 12, 18, 60])
@pytest.mark.parametrize("count", [1, 2, 23, 24])
def test_evaluation_sees_every_example_once(count, batch_size, shards):
  examples = Numbered(count)
  parts = [
    evaluation(examples=examples, batch_size=batch_size, shard=(index, shards))
    for index in range(shards)
  ]
  assert {len(part) for part in parts} == {-(-count // batch_size)}
  batches = [batch for part in parts for batch in part]
  assert {len(batch["label"]) for batch in batches} == {batch_size // shards}
  mask, labels = joined(batches, "mask"), joined(batches, "label")
  np.testing.assert_array_equal(np.sort(labels[mask]), range(count))
  assert not joined(batches, "image")[~mask].any()
  assert joined(batches, "image")[mask].any((1, 2, 3)).all()


def test_evaluation_is_in_order_and_centred():
  images = joined(evaluation(examples=Numbered(5), batch_size=2), "image")
  # Sources are 20 x 24 pixels, so that nothing is resized.
  pixels = [Numbered()[index]["image"][8:16, 6:14] for index in range(5)]
  np.testing.assert_array_equal(images, [*pixels, np.zeros_like(pixels[0])])


def test_an_evaluation_batch_is_uint8_images_int32_labels_and_a_mask():
  (batch,) = evaluation(examples=Numbered(2), batch_size=3)
  assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
    "image": ((3, 8, 8, 3), np.uint8),
    "label": ((3,), np.int32),
    "mask": ((3,), np.bool_),
  }


def test_ten_crops_of_each_image_are_one_more_axis():
  (batch,) = evaluation(examples=Numbered(2), batch_size=3, ten_crop=True)
  assert batch["image"].shape == (3, 10, 8, 8, 3)
  (single,) = evaluation(examples=Numbered(2), batch_size=3)
  np.testing.assert_array_equal(batch["image"][:, 4], single["image"])
  np.testing.assert_array_equal(batch["image"][0, 0], Numbered()[0]["image"][:8, :8])
  np.testing.assert_array_equal(batch["label"], single["label"])


class Damaged(Numbered):
  """Numbered examples, of which example 5 is the beginning of a JPEG."""

  def __getitem__(self, index):
    example = super().__getitem__(index) | {"name": f"image {index} (cat.jpg)"}
    damaged = encoded(example["image"], "JPEG")[:400]
    return example | ({"image": damaged} if index == 5 else {})


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(
  "run", [lambda **k: train(9, **k), lambda **k: evaluation(batch_size=4, **k)]
)
def test_an_image_that_cannot_be_decoded_is_named(run, num_workers):
  with pytest.raises(InputError, match=r"^image 5 \(cat.jpg\) cannot be decoded: "):
    run(examples=Damaged(), num_workers=num_workers)


def test_reading_data_sets_up_no_accelerator_and_no_tensorflow(tmp_path):
  script = tmp_path / "read.py"
  script.write_text("""
from tests.data.test_pipeline import Backends, backends_here, train
from repjax.data import open_source

if __name__ == "__main__":
  digits = open_source("digits", "train", data_dir="tfds").examples
  train(1, digits)
  assert backends_here() == 0, "the process that asks"
  (batch,) = train(1, Backends(), num_workers=1)
  assert not batch["label"].any(), "a worker"
""")
  finished = tiny.run_python(str(script), cwd=tmp_path, cache=tmp_path)
  assert finished.returncode == 0, finished.stderr


def test_workers_end_with_a_process_that_is_killed(tmp_path):
  script = tmp_path / "hold.py"
  script.write_text("""
import multiprocessing, os, sys, time
from repjax.data import processes

def work():
  processes.prepare(0, 1)
  print(os.getpid(), flush=True)
  time.sleep(600)

if __name__ == "__main__":
  multiprocessing.get_context("spawn").Process(target=work).start()
  time.sleep(600)
""")
  parent = tiny.start_python(str(script), cwd=tmp_path, cache=tmp_path)
  assert int(parent.stdout.readline()) != parent.pid
  parent.kill()
  parent.communicate(timeout=20)  # ends when nobody holds its output any more
