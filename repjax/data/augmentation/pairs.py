"""Steps for an image and its mask, which stay aligned to the pixel."""

import functools
import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from repjax.data.augmentation.base import (
  AugmentationStep,
  PairCrop,
  PairStep,
  check_number,
  check_range,
)
from repjax.data.masks import IGNORED
from repjax.data.pairs import Pair
from repjax.data.transforms import INTERPOLATIONS

_MARGIN = 4  # pixels around a rectangle that bicubic interpolation may read
_SCALES = (0.1, 10.0)  # least and largest scale


def scale_and_crop(scale: tuple[float, float] = (0.5, 2.0)) -> PairCrop:
  """Returns a crop that resizes the pair by a random factor, then cuts out a random square.

  The factor is uniform in `scale`. Where the resized pair is smaller than the square, it lies at a
  random place inside it. The pixels around it have the pair's colour, and no class that counts. The
  classes are resampled by the nearest pixel.

  Args:
    scale: least and largest factor, in 0.1 ... 10.

  Raises:
    InputError: `scale` is no range.

  References:
    Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, section 5.1.
      https://arxiv.org/abs/1612.01105
  """
  limits = check_range("scale_and_crop's scale", scale, *_SCALES)

  def crop(pair: Pair, size: int, interpolation: str, rng: np.random.Generator) -> Pair:
    factor = limits[0] + (limits[1] - limits[0]) * rng.random()
    shape = [max(1, round(side * factor)) for side in pair.classes.shape]
    # Negative corners lie outside of a pair that is smaller than the square.
    corner = [int(rng.integers(min(0, side - size), max(0, side - size) + 1)) for side in shape]
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = pair.fill
    classes = np.full((size, size), IGNORED, np.uint8)
    spans = [(max(0, start), min(side, start + size)) for side, start in zip(shape, corner)]
    inside = tuple(slice(low - start, high - start) for (low, high), start in zip(spans, corner))
    rows, columns = (
      _nearest(span, side, old) for span, side, old in zip(spans, shape, pair.classes.shape)
    )
    classes[inside] = pair.classes[np.ix_(rows, columns)]
    if interpolation == "nearest":
      pixels[inside] = pair.pixels[np.ix_(rows, columns)]
    else:
      pixels[inside] = _window(pair.pixels, shape, spans, interpolation)
    return Pair(pixels, classes, pair.fill)

  return crop


def _nearest(span: tuple[int, int], side: int, old: int) -> np.ndarray:
  """Returns which of `old` pixels are nearest to the pixels of a span, if all become `side`."""
  # The centre of pixel i is at i + 1/2.
  return (2 * np.arange(*span) + 1) * old // (2 * side)


def _window(
  pixels: np.ndarray, shape: list[int], spans: list[tuple[int, int]], interpolation: str
) -> np.ndarray:
  """Returns a rectangle of the resized image, and resizes no more than the rectangle.

  Args:
    pixels: the image (H, W, 3).
    shape: height and width of the resized image.
    spans: (first, end) of the rows and of the columns in the resized image.
    interpolation: a key of INTERPOLATIONS.
  """
  matrix = np.zeros((2, 3))
  for axis, ((first, end), side) in enumerate(zip(spans, shape)):
    old = pixels.shape[axis]
    step = old / side
    low = max(0, math.floor(first * step) - _MARGIN)
    high = min(old, math.ceil(end * step) + _MARGIN)
    pixels = pixels[low:high] if axis == 0 else pixels[:, low:high]
    # Centre to centre; OpenCV's first row is for x, which is the second axis.
    matrix[1 - axis, 1 - axis] = step
    matrix[1 - axis, 2] = (first + 0.5) * step - 0.5 - low
  (top, bottom), (left, right) = spans
  return cv2.warpAffine(
    pixels,
    matrix,
    (right - left, bottom - top),
    flags=INTERPOLATIONS[interpolation].opencv | cv2.WARP_INVERSE_MAP,
    borderMode=cv2.BORDER_REPLICATE,
  )


def flip(probability: float = 0.5) -> PairStep:
  """Returns a step that mirrors image and mask left and right with a probability."""
  check_number("flip's probability", probability, 0, 1)

  def step(pair: Pair, rng: np.random.Generator) -> Pair:
    if rng.random() >= probability:
      return pair
    return pair._replace(pixels=cv2.flip(pair.pixels, 1), classes=cv2.flip(pair.classes, 1))

  return step


def on_image(make: Callable[..., AugmentationStep]) -> Callable[..., PairStep]:
  """Returns a function that makes a step for the image alone, with the arguments of `make`."""

  @functools.wraps(make)
  def make_for_pairs(*arguments: Any, **named: Any) -> PairStep:
    step = make(*arguments, **named)
    return lambda pair, rng: pair._replace(pixels=step(pair.pixels, rng))

  return make_for_pairs
