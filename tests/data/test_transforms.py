"""Evaluation's crops to the pixel, and training's crops by their laws."""

import types

import numpy as np
import pytest
from PIL import Image

from repjax.data.decode import Picture
from repjax.data.transforms import (
  INTERPOLATIONS,
  central_square,
  flip,
  pad_and_crop,
  random_box,
  random_resized_crop,
  read_image,
  resize_and_crop,
  ten_crop,
)
from repjax.errors import InputError
from tests.data.images import encoded, noise, rotated, smooth

AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
SIZES = [
  ((40, 20), (32, 16), (12, 4)),
  ((20, 40), (16, 32), (4, 12)),
  ((21, 40), (16, 30), (4, 11)),  # 30.5 rounds down
  ((41, 20), (32, 16), (12, 4)),  # 32.8 rounds down
  ((5, 4), (20, 16), (6, 4)),  # smaller than wanted
  ((16, 16), (16, 16), (4, 4)),
  ((16, 33), (16, 33), (4, 12)),  # the shorter side fits: no resampling
  ((16, 31), (16, 31), (4, 12)),  # 11.5 and, above, 12.5 round to even
]


def scripted(integers=(), random=()):
  """A generator that returns the given numbers, whatever the range."""
  integers, random = iter(integers), iter(random)
  return types.SimpleNamespace(
    integers=lambda *_: next(integers), random=lambda *_: np.asarray(next(random))
  )


def by_pillow(pixels, resized, interpolation):
  image = Image.fromarray(pixels)
  method = getattr(Image.Resampling, interpolation.upper())
  return image if image.size == resized else image.resize(resized, method)


@pytest.mark.parametrize(("source", "resized", "corner"), SIZES, ids=str)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_resize_and_crop_is_the_shorter_side_resized_and_the_centre_cut_out(
  source, resized, corner, interpolation
):
  left, top = corner
  image = by_pillow(noise(*source), resized, interpolation)
  result = resize_and_crop(Picture(noise(*source)), 8, 16, interpolation)
  assert result.dtype == np.uint8
  expected = np.asarray(image.crop((left, top, left + 8, top + 8)))
  np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("source", [(500, 375), (375, 500), (224, 300)], ids=str)
@pytest.mark.parametrize("resize_size", [224, 256])
def test_a_jpegs_evaluation_is_pillows_to_the_pixel(source, resize_size):
  data = encoded(smooth(*source), "JPEG", quality=90)
  whole = Picture(data).pixels()  # which another test holds to be Pillow's
  width, height = source
  longer = int(resize_size * max(source) / min(source))
  resized = (resize_size, longer) if width < height else (longer, resize_size)
  image = by_pillow(whole, resized, "bilinear")
  left, top = (round((side - 224) / 2) for side in resized)
  expected = np.asarray(image.crop((left, top, left + 224, top + 224)))
  np.testing.assert_array_equal(
    resize_and_crop(Picture(data), 224, resize_size, "bilinear"), expected
  )


def test_an_image_file_is_read_as_in_evaluation(tmp_path):
  data = encoded(smooth(60, 40), "JPEG")
  (tmp_path / "a.jpg").write_bytes(data)
  preprocessing = types.SimpleNamespace(image_size=16, resize_size=20, interpolation="bicubic")
  expected = resize_and_crop(Picture(data), 16, 20, "bicubic")
  for file in (data, tmp_path / "a.jpg", str(tmp_path / "a.jpg")):
    np.testing.assert_array_equal(read_image(file, preprocessing), expected)
  with pytest.raises(InputError, match=r"b.jpg cannot be read: No such file"):
    read_image(tmp_path / "b.jpg", preprocessing)
  with pytest.raises(InputError, match="the image cannot be decoded: not an image"):
    read_image(b"text", preprocessing)


def test_evaluation_follows_exif():
  upright, lying = (Picture(rotated(smooth(40, 20), orientation)) for orientation in (1, 6))
  first, second = (resize_and_crop(picture, 16, 20, "bilinear") for picture in (upright, lying))
  np.testing.assert_array_equal(np.rot90(first, -1), second)


@pytest.mark.parametrize(("source", "resized", "corner"), SIZES, ids=str)
def test_ten_crops_are_the_corners_the_centre_and_their_mirror_images(source, resized, corner):
  image = by_pillow(noise(*source), resized, "bilinear")
  right, bottom = (side - 8 for side in image.size)
  result = ten_crop(Picture(noise(*source)), 8, 16, "bilinear")
  assert result.shape == (10, 8, 8, 3)
  corners = [(0, 0), (right, 0), (0, bottom), (right, bottom), corner]
  for crop, mirrored, (left, top) in zip(result, result[5:], corners):
    expected = np.asarray(image.crop((left, top, left + 8, top + 8)))
    np.testing.assert_array_equal(crop, expected)
    np.testing.assert_array_equal(mirrored, expected[:, ::-1])


def test_the_fifth_of_ten_crops_is_the_central_one():
  picture = Picture(noise(31, 40))
  np.testing.assert_array_equal(
    ten_crop(picture, 8, 16, "bicubic")[4], resize_and_crop(picture, 8, 16, "bicubic")
  )


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


@pytest.mark.parametrize("probability", [0, 0.2, 0.5, 1])
def test_flip_mirrors_with_its_probability(probability):
  pixels, rng = noise(5, 5), np.random.default_rng(0)
  results = [flip(probability)(pixels, rng) for _ in range(1000)]
  mirrored = [np.array_equal(result, pixels[:, ::-1]) for result in results]
  assert all(flipped or result is pixels for flipped, result in zip(mirrored, results))
  assert abs(np.mean(mirrored) - probability) <= (0.05 if 0 < probability < 1 else 0)


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
    (lambda: flip(2), "flip's probability is 2; it must be a number from 0 to 1"),
    (lambda: flip("often"), "flip's probability is 'often'"),
  ],
)
def test_arguments_that_cannot_be_are_named(make, message):
  with pytest.raises(InputError, match=message):
    make()
