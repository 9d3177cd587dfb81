"""Steps that change colours, mirror the image or overwrite a rectangle, at random."""

import functools
import math
from collections.abc import Sequence

import cv2
import numpy as np

from repjax.data.augmentation import operations
from repjax.data.augmentation.base import AugmentationStep, check_number, check_range

_CUTOUT_COLOUR = (125, 122, 113)


def flip(probability: float = 0.5) -> AugmentationStep:
  """Returns a step that mirrors left and right with a probability."""
  check_number("flip's probability", probability, 0, 1)

  def step(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return cv2.flip(pixels, 1) if rng.random() < probability else pixels

  return step


def color_jitter(
  brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.0
) -> AugmentationStep:
  """Returns a step that changes brightness, contrast, saturation and hue at random.

  The factors of the first three are uniform in [max(0, 1 - strength), 1 + strength]. The hue turns
  by a fraction of the full circle that is uniform in [-hue, hue]. The order of the four changes is
  drawn for each image. A change of strength 0 is left out.

  Args:
    brightness, contrast, saturation: strengths, 0 or more.
    hue: the largest turn, 0 to 0.5 of the full circle.

  Raises:
    InputError: a strength is no number or outside its range.

  References:
    Howard, Some Improvements on Deep Convolutional Neural Network Based Image Classification, 2013.
      https://arxiv.org/abs/1312.5402
    torchvision's ColorJitter has the same ranges. The strength of 0.4 is timm's default.
  """
  # The name of the operation, the name of the argument, the strength.
  strengths = (
    ("brightness", "brightness", brightness),
    ("contrast", "contrast", contrast),
    ("color", "saturation", saturation),
    ("hue", "hue", hue),
  )
  for name, argument, strength in strengths:
    limit = 0.5 if name == "hue" else math.inf
    check_number(f"color_jitter's {argument}", strength, 0, limit)
  active = tuple((name, float(strength)) for name, _, strength in strengths if strength)
  return functools.partial(_jittered, active=active)


def random_erasing(
  probability: float = 0.25,
  area: Sequence[float] = (0.02, 1 / 3),
  ratio: Sequence[float] = (0.3, 1 / 0.3),
) -> AugmentationStep:
  """Returns a step that overwrites a random rectangle with noise, uniform in 0 ... 255.

  The rectangle's area is uniform in `area`, its aspect ratio log-uniform in `ratio`. Its place is
  uniform among all places inside the image. Ten rectangles are tried; where none fits, the image
  stays as it is.

  These are timm's rules, and the default areas are timm's. The paper differs: it has areas up to
  0.4 and uniform ratios, and it tries until a rectangle fits.

  Args:
    probability: the probability that an image is changed at all.
    area: least and largest share of the image's area.
    ratio: least and largest height / width.

  Raises:
    InputError: a number is outside its range, or a range is not (least, largest).

  References:
    Zhong et al., Random Erasing Data Augmentation, AAAI 2020, algorithm 1, with random values
      (RE-R). https://arxiv.org/abs/1708.04896
  """
  check_number("random_erasing's probability", probability, 0, 1)
  areas = check_range("random_erasing's area", area, 0, 1)
  ratios = check_range("random_erasing's ratio", ratio, 0, math.inf)
  return functools.partial(_erased, probability=probability, areas=areas, ratios=ratios)


def cutout(pixels: np.ndarray, side: int, rng: np.random.Generator) -> np.ndarray:
  """Paints a square of `side` pixels in one colour, about a centre drawn among all pixels.

  The image's border cuts the square off. The colour is (125, 122, 113), as in AutoAugment's code.

  References:
    DeVries and Taylor, Improved Regularization of Convolutional Neural Networks with Cutout, 2017.
      https://arxiv.org/abs/1708.04552
  """
  top, left = rng.integers(0, pixels.shape[:2]) - side // 2
  painted = pixels.copy()
  painted[max(top, 0) : top + side, max(left, 0) : left + side] = _CUTOUT_COLOUR
  return painted


def _jittered(
  pixels: np.ndarray, rng: np.random.Generator, *, active: tuple[tuple[str, float], ...]
) -> np.ndarray:
  """Applies the active colour changes (operation, strength) in a random order."""
  for index in rng.permutation(len(active)):
    name, strength = active[index]
    if name == "hue":
      pixels = operations.hue(pixels, rng.uniform(-strength, strength))
    else:
      factor = rng.uniform(max(0.0, 1 - strength), 1 + strength)
      pixels = operations.OPERATIONS[name](pixels, factor)
  return pixels


def _erased(
  pixels: np.ndarray,
  rng: np.random.Generator,
  *,
  probability: float,
  areas: tuple[float, float],
  ratios: tuple[float, float],
) -> np.ndarray:
  """Overwrites a random rectangle with noise, as `random_erasing` describes."""
  if rng.random() >= probability:
    return pixels
  height, width = pixels.shape[:2]
  for _ in range(10):
    area = height * width * rng.uniform(*areas)
    ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
    # h w = area and h / w = ratio.
    h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < h <= height and 0 < w <= width:
      top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
      erased = pixels.copy()
      erased[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, 3), np.uint8)
      return erased
  return pixels
