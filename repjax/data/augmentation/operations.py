"""The single image operations that augmentation policies apply, on uint8 RGB arrays.

Each operation takes pixels (H, W, 3) and returns a new array of that shape. Operations on colours
equal Pillow's ImageOps and ImageEnhance to the pixel, except for `hue`; the papers used Pillow.
Operations that move pixels fill with grey 128, as the papers' code does, and sample bilinearly.

OpenCV does the work because it takes a fraction of Pillow's time. Where the two libraries round
differently, the operation is written out here so that the result is Pillow's.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

FILL = 128
"""The grey that fills in from outside of an image, as in AutoAugment's and RandAugment's code."""

_GREYS = np.arange(256)
# Weights of red, green and blue in ITU-R 601, in the 16-bit integers that Pillow uses. The last
# column is 1/2, so that cutting off the fraction rounds to the nearest level.
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536


def shear_x(pixels: np.ndarray, amount: float) -> np.ndarray:
  """Slants the image sideways: output(x, y) = input(x + amount y, y), from the top left corner.

  Away from the seam the result is within one level of Pillow's bilinear `Image.transform`. At the
  seam the image fades into the grey, where Pillow repeats its last pixel. The same holds for
  `shear_y` and `rotate`.
  """
  return _warp(pixels, np.array([[1, amount, 0], [0, 1, 0]]))


def shear_y(pixels: np.ndarray, amount: float) -> np.ndarray:
  """Slants the image upwards: output(x, y) = input(x, y + amount x), from the top left corner."""
  return _warp(pixels, np.array([[1, 0, 0], [amount, 1, 0]]))


def translate_x(pixels: np.ndarray, shift: int) -> np.ndarray:
  """Moves the image `shift` whole pixels to the right: output(x, y) = input(x - shift, y)."""
  width = pixels.shape[1]
  shift = max(-width, min(shift, width))
  moved = np.full_like(pixels, FILL)
  # A positive shift copies to the columns from `shift` on, a negative one from `-shift` on.
  moved[:, max(shift, 0) : width + min(shift, 0)] = pixels[
    :, max(-shift, 0) : width - max(shift, 0)
  ]
  return moved


def translate_y(pixels: np.ndarray, shift: int) -> np.ndarray:
  """Moves the image `shift` whole pixels down: output(x, y) = input(x, y - shift)."""
  return translate_x(pixels.swapaxes(0, 1), shift).swapaxes(0, 1)


def rotate(pixels: np.ndarray, degrees: float) -> np.ndarray:
  """Turns the image counter-clockwise about its centre."""
  height, width = pixels.shape[:2]
  cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
  turn = np.array([[cos, -sin], [sin, cos]])
  # turn (p - centre) + centre: the centre stays where it is.
  centre = np.array([width / 2, height / 2])
  return _warp(pixels, np.column_stack([turn, centre - turn @ centre]))


def autocontrast(pixels: np.ndarray) -> np.ndarray:
  """Stretches each channel so that its darkest value becomes 0 and its lightest 255."""
  tables = []
  for channel in cv2.split(pixels):
    low, high = int(channel.min()), int(channel.max())
    # A channel of one value cannot be stretched and stays.
    scale = 255 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    tables.append(_clipped(_GREYS * scale + offset))
  return cv2.LUT(pixels, np.stack(tables, -1)[None])


def equalize(pixels: np.ndarray) -> np.ndarray:
  """Spreads the values of each channel so that their histogram becomes as even as possible.

  A value becomes its rank: the count of darker pixels, in units of `step` pixels. As in Pillow,
  the lightest value that occurs does not count for the step, and all divisions are of integers.
  """
  tables = []
  for channel in range(3):
    counts = cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
    used = counts[counts > 0]
    step = int(used.sum() - used[-1]) // 255
    below = np.cumsum(counts) - counts  # pixels darker than each value
    # With fewer than 255 pixels darker than the lightest the step is 0, and the channel stays.
    tables.append(_clipped((below + step // 2) // step) if step else _GREYS.astype(np.uint8))
  return cv2.LUT(pixels, np.stack(tables, -1)[None])


def invert(pixels: np.ndarray) -> np.ndarray:
  """Inverts every value v: 255 - v."""
  return ~pixels


def posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
  """Keeps the `bits` highest bits of each value, 0 to 8; with 0 bits the image is black."""
  return pixels & np.uint8(256 - (1 << (8 - bits)))


def solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
  """Inverts the values from `threshold` on."""
  return cv2.LUT(pixels, np.where(threshold > _GREYS, _GREYS, 255 - _GREYS).astype(np.uint8))


def solarize_add(pixels: np.ndarray, amount: int) -> np.ndarray:
  """Adds `amount` to the values below 128; sums above 255 become 255."""
  return cv2.LUT(pixels, _clipped(np.where(_GREYS < 128, _GREYS + amount, _GREYS)))


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Changes the saturation: grey + factor (v - grey), where grey is the pixel's luma.

  A factor of 1 changes nothing; 0 gives a grey image.
  """
  grey = _luma(pixels)
  return _blend(cv2.merge([grey, grey, grey]), pixels, factor)


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Changes the contrast: mean + factor (v - mean), where mean is the image's mean luma.

  A factor of 1 changes nothing; 0 gives one grey.
  """
  mean = int(_luma(pixels).mean() + 0.5)
  return cv2.LUT(pixels, _blend(np.full(256, mean), _GREYS, factor))


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Multiplies every value by `factor`; products above 255 become 255."""
  return cv2.LUT(pixels, _blend(np.zeros(256), _GREYS, factor))


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Changes the sharpness: smooth + factor (v - smooth), where smooth is a 3x3 average.

  The centre of the average counts five times. A factor of 1 changes nothing; 0 blurs. The pixels
  at the image's border stay.
  """
  # Every pixel of the 3x3 counts 1/13; the centre counts 4/13 more, which makes 5/13.
  sums = cv2.boxFilter(pixels, cv2.CV_32F, (3, 3), normalize=False)
  smooth = cv2.addWeighted(sums, 1 / 13, pixels, 4 / 13, 0, dtype=cv2.CV_8U)
  for border in (np.s_[[0, -1]], np.s_[:, [0, -1]]):
    smooth[border] = pixels[border]
  return _blend(smooth, pixels, factor)


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
  """Turns the hue of every colour by `turn` of the full circle, in 256 steps; greys stay.

  Hue, saturation and value are rounded to 8 bits, as in Pillow's HSV mode. Therefore even a turn
  of 0 changes values by up to 5 levels.
  """
  hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
  hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # the addition of uint8 wraps, as a circle does
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _warp(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """Samples the image at affinely mapped places: output(p) = input(matrix [p; 1]).

  Args:
    pixels: uint8 (H, W, 3).
    matrix: (2, 3), for coordinates in which the centre of a pixel lies at half-integers.
  """
  height, width = pixels.shape[:2]
  half = np.array([0.5, 0.5])
  # OpenCV has the centres at integers: shift by a half before the map, and back after it.
  offset = matrix @ [0.5, 0.5, 1] - half
  image = cv2.cvtColor(pixels, cv2.COLOR_RGB2RGBA)  # four channels take half the time of three
  warped = cv2.warpAffine(
    image,
    np.column_stack([matrix[:, :2], offset]),
    (width, height),
    flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
    borderValue=(FILL,) * 4,
  )
  return cv2.cvtColor(warped, cv2.COLOR_RGBA2RGB)


def _luma(pixels: np.ndarray) -> np.ndarray:
  """Returns the grey levels (H, W) of Pillow's mode L.

  OpenCV's own conversion differs by a level in some pixels. The sums here stay below 2^24 in units
  of 1/65536, so float32 holds them exactly.
  """
  return cv2.transform(pixels.astype(np.float32), _LUMA).astype(np.uint8)


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
  """Returns start + factor (end - start), clipped to uint8.

  The computation is in float32 and cuts off the fraction, as in Pillow, so the results are equal.
  """
  start = start.astype(np.float32)
  mixed = end.astype(np.float32)
  mixed -= start
  mixed *= np.float32(factor)
  mixed += start
  return np.clip(mixed, 0, 255, out=mixed).astype(np.uint8)


def _clipped(values: np.ndarray) -> np.ndarray:
  return np.clip(values, 0, 255).astype(np.uint8)


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
  operation.__name__: operation
  for operation in (
    autocontrast,
    equalize,
    invert,
    rotate,
    posterize,
    solarize,
    solarize_add,
    color,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
  )
}
"""Name to `operation(pixels)` or `operation(pixels, value)`.

RandAugment draws from this table by position, so a new order would change what a seed draws.
"""
