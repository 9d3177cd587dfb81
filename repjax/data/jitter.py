"""Random changes of colours and of rectangles."""

import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

from repjax.data import operations
from repjax.data.checks import check_number, check_range

Step = Callable[[np.ndarray, np.random.Generator], np.ndarray]
"""`step(pixels, rng)`: uint8 (S, S, 3) to uint8 (S, S, 3). It leaves `pixels` as they are."""

_CUTOUT_COLOUR = (125, 122, 113)


def color_jitter(
  brightness: float = 0.4, contrast: float = 0.4, saturation: float = 0.4, hue: float = 0.0
) -> Step:
  """Changes brightness, contrast, saturation and hue at random, in an order drawn for each image.

  The first three have a factor uniform in [max(0, 1 - strength), 1 + strength], the hue is turned
  by a part of the full circle uniform in [-hue, hue]. What has strength 0 is left out.

  Args:
    brightness, contrast, saturation: strengths, 0 or more.
    hue: 0 to 0.5.

  Raises:
    InputError: a strength is no number or outside its range.

  References:
    Howard, Some Improvements on Deep Convolutional Neural Network Based Image Classification, 2013.
      https://arxiv.org/abs/1312.5402
    The ranges are those of torchvision's ColorJitter, the strength of 0.4 is timm's default.
  """
  strengths = {"brightness": brightness, "contrast": contrast, "color": saturation, "hue": hue}
  for argument, strength in zip(
    ("brightness", "contrast", "saturation", "hue"), strengths.values()
  ):
    limit = 0.5 if argument == "hue" else math.inf
    check_number(f"color_jitter's {argument}", strength, 0, limit)
  active = tuple((name, float(strength)) for name, strength in strengths.items() if strength)
  return functools.partial(_jittered, active=active)


def random_erasing(
  probability: float = 0.25,
  area: Sequence[float] = (0.02, 1 / 3),
  ratio: Sequence[float] = (0.3, 1 / 0.3),
) -> Step:
  """Overwrites a random rectangle with noise, each value of each pixel uniform in 0 ... 255.

  The rectangle's area is uniform in `area`, its aspect ratio log-uniform in `ratio`, its place
  uniform among those where it lies inside. Ten rectangles are tried; where none fits, the image
  stays. The paper has areas up to 0.4, ratios that are uniform, and tries until one fits; what is
  done here is what timm does, whose default the areas are.

  Args:
    probability: of an image being changed at all.
    area: (least, largest) part of the image's area.
    ratio: (least, largest) height / width.

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

  What of the square lies outside is lost. The colour is (125, 122, 113), as in AutoAugment's code.

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
  if rng.random() >= probability:
    return pixels
  height, width = pixels.shape[:2]
  for _ in range(10):
    area = height * width * rng.uniform(*areas)
    ratio = math.exp(rng.uniform(math.log(ratios[0]), math.log(ratios[1])))
    h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < h <= height and 0 < w <= width:
      top, left = rng.integers(0, height - h + 1), rng.integers(0, width - w + 1)
      erased = pixels.copy()
      erased[top : top + h, left : left + w] = rng.integers(0, 256, (h, w, 3), np.uint8)
      return erased
  return pixels
