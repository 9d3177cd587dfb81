"""Decoding: Pillow's pixels, whatever the file's mode, and errors that name the image."""

import io
import struct

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from repjax.data import decode as decoding
from repjax.data import formats
from repjax.data.decode import REDUCTIONS, Picture
from repjax.data.reading import find_fault
from repjax.errors import InputError
from tests.data.hostile import (
  EPS,
  bmp,
  chunk,
  claiming,
  claiming_png,
  claiming_webp,
  many_scans,
  png,
)
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


@pytest.mark.parametrize("orientation", [0, 9, 99, 65535])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_an_unknown_orientation_is_upright(orientation, file_format):
  data = rotated(noise(400, 100), orientation, file_format)
  picture = Picture(data)
  assert (picture.width, picture.height) == (400, 100)
  np.testing.assert_array_equal(picture.pixels(), pillows(data))


def pillows_on_white(data):
  """Returns the pixels that Pillow converts to RGBA, laid on white."""
  image = Image.open(io.BytesIO(data)).convert("RGBA")
  white = Image.new("RGBA", image.size, "white")
  return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def specified(values, depth, colour, transparent=None):
  """Returns the pixels of a grey or RGB PNG on white, as the specification of PNG has them.

  Args:
    values: whole numbers (H, W, channels).
    depth, colour: as in `png`.
    transparent: one transparent value for each channel that is no alpha.
  """
  eight = values >> 8 if depth == 16 else values * 255 // (2**depth - 1)
  rgb = eight[..., :1].repeat(3, -1) if colour in (0, 4) else eight[..., :3]
  alpha = eight[..., -1:] if colour in (4, 6) else np.full_like(eight[..., :1], 255)
  if transparent is not None:
    alpha = np.where((values == transparent).all(-1, keepdims=True), 0, alpha)
  return rgb * (alpha / 255) + 255 - alpha


WITHOUT_ALPHA = [(0, 1), (0, 2), (0, 4), (0, 8), (0, 16), (2, 8), (2, 16)]
WITH_ALPHA = [(4, 8), (4, 16), (6, 8), (6, 16)]


