"""Random steps keep to their ranges, drawn many times with fixed seeds."""

import collections
import itertools
import types

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from repjax.data.augmentation import operations
from repjax.data.augmentation.distortions import color_jitter, cutout, flip, random_erasing
from repjax.errors import InputError
from tests.data.images import noise

STRENGTHS = {"brightness": 0.4, "contrast": 0.2, "saturation": 0.7, "hue": 0.1}


@pytest.fixture
def calls(monkeypatch):
  """Replaces the operations, which then change nothing, and lists their calls (name, value)."""
  recorded = []

  def recorder(name):
    return lambda pixels, value: recorded.append((name, value)) or pixels

  for name in ("brightness", "contrast", "color"):
    monkeypatch.setitem(operations.OPERATIONS, name, recorder(name))
  monkeypatch.setattr(operations, "hue", recorder("hue"))
  return recorded


def values_of(calls, name):
  return np.array([value for called, value in calls if called == name])


def assert_uniform(values, low, high):
  """Checks the range, the mean and the spread of values that should be uniform."""
  assert low <= values.min() < low + 0.02 * (high - low)
  assert high - 0.02 * (high - low) < values.max() <= high
  assert abs(values.mean() - (low + high) / 2) < 0.02 * (high - low)
  assert abs(values.std() - (high - low) / 12**0.5) < 0.02 * (high - low)


def test_color_jitter_draws_each_strength_uniformly(calls):
  step, rng = color_jitter(**STRENGTHS), np.random.default_rng(0)
  for _ in range(2000):
    step(noise(2, 2), rng)
  assert_uniform(values_of(calls, "brightness"), 0.6, 1.4)
  assert_uniform(values_of(calls, "contrast"), 0.8, 1.2)
  assert_uniform(values_of(calls, "color"), 0.3, 1.7)
  assert_uniform(values_of(calls, "hue"), -0.1, 0.1)


def test_a_strength_above_one_has_no_negative_factors(calls):
  step, rng = color_jitter(2.0, 0, 0), np.random.default_rng(0)
  for _ in range(2000):
    step(noise(2, 2), rng)
  assert_uniform(values_of(calls, "brightness"), 0.0, 3.0)


def test_color_jitter_has_every_order_equally_often(calls):
  step, rng = color_jitter(**STRENGTHS), np.random.default_rng(0)
  orders = collections.Counter()
  for _ in range(4800):
    calls.clear()
    step(noise(2, 2), rng)
    orders[tuple(name for name, _ in calls)] += 1
  assert set(orders) == set(itertools.permutations(["brightness", "contrast", "color", "hue"]))
  assert min(orders.values()) > 130  # 200 each, less five standard deviations
  assert max(orders.values()) < 270


@pytest.mark.parametrize("kept", [*STRENGTHS, None])
def test_a_change_without_strength_is_left_out(calls, kept):
  strengths = {name: STRENGTHS[name] if name == kept else 0 for name in STRENGTHS}
  color_jitter(**strengths)(noise(2, 2), np.random.default_rng(0))
  expected = [] if kept is None else ["color" if kept == "saturation" else kept]
  assert [name for name, _ in calls] == expected


def test_the_default_jitter_leaves_the_hue(calls):
  color_jitter()(noise(2, 2), np.random.default_rng(0))
  assert {name for name, _ in calls} == {"brightness", "contrast", "color"}


@pytest.mark.parametrize("seed", range(3))
def test_a_jitter_of_brightness_equals_pillow(seed):
  image = noise(32, 32)
  result = color_jitter(0.5, 0, 0)(image, np.random.default_rng(seed))
  off = []
  # The drawn factor is unknown. One of these factors is within 0.06 levels of it.
  for factor in np.linspace(0.5, 1.5, 2001):
    expected = np.asarray(ImageEnhance.Brightness(Image.fromarray(image)).enhance(factor))
    off.append(abs(result.astype(int) - expected))
  assert min(difference.max() for difference in off) <= 1
  assert min(difference.mean() for difference in off) < 0.05


def erased(step, size, seed):
  """Returns where a step writes, a mask (S, S), and the values that it writes.

  A pixel that comes out the same on a white and on a black image was written.
  """
  white, black = np.full((size, size, 3), 255, np.uint8), np.zeros((size, size, 3), np.uint8)
  on_white = step(white, np.random.default_rng(seed))
  on_black = step(black, np.random.default_rng(seed))
  touched = (on_white == on_black).all(-1)
  assert (on_white[~touched] == 255).all()
  assert (on_black[~touched] == 0).all()
  return touched, on_black[touched]


def box(touched):
  """Returns (top, left, height, width) of a filled rectangle."""
  rows, columns = np.flatnonzero(touched.any(1)), np.flatnonzero(touched.any(0))
  height, width = rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1
  assert touched.sum() == height * width
  return rows[0], columns[0], height, width


def test_erased_rectangles_have_the_areas_ratios_and_places_asked_for():
  step = random_erasing(1, area=(0.1, 0.2), ratio=(0.5, 3))
  boxes = np.array([box(erased(step, 64, seed)[0]) for seed in range(1500)])
  top, left, height, width = boxes.T
  # Sides are rounded to whole pixels.
  assert ((height + 0.5) * (width + 0.5) >= 0.1 * 64**2).all()
  assert ((height - 0.5) * (width - 0.5) <= 0.2 * 64**2).all()
  assert ((height + 0.5) / (width - 0.5) >= 0.5).all()
  assert ((height - 0.5) / (width + 0.5) <= 3).all()
  assert abs((height * width / 64**2).mean() - 0.15) < 0.003
  assert abs((height * width / 64**2).std() - 0.1 / 12**0.5) < 0.003
  ratios = np.log(height / width)
  assert abs(ratios.mean() - np.log(0.5 * 3) / 2) < 0.04
  assert abs(ratios.std() - np.log(3 / 0.5) / 12**0.5) < 0.03
  for start, side in ((top, height), (left, width)):
    assert start.min() == 0
    assert (start + side).max() == 64
    assert abs((start / (64 - side)).mean() - 0.5) < 0.03


