"""Crops: the first step of an augmentation, from an image of any size to a square."""

import math

import cv2
import numpy as np

from repjax.data.augmentation.base import Crop, check_number, check_range
from repjax.data.decode import REDUCTIONS, Picture
from repjax.data.transforms import INTERPOLATIONS, resize, resize_and_crop


def central_square() -> Crop:
  """Returns a crop that takes the largest central square and resizes it, as in evaluation."""

  def crop(picture: Picture, size: int, interpolation: str, rng: np.random.Generator) -> np.ndarray:
    del rng
    return resize_and_crop(picture, size, size, interpolation)

  return crop


def pad_and_crop(padding: int | None = None) -> Crop:
  """Returns the augmentation of CIFAR: adds a black frame, then cuts out a random square.

  The square has the size of the image before padding. An image of a different size is resized to
  the square first.

  Args:
    padding: width of the frame in pixels. None means an eighth of the side: 4 px of CIFAR's 32.

  Raises:
    InputError: `padding` is no whole number of 0 or more.

  References:
    He et al., Deep Residual Learning, CVPR 2016, section 4.2. https://arxiv.org/abs/1512.03385
  """
  if padding is not None:
    check_number("pad_and_crop's padding", padding, 0, math.inf, whole=True)

  def crop(picture: Picture, size: int, interpolation: str, rng: np.random.Generator) -> np.ndarray:
    pixels = picture.pixels()
    if pixels.shape[:2] != (size, size):
      pixels = resize(pixels, (size, size), interpolation)
    margin = size // 8 if padding is None else padding
    padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)))
    top, left = rng.integers(0, 2 * margin + 1, 2)
    return padded[top : top + size, left : left + size]

  return crop


def random_resized_crop(
  area: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Crop:
  """Returns a crop that cuts out a random rectangle and resizes it to a square.

  The area of the rectangle is uniform in `area` times the image's area. Its aspect ratio is
  log-uniform in `ratio`. After ten rectangles that do not fit into the image, the crop takes the
  largest central rectangle within these ratios.

  A JPEG is decoded at the smallest scale at which the rectangle still has as many pixels as the
  square. OpenCV resamples without antialiasing. Where the rectangle shrinks to half or less, each
  pixel is an average over an area instead.

  Args:
    area: least and largest share of the image's area, in 0 ... 1.
    ratio: least and largest width / height.

  Raises:
    InputError: `area` or `ratio` is no range.

  References:
    Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.
      https://arxiv.org/abs/1409.4842
  """
  area = check_range("random_resized_crop's area", area, 0, 1)
  ratio = check_range("random_resized_crop's ratio", ratio, 0, math.inf)

  def crop(picture: Picture, size: int, interpolation: str, rng: np.random.Generator) -> np.ndarray:
    left, top, right, bottom = random_box(picture.width, picture.height, area, ratio, rng)
    shorter = min(right - left, bottom - top)
    pixels = picture.pixels(max(r for r in REDUCTIONS if r == 1 or shorter // r >= size))
    # The box is in pixels of the whole image; the decoded image may be smaller. Rounding outwards
    # keeps every pixel that the box touches.
    x, y = pixels.shape[1] / picture.width, pixels.shape[0] / picture.height
    rectangle = pixels[int(top * y) : math.ceil(bottom * y), int(left * x) : math.ceil(right * x)]
    halved = min(rectangle.shape[:2]) >= 2 * size
    method = cv2.INTER_AREA if halved else INTERPOLATIONS[interpolation].opencv
    return cv2.resize(rectangle, (size, size), interpolation=method)

  return crop


def random_box(
  width: int,
  height: int,
  area: tuple[float, float],
  ratio: tuple[float, float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """Draws the rectangle that `random_resized_crop` cuts out.

  Returns:
    (left, top, right, bottom) in pixels.
  """
  log_ratio = math.log(ratio[0]), math.log(ratio[1])
  # One draw serves all ten attempts, so that later draws do not depend on their number.
  for share, shape, x, y in rng.random((10, 4)).tolist():
    pixels = width * height * _between(area, share)
    aspect = math.exp(_between(log_ratio, shape))
    # w h = pixels and w / h = aspect.
    w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
      return (left, top, left + w, top + h)
  # The whole image where its ratio is allowed, else the image cut to the nearest allowed ratio.
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  left, top = (width - w) // 2, (height - h) // 2
  return (left, top, left + w, top + h)


def _between(limits: tuple[float, float], share: float) -> float:
  """Interpolates linearly from the first limit (share 0) to the second (share 1)."""
  return limits[0] + (limits[1] - limits[0]) * share
