"""The data set `digits`: handwritten digits that scikit-learn ships, prepared offline by TFDS."""

import io
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from repjax.extras import need


class Digits(tfds.core.GeneratorBasedBuilder):
  """1,797 grey 8x8 images of handwritten digits; every fifth is a test image.

  References:
    Alpaydin and Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
      https://archive.ics.uci.edu/dataset/80
  """

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    """Describes the set to TFDS."""
    return tfds.core.DatasetInfo(
      builder=self,
      description="The 8x8 handwritten digits of scikit-learn, as PNG.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
          "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
        }
      ),
      supervised_keys=("image", "label"),
    )

  def _split_generators(self, dl_manager):
    """Returns the generator of each split's examples, which TFDS runs."""
    del dl_manager  # nothing is downloaded
    purpose = "the digits data set, whose images are inside a package"
    digits: Any = need("sklearn.datasets", purpose).load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # grey levels are 0 ... 16
    test = np.arange(len(images)) % 5 == 0
    return {
      "train": self._examples(images, digits.target, np.flatnonzero(~test)),
      "test": self._examples(images, digits.target, np.flatnonzero(test)),
    }

  def _generate_examples(self):
    raise AssertionError("_split_generators names the generators itself")

  @staticmethod
  def _examples(images, labels, indices):
    """Yields (key, example) of some images, each as a PNG file."""
    for index in indices:
      png = io.BytesIO()
      Image.fromarray(images[index]).save(png, "PNG")
      png.seek(0)
      yield int(index), {"image": png, "label": int(labels[index])}