def test_erased_pixels_are_uniform_noise_in_each_channel():
  step = random_erasing(1, area=(0.3, 0.3))
  values = np.concatenate([erased(step, 64, seed)[1] for seed in range(60)])
  counts = np.bincount(values.ravel(), minlength=256)
  mean = values.size / 256
  assert abs(counts - mean).max() < 5 * mean**0.5
  assert abs(np.corrcoef(values.T)[np.triu_indices(3, 1)]).max() < 0.02


@pytest.mark.parametrize("probability", [0, 0.25, 0.6, 1])
def test_erasing_happens_as_often_as_asked_for(probability):
  step, rng, image = random_erasing(probability), np.random.default_rng(0), noise(16, 16)
  changed = np.mean([not np.array_equal(step(image, rng), image) for _ in range(2000)])
  assert abs(changed - probability) < 0.04 * (0 < probability < 1) + 1e-9


def test_where_no_rectangle_fits_the_image_stays():
  step = random_erasing(1, area=(0.9, 0.9), ratio=(2, 2))
  image = noise(16, 16)
  np.testing.assert_array_equal(step(image, np.random.default_rng(0)), image)


def test_a_rectangle_that_does_not_fit_is_drawn_again():
  # More than half of the rectangles are higher than the image.
  step = random_erasing(1, area=(0.5, 0.5), ratio=(1, 6))
  missing = sum(not erased(step, 32, seed)[0].any() for seed in range(300))
  assert missing < 30


@pytest.mark.parametrize("side", [2, 8, 9, 20, 56])
@pytest.mark.parametrize("centre", [(0, 0), (3, 31), (16, 10), (31, 28)], ids=str)
def test_cutout_paints_a_square_about_its_centre(side, centre):
  rng = types.SimpleNamespace(integers=lambda low, high: np.array(centre))
  image = noise(32, 32)
  painted = cutout(image, side, rng)
  for row, column in np.ndindex(32, 32):
    inside = all(
      -(side // 2) <= offset < side - side // 2 for offset in (row - centre[0], column - centre[1])
    )
    expected = (125, 122, 113) if inside else image[row, column]
    np.testing.assert_array_equal(painted[row, column], expected)


def test_cutout_has_its_centre_anywhere():
  rng, image = np.random.default_rng(0), np.zeros((16, 16, 3), np.uint8)
  boxes = [box(cutout(image, 2, rng).any(-1)) for _ in range(5120)]
  # A square of two pixels starts one before its centre, or has lost its first row or column.
  counts = collections.Counter((top + h - 1, left + w - 1) for top, left, h, w in boxes)
  assert set(counts) == set(np.ndindex(16, 16))
  assert max(counts.values()) < 20 + 5 * 20**0.5


@pytest.mark.parametrize("argument", STRENGTHS)
def test_color_jitter_refuses_strengths(argument):
  wanted = "from 0 to 0.5" if argument == "hue" else "of 0 or more"
  for value in (-0.1, float("inf"), 0.6 if argument == "hue" else "strong"):
    with pytest.raises(InputError, match=f"color_jitter's {argument} is .*number {wanted}"):
      color_jitter(**{argument: value})


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"area": 0.2}, "area is 0.2; it must be two numbers"),
    ({"area": (0.1, 0.2, 0.3)}, "area is .*; it must be two numbers"),
    ({"area": "02"}, "area is '02'; it must be two numbers"),
    ({"area": (0.3, 0.1)}, r"area is \(0.3, 0.1\); it must be \(least, largest\)"),
    ({"area": (0, 0.1)}, "both above 0"),
    ({"area": (0.1, 1.5)}, "a bound of random_erasing's area is 1.5; .* from 0 to 1"),
    ({"ratio": (0, 2)}, "ratio is .*both above 0"),
    ({"ratio": (0.5, float("inf"))}, "a bound of random_erasing's ratio is inf"),
  ],
)
def test_random_erasing_refuses_ranges(arguments, message):
  with pytest.raises(InputError, match=message):
    random_erasing(**arguments)


@pytest.mark.parametrize("probability", [0, 0.2, 0.5, 1])
def test_flip_mirrors_with_its_probability(probability):
  pixels, rng = noise(5, 5), np.random.default_rng(0)
  results = [flip(probability)(pixels, rng) for _ in range(1000)]
  mirrored = [np.array_equal(result, pixels[:, ::-1]) for result in results]
  assert all(flipped or result is pixels for flipped, result in zip(mirrored, results))
  assert abs(np.mean(mirrored) - probability) <= (0.05 if 0 < probability < 1 else 0)


@pytest.mark.parametrize(
  ("probability", "message"),
  [(2, "flip's probability is 2; it must be a number from 0 to 1"), ("often", "is 'often'")],
)
def test_flip_refuses_what_is_no_probability(probability, message):
  with pytest.raises(InputError, match=message):
    flip(probability)
