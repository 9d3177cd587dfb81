"""From an image of any size to a uint8 square: evaluation's resize and crop, training's crops."""

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from repjax.data.checks import check_number, check_range
from repjax.data.decode import REDUCTIONS, Picture
from repjax.errors import InputError


class Interpolation(NamedTuple):
  """One way to resample, by its names in Pillow (evaluation) and OpenCV (training)."""

  pillow: Image.Resampling
  opencv: int


INTERPOLATIONS = {
  "nearest": Interpolation(Image.Resampling.NEAREST, cv2.INTER_NEAREST_EXACT),
  "bilinear": Interpolation(Image.Resampling.BILINEAR, cv2.INTER_LINEAR),
  "bicubic": Interpolation(Image.Resampling.BICUBIC, cv2.INTER_CUBIC),
}

Crop = Callable[[Picture, int, str, np.random.Generator], np.ndarray]
"""crop(picture, size, interpolation, rng) -> uint8 (size, size, 3)."""


def resize_and_crop(
  picture: Picture, size: int, resize_size: int, interpolation: str
) -> np.ndarray:
  """The papers' evaluation transform: shorter side to `resize_size`, then the central square.

  To the pixel what Pillow makes of it. `resize_size` holds every convention: 256 for 224 px is the
  papers', `size` itself is "resize S, crop S", floor(size / r) is timm's crop ratio r.

  Args:
    picture: of any size.
    size: side of the result in pixels, at most `resize_size`.
    resize_size: length of the shorter side after resizing, with antialiasing.
    interpolation: a key of INTERPOLATIONS.

  Returns:
    uint8 (size, size, 3).
  """
  pixels = _resized(picture, resize_size, interpolation)
  height, width = pixels.shape[:2]
  return _cut(pixels, round((height - size) / 2), round((width - size) / 2), size)


def read_image(file: str | os.PathLike[str] | bytes, preprocessing: Any) -> np.ndarray:
  """An image file as a model sees it in evaluation.

  Args:
    file: a path, or the bytes of a file.
    preprocessing: of the model's ModelSpec.

  Returns:
    uint8 (S, S, 3); `preprocessing.normalize` makes the model's input of a batch of such images.

  Raises:
    InputError: the file does not exist or is no image.

  Example:
    model, variables, spec = repjax.load("runs/pets")
    image = read_image("cat.jpg", spec.preprocessing)
    logits = model.apply(variables, spec.preprocessing.normalize(image[None]))
  """
  name = "the image" if isinstance(file, bytes) else str(file)
  try:
    data = file if isinstance(file, bytes) else Path(file).read_bytes()
  except OSError as error:
    raise InputError(f"{name} cannot be read: {error.strerror}") from error
  size, resize_size = preprocessing.image_size, preprocessing.resize_size
  return resize_and_crop(Picture(data, name), size, resize_size, preprocessing.interpolation)


def ten_crop(picture: Picture, size: int, resize_size: int, interpolation: str) -> np.ndarray:
  """Four corners and the centre of the resized image, then the mirror images of the five.

  Args: as in `resize_and_crop`.

  Returns:
    uint8 (10, size, size, 3), in the order top left, top right, bottom left, bottom right, centre.

  References:
    Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012,
      section 4.1.
  """
  pixels = _resized(picture, resize_size, interpolation)
  below, right = pixels.shape[0] - size, pixels.shape[1] - size
  corners = [(0, 0), (0, right), (below, 0), (below, right)]
  centre = round(below / 2), round(right / 2)
  crops = np.stack([_cut(pixels, top, left, size) for top, left in [*corners, centre]])
  return np.concatenate([crops, crops[:, :, ::-1]])


def _resized(picture: Picture, resize_size: int, interpolation: str) -> np.ndarray:
  """The whole image with its shorter side at `resize_size`; the longer rounds down."""
  width, height = picture.width, picture.height
  if min(width, height) == resize_size:
    return picture.pixels()
  shape = (
    (resize_size, int(resize_size * height / width))
    if width <= height
    else (int(resize_size * width / height), resize_size)
  )
  return resize(picture.pixels(), shape, interpolation)


