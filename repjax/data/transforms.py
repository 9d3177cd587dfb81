"""The transforms of evaluation: an image of any size becomes a uint8 square, as Pillow resizes.

Training's crops are in repjax/data/augmentation.
"""

import os
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from repjax import regular_files
from repjax.data import files
from repjax.data.decode import Picture, image_errors
from repjax.data.formats import FREE_PIXELS
from repjax.errors import InputError, printable


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
  width, height = _resized_shape(picture, resize_size)
  corner = round((height - size) / 2), round((width - size) / 2)
  return _crops(picture, (width, height), [corner], size, interpolation)[0]


def read_image(
  file: str | os.PathLike[str] | bytes, preprocessing: Any, name: str | None = None
) -> np.ndarray:
  """Reads an image file as a model sees the image in evaluation.

  Args:
    file: a path, or the bytes of a file.
    preprocessing: the `preprocessing` of the model's ModelSpec.
    name: the image's name in errors; None: its path, if it has one.

  Returns:
    uint8 (S, S, 3). `preprocessing.normalize` makes the model's input of a batch of such images.

  Raises:
    InputError: the file does not exist or is no image.

  Example:
    model, variables, spec = repjax.load("runs/pets")
    image = read_image("cat.jpg", spec.preprocessing)
    logits = model.apply(variables, spec.preprocessing.normalize(image[None]))
  """
  picture = open_picture(file, name)
  size, resize_size = preprocessing.image_size, preprocessing.resize_size
  with image_errors(name or _name_of(file)):
    return resize_and_crop(picture, size, resize_size, preprocessing.interpolation)


def open_picture(file: str | os.PathLike[str] | bytes, name: str | None = None) -> Picture:
  """Returns the image in a file, not decoded yet.

  Args:
    file: a path, or the bytes of a file.
    name: the image's name in errors; None: its path, if it has one.

  Raises:
    InputError: the file does not exist or is no image.
  """
  name = name or _name_of(file)
  with image_errors(name):
    try:
      data = file if isinstance(file, bytes) else regular_files.read(file, files.LARGEST)
    except OSError as error:
      raise InputError(f"{printable(name)} cannot be read: {error.strerror}") from error
    return Picture(data, name)


def _name_of(file: str | os.PathLike[str] | bytes) -> str:
  """Returns the name of a file in errors."""
  return "the image" if isinstance(file, bytes) else os.fsdecode(file)


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
  width, height = _resized_shape(picture, resize_size)
  below, right = height - size, width - size
  corners = [(0, 0), (0, right), (below, 0), (below, right), (round(below / 2), round(right / 2))]
  crops = np.stack(_crops(picture, (width, height), corners, size, interpolation))
  return np.concatenate([crops, crops[:, :, ::-1]])  # (10, S, S, 3)


def resize(pixels: np.ndarray, shape: tuple[int, int], interpolation: str) -> np.ndarray:
  """Resizes to (width, height) with antialiasing, to the pixels that Pillow produces."""
  image = Image.fromarray(pixels).resize(shape, INTERPOLATIONS[interpolation].pillow)
  return np.asarray(image)


def _resized_shape(picture: Picture, resize_size: int) -> tuple[int, int]:
  """Returns the width and height of an image whose shorter side becomes `resize_size`.

  The longer side keeps the proportion and is rounded down, as in torchvision.
  """
  width, height = picture.width, picture.height
  if width <= height:
    return resize_size, int(resize_size * height / width)
  return int(resize_size * width / height), resize_size


def _crops(
  picture: Picture,
  shape: tuple[int, int],
  corners: list[tuple[int, int]],
  size: int,
  interpolation: str,
) -> list[np.ndarray]:
  """Returns squares that are cut out of the resized image.

  Args:
    picture: the image.
    shape: width and height of the resized image.
    corners: top and left of each square in the resized image.
    size: side of the squares.
    interpolation: a key of INTERPOLATIONS.
  """
  pixels = picture.pixels()
  if max(shape) > _LONGEST * min(shape) or shape[0] * shape[1] > FREE_PIXELS:
    return [_cut_of_large(pixels, shape, *corner, size, interpolation) for corner in corners]
  if shape != (picture.width, picture.height):
    pixels = resize(pixels, shape, interpolation)
  return [pixels[top : top + size, left : left + size] for top, left in corners]


_LONGEST = 8
"""Ratio of the sides above which an image is not resized as a whole."""


def _cut_of_large(
  pixels: np.ndarray,
  shape: tuple[int, int],
  top: int,
  left: int,
  size: int,
  interpolation: str,
) -> np.ndarray:
  """Returns a square of the resized image, and resizes no more than the square.

  A file of a hundred bytes can hold 20,000 x 1 pixels, which would become gigabytes. So would an
  image of any size, if a model asks for a shorter side of thousands of pixels. Other images
  are resized as a whole, because Pillow takes the corners of a part as float32. The pixels of a
  part can therefore differ in the last bit, and "nearest" can choose a different pixel.
  """
  # Pixels of the image for each pixel of the resized image, by width and height.
  x, y = pixels.shape[1] / shape[0], pixels.shape[0] / shape[1]
  # Rounding must not carry the box over the edge of the image.
  right, bottom = min((left + size) * x, pixels.shape[1]), min((top + size) * y, pixels.shape[0])
  box = (left * x, top * y, right, bottom)
  method = INTERPOLATIONS[interpolation].pillow
  return np.asarray(Image.fromarray(pixels).resize((size, size), method, box=box))
