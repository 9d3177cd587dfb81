"""The transforms of evaluation equal Pillow's, pixel by pixel."""

import types

import numpy as np
import pytest
from PIL import Image

from repjax.data.decode import Picture
from repjax.data.transforms import INTERPOLATIONS, read_image, resize_and_crop, ten_crop
from repjax.errors import InputError
from tests.data.images import by_pillow, encoded, noise, rotated, smooth

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


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (65_000, 3)], ids=str)
@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_a_long_image_is_resized_no_further_than_the_crop_needs(size, interpolation, monkeypatch):
  shapes, original = [], Image.Image.resize

  def noted(image, shape, *arguments, **options):
    shapes.append(shape)
    return original(image, shape, *arguments, **options)

  monkeypatch.setattr(Image.Image, "resize", noted)
  data = encoded(np.full((*size[::-1], 3), (10, 200, 30), np.uint8))
  for crops in (
    resize_and_crop(Picture(data), 224, 256, interpolation)[None],
    ten_crop(Picture(data), 224, 256, interpolation),
  ):
    assert crops.shape[1:] == (224, 224, 3)
    assert (crops == (10, 200, 30)).all()
  assert max(max(shape) for shape in shapes) == 224


def test_a_model_that_asks_for_huge_images_takes_the_memory_of_its_crop(monkeypatch):
  shapes, original = [], Image.Image.resize

  def noted(image, shape, *arguments, **options):
    shapes.append(shape)
    return original(image, shape, *arguments, **options)

  monkeypatch.setattr(Image.Image, "resize", noted)
  crop = resize_and_crop(Picture(noise(30, 20)), 24, 65_536, "bicubic")
  assert crop.shape == (24, 24, 3)
  assert shapes == [(24, 24)]


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_long_image_has_the_pixels_of_the_whole_resized_image(interpolation):
  pixels = smooth(900, 60)
  whole = by_pillow(pixels, (int(32 * 900 / 60), 32), interpolation)
  left, top = round((whole.width - 24) / 2), round((32 - 24) / 2)
  expected = np.asarray(whole.crop((left, top, left + 24, top + 24))).astype(int)
  result = resize_and_crop(Picture(pixels), 24, 32, interpolation)
  assert np.abs(result - expected).max() <= 1


def test_an_error_of_any_step_names_the_file(tmp_path, monkeypatch):
  def fail(*_, **__):
    raise MemoryError

  (tmp_path / "a.jpg").write_bytes(encoded(noise(30, 20), "JPEG"))
  monkeypatch.setattr(Image.Image, "resize", fail)
  preprocessing = types.SimpleNamespace(image_size=16, resize_size=18, interpolation="bicubic")
  with pytest.raises(InputError, match=r"a\.jpg cannot be decoded: it needs more memory"):
    read_image(tmp_path / "a.jpg", preprocessing)
  with pytest.raises(InputError, match=r"b\\x00\.jpg cannot be read: its name holds a NUL"):
    read_image("b\0.jpg", preprocessing)
