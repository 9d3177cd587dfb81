"""The single image operations that augmentation policies are made of, on uint8 RGB arrays.

Each takes pixels (H, W, 3) and returns a new array of that shape. What changes colours equals
Pillow's ImageOps and ImageEnhance, which the papers used, to the pixel (`hue` apart). What moves
pixels fills with grey 128, as the papers' code does, and samples bilinearly.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

FILL = 128
"""What comes in from outside of an image: the fill of AutoAugment's and RandAugment's code."""

_GREYS = np.arange(256)
_LUMA = np.array([[19595, 38470, 7471, 32768]], np.float32) / 65536  # ITU-R 601, and 1/2 to round


def shear_x(pixels: np.ndarray, amount: float) -> np.ndarray:
  """Slants the image sideways: output(x, y) = input(x + amount y, y), from the top left corner.

  All but the seam is within one level of Pillow's bilinear `Image.transform`; there the image fades
  into the grey where Pillow repeats its last pixel. The same holds for `shear_y` and `rotate`.
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
  centre = np.array([width / 2, height / 2])
  return _warp(pixels, np.column_stack([turn, centre - turn @ centre]))


def autocontrast(pixels: np.ndarray) -> np.ndarray:
  """Stretches each channel so that its darkest value is 0 and its lightest 255."""
  tables = []
  for channel in cv2.split(pixels):
    low, high = int(channel.min()), int(channel.max())
    scale = 255 / (high - low) if high > low else 1.0
    offset = -low * scale if high > low else 0.0
    tables.append(_clipped(_GREYS * scale + offset))
  return cv2.LUT(pixels, np.stack(tables, -1)[None])


def equalize(pixels: np.ndarray) -> np.ndarray:
  """Spreads the values of each channel so that their histogram becomes as even as it can be."""
  tables = []
  for channel in range(3):
    counts = cv2.calcHist([pixels], [channel], None, [256], [0, 256]).ravel().astype(np.int64)
    used = counts[counts > 0]
    step = int(used.sum() - used[-1]) // 255
    below = np.cumsum(counts) - counts  # pixels darker than each value
    tables.append(_clipped((below + step // 2) // step) if step else _GREYS.astype(np.uint8))
  return cv2.LUT(pixels, np.stack(tables, -1)[None])


def invert(pixels: np.ndarray) -> np.ndarray:
  """255 - v."""
  return ~pixels


def posterize(pixels: np.ndarray, bits: int) -> np.ndarray:
  """Keeps the `bits` (0 to 8) highest bits of each value; none are left of 0."""
  return pixels & np.uint8(256 - (1 << (8 - bits)))


def solarize(pixels: np.ndarray, threshold: float) -> np.ndarray:
  """Inverts the values from `threshold` on."""
  return cv2.LUT(pixels, np.where(threshold > _GREYS, _GREYS, 255 - _GREYS).astype(np.uint8))


def solarize_add(pixels: np.ndarray, amount: int) -> np.ndarray:
  """Adds `amount` to the values below 128, up to 255."""
  return cv2.LUT(pixels, _clipped(np.where(_GREYS < 128, _GREYS + amount, _GREYS)))


def color(pixels: np.ndarray, factor: float) -> np.ndarray:
  """Saturation: grey + factor (v - grey), grey being the pixel's luma; 1 changes nothing."""
  grey = _luma(pixels)
  return _blend(cv2.merge([grey, grey, grey]), pixels, factor)


def contrast(pixels: np.ndarray, factor: float) -> np.ndarray:
  """mean + factor (v - mean), mean being the image's mean luma; 1 changes nothing."""
  mean = int(_luma(pixels).mean() + 0.5)
  return cv2.LUT(pixels, _blend(np.full(256, mean), _GREYS, factor))


def brightness(pixels: np.ndarray, factor: float) -> np.ndarray:
  """factor v; 1 changes nothing."""
  return cv2.LUT(pixels, _blend(np.zeros(256), _GREYS, factor))


def sharpness(pixels: np.ndarray, factor: float) -> np.ndarray:
  """smooth + factor (v - smooth), smooth being the 3x3 average in which the centre counts
  five times; 1 changes nothing, 0 blurs. The image's border stays.
  """
  sums = cv2.boxFilter(pixels, cv2.CV_32F, (3, 3), normalize=False)
  smooth = cv2.addWeighted(sums, 1 / 13, pixels, 4 / 13, 0, dtype=cv2.CV_8U)
  for border in (np.s_[[0, -1]], np.s_[:, [0, -1]]):
    smooth[border] = pixels[border]
  return _blend(smooth, pixels, factor)


def hue(pixels: np.ndarray, turn: float) -> np.ndarray:
  """Turns every colour's hue by `turn` of the full circle, in 256 steps; greys stay.

  Hue, saturation and value are rounded to 8 bits, as in Pillow's HSV mode, so a colour comes back
  with an error of up to 5 levels even from a turn of 0.
  """
  hsv = cv2.cvtColor(pixels, cv2.COLOR_RGB2HSV_FULL)
  hsv[..., 0] += np.uint8(round(turn * 256) % 256)  # wraps
  return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB_FULL)


def _warp(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
  """output(p) = input(matrix [p; 1]), where a pixel's centre lies at half-integer coordinates."""
  height, width = pixels.shape[:2]
  half = np.array([0.5, 0.5])
  offset = matrix @ [0.5, 0.5, 1] - half  # OpenCV has the centres at integers
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
  """Grey (H, W) as Pillow's mode L; OpenCV's own differs by a level in some pixels."""
  return cv2.transform(pixels.astype(np.float32), _LUMA).astype(np.uint8)  # sums < 2^24 are exact


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
  """start + factor (end - start), cut off to uint8; in float32 as in Pillow, so equal to it."""
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
"""Name to `operation(pixels)` or `operation(pixels, value)`: what RandAugment chooses from."""
