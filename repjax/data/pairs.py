"""Decodes examples: the image, or the image and the classes of its pixels."""

from collections.abc import Sequence
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
  classes = np.full(canvas, IGNORED, np.uint8)
  classes[:height, :width] = pair.classes
  return laid_out(pair.pixels, canvas, pair.fill), classes


def laid_out(pixels: np.ndarray, canvas: tuple[int, int], fill: tuple[int, int, int]) -> np.ndarray:
  """Returns an image at the top left of a canvas of one colour, uint8 (height, width, 3).

  Args:
    pixels: uint8 (H, W, 3), no larger than the canvas.
    canvas: (height, width).
    fill: the colour of the rest.
  """
  height, width = pixels.shape[:2]
  laid = np.empty((*canvas, 3), np.uint8)
  laid[:] = fill
  laid[:height, :width] = pixels
  return laid


def color_of(mean: Sequence[float]) -> tuple[int, int, int]:
  """Returns a mean in 0 ... 1 as the nearest colour of bytes."""
  red, green, blue = (min(max(round(255 * value), 0), 255) for value in mean)
  return red, green, blue


def window_starts(side: int, window: int) -> list[int]:
  """Returns where windows begin along a side: every two thirds of a window, and at the end.

  Args:
    side: length of the side in pixels.
    window: length of a window. A longer window begins at 0.
  """
  last = max(0, side - window)
  return [*range(0, last, -(-2 * window // 3)), last]
