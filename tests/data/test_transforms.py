"""Each transform against its definition."""

import io
import types

import numpy as np
import pytest
from PIL import Image

from repjax.data.transforms import (
  AUGMENTATIONS,
  INTERPOLATIONS,
  decode,
  random_resized_crop,
  resize_and_crop,
  shift,
)


def noise(width, height, seed=0):
  """An RGB image in which no pixel is black."""
  rng = np.random.default_rng(seed)
  return Image.fromarray(rng.integers(1, 256, (height, width, 3), np.uint8))


@pytest.fixture
def recorded_boxes(monkeypatch):
  """The rectangles that are cut out of images, be it by `crop` or by `resize`."""
  boxes = []

  def crop(self, box):
    boxes.append(box)
    return self

  def resize(self, size, resample, box=None):
    boxes.extend([] if box is None else [box])
    return Image.new("RGB", size)

  monkeypatch.setattr(Image.Image, "crop", crop)
  monkeypatch.setattr(Image.Image, "resize", resize)
  return boxes


def encoded(image, file_format="PNG"):
  file = io.BytesIO()
  image.save(file, file_format)
  return file.getvalue()


def scripted(uniform=(), integers=(), random=()):
  """A generator that returns the given numbers, whatever the range."""
  rows = {"uniform": uniform, "integers": integers, "random": random}
  streams = {name: iter(values) for name, values in rows.items()}
  return types.SimpleNamespace(
    **{name: lambda *_, stream=stream: next(stream) for name, stream in streams.items()}
  )


@pytest.mark.parametrize(
  ("source", "resized", "box"),
  [
    ((40, 20), (32, 16), (12, 4, 20, 12)),
    ((20, 40), (16, 32), (4, 12, 12, 20)),
    ((21, 40), (16, 30), (4, 11, 12, 19)),  # 30.5 rounds down
    ((41, 20), (32, 16), (12, 4, 20, 12)),  # 32.8 rounds down
    ((5, 4), (20, 16), (6, 4, 14, 12)),  # smaller than wanted
    ((16, 16), (16, 16), (4, 4, 12, 12)),
    ((16, 33), (16, 33), (4, 12, 12, 20)),  # the shorter side fits: no resampling
    ((16, 31), (16, 31), (4, 12, 12, 20)),  # 11.5 and, above, 12.5 round to even
  ],
  ids=str,
)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_and_crop_is_the_shorter_side_resized_and_the_centre_cut_out(
  source, resized, box, interpolation
):
  image = noise(*source)
  method = getattr(Image.Resampling, interpolation.upper())
  by_hand = image if source == resized else image.resize(resized, method)
  result = resize_and_crop(image, 8, 16, interpolation)
  assert result.dtype == np.uint8
  np.testing.assert_array_equal(result, np.asarray(by_hand.crop(box)))


def test_no_augmentation_is_the_central_square_at_full_size():
  image = noise(24, 16)
  result = AUGMENTATIONS["none"](image, 16, "bilinear", np.random.default_rng(0))
  np.testing.assert_array_equal(result, np.asarray(image)[:, 4:20])