def _cut(pixels: np.ndarray, top: int, left: int, size: int) -> np.ndarray:
  return pixels[top : top + size, left : left + size]


def resize(pixels: np.ndarray, shape: tuple[int, int], interpolation: str) -> np.ndarray:
  """Resizes to (width, height) with antialiasing, to the pixel as Pillow does."""
  image = Image.fromarray(pixels).resize(shape, INTERPOLATIONS[interpolation].pillow)
  return np.asarray(image)


def central_square() -> Crop:
  """The largest central square, resized, as in evaluation."""

  def crop(picture: Picture, size: int, interpolation: str, rng: np.random.Generator) -> np.ndarray:
    del rng
    return resize_and_crop(picture, size, size, interpolation)

  return crop


def pad_and_crop(padding: int | None = None) -> Crop:
  """The augmentation of CIFAR: a frame of black pixels, and a random square of the first size.

  Images of another size are resized to the square before.

  Args:
    padding: width of the frame in pixels; None is an eighth of the side, 4 px of CIFAR's 32.

  Raises:
    InputError: a padding below 0.

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
    return _cut(padded, top, left, size)

  return crop


def random_resized_crop(
  area: tuple[float, float] = (0.08, 1.0), ratio: tuple[float, float] = (3 / 4, 4 / 3)
) -> Crop:
  """A random rectangle resized to a square.

  Its area is uniform in `area` of the image's, its aspect ratio log-uniform in `ratio`. After ten
  rectangles that do not fit, the largest central one within those ratios is taken. A JPEG is
  decoded at the smallest scale at which the rectangle still has as many pixels as the square.
  Resampling is OpenCV's, without antialiasing, except where the rectangle has to shrink to half
  or less: pixels there are averages over areas.

  Args:
    area: least and largest share of the image, in 0 ... 1.
    ratio: least and largest width / height.

  Raises:
    InputError: a range that is no range.

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
    x, y = pixels.shape[1] / picture.width, pixels.shape[0] / picture.height
    part = pixels[int(top * y) : math.ceil(bottom * y), int(left * x) : math.ceil(right * x)]
    halved = min(part.shape[:2]) >= 2 * size
    method = cv2.INTER_AREA if halved else INTERPOLATIONS[interpolation].opencv
    return cv2.resize(part, (size, size), interpolation=method)

  return crop


def random_box(
  width: int,
  height: int,
  area: tuple[float, float],
  ratio: tuple[float, float],
  rng: np.random.Generator,
) -> tuple[int, int, int, int]:
  """(left, top, right, bottom) of the rectangle that `random_resized_crop` cuts out."""
  log_ratio = math.log(ratio[0]), math.log(ratio[1])
  for share, shape, x, y in rng.random((10, 4)).tolist():
    pixels = width * height * _between(area, share)
    aspect = math.exp(_between(log_ratio, shape))
    w, h = round(math.sqrt(pixels * aspect)), round(math.sqrt(pixels / aspect))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(x * (width - w + 1)), int(y * (height - h + 1))
      return (left, top, left + w, top + h)
  w = min(width, max(1, round(height * ratio[1])))
  h = min(height, max(1, round(width / ratio[0])))
  left, top = (width - w) // 2, (height - h) // 2
  return (left, top, left + w, top + h)


def _between(limits: tuple[float, float], share: float) -> float:
  return limits[0] + (limits[1] - limits[0]) * share


def flip(probability: float = 0.5) -> Callable[[np.ndarray, np.random.Generator], np.ndarray]:
  """Mirrors left and right with a probability."""
  check_number("flip's probability", probability, 0, 1)

  def step(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return cv2.flip(pixels, 1) if rng.random() < probability else pixels

  return step
