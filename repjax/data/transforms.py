"""From an example to a uint8 image of one size: decoding, evaluation resize, augmentation."""

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image

INTERPOLATIONS = {
  "nearest": Image.Resampling.NEAREST,
  "bilinear": Image.Resampling.BILINEAR,
  "bicubic": Image.Resampling.BICUBIC,
}


def decode(image: Any) -> Image.Image:
  """Encoded bytes, or a uint8 array (H, W, 3), as an RGB image."""
  if isinstance(image, np.ndarray):
    return Image.fromarray(image)
  decoded = Image.open(io.BytesIO(image))
  if decoded.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
    decoded = Image.fromarray((np.asarray(decoded) >> 8).astype(np.uint8))
  return decoded.convert("RGB")


def resize_and_crop(
  image: Image.Image, size: int, resize_size: int, interpolation: str
) -> np.ndarray:
  """The papers' evaluation transform: shorter side to `resize_size`, then the central square.

  Args:
    image: RGB.
    size: side of the result in pixels, at most `resize_size`.
    resize_size: length of the shorter side after resizing, with antialiasing.
    interpolation: a key of INTERPOLATIONS.

  Returns:
    uint8 (size, size, 3).
  """
  width, height = image.size
  if min(width, height) != resize_size:
    # The longer side rounds down, as torchvision does it.
    width, height = (
      (resize_size, int(resize_size * height / width))
      if width <= height
      else (int(resize_size * width / height), resize_size)
    )
    image = image.resize((width, height), INTERPOLATIONS[interpolation])
  left, top = round((width - size) / 2), round((height - size) / 2)
  return np.asarray(image.crop((left, top, left + size, top + size)))


def shift(
  image: Image.Image, size: int, interpolation: str, rng: np.random.Generator
) -> np.ndarray:
  """Resizes to a square, then moves it by up to an eighth of its side, black coming in behind."""
  pixels = np.asarray(image.resize((size, size), INTERPOLATIONS[interpolation]))
  margin = size // 8
  padded = np.pad(pixels, ((margin, margin), (margin, margin), (0, 0)))
  top, left = rng.integers(0, 2 * margin + 1, 2)
  return padded[top : top + size, left : left + size]


def random_resized_crop(
  image: Image.Image, size: int, interpolation: str, rng: np.random.Generator
) -> np.ndarray:
  """A random rectangle resized to a square, mirrored half of the time.

  Its area is uniform in 8-100 % of the image's, its aspect ratio log-uniform in 3/4-4/3. After ten
  rectangles that do not fit, the largest central one within those ratios is taken.

  References:
    Szegedy et al., Going Deeper with Convolutions, CVPR 2015, section 6.
      https://arxiv.org/abs/1409.4842
  """
  # Cropped first: a resize of a box would blend in pixels from outside it.
  part = image.crop(_random_box(*image.size, rng))
  pixels = np.asarray(part.resize((size, size), INTERPOLATIONS[interpolation]))
  return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _random_box(width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
  for _ in range(10):
    area = width * height * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    if 0 < w <= width and 0 < h <= height:
      left, top = int(rng.integers(0, width - w + 1)), int(rng.integers(0, height - h + 1))
      return (left, top, left + w, top + h)
  w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
  left, top = (width - w) // 2, (height - h) // 2
  return (left, top, left + w, top + h)


AUGMENTATIONS: dict[str, Callable[[Image.Image, int, str, np.random.Generator], np.ndarray]] = {
  "none": lambda image, size, interpolation, rng: resize_and_crop(image, size, size, interpolation),
  "shift": shift,
  "random_resized_crop": random_resized_crop,
}
"""Name in a config to `augment(image, size, interpolation, rng) -> uint8 (size, size, 3)`."""
