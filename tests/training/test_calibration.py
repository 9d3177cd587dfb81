"""Images to calibrate with: which of a split, and as evaluation prepares them."""

import numpy as np
import pytest

from repjax.data import Source, open_source
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.training import evaluation
from repjax.training.calibration import calibration_images

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
