"""Random crops follow their laws, and cut out what Pillow would."""

import numpy as np
import pytest
from PIL import Image

from repjax.data.augmentation.crops import (
  central_square,
  pad_and_crop,
  random_box,
  random_resized_crop,
)
from repjax.data.decode import Picture
from repjax.data.transforms import INTERPOLATIONS
from repjax.errors import InputError
from tests.data.images import by_pillow, encoded, noise, scripted, smooth

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def test_no_augmentation_is_the_central_square_at_full_size():
  pixels = noise(24, 16)
  result = central_square()(Picture(pixels), 16, "bilinear", np.random.default_rng(0))
  np.testing.assert_array_equal(result, pixels[:, 4:20])


@pytest.mark.parametrize("top", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("left", [0, 2, 4])
def test_pad_and_crop_moves_the_image_and_fills_with_black(top, left):
  pixels = noise(16, 16)
  result = pad_and_crop()(Picture(pixels), 16, "bilinear", scripted(integers=[(top, left)]))
  down, right = 2 - top, 2 - left
  expected = np.zeros((16, 16, 3), np.uint8)
  for row, column in np.ndindex(16, 16):
    if 0 <= row - down < 16 and 0 <= column - right < 16:
      expected[row, column] = pixels[row - down, column - right]
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize(("padding", "most"), [(None, 2), (0, 0), (3, 3)])
def test_pad_and_crop_draws_every_offset_up_to_the_padding_and_none_beyond(padding, most):
  pixels, rng = noise(16, 16), np.random.default_rng(0)
  padded = np.pad(pixels, ((4, 4), (4, 4), (0, 0)))
  known = {
    padded[4 + row : 20 + row, 4 + column : 20 + column].tobytes(): (row, column)
    for row in range(-4, 5)
    for column in range(-4, 5)
  }
  crop = pad_and_crop(padding)
  seen = {known[crop(Picture(pixels), 16, "bilinear", rng).tobytes()] for _ in range(500)}
  offsets = range(-most, most + 1)
  assert seen == {(row, column) for row in offsets for column in offsets}


def test_pad_and_crop_resizes_to_a_square_first():
  result = pad_and_crop()(Picture(noise(20, 10)), 16, "bicubic", scripted(integers=[(2, 2)]))
  expected = by_pillow(noise(20, 10), (16, 16), "bicubic")
  np.testing.assert_array_equal(result, np.asarray(expected))


# A quarter of the area of 32 x 32 pixels, square, 3 from the left and 5 from the top.
QUARTER = [[((0.25 - 0.08) / 0.92, 0.5, 3.5 / 17, 5.5 / 17)] * 10]


def test_a_known_random_resized_crop():
  pixels = noise(32, 32)
  result = random_resized_crop()(Picture(pixels), 16, "nearest", scripted(random=QUARTER))
  np.testing.assert_array_equal(result, pixels[5:21, 3:19])


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("size", [6, 16, 24])
def test_a_random_crop_depends_on_the_pixels_of_its_rectangle_alone(interpolation, size):
  inside = np.zeros((32, 32, 3), np.uint8)
  inside[5:21, 3:19] = noise(32, 32)[5:21, 3:19]
  first, second = (
    random_resized_crop()(Picture(pixels), size, interpolation, scripted(random=QUARTER))
    for pixels in (noise(32, 32), inside)
  )
  np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("source", [(500, 375), (375, 500), (1600, 1200), (90, 60)])
@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_random_crop_is_what_pillow_would_cut_out(source, interpolation, file_format):
  data = encoded(smooth(*source), file_format, quality=98, subsampling=0)
  for seed in range(4):
    rng, same = np.random.default_rng(seed), np.random.default_rng(seed)
    result = random_resized_crop()(Picture(data), 64, interpolation, rng)
    box = random_box(*source, AREA, RATIO, same)
    method = getattr(Image.Resampling, interpolation.upper())
    whole = Image.fromarray(Picture(data).pixels())
    expected = np.asarray(whole.crop(box).resize((64, 64), method))
    # A smooth image, in which a shift by a pixel shows and antialiasing does not. A JPEG that was
    # reduced is cut between pixels of the reduced image.
    reduced = file_format == "JPEG" and source != (90, 60)
    assert np.abs(result.astype(float) - expected).mean() <= (1.1 if reduced else 0.25)


@pytest.mark.parametrize(("side", "reduction"), [(63, 1), (127, 1), (128, 2), (256, 4), (600, 8)])
def test_a_jpeg_is_decoded_at_the_smallest_scale_that_leaves_enough_pixels(side, reduction):
  asked = []

  class Recorded(Picture):
    def pixels(self, reduction=1):
      asked.append(reduction)
      return super().pixels(reduction)

  picture = Recorded(encoded(smooth(side, side), "JPEG"))
  whole = random_resized_crop(area=(0.999999, 1.0), ratio=(1.0, 1.0))
  result = whole(picture, 64, "bilinear", np.random.default_rng(0))
  assert result.shape == (64, 64, 3)
  assert asked == [reduction]


def boxes(size, count=2000, area=AREA, ratio=RATIO):
  rng = np.random.default_rng(0)
  return np.array([random_box(*size, area, ratio, rng) for _ in range(count)]).T


@pytest.mark.parametrize("size", [(400, 400), (640, 480), (300, 500)], ids=str)
@pytest.mark.parametrize("area", [AREA, (0.5, 1.0)])
def test_random_boxes_lie_inside_and_have_the_areas_and_ratios_asked_for(size, area):
  left, top, right, bottom = boxes(size, area=area)
  assert left.min() == top.min() == 0
  assert (right.max(), bottom.max()) == size
  width, height = right - left, bottom - top
  # Sides are rounded to whole pixels, so each may be off by half a pixel.
  pixels = size[0] * size[1]
  assert np.all((width + 0.5) * (height + 0.5) >= area[0] * pixels)
  assert np.all((width - 0.5) * (height - 0.5) <= area[1] * pixels)
  assert np.all((width + 0.5) / (height - 0.5) >= 3 / 4)
  assert np.all((width - 0.5) / (height + 0.5) <= 4 / 3)


def test_random_boxes_fill_the_ranges_evenly():
  left, top, right, bottom = boxes((400, 400))
  fraction, ratio = (right - left) * (bottom - top) / 400**2, (right - left) / (bottom - top)
  assert fraction.min() < 0.1
  assert fraction.max() > 0.9
  assert ratio.min() < 0.77
  assert ratio.max() > 1.3
  assert abs(np.mean(ratio > 1) - 0.5) < 0.05
  small = fraction < 0.5  # which fit nearly always
  quarters = np.histogram(fraction[small], np.linspace(0.08, 0.5, 5))[0] / small.sum()
  assert np.abs(quarters - 0.25).max() < 0.05
  for start, length in ((left, right - left), (top, bottom - top)):
    place = (start / (400 - length + 1))[small]
    assert abs(place.mean() - 0.5) < 0.03
    assert abs(place.std() - 12**-0.5) < 0.02


@pytest.mark.parametrize(
  ("size", "box"),
  [((1, 100), (0, 49, 1, 50)), ((9, 100), (0, 44, 9, 56)), ((100, 9), (44, 0, 56, 9))],
)
def test_where_no_box_fits_the_largest_central_one_is_taken(size, box):
  never = scripted(random=[[(1.0, 0.5, 0.5, 0.5)] * 10])
  assert random_box(*size, AREA, RATIO, never) == box


def test_the_largest_central_box_has_a_pixel_at_least():
  never = [[(1.0, 0.5, 0.5, 0.5)] * 10]
  assert random_box(9, 1, AREA, (0.1, 0.2), scripted(random=never)) == (4, 0, 5, 1)
  assert random_box(1, 9, AREA, (5, 10), scripted(random=never)) == (0, 4, 1, 5)


@pytest.mark.parametrize(
  ("make", "message"),
  [
    (lambda: random_resized_crop(area=(0.0, 1.0)), r"_crop's area is \(0.0, 1.0\)"),
    (lambda: random_resized_crop(area=(0.5, 1.5)), r"_crop's area is 1.5; .* from 0 to 1"),
    (lambda: random_resized_crop(area=0.5), "area is 0.5; it must be two numbers"),
    (lambda: random_resized_crop(ratio=(2, 1)), r"ratio is \(2, 1\); it must be \(least, largest"),
    (lambda: random_resized_crop(ratio=("a", "b")), "ratio is 'a'; it must be a number"),
    (lambda: pad_and_crop(-1), "padding is -1; it must be a whole number of 0 or more"),
    (lambda: pad_and_crop(1.5), "padding is 1.5; it must be a whole number"),
  ],
)
def test_arguments_that_cannot_be_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()
