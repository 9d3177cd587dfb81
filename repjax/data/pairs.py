"""Decodes examples: the image, or the image and the classes of its pixels."""

from typing import Any, NamedTuple

import numpy as np

from repjax.data.decode import Picture, image_errors
from repjax.data.masks import IGNORED, classes_of_values

WAY_OUT = "Repair or remove the file, and prepare the data set again"
"""What to do about an example that cannot be decoded."""


def picture_of(example: dict[str, Any]) -> Picture:
  """Returns the image of an example, not decoded yet."""
  return Picture(example["image"], name_of(example), WAY_OUT)


def name_of(example: dict[str, Any]) -> str:
  """Returns the name of an example for errors."""
  return example.get("name", "the image")


class Pair(NamedTuple):
  """An image and the class of each of its pixels.

  Attributes:
    pixels: uint8 (H, W, 3).
    classes: uint8 (H, W), 255 where no class counts.
    fill: the colour around the image.
  """

  pixels: np.ndarray
  classes: np.ndarray
  fill: tuple[int, int, int]


def pair_of(example: dict[str, Any], fill: tuple[int, int, int]) -> Pair:
  """Decodes an example for segmentation.

  Raises:
    InputError: image or mask cannot be decoded, or their sizes differ; the text names the example.
  """
  pixels = picture_of(example).pixels()
  name = f"the mask of {name_of(example)}"
  with image_errors(name, WAY_OUT):
    classes = example["mask"]
    if isinstance(classes, bytes):
      classes = classes_of_values(classes, example["table"])
    check_sizes(pixels.shape[:2], classes.shape)
  return Pair(pixels, classes, fill)


def check_sizes(image: tuple[int, ...], mask: tuple[int, ...]) -> None:
  """Raises ValueError unless image and mask, both (height, width), have the same size."""
  if image != mask:
    sizes = [f"{width} x {height}" for height, width in (mask, image)]
    raise ValueError(f"it has {sizes[0]} pixels, and its image has {sizes[1]}")


def on_canvas(pair: Pair, canvas: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
  """Lays a pair at the top left of a canvas of (height, width).

  Returns:
    The image, uint8 (height, width, 3), filled up with the pair's colour; and the classes, uint8
    (height, width), filled up with 255.

  Raises:
    ValueError: the pair is larger than the canvas.
  """
  height, width = pair.classes.shape
  if height > canvas[0] or width > canvas[1]:
    raise ValueError(
      f"it has {width} x {height} pixels, and the split's largest image is said to have "
      f"{canvas[1]} x {canvas[0]}"
    )
  pixels = np.empty((*canvas, 3), np.uint8)
  pixels[:] = pair.fill
  pixels[:height, :width] = pair.pixels
  classes = np.full(canvas, IGNORED, np.uint8)
  classes[:height, :width] = pair.classes
  return pixels, classes
