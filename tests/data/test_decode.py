"""Decoding: Pillow's pixels, whatever the file's mode, and errors that name the image."""

import io

import numpy as np
import pytest
from PIL import Image, ImageOps

from repjax.data import decode as decoding
from repjax.data.decode import REDUCTIONS, Picture
from repjax.errors import InputError
from tests.data.images import encoded, noise, rotated, smooth


def pillows(data):
  """Returns the pixels that Pillow decodes, rotated as the file asks for."""
  return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))


JPEGS = {
  "4:4:4": {"subsampling": 0},
  "4:2:2": {"subsampling": 1},
  "4:2:0": {"subsampling": 2},
  "progressive": {"progressive": True},
  "coarse": {"quality": 5},
  "fine": {"quality": 100},
}


@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS)
@pytest.mark.parametrize("size", [(33, 47), (64, 48), (1, 1), (500, 375)], ids=str)
def test_a_jpeg_has_pillows_pixels(options, size):
  data = encoded(noise(*size), "JPEG", **options)
  picture = Picture(data)
  assert (picture.width, picture.height) == size
  np.testing.assert_array_equal(picture.pixels(), pillows(data))


def test_a_plain_jpeg_is_not_decoded_by_pillow(monkeypatch):
  data = encoded(noise(33, 47), "JPEG")
  expected = pillows(data)
  monkeypatch.setattr(decoding.formats, "open_image", None)
  np.testing.assert_array_equal(Picture(data).pixels(), expected)


