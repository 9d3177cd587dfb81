"""Each operation equals Pillow, or does to single pixels what its definition says."""

import colorsys
import inspect

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from repjax.data.augmentation import operations
from repjax.data.augmentation.operations import OPERATIONS

GREY = (128, 128, 128)
SIZES = [(7, 7), (32, 32), (33, 20), (224, 224)]
FACTORS = [0.0, 0.1, 0.37, 0.46, 1.0, 1.3, 1.72, 1.9, 2.62]


def noise(height, width, low=0, high=256, seed=0):
  return np.random.default_rng(seed).integers(low, high, (height, width, 3), np.uint8)


def smooth(size, seed=0):
  """Returns an image with large structures, as photographs have."""
  coarse = Image.fromarray(noise(4, 4, seed=seed))
  return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))


def images(height, width):
  """Returns images with random values, few values, low contrast, one colour, and a gradient."""
  ramp = np.arange(height * width * 3).reshape(height, width, 3) % 256
  return [
    noise(height, width),
    noise(height, width, 0, 4) * np.uint8(85),
    noise(height, width, 90, 130),
    np.full((height, width, 3), (3, 140, 255), np.uint8),
    ramp.astype(np.uint8),
  ]


def assert_equals_pillow(ours, pillow, size):
  for image in images(*size):
    expected = np.asarray(pillow(Image.fromarray(image)))
    np.testing.assert_array_equal(ours(image), expected)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", ["autocontrast", "equalize", "invert"])
def test_operations_without_a_value_equal_pillow(name, size):
  assert_equals_pillow(OPERATIONS[name], getattr(ImageOps, name), size)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("factor", FACTORS)
@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_enhancements_equal_pillow(name, factor, size):
  enhancer = getattr(ImageEnhance, name.capitalize())
  assert_equals_pillow(
    lambda image: OPERATIONS[name](image, factor),
    lambda image: enhancer(image).enhance(factor),
    size,
  )


@pytest.mark.parametrize("name", ["color", "contrast", "brightness", "sharpness"])
def test_enhancements_equal_pillow_at_any_factor(name):
  image = noise(64, 64)
  enhancer = getattr(ImageEnhance, name.capitalize())(Image.fromarray(image))
  for factor in np.random.default_rng(1).uniform(0, 3, 60):
    expected = np.asarray(enhancer.enhance(float(factor)))
    np.testing.assert_array_equal(OPERATIONS[name](image, float(factor)), expected)


@pytest.mark.parametrize("bits", range(1, 9))
def test_posterize_equals_pillow(bits):
  assert_equals_pillow(
    lambda image: operations.posterize(image, bits),
    lambda image: ImageOps.posterize(image, bits),
    (32, 32),
  )


def test_posterize_to_no_bits_is_black():
  assert not operations.posterize(noise(8, 8), 0).any()


@pytest.mark.parametrize("threshold", [-50, 0, 1, 113.7, 128, 142.2, 230, 255, 256, 384])
def test_solarize_equals_pillow(threshold):
  assert_equals_pillow(
    lambda image: operations.solarize(image, threshold),
    lambda image: ImageOps.solarize(image, threshold),
    (32, 32),
  )


@pytest.mark.parametrize("amount", [0, 1, 66, 110, 165, 330])
def test_solarize_add_brightens_the_dark_half(amount):
  values = np.arange(256)
  image = np.repeat(values.astype(np.uint8), 3).reshape(16, 16, 3)
  expected = [min(255, value + amount) if value < 128 else value for value in values]
  result = operations.solarize_add(image, amount)
  np.testing.assert_array_equal(result.reshape(-1, 3), np.stack([expected] * 3, -1))


def transformed(image, matrix):
  height, width = image.shape[:2]
  affine, bilinear = Image.Transform.AFFINE, Image.Resampling.BILINEAR
  moved = Image.fromarray(image).transform(
    (width, height), affine, matrix, bilinear, fillcolor=GREY
  )
  return np.asarray(moved)


def sampled(image, source_x, source_y):
  """Returns bilinear samples, in float64, of an image on an endless grey wall."""
  height, width = image.shape[:2]
  wall = np.pad(image.astype(float) - 128, ((2, 2), (2, 2), (0, 0))) + 128
  x = np.clip(source_x - 0.5, -1.5, width + 0.5) + 2
  y = np.clip(source_y - 0.5, -1.5, height + 0.5) + 2
  left, top = np.floor(x).astype(int), np.floor(y).astype(int)
  right_share, low_share = (x - left)[..., None], (y - top)[..., None]
  upper = wall[top, left] * (1 - right_share) + wall[top, left + 1] * right_share
  lower = wall[top + 1, left] * (1 - right_share) + wall[top + 1, left + 1] * right_share
  return upper * (1 - low_share) + lower * low_share


def assert_is_moved(result, image, pillow, source_x, source_y):
  """Checks a moved image.

  It is within a level of the definition everywhere, and within a level of Pillow's image away from
  the border of the source.
  """
  height, width = result.shape[:2]
  assert abs(result - sampled(image, source_x, source_y)).max() <= 0.6
  off_x = width / 2 - abs(source_x - width / 2)
  off_y = height / 2 - abs(source_y - height / 2)
  inside, outside = np.minimum(off_x, off_y) > 0.51, np.minimum(off_x, off_y) < -0.51
  assert np.mean(inside | outside) > 1 - 5 / min(height, width)
  assert abs(result.astype(int) - pillow)[inside | outside].max() <= 1


def centres(image):
  y, x = np.mgrid[: image.shape[0], : image.shape[1]] + 0.5
  return x, y


