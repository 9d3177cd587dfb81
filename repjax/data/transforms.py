"""The transforms of evaluation: an image of any size becomes a uint8 square, as Pillow resizes.

Training's crops are in repjax/data/augmentation.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from repjax.data.decode import Picture
from repjax.errors import InputError


class Interpolation(NamedTuple):
  """A way to resample.

  Attributes:
    pillow: its constant in Pillow, which resizes for evaluation.
    opencv: its constant in OpenCV, which resizes for training.
  """

  pillow: Image.Resampling
  opencv: int


INTERPOLATIONS = {
  "nearest": Interpolation(Image.Resampling.NEAREST, cv2.INTER_NEAREST_EXACT),
  "bilinear": Interpolation(Image.Resampling.BILINEAR, cv2.INTER_LINEAR),
  "bicubic": Interpolation(Image.Resampling.BICUBIC, cv2.INTER_CUBIC),
}


def resize_and_crop(
  picture: Picture, size: int, resize_size: int, interpolation: str
) -> np.ndarray:
  """Resizes the shorter side to `resize_size`, then cuts out the central square.

  This is the evaluation transform of the papers, with the pixels that Pillow produces. All
  conventions are values of `resize_size`. The papers take 256 for 224 px. `size` itself is
  "resize S, crop S". floor(size / r) is timm's crop ratio r.

  Args:
    picture: an image of any size.
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
  """Reads an image file as a model sees the image in evaluation.

  Args:
    file: a path, or the bytes of a file.
    preprocessing: the `preprocessing` of the model's ModelSpec.

  Returns:
    uint8 (S, S, 3). `preprocessing.normalize` makes the model's input of a batch of such images.

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
  """Cuts four corners and the centre out of the resized image, and adds their mirror images.

  Args: as in `resize_and_crop`.

  Returns:
    uint8 (10, size, size, 3), in the order top left, top right, bottom left, bottom right, centre,
    and the mirror images in the same order.

  References:
    Krizhevsky et al., ImageNet Classification with Deep Convolutional Neural Networks, NIPS 2012,
      section 4.1.
  """
  pixels = _resized(picture, resize_size, interpolation)
  below, right = pixels.shape[0] - size, pixels.shape[1] - size
  corners = [(0, 0), (0, right), (below, 0), (below, right)]
  centre = round(below / 2), round(right / 2)
  crops = np.stack([_cut(pixels, top, left, size) for top, left in [*corners, centre]])
  return np.concatenate([crops, crops[:, :, ::-1]])  # (10, S, S, 3)


def resize(pixels: np.ndarray, shape: tuple[int, int], interpolation: str) -> np.ndarray:
  """Resizes to (width, height) with antialiasing, to the pixels that Pillow produces."""
  image = Image.fromarray(pixels).resize(shape, INTERPOLATIONS[interpolation].pillow)
  return np.asarray(image)


def _resized(picture: Picture, resize_size: int, interpolation: str) -> np.ndarray:
  """Decodes the image and resizes its shorter side to `resize_size`.

  The longer side keeps the proportion and is rounded down, as in torchvision.
  """
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