@pytest.mark.parametrize(
  ("colour", "depth", "value"),
  [
    *((*kind, value) for kind in WITHOUT_ALPHA for value in (None, 0, 1, "middle", "last")),
    *((*kind, None) for kind in WITH_ALPHA),
  ],
)
def test_every_depth_and_transparent_colour_is_that_of_the_specification(colour, depth, value):
  channels, last = {0: 1, 2: 3, 4: 2, 6: 4}[colour], 2**depth - 1
  values = np.random.default_rng(depth).integers(0, last + 1, (16, 20, channels))
  number = {"middle": last // 2, "last": last}.get(value, value)
  extra, transparent = {}, None
  if number is not None:
    transparent = [number] * min(channels, 3)
    values[3:6, 2:9] = transparent
    values[4, 4, -1] ^= 1  # a similar colour, which differs in the lowest bit of one channel
    extra["tRNS"] = np.asarray(transparent, ">u2").tobytes()
  picture = Picture(png(values, depth, colour, **extra))
  expected = specified(values, depth, colour, transparent)
  for _ in range(2):  # asked for again, the pixels are the same
    assert np.abs(picture.pixels() - expected).max() <= 0.5


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
@pytest.mark.parametrize("table", [b"\0", b"\xff\0", b"\x80\x40"], ids=["first", "second", "both"])
def test_a_transparency_table_of_a_palette_is_what_pillow_makes_of_it(depth, table):
  count = 2**depth
  colours = np.random.default_rng(depth).integers(0, 256, 3 * count, np.uint8).tobytes()
  values = np.random.default_rng(1).permutation(np.arange(320) % count).reshape(16, 20)
  data = png(values, depth, 3, PLTE=colours, tRNS=table)
  pixels = Picture(data).pixels()
  np.testing.assert_array_equal(pixels, pillows_on_white(data))
  first = np.frombuffer(colours, np.uint8)[:3] if table[0] else [255] * 3
  if table[0] in (0, 255):
    assert (pixels[values == 0] == first).all()


@pytest.mark.parametrize(("alpha", "expected"), [(0, "opaque"), (255, "opaque"), (128, "mixed")])
def test_a_bmp_whose_alpha_is_zero_everywhere_is_opaque(alpha, expected):
  pixels = noise(7, 5)
  decoded = Picture(bmp(pixels, alpha)).pixels()
  wanted = pixels if expected == "opaque" else on_white(pixels.astype(float), 128)
  assert np.abs(decoded - wanted).max() <= 1


def text_chunk(image, kind):
  """Returns a PNG with a text: damaged, or too large when it is unpacked."""
  info = PngImagePlugin.PngInfo()
  info.add_text("Comment", "hello " * (10 if kind == "damaged" else 500_000), zip=kind != "damaged")
  data = bytearray(encoded(image, pnginfo=info))
  if kind == "damaged":
    data[data.index(b"hello") + 2] ^= 1
  return bytes(data)


def late_chunk(image, kind):
  """Returns a PNG with a damaged text after its pixels."""
  data = encoded(image)
  end = data.index(b"IEND") - 4
  return data[:end] + chunk(b"tEXt", b"Comment\0hello")[:-1] + b"!" + data[end:]


def broken_exif(image, kind):
  """Returns an image whose EXIF is noise, or in a WebP image longer than the file."""
  tags = Image.Exif()
  tags[0x010E] = "a description that is long enough"
  data = bytearray(encoded(image, kind.split()[0], exif=tags, **LOSSLESS[kind.split()[0]]))
  name = {"JPEG": b"Exif", "WEBP": b"EXIF", "PNG": b"eXIf"}[kind.split()[0]]
  start = data.index(name)
  if kind.endswith("length"):
    data[start + 4 : start + 8] = b"\xff\xff\xff\x0f"
  else:
    data[start + 6 : start + 30] = b"\xff" * 24
  return bytes(data)


LOSSLESS = {"JPEG": {"quality": 95}, "WEBP": {"lossless": True}, "PNG": {}}


@pytest.mark.parametrize(
  ("make", "kind"),
  [
    (text_chunk, "damaged"),
    (text_chunk, "too large"),
    (late_chunk, ""),
    (broken_exif, "PNG"),
    (broken_exif, "JPEG"),
    (broken_exif, "WEBP"),
    (broken_exif, "WEBP length"),
  ],
)
def test_damaged_metadata_do_not_spoil_a_picture(make, kind):
  pixels = smooth(40, 30)
  data = make(Image.fromarray(pixels), kind)
  assert find_fault(data) is None
  assert np.abs(Picture(data).pixels().astype(int) - pixels).max() <= (12 if kind == "JPEG" else 0)


@pytest.mark.parametrize(
  ("data", "said"),
  [
    (claiming(32000, 32000), "32000 x 32000 pixels, and at most 268,435,456"),
    (claiming(16000, 16000), "claims 16000 x 16000 pixels and has 3.. bytes"),
    (claiming(65500, 65500), "at most"),
    (claiming_png(10**6, 10**6), "1000000 x 1000000"),
    (claiming_png(10**4, 10**4), "claims 10000 x 10000"),
    (many_scans(200), "more than 100 scans"),
    (EPS, r"not an image of a known kind \(JPEG, PNG, WEBP, BMP, GIF\)"),
    (encoded(noise(4, 4), "TIFF"), "not an image of a known kind"),
    (b"GIF89a" + struct.pack("<HH", 65000, 65000) + bytes(40), "65000 x 65000"),
    (claiming_webp(16000, 16000), "claims 16000 x 16000"),
  ],
  ids=["1 GP", "256 MP", "4 GP", "PNG", "PNG 2", "scans", "EPS", "TIFF", "GIF", "WebP"],
)
def test_what_is_refused_is_refused_before_decoding_and_by_prepare_too(data, said, monkeypatch):
  def fail(*_):
    raise AssertionError("decoded")

  monkeypatch.setattr(decoding.cv2, "imdecode", fail)
  monkeypatch.setattr(Image.core, "new", fail)
  monkeypatch.setattr(Image.core, "fill", fail)
  with pytest.raises(InputError, match=rf"^cat.jpg cannot be decoded: .*{said}"):
    Picture(data, "cat.jpg").pixels()
  assert find_fault(data) in str(refused(data))


def refused(data):
  """Returns the error of an image."""
  with pytest.raises(InputError) as caught:
    Picture(data).pixels()
  return caught.value


def test_a_film_after_the_image_is_no_scan():
  data = encoded(noise(16, 16), "JPEG", progressive=True)
  expected = pillows(data)
  film = b"\xff\xda\0\0film" * 300
  np.testing.assert_array_equal(Picture(data + film).pixels(), expected)


def test_a_large_photograph_is_read_by_all_or_by_none(monkeypatch):
  monkeypatch.setattr(formats, "MOST_PIXELS", 5000)
  for size in ((70, 70), (71, 71)):
    data = encoded(noise(*size), "JPEG")
    assert (find_fault(data) is None) == (size == (70, 70))
    if size == (71, 71):
      assert "at most 5,000" in str(refused(data))
    else:
      assert Picture(data).pixels().shape == (70, 70, 3)


@pytest.mark.parametrize(
  "error", [MemoryError(), OverflowError("x"), cv2.error("bad"), KeyError(1)]
)
def test_whatever_a_decoder_raises_names_the_image(error, monkeypatch):
  def fail(*_):
    raise error

  monkeypatch.setattr(decoding.cv2, "imdecode", fail)
  with pytest.raises(InputError, match=r"^a\\nb\.jpg cannot be decoded: ") as caught:
    Picture(JPEG, "a\nb.jpg").pixels()
  assert caught.value.__cause__ is error


def test_a_size_that_decoders_disagree_about_is_an_error(monkeypatch):
  monkeypatch.setattr(decoding.cv2, "imdecode", lambda *_: np.zeros((5, 5, 3), np.uint8))
  np.testing.assert_array_equal(Picture(JPEG).pixels(), pillows(JPEG))  # by Pillow
  monkeypatch.setattr(decoding, "_rgb", lambda _: np.zeros((5, 5, 3), np.uint8))
  with pytest.raises(InputError, match="header says 64 x 64 pixels, and its data are 5 x 5"):
    Picture(JPEG).pixels()


def test_an_image_of_pillow_is_decoded_as_its_file():
  data = rotated(noise(33, 47), 6, "PNG")
  np.testing.assert_array_equal(Picture(Image.open(io.BytesIO(data))).pixels(), pillows(data))
