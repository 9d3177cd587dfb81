"""Images to calibrate with: which of a split, and as evaluation prepares them."""

import numpy as np
import pytest

from repjax.data import Source, open_source
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.training import evaluation
from repjax.training.calibration import calibration_images, check_apart

pytest_plugins = ["tests.training.fixtures"]

PREPROCESSING = Preprocessing(12, 14, "bicubic", (0.3,) * 3, (0.35,) * 3)
SOURCE = open_source("synthetic", "validation", num_classes=10, image_size=16)


@pytest.mark.parametrize("count", [1, 3, 64, 100, 128])
def test_images_are_at_equal_distances_and_as_evaluation_has_them(count):
  images = calibration_images(SOURCE, count, PREPROCESSING)
  assert (images.shape, images.dtype) == ((count, 12, 12, 3), np.uint8)
  (whole,) = evaluation.host_batches(SOURCE, PREPROCESSING, batch_size=128)
  places = [128 * i // count for i in range(count)]
  assert (images == whole["image"][places]).all()
  assert set(np.diff(places)) <= {128 // count, 128 // count + 1}


@pytest.mark.parametrize("count", [0, -1, 129])
def test_more_images_than_there_are_is_an_error(count):
  with pytest.raises(InputError, match=f"{count} images to calibrate .*, and the split has 128"):
    calibration_images(SOURCE, count, PREPROCESSING)


def test_an_image_that_cannot_be_decoded_is_named():
  source = Source([{"image": b"no", "label": 0, "index": 0, "name": "image 0 of it"}], ("0",), {})
  with pytest.raises(InputError, match="image 0 of it"):
    calibration_images(source, 1, PREPROCESSING)


def with_facts(split="train", **facts):
  return Source([], (), {"name": "sky", "version": "1.0.0", "split": split, "bytes": 5} | facts)


@pytest.mark.parametrize(
  ("one", "other", "text"),
  [
    (with_facts(), with_facts(), "are the same, sky's train split, which"),
    (
      with_facts(checksum="ab"),
      with_facts("test", checksum="ab"),
      "are the same, sky's test split and sky's train split, which",
    ),
  ],
)
def test_accuracy_is_not_measured_on_images_that_calibrate(one, other, text):
  with pytest.raises(InputError, match=f"{text} would flatter .* --calibration-split or --split"):
    check_apart(one, other)


@pytest.mark.parametrize(
  ("one", "other"),
  [
    (with_facts(), with_facts("test")),
    (with_facts(), with_facts(name="sea")),
    (with_facts(checksum="ab"), with_facts("test", checksum="cd")),
  ],
)
def test_other_splits_are_taken(one, other):
  check_apart(one, other)


@pytest.mark.parametrize("split", ["train[:50%]", "train+test", "all"])
def test_parts_of_a_split_which_could_overlap_are_not_opened(digits_dir, split):
  with pytest.raises(InputError, match="unknown split of digits"):
    open_source("digits", split, data_dir=str(digits_dir))