@pytest.mark.parametrize("top", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("left", [0, 2, 4])
def test_shift_moves_the_image_and_fills_with_black(top, left):
  image = noise(16, 16)
  result = shift(image, 16, "bilinear", scripted(integers=[(top, left)]))
  down, right = 2 - top, 2 - left
  expected = np.zeros((16, 16, 3), np.uint8)
  for row, column in np.ndindex(16, 16):
    if 0 <= row - down < 16 and 0 <= column - right < 16:
      expected[row, column] = np.asarray(image)[row - down, column - right]
  np.testing.assert_array_equal(result, expected)


def test_shift_draws_every_offset_up_to_an_eighth_and_none_beyond():
  image, rng = noise(16, 16), np.random.default_rng(0)
  pixels = np.asarray(image)
  padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
  known = {
    padded[4 + row : 20 + row, 4 + column : 20 + column].tobytes(): (row, column)
    for row in range(-4, 5)
    for column in range(-4, 5)
  }
  seen = {known[shift(image, 16, "bilinear", rng).tobytes()] for _ in range(500)}
  assert seen == {(row, column) for row in range(-2, 3) for column in range(-2, 3)}


def test_shift_resizes_to_a_square_first():
  image = noise(20, 10)
  result = shift(image, 16, "bicubic", scripted(integers=[(2, 2)]))
  expected = image.resize((16, 16), Image.Resampling.BICUBIC)
  np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_known_random_resized_crop(mirrored):
  image = noise(32, 32)
  # A quarter of the area, square, 3 from the left and 5 from the top.
  rng = scripted(uniform=[0.25, 0.0], integers=[3, 5], random=[0.1 if mirrored else 0.9])
  result = random_resized_crop(image, 16, "nearest", rng)
  expected = np.asarray(image)[5:21, 3:19]
  np.testing.assert_array_equal(result, expected[:, ::-1] if mirrored else expected)


@pytest.mark.parametrize("size", [(400, 400), (640, 480), (300, 500)], ids=str)
def test_random_boxes_lie_inside_and_have_the_papers_areas_and_ratios(size, recorded_boxes):
  image, rng = noise(*size), np.random.default_rng(0)
  for _ in range(2000):
    random_resized_crop(image, 4, "bilinear", rng)
  left, top, right, bottom = np.array(recorded_boxes).T
  assert left.min() == top.min() == 0
  assert (right.max(), bottom.max()) == size
  width, height = right - left, bottom - top
  # Sides are rounded to whole pixels, so each may be off by half a pixel.
  area = size[0] * size[1]
  assert np.all((width + 0.5) * (height + 0.5) >= 0.08 * area)
  assert np.all((width - 0.5) * (height - 0.5) <= area)
  assert np.all((width + 0.5) / (height - 0.5) >= 3 / 4)
  assert np.all((width - 0.5) / (height + 0.5) <= 4 / 3)


def test_random_boxes_fill_the_ranges(recorded_boxes):
  image, rng = noise(400, 400), np.random.default_rng(0)
  for _ in range(2000):
    random_resized_crop(image, 4, "bilinear", rng)
  left, top, right, bottom = np.array(recorded_boxes).T
  fraction, ratio = (right - left) * (bottom - top) / 400**2, (right - left) / (bottom - top)
  assert fraction.min() < 0.1
  assert fraction.max() > 0.9
  assert ratio.min() < 0.77
  assert ratio.max() > 1.3
  assert abs(np.mean(ratio > 1) - 0.5) < 0.05


@pytest.mark.parametrize(
  ("size", "box"),
  [((1, 100), (0, 49, 1, 50)), ((9, 100), (0, 44, 9, 56)), ((100, 9), (44, 0, 56, 9))],
)
def test_where_no_box_fits_the_largest_central_one_is_taken(size, box):
  image = noise(*size)
  never = scripted(uniform=[1.0, 0.0] * 10, random=[0.9])
  result = random_resized_crop(image, 8, "nearest", never)
  expected = image.crop(box).resize((8, 8), Image.Resampling.NEAREST)
  np.testing.assert_array_equal(result, np.asarray(expected))


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_random_crop_depends_on_the_pixels_of_its_rectangle_alone(interpolation):
  box = (3, 5, 19, 21)
  inside = Image.new("RGB", (32, 32))
  inside.paste(noise(32, 32).crop(box), box[:2])
  results = []
  for image in (noise(32, 32), inside):
    rng = scripted(uniform=[0.25, 0.0], integers=box[:2], random=[0.9])
    results.append(random_resized_crop(image, 24, interpolation, rng))
  np.testing.assert_array_equal(*results)


def test_half_of_the_random_crops_are_mirrored():
  ramp = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None], (64, 1, 3)))
  rng = np.random.default_rng(0)
  crops = [random_resized_crop(ramp, 8, "bilinear", rng) for _ in range(500)]
  mirrored = np.mean([crop[0, 0, 0] > crop[0, -1, 0] for crop in crops])
  assert abs(mirrored - 0.5) < 0.07


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("size", [(16, 16), (9, 40), (40, 9), (1, 1)], ids=str)
def test_every_augmentation_gives_the_size_and_type_and_follows_the_generator(name, size):
  first, again = (
    AUGMENTATIONS[name](noise(*size), 16, "bilinear", np.random.default_rng(3)) for _ in range(2)
  )
  assert first.shape == (16, 16, 3)
  assert first.dtype == np.uint8
  np.testing.assert_array_equal(first, again)


GREY = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey_palette():
  image = Image.fromarray(GREY, "L").convert("P")
  image.putpalette([value for grey in range(256) for value in (grey, 255 - grey, 7)])
  return image


@pytest.mark.parametrize(
  ("image", "rgb"),
  [
    (Image.fromarray(GREY), (GREY, GREY, GREY)),
    (grey_palette(), (GREY, 255 - GREY, np.full_like(GREY, 7))),
    (Image.fromarray(np.stack([GREY, GREY.T], -1), "LA"), (GREY, GREY, GREY)),
    (
      Image.fromarray(np.stack([GREY, GREY.T, 255 - GREY, GREY // 2], -1), "RGBA"),
      (GREY, GREY.T, 255 - GREY),
    ),
    (Image.fromarray(GREY > 99), ((GREY > 99) * np.uint8(255),) * 3),
    (Image.fromarray(GREY.astype(np.uint16) * 257), (GREY, GREY, GREY)),
  ],
  ids=["grey", "palette", "grey and alpha", "RGBA", "black and white", "16-bit grey"],
)
def test_every_kind_of_png_comes_out_rgb(image, rgb):
  decoded = decode(encoded(image))
  assert decoded.mode == "RGB"
  np.testing.assert_array_equal(np.asarray(decoded), np.stack(rgb, -1))


def test_a_cmyk_jpeg_comes_out_rgb():
  # Full black ink is black, no ink is white; JPEG is off by little.
  ink = np.zeros((16, 16, 4), np.uint8)
  ink[:, 8:, 3] = 255
  decoded = decode(encoded(Image.fromarray(ink, "CMYK"), "JPEG"))
  assert decoded.mode == "RGB"
  pixels = np.asarray(decoded).astype(int)
  assert pixels[:, :8].min() > 250
  assert pixels[:, 8:].max() < 5


def test_an_array_is_taken_as_it_is():
  pixels = np.asarray(noise(3, 5))
  np.testing.assert_array_equal(np.asarray(decode(pixels)), pixels)