@pytest.mark.parametrize("size", [7, 32, 224])
@pytest.mark.parametrize("amount", [-0.42, -0.27, -0.03, 0.1, 0.3])
def test_shears_agree_with_pillow(amount, size):
  image = smooth(size)
  x, y = centres(image)
  expected = transformed(image, (1, amount, 0, 0, 1, 0))
  assert_is_moved(operations.shear_x(image, amount), image, expected, x + amount * y, y)
  expected = transformed(image, (1, 0, 0, amount, 1, 0))
  assert_is_moved(operations.shear_y(image, amount), image, expected, x, y + amount * x)


@pytest.mark.parametrize("size", [7, 32, 224])
@pytest.mark.parametrize("degrees", [-45, -30, -17.3, -1, 3.3, 27, 30])
def test_rotate_agrees_with_pillow(degrees, size):
  image = smooth(size)
  x, y = (coordinate - size / 2 for coordinate in centres(image))
  cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  bilinear = Image.Resampling.BILINEAR
  expected = np.asarray(Image.fromarray(image).rotate(degrees, bilinear, fillcolor=GREY))
  source_x, source_y = cos * x - sin * y + size / 2, sin * x + cos * y + size / 2
  assert_is_moved(operations.rotate(image, degrees), image, expected, source_x, source_y)


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (20, 32)], ids=str)
def test_moving_by_nothing_changes_nothing(size):
  image = noise(*size)
  for name in ("shear_x", "shear_y", "rotate", "translate_x", "translate_y"):
    np.testing.assert_array_equal(OPERATIONS[name](image, 0), image)


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (20, 32)], ids=str)
def test_half_a_turn_reverses_both_axes(size):
  image = noise(*size)
  np.testing.assert_array_equal(operations.rotate(image, 180), image[::-1, ::-1])


@pytest.mark.parametrize("size", [7, 8, 32])
def test_a_quarter_turn_is_counter_clockwise(size):
  image = noise(size, size)
  np.testing.assert_array_equal(operations.rotate(image, 90), np.rot90(image))


def test_a_shear_of_two_moves_each_row_by_two_pixels_more():
  image = noise(8, 8)
  result = operations.shear_x(image, 2)
  for row in range(3):
    shift = 2 * row + 1  # amount times the row's middle
    np.testing.assert_array_equal(result[row, : 8 - shift], image[row, shift:])
    assert (result[row, 8 - shift :] == 128).all()
  turned = operations.shear_y(image.swapaxes(0, 1), 2).swapaxes(0, 1)
  np.testing.assert_array_equal(turned, result)


@pytest.mark.parametrize("shift", [-99, -7, -3, -1, 0, 1, 4, 6, 7, 8, 99])
def test_translations_move_whole_pixels_and_fill_with_grey(shift):
  image = noise(7, 9)
  across, down = np.full_like(image, 128), np.full_like(image, 128)
  for y, x in np.ndindex(7, 9):
    if 0 <= x - shift < 9:
      across[y, x] = image[y, x - shift]
    if 0 <= y - shift < 7:
      down[y, x] = image[y - shift, x]
  np.testing.assert_array_equal(operations.translate_x(image, shift), across)
  np.testing.assert_array_equal(operations.translate_y(image, shift), down)


@pytest.mark.parametrize("turn", [-0.5, -0.13, 0.0, 0.07, 1 / 3, 0.5])
def test_hue_turns_the_colour_circle(turn):
  image = noise(16, 16)
  expected = np.empty((256, 3))
  for index, pixel in enumerate(image.reshape(-1, 3) / 255):
    hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
    expected[index] = colorsys.hsv_to_rgb((hue + turn) % 1, saturation, value)
  difference = abs(operations.hue(image, turn).reshape(-1, 3) - 255 * expected)
  assert difference.max() < 8  # hue, saturation and value have 8 bits each
  assert difference.mean() < 1.5


def test_hue_leaves_greys():
  image = np.repeat(np.arange(256, dtype=np.uint8), 3).reshape(16, 16, 3)
  np.testing.assert_array_equal(operations.hue(image, 0.3), image)


VALUES = {"posterize": 3, "solarize": 100, "rotate": 20, "translate_x": 3, "translate_y": -2}


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (7, 7), (32, 32)], ids=str)
@pytest.mark.parametrize("view", ["plain", "mirrored", "transposed", "every other"])
@pytest.mark.parametrize("name", [*OPERATIONS, "hue"])
def test_operations_keep_shape_and_type_and_their_input_whatever_its_layout(name, view, size):
  operation = getattr(operations, name)
  image = {
    "plain": noise(*size),
    "mirrored": noise(*size)[:, ::-1],
    "transposed": noise(*size).swapaxes(0, 1),
    "every other": noise(size[0] * 2, size[1] * 2)[::2, ::2],
  }[view]
  takes_value = len(inspect.signature(operation).parameters) == 2
  values = (VALUES.get(name, 0.4 if name != "solarize_add" else 40),) if takes_value else ()
  before = image.copy()
  image.flags.writeable = False
  result = operation(image, *values)
  assert result.dtype == np.uint8
  assert result.shape == image.shape
  assert not np.shares_memory(result, image)
  np.testing.assert_array_equal(image, before)
  np.testing.assert_array_equal(result, operation(np.ascontiguousarray(image), *values))


def test_the_table_names_each_operation_as_it_is_called():
  assert len(OPERATIONS) == 15
  for name, operation in OPERATIONS.items():
    assert getattr(operations, name) is operation