def test_a_grey_jpeg_has_pillows_pixels():
  data = encoded(noise(33, 47)[:, :, 0], "JPEG")
  np.testing.assert_array_equal(Picture(data).pixels(), pillows(data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_an_image_is_shown_as_exif_says(orientation, file_format):
  data = rotated(noise(33, 47), orientation, file_format)
  picture = Picture(data)
  assert (picture.width, picture.height) == ((33, 47) if orientation < 5 else (47, 33))
  np.testing.assert_array_equal(picture.pixels(), pillows(data))


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description
 xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize("exif", [Image.Exif(), {0x010E: "a tag"}], ids=["XMP alone", "EXIF too"])
def test_an_orientation_in_xmp_counts_as_in_pillow(exif):
  tags = Image.Exif()
  tags.update(exif)
  data = encoded(smooth(40, 24), "JPEG", xmp=XMP, exif=tags)
  picture = Picture(data)
  assert (picture.width, picture.height) == (24, 40)
  np.testing.assert_array_equal(picture.pixels(), pillows(data))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_reduced_jpeg_is_the_average_of_its_pixels(reduction, orientation):
  data = rotated(smooth(160, 96), orientation)
  picture = Picture(data)
  pixels = picture.pixels(reduction)
  height, width = picture.height // reduction, picture.width // reduction
  whole = pillows(data).astype(float)
  blocks = whole.reshape(height, reduction, width, reduction, 3).mean((1, 3))
  assert pixels.shape == (height, width, 3)
  assert np.abs(pixels - blocks).max() <= 4


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_side_that_does_not_divide_rounds_up(reduction):
  pixels = Picture(encoded(noise(33, 47), "JPEG")).pixels(reduction)
  assert pixels.shape == (-(-47 // reduction), -(-33 // reduction), 3)


def test_a_png_is_never_reduced():
  pixels = noise(32, 48)
  np.testing.assert_array_equal(Picture(encoded(pixels)).pixels(4), pixels)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey_palette():
  image = Image.fromarray(GREY, "L").convert("P")
  image.putpalette([value for grey in range(256) for value in (grey, 255 - grey, 7)])
  return image


def on_white(value, alpha):
  """Returns a value as seen through its alpha on white, to the nearest grey level."""
  return 255 - (255.0 - value) * alpha / 255


@pytest.mark.parametrize(
  ("image", "rgb"),
  [
    (Image.fromarray(GREY), (GREY, GREY, GREY)),
    (grey_palette(), (GREY, 255 - GREY, np.full_like(GREY, 7))),
    (Image.fromarray(np.stack([GREY, GREY.T], -1), "LA"), (on_white(GREY, GREY.T),) * 3),
    (
      Image.fromarray(np.stack([GREY, GREY.T, 255 - GREY, GREY // 2], -1), "RGBA"),
      tuple(on_white(value, GREY // 2) for value in (GREY, GREY.T, 255.0 - GREY)),
    ),
    (Image.fromarray(GREY > 99), ((GREY > 99) * np.uint8(255),) * 3),
    (Image.fromarray(GREY.astype(np.uint16) * 257), (GREY, GREY, GREY)),
  ],
  ids=["grey", "palette", "grey and alpha", "RGBA", "black and white", "16-bit grey"],
)
def test_every_kind_of_png_comes_out_rgb(image, rgb):
  decoded = Picture(encoded(image)).pixels()
  assert decoded.dtype == np.uint8
  assert np.abs(decoded - np.stack(rgb, -1).astype(float)).max() <= 1


def test_a_palettes_transparent_colour_is_white():
  data = encoded(grey_palette(), transparency=0)
  decoded = Picture(data).pixels()
  np.testing.assert_array_equal(decoded[0, 0], [255, 255, 255])
  np.testing.assert_array_equal(decoded[0, 1], [1, 254, 7])


def test_a_transparent_grey_of_16_bits_is_white():
  values = GREY.astype(np.uint16) * 257
  data = encoded(Image.fromarray(values), transparency=257)
  expected = np.where(GREY == 1, 255, GREY)
  np.testing.assert_array_equal(Picture(data).pixels(), np.stack([expected] * 3, -1))


def test_a_cmyk_jpeg_has_pillows_pixels():
  # Full black ink is black, no ink is white; JPEG is off by little.
  ink = np.zeros((16, 16, 4), np.uint8)
  ink[:, 8:, 3] = 255
  data = encoded(Image.fromarray(ink, "CMYK"), "JPEG")
  decoded = Picture(data).pixels()
  np.testing.assert_array_equal(decoded, pillows(data))
  assert decoded[:, :8].min() > 250
  assert decoded[:, 8:].max() < 5


def test_an_array_is_taken_as_it_is():
  pixels = noise(3, 5)
  picture = Picture(pixels)
  assert (picture.width, picture.height) == (3, 5)
  assert picture.pixels() is pixels


JPEG = encoded(noise(64, 64), "JPEG")
PNG = encoded(noise(64, 64))


@pytest.mark.parametrize(
  "data",
  [b"", b"some text", JPEG[:1], JPEG[:30], JPEG[:300], JPEG[: len(JPEG) // 2], PNG[:20], PNG[:500]],
  ids=["nothing", "text", "1", "30", "300", "half a JPEG", "20 of a PNG", "500 of a PNG"],
)
def test_an_image_that_cannot_be_decoded_is_named(data):
  with pytest.raises(InputError, match=r"^image 7 \(cat.jpg\) cannot be decoded"):
    Picture(data, "image 7 (cat.jpg)").pixels()


@pytest.mark.parametrize("tail", [b"\0", b"\0" * 40, b"\xff\xd9", b"end"], ids=repr)
def test_bytes_after_the_end_do_no_harm(tail):
  np.testing.assert_array_equal(Picture(JPEG + tail).pixels(), pillows(JPEG))


@pytest.mark.parametrize("seed", range(30))
def test_a_damaged_header_never_gives_a_size_that_differs_from_the_pixels(seed):
  rng = np.random.default_rng(seed)
  data = bytearray(JPEG)
  data[int(rng.integers(2, 700))] = int(rng.integers(256))
  try:
    picture = Picture(bytes(data))
    pixels = picture.pixels()
  except InputError:
    return
  assert pixels.shape[:2] == (picture.height, picture.width)
