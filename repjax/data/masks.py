"""Masks: PNG files whose pixels name classes, and the rules that turn their values into classes.

Everywhere else in the package a mask is an array of classes, uint8 (H, W), with 255 where no class
counts.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from repjax.data import formats
from repjax.data.decode import turned

IGNORED = 255
"""The class of pixels that neither training nor evaluation counts."""
MOST_CLASSES = IGNORED
"""Number of classes that a mask can name."""
_UNKNOWN = -1

Color = tuple[int, int, int]


def lookup(classes: Mapping[int, int]) -> np.ndarray:
  """Returns the table by which `classes_of_values` translates.

  Args:
    classes: value in a mask to its class. The value 255 is ignored if it is not named.

  Returns:
    int16 (256,): the class of each value, and -1 for values that may not occur.
  """
  table = np.full(256, _UNKNOWN, np.int16)
  table[IGNORED] = IGNORED
  table[list(classes)] = list(classes.values())
  return table


def classes_of_values(data: bytes, table: np.ndarray) -> np.ndarray:
  """Decodes an index mask: a grey PNG of at most 8 bits, or the indices of one with a palette.

  Args:
    data: the encoded mask.
    table: from `lookup`.

  Returns:
    uint8 (H, W), upright.

  Raises:
    ValueError: the bytes are no such PNG, or hold a value that the table does not know.
  """
  image = _opened(data)
  if image.mode not in ("1", "L", "P"):
    raise ValueError(
      f"it is a mask of colours ({image.mode}), and no table says which colour is which class"
    )
  return _translated(_values(image, data), table)


def palette(count: int) -> tuple[Color, ...]:
  """Returns colours that differ well, the first one black: those of PASCAL VOC.

  The bits of a class's number go round to red, green and blue, the highest bits first.

  References:
    Everingham et al., The PASCAL Visual Object Classes Challenge, IJCV 2010, the development kit's
      VOClabelcolormap.
  """
  colors = []
  for number in range(count):
    color = [0, 0, 0]
    for bit in range(8):
      for channel in range(3):
        color[channel] |= (number >> (3 * bit + channel) & 1) << (7 - bit)
    colors.append(tuple(color))
  return tuple(colors)


def encoded(classes: np.ndarray, colors: Sequence[Color] = ()) -> bytes:
  """Returns a mask, uint8 (H, W), as the bytes of a PNG whose values are the classes.

  Args:
    classes: the class of each pixel.
    colors: a colour for each class, in which programs show the mask; empty: the mask is grey.
  """
  file, image = io.BytesIO(), Image.fromarray(classes)
  if colors:
    # The mode has a palette; the values of the pixels stay the classes.
    image.putpalette([value for color in colors for value in color])
  image.save(file, "PNG")
  return file.getvalue()


def overlay(pixels: np.ndarray, classes: np.ndarray, colors: Sequence[Color]) -> np.ndarray:
  """Returns an image with the colours of the classes over it, each at half.

  Args:
    pixels: uint8 (H, W, 3).
    classes: uint8 (H, W). Pixels without a class, 255, stay as they are.
    colors: the colour of each class.
  """
  table = np.zeros((IGNORED + 1, 3), np.uint16)
  table[: len(colors)] = colors
  mixed = ((pixels.astype(np.uint16) + table[classes] + 1) // 2).astype(np.uint8)
  return np.where((classes == IGNORED)[..., None], pixels, mixed)


class Rules(NamedTuple):
  """The rules by which the masks of a folder name classes.

  Attributes:
    table: from `lookup`; it translates the values of index masks.
    colors: each colour that masks of colours may have, to its class; None: no colours are known.
  """

  table: np.ndarray
  colors: Mapping[Color, int] | None

  def classes(self, data: bytes) -> np.ndarray:
    """Decodes a mask of any kind.

    A grey PNG is read by its values. A PNG with a palette is read by the colours that it shows
    where the rules know colours, else by its indices.

    Returns:
      uint8 (H, W), upright.

    Raises:
      ValueError: the bytes are no mask, or hold a value or colour of no class.
    """
    image = _opened(data)
    if self.colors is None or image.mode in ("1", "L"):
      return classes_of_values(data, self.table)
    if image.mode not in ("P", "RGB", "RGBA"):
      raise ValueError(f"its pixels are of the kind {image.mode}, and masks are grey or RGB")
    if image.mode == "RGBA" and image.getchannel("A").getextrema() != (255, 255):
      raise ValueError("some of its pixels are transparent, and every pixel needs a class")
    pixels = turned(np.asarray(image.convert("RGB")), formats.orientation_of(image))
    return _by_colors(pixels, self.colors)


def _opened(data: bytes) -> Image.Image:
  """Opens a mask and decodes its pixels, as they are stored."""
  image = formats.open_image(data)
  if image.format != "PNG":
    raise ValueError(f"a mask is a PNG, and this is a {image.format}")
  if formats.png_depth(data) == 16:
    raise ValueError("it has 16 bits for each value, and a mask has at most 8")
  image.load()
  return image


def _values(image: Image.Image, data: bytes) -> np.ndarray:
  """Returns the values of an index mask, uint8 (H, W), upright."""
  values = np.asarray(image).astype(np.uint8)
  depth = formats.png_depth(data)
  if image.mode == "L" and depth < 8:  # Pillow gives such values the range of 8 bits
    values = values // (255 // (2**depth - 1))
  return turned(values, formats.orientation_of(image))


def _translated(values: np.ndarray, table: np.ndarray) -> np.ndarray:
  classes = table[values]
  if (unknown := classes == _UNKNOWN).any():
    place = _first(unknown)
    known = int(np.count_nonzero(table != _UNKNOWN))
    raise ValueError(
      f"pixel {place[::-1]} has the value {values[place]}, which is none of the {known} known ones"
    )
  return classes.astype(np.uint8)


def _by_colors(pixels: np.ndarray, colors: Mapping[Color, int]) -> np.ndarray:
  """Returns the class of each pixel of an RGB image."""
  codes = _codes(pixels)
  known = _codes(np.array(list(colors), np.uint8))
  order = np.argsort(known)
  found = order[np.searchsorted(known, codes, sorter=order).clip(max=len(known) - 1)]
  if (unknown := known[found] != codes).any():
    place = _first(unknown)
    color = tuple(map(int, pixels[place]))
    raise ValueError(f"pixel {place[::-1]} has the colour {color}, which no class has")
  return np.array(list(colors.values()), np.uint8)[found]


def _codes(pixels: np.ndarray) -> np.ndarray:
  """Returns a number for each colour (..., 3)."""
  return pixels.astype(np.int32) @ np.array([65536, 256, 1], np.int32)


def _first(where: np.ndarray) -> tuple[int, int]:
  """Returns the row and column of the first True."""
  row, column = divmod(int(where.argmax()), where.shape[1])
  return row, column


def colors_of(colors: Sequence[Any]) -> tuple[Color, ...]:
  """Returns colours as tuples of numbers."""
  return tuple((int(red), int(green), int(blue)) for red, green, blue in colors)
