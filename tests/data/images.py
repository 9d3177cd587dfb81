"""Images that the data tests make."""

import io
import types

import numpy as np
from PIL import Image


def noise(width, height, seed=0):
  """Returns an RGB array (height, width, 3) in which no pixel is black."""
  return np.random.default_rng(seed).integers(1, 256, (height, width, 3), np.uint8)


def smooth(width, height):
  """Returns an RGB array without sharp edges, which JPEG and resampling hardly change."""
  y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
  waves = [np.sin(3 * x + 1), np.cos(2 * y), np.sin(2 * x + 3 * y)]
  return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


def encoded(image, file_format="PNG", **options):
  """Encodes an array or a Pillow image, and returns the bytes of the file."""
  if isinstance(image, np.ndarray):
    image = Image.fromarray(image)
  file = io.BytesIO()
  image.save(file, file_format, **options)
  return file.getvalue()


def rotated(image, orientation, file_format="JPEG"):
  """Encodes an image with an EXIF tag for its orientation."""
  exif = Image.Exif()
  exif[0x0112] = orientation
  return encoded(image, file_format, exif=exif, quality=95)


def scripted(integers=(), random=()):
  """Returns a generator of random numbers that yields the given numbers, whatever the range."""
  integers, random = iter(integers), iter(random)
  return types.SimpleNamespace(
    integers=lambda *_: next(integers), random=lambda *_: np.asarray(next(random))
  )


def by_pillow(pixels, resized, interpolation):
  """Returns a Pillow image of the size `resized`, resampled where the size differs."""
  image = Image.fromarray(pixels)
  method = getattr(Image.Resampling, interpolation.upper())
  return image if image.size == resized else image.resize(resized, method)
