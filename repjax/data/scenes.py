"""The data set `scenes`: handwritten digits on photographs, with a class for each pixel."""

import importlib.resources
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from repjax.data.masks import encoded
from repjax.extras import need

_PURPOSE = "the scenes data set, whose images are inside packages"

COUNTS = {"train": 512, "test": 128}
"""Number of scenes in each split."""
SIDES = (96, 112, 128)
"""Sides of a scene in pixels, drawn for height and width."""
# Photographs inside the scikit-image package; it would download others.
_PHOTOGRAPHS = (
  *("astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png", "grass.png"),
  *("gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg", "rocket.jpg"),
)
_TEST_SHARE = 0.3  # share of the longer side of a photograph
_DIGITS = (5, 12)  # least and largest number of digits that are tried in a scene
_DIGIT_SIDES = (22, 60)  # least and largest side of a digit in pixels
_CONTRAST = 130  # least distance in RGB of a digit's colour from the mean of its surroundings
_EDGE = 0.4  # ink above which a pixel belongs to the digit


class Scenes(tfds.core.GeneratorBasedBuilder):
  """640 scenes: digits of many sizes and colours on crops of photographs.

  A mask has the class 0 for the background and 1 to 10 for the digits 0 to 9. Every fifth image of
  a digit is in test scenes only. The parts of the photographs under test scenes are in no training
  scene.

  References:
    The digits: see `repjax.data.digits`. The photographs: van der Walt et al., scikit-image, PeerJ
      2014. https://doi.org/10.7717/peerj.453
  """

  VERSION = tfds.core.Version("1.0.0")

  def _info(self) -> tfds.core.DatasetInfo:
    """Describes the set to TFDS."""
    names = ["background", *(str(digit) for digit in range(10))]
    return tfds.core.DatasetInfo(
      builder=self,
      description="Handwritten digits of scikit-learn on photographs of scikit-image.",
      features=tfds.features.FeaturesDict(
        {
          "image": tfds.features.Image(encoding_format="jpeg"),
          "mask": tfds.features.LabeledImage(labels=names, encoding_format="png"),
        }
      ),
      metadata=tfds.core.MetadataDict({"largest_images": dict.fromkeys(COUNTS, [max(SIDES)] * 2)}),
    )

  def _split_generators(self, dl_manager):
    """Returns the generator of each split's examples, which TFDS runs."""
    del dl_manager  # nothing is downloaded
    digits: Any = need("sklearn.datasets", _PURPOSE).load_digits()
    folder = importlib.resources.files(need("skimage", _PURPOSE)) / "data"
    photographs = [
      np.asarray(Image.open(io.BytesIO((folder / name).read_bytes())).convert("RGB"))
      for name in _PHOTOGRAPHS
    ]
    test = np.arange(len(digits.target)) % 5 == 0
    generators = {}
    for split, mine in (("train", ~test), ("test", test)):
      parts = [_part(photograph, split == "test") for photograph in photographs]
      ink, labels = digits.images[mine] / 16, digits.target[mine]
      generators[split] = _scenes(split, parts, ink, labels)
    return generators

  def _generate_examples(self):
    raise AssertionError("_split_generators names the generators itself")


def _part(photograph: np.ndarray, test: bool) -> np.ndarray:
  """Returns the part of a photograph that lies under the scenes of a split."""
  axis = int(photograph.shape[1] > photograph.shape[0])
  cut = round(photograph.shape[axis] * (1 - _TEST_SHARE))
  first, second = np.split(photograph, [cut], axis)
  return second if test else first


def _scenes(
  split: str, parts: list[np.ndarray], ink: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[int, dict[str, Any]]]:
  """Yields (key, example) of the scenes of a split.

  Args:
    split: name of the split.
    parts: parts of the photographs.
    ink: images of digits (N, 8, 8) in 0 ... 1.
    labels: the digits (N,).
  """
  for number in range(COUNTS[split]):
    rng = np.random.default_rng([split == "test", number])
    pixels, classes = _scene(parts[number % len(parts)], ink, labels, rng)
    image = io.BytesIO()
    Image.fromarray(pixels).save(image, "JPEG", quality=92)
    image.seek(0)
    yield number, {"image": image, "mask": io.BytesIO(encoded(classes))}


def _scene(
  part: np.ndarray, ink: np.ndarray, labels: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Draws a scene; returns uint8 (H, W, 3) and its classes, uint8 (H, W)."""
  height, width = rng.choice(SIDES, 2)
  pixels = _background(part, height, width, rng)
  classes = np.zeros((height, width), np.uint8)
  for _ in range(rng.integers(_DIGITS[0], _DIGITS[1] + 1)):
    chosen = rng.integers(len(ink))
    side = int(rng.integers(_DIGIT_SIDES[0], _DIGIT_SIDES[1] + 1))
    # Bicubic values leave 0 ... 1 a little, at sharp edges.
    drawn = Image.fromarray(ink[chosen].astype(np.float32)).resize((side, side), _SMOOTH)
    shape = np.clip(np.asarray(drawn), 0, 1)
    top, left = rng.integers(0, height - side + 1), rng.integers(0, width - side + 1)
    place = slice(top, top + side), slice(left, left + side)
    if (classes[place][shape > _EDGE]).any():
      continue  # digits do not hide each other
    color = _color(pixels[place].mean((0, 1)), rng)
    cover = np.clip(4 * (shape - _EDGE) + 0.5, 0, 1)[..., None]  # half where the mask begins
    pixels[place] += cover * (color - pixels[place])
    classes[place][shape > _EDGE] = labels[chosen] + 1
  return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8), classes


_SMOOTH = Image.Resampling.BICUBIC


def _background(part: np.ndarray, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
  """Returns a random crop of a photograph, mirrored half of the time, float64 (H, W, 3)."""
  fitting = min(part.shape[0] / height, part.shape[1] / width)
  scale = rng.uniform(min(1, fitting), min(2.5, fitting))
  tall, wide = int(height * scale), int(width * scale)
  top = rng.integers(0, part.shape[0] - tall + 1)
  left = rng.integers(0, part.shape[1] - wide + 1)
  crop = Image.fromarray(part[top : top + tall, left : left + wide]).resize((width, height))
  pixels = np.asarray(crop, np.float64)
  return (pixels[:, ::-1] if rng.random() < 0.5 else pixels).copy()


def _color(around: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Draws a colour that stands out from the mean colour of its surroundings."""
  while True:
    color = rng.uniform(0, 255, 3)
    if np.linalg.norm(color - around) > _CONTRAST:
      return color
