"""Decodes images: encoded bytes to RGB pixels, whatever the mode of the file.

OpenCV decodes plain JPEGs, which it does faster than Pillow and to the same pixels. Pillow decodes
everything else, and explains what is wrong with a file.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import cv2
import numpy as np
from PIL import Image

from repjax.data import formats
from repjax.errors import InputError, printable

# The orientation in a file is applied here, for every decoder in the same way.
_PLAIN = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
_REDUCED = {
  1: _PLAIN,
  # OpenCV names these reductions for grey and for BGR only. The bit that IMREAD_REDUCED_COLOR_*
  # adds stands for BGR, so the grey names are combined with RGB instead.
  2: _PLAIN | cv2.IMREAD_REDUCED_GRAYSCALE_2,
  4: _PLAIN | cv2.IMREAD_REDUCED_GRAYSCALE_4,
  8: _PLAIN | cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
REDUCTIONS = tuple(_REDUCED)
"""The factors by which a JPEG can shrink while it is decoded."""

# Orientation in EXIF to whether rows become columns, and to the flip after that in OpenCV's code:
# 0 top to bottom, 1 left to right, -1 both.
_TURNS = {
  2: (False, 1),
  3: (False, -1),
  4: (False, 0),
  5: (True, None),
  6: (True, 1),
  7: (True, -1),
  8: (True, 0),
}


REPAIR = "Repair or remove the file"
"""The way out for an image that cannot be decoded."""


@contextlib.contextmanager
def image_errors(name: object, way_out: str = REPAIR) -> Iterator[None]:
  """Turns every error in the block into an `InputError` that names the image.

  Decoders raise dozens of classes for damaged files. None of them may end more than the one image.

  Args:
    name: the image's name in the text.
    way_out: what to do about it, the end of the text.

  Raises:
    InputError: anything was raised; `fault_of` gives the reason.
  """
  try:
    yield
  except InputError:
    raise
  except Exception as error:
    raise InputError(f"{printable(name)} cannot be decoded: {_reason(error)}. {way_out}") from error


def fault_of(error: InputError) -> str:
  """Returns the reason in an error of `image_errors`, without the name of the image."""
  return _reason(error.__cause__ or error)


def _reason(error: BaseException) -> str:
  """Returns what an error says, in one line."""
  if isinstance(error, MemoryError):
    return "it needs more memory than there is"
  if isinstance(error, OSError) and error.strerror:
    return error.strerror
  return printable(" ".join(str(error).split())[:300]) or type(error).__name__


class Picture:
  """An image whose size is known and whose pixels are not decoded yet.

  Attributes:
    image: the encoded bytes, the array or the Pillow image that was given.
    width: width in pixels as a person sees the image, after the rotation that EXIF asks for.
    height: height in pixels, after the same rotation.
  """

  def __init__(
    self,
    image: bytes | np.ndarray | Image.Image,
    name: str = "the image",
    way_out: str = REPAIR,
  ):
    """Reads the header.

    Args:
      image: an encoded image, a Pillow image, or a uint8 array: RGB (H, W, 3), grey (H, W) or
        (H, W, 1), or RGBA (H, W, 4).
      name: the image's name in errors.
      way_out: as in `image_errors`.

    Raises:
      InputError: the bytes are no image, or claim more pixels than `formats.check_size` allows.
    """
    self.image, self._name, self._way_out = image, name, way_out
    self._opened: Image.Image | None = None  # None where OpenCV shall decode
    self._orientation = 1
    with image_errors(name, way_out):
      self._stored = self._read_header()
    transposed = _TURNS.get(self._orientation, (False, None))[0]
    self.width, self.height = self._stored[::-1] if transposed else self._stored

  def _read_header(self) -> tuple[int, int]:
    """Returns the width and height of the stored pixels, before any rotation."""
    image = self.image
    if isinstance(image, np.ndarray):
      formats.check_size(image.shape[1], image.shape[0], formats.MOST_PIXELS)
      return image.shape[1], image.shape[0]
    if isinstance(image, Image.Image):
      self._opened, self._orientation = image, formats.orientation_of(image)
      formats.check_size(*image.size, formats.MOST_PIXELS)
      return image.size
    if not image:
      raise ValueError("empty file")
    is_jpeg = image[:2] == b"\xff\xd8"
    header = formats.jpeg_header(image) if is_jpeg else None
    if is_jpeg and header is None:
      formats.check_scans(image)
    if header is not None and header.is_plain:
      formats.check_size(header.width, header.height, len(image))
      return header.width, header.height
    opened = _open(image, load=not is_jpeg)
    self._orientation = formats.orientation_of(opened)
    # OpenCV's pixels equal Pillow's for these two modes. For CMYK its formula differs. Pillow reads
    # a header that `jpeg_header` cannot follow.
    if header is None or opened.format != "JPEG" or opened.mode not in ("RGB", "L"):
      self._opened = opened
    return opened.size

  def pixels(self, reduction: int = 1) -> np.ndarray:
    """Decodes the image.

    Pixels that are not opaque lie on white. Of 16-bit values the upper 8 bits count. Bytes that
    were changed within a JPEG's data change pixels, and no decoder notices.

    Args:
      reduction: one of REDUCTIONS. A JPEG shrinks by this factor, with sides rounded up. The
        decoder averages, which takes less time than a full image. All other images keep their full
        size.

    Returns:
      uint8 (H, W, 3).

    Raises:
      InputError: the image is cut short or otherwise damaged.
    """
    if isinstance(self.image, np.ndarray):
      return _rgb_of_array(self.image)
    with image_errors(self._name, self._way_out):
      pixels = self._by_opencv(reduction)
      if pixels is None:
        pixels = self._by_pillow()
      return turned(pixels, self._orientation)

  def _by_opencv(self, reduction: int) -> np.ndarray | None:
    """Returns the stored pixels by OpenCV, or None where Pillow must decode or explain."""
    if self._opened is not None or not isinstance(self.image, bytes):
      return None
    pixels = cv2.imdecode(np.frombuffer(self.image, np.uint8), _REDUCED[reduction])
    width, height = (-(-side // reduction) for side in self._stored)
    # The size was read by a different parser, which a damaged file may have misled.
    return pixels if pixels is not None and pixels.shape[:2] == (height, width) else None

  def _by_pillow(self) -> np.ndarray:
    """Returns the stored pixels by Pillow."""
    if self._opened is None:
      assert isinstance(self.image, bytes)
      self._opened = _open(self.image, load=True)
    if isinstance(self.image, bytes) and self._opened.format == "PNG":
      pixels = _rgb_of_png(self._opened, self.image)
    else:
      pixels = _rgb(self._opened)
    height, width = pixels.shape[:2]
    if (width, height) != self._stored:
      wanted = " x ".join(map(str, self._stored))
      raise ValueError(f"its header says {wanted} pixels, and its data are {width} x {height}")
    return pixels


def _open(data: bytes, *, load: bool) -> Image.Image:
  """Opens an image with Pillow, also where a part of the file without pixels is damaged.

  Args:
    data: the encoded image.
    load: decodes the pixels too.
  """
  try:
    return _open_whole(data, load)
  except Exception:
    bare = formats.without_extras(data)
    if bare != data:
      # Where the pixels are damaged too, the first error says so better.
      with contextlib.suppress(Exception):
        return _open_whole(bare, load)
    raise


def _open_whole(data: bytes, load: bool) -> Image.Image:
  image = formats.open_image(data)
  if load:
    image.load()
  return image


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
  """Returns stored pixels (H, W, ...) in the orientation that EXIF asks for."""
  transposed, flip = _TURNS.get(orientation, (False, None))
  if transposed:
    pixels = cv2.transpose(pixels)
  return pixels if flip is None else cv2.flip(pixels, flip)


def _rgb_of_png(image: Image.Image, data: bytes) -> np.ndarray:
  """Returns the pixels of a PNG as `_rgb` does, with the transparent colour that the file names.

  Pillow gives grey of 2 and 4 bits the range of 8 bits, and drops the lower 8 bits of RGB of 16. It
  then compares the pixels with the colour as the file has it, which fits none or the wrong ones.

  Args:
    image: the PNG, as Pillow opened it.
    data: the encoded image.
  """
  depth, colour = formats.png_depth(data), image.info.get("transparency")
  if image.mode == "L" and depth in (2, 4) and colour is not None:
    image = image.copy()  # the pixels may be asked for again
    image.info["transparency"] = colour * (255 // (2**depth - 1))
  elif image.mode == "RGB" and depth == 16 and colour is not None:
    # OpenCV decodes to blue, green, red and alpha of 16 bits each.
    encoded = np.frombuffer(formats.without_extras(data), np.uint8)
    pixels: Any = cv2.imdecode(encoded, cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16 or pixels.shape[2:] != (4,):
      raise ValueError("its transparent colour cannot be told from similar colours")
    return np.where(pixels[..., 3:] == 0, 255, pixels[..., 2::-1] >> 8).astype(np.uint8)
  return _rgb(image)


def _rgb_of_array(pixels: np.ndarray) -> np.ndarray:
  """Returns the RGB pixels of an array, which stays as it is if it holds RGB."""
  if pixels.shape[2:] == (3,):
    return pixels
  return _rgb(Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels))


def _rgb(image: Image.Image) -> np.ndarray:
  """Returns the RGB pixels of a Pillow image, as they are stored and on white."""
  if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
    values = np.asarray(image)
    grey = (values >> 8).astype(np.uint8)
    # A grey PNG may name one 16-bit value as transparent; such pixels are white here.
    image = Image.fromarray(np.where(values == image.info.get("transparency"), 255, grey))
  if image.has_transparency_data and not _is_without_alpha(image):
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    image = Image.alpha_composite(white, image)
  return np.asarray(image.convert("RGB"))


def _is_without_alpha(image: Image.Image) -> bool:
  """Tells if the alpha of a BMP is meaningless: all programs but a few leave zeros there."""
  return (
    image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
  )
