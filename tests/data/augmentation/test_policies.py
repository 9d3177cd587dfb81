"""The tables of policies equal published copies, and draws follow the definitions."""

import collections
import pickle
import re

import numpy as np
import pytest

from repjax.data.augmentation import operations, policies
from repjax.data.augmentation.distortions import color_jitter, random_erasing
from repjax.data.augmentation.policies import (
  AUTO_SCALES,
  INCREASING_SCALES,
  POLICIES,
  RAND_SCALES,
  auto_augment,
  rand_augment,
)
from repjax.errors import InputError
from tests.data.images import noise

# The tables as other projects write them: operation, probability, and magnitude where it matters.
IMAGENET = """
  Posterize .4 8, Rotate .6 9        | Solarize .6 5, AutoContrast .6
  Equalize .8, Equalize .6           | Posterize .6 7, Posterize .6 6
  Equalize .4, Solarize .2 4         | Equalize .4, Rotate .8 8
  Solarize .6 3, Equalize .6         | Posterize .8 5, Equalize 1.
  Rotate .2 3, Solarize .6 8         | Equalize .6, Posterize .4 6
  Rotate .8 8, Color .4 0            | Rotate .4 9, Equalize .6
  Equalize 0., Equalize .8           | Invert .6, Equalize 1.
  Color .6 4, Contrast 1. 8          | Rotate .8 8, Color 1. 2
  Color .8 8, Solarize .8 7          | Sharpness .4 7, Invert .6
  ShearX .6 5, Equalize 1.           | Color .4 0, Equalize .6
  Equalize .4, Solarize .2 4         | Solarize .6 5, AutoContrast .6
  Invert .6, Equalize 1.             | Color .6 4, Contrast 1. 8
  Equalize .8, Equalize .6
"""
CIFAR10 = """
  Invert .1, Contrast .2 6           | Rotate .7 2, TranslateX .3 9
  Sharpness .8 1, Sharpness .9 3     | ShearY .5 8, TranslateY .7 9
  AutoContrast .5, Equalize .9       | ShearY .2 7, Posterize .3 7
  Color .4 3, Brightness .6 7        | Sharpness .3 9, Brightness .7 9
  Equalize .6, Equalize .5           | Contrast .6 7, Sharpness .6 5
  Color .7 7, TranslateX .5 8        | Equalize .3, AutoContrast .4
  TranslateY .4 3, Sharpness .2 6    | Brightness .9 6, Color .2 8
  Solarize .5 2, Invert 0.           | Equalize .2, AutoContrast .6
  Equalize .2, Equalize .6           | Color .9 9, Equalize .6
  AutoContrast .8, Solarize .2 8     | Brightness .1 3, Color .7 0
  Solarize .4 5, AutoContrast .9     | TranslateY .9 9, TranslateY .7 9
  AutoContrast .9, Solarize .8 3     | Equalize .8, Invert .1
  TranslateY .7 9, AutoContrast .9
"""
PLAIN = {"autocontrast", "equalize", "invert"}
ENHANCE = ("color", "contrast", "brightness", "sharpness")
FACTORIES = {
  "auto_augment()": auto_augment(),
  'auto_augment("cifar10")': auto_augment("cifar10"),
  "rand_augment()": rand_augment(),
  "parnet": rand_augment(2, 9, noise=0.5),
  "repvgg_b3": rand_augment(2, 7, noise=0.5, increasing=True),
  "raug15": rand_augment(2, 15, noise="uniform", probability=1, cutout=True),
  "far beyond": rand_augment(8, 30, noise=30, probability=1, increasing=True, cutout=True),
  "color_jitter": color_jitter(hue=0.1),
  "random_erasing": random_erasing(0.8),
}


def record(monkeypatch, names):
  """Replaces the operations, which then change nothing, and lists their calls (name, value)."""
  calls = []

  def recorder(name):
    return lambda pixels, value=None: calls.append((name, value)) or pixels

  monkeypatch.setattr(policies, "OPERATIONS", {name: recorder(name) for name in names})
  monkeypatch.setattr(
    policies, "cutout", lambda pixels, side, rng: recorder("cutout")(pixels, side)
  )
  return calls


def snake(name):
  return re.sub(r"(X|Y)$", r"_\1", name.replace("AutoContrast", "Autocontrast")).lower()


@pytest.mark.parametrize(("policy", "text"), [("imagenet", IMAGENET), ("cifar10", CIFAR10)])
def test_the_tables_are_the_published_ones(policy, text):
  expected = [
    tuple(part.split() for part in row.split(","))
    for row in text.replace("|", "\n").strip().splitlines()
  ]
  assert len(expected) == len(POLICIES[policy]) == 25
  for row, parts in zip(POLICIES[policy], expected):
    for (name, probability, magnitude), part in zip((row[:3], row[3:]), parts):
      assert [name, probability] == [snake(part[0]), float(part[1])]
      assert [str(magnitude)] == part[2:] or name in PLAIN
      assert magnitude in range(10)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_operation_of_the_tables_exists(policy):
  for row in POLICIES[policy]:
    for name in (row[0], row[3]):
      assert name in operations.OPERATIONS
      assert (name in AUTO_SCALES) != (name in PLAIN)


def test_every_operation_has_a_scale_where_it_takes_a_value():
  assert set(RAND_SCALES) == set(INCREASING_SCALES)
  assert set(RAND_SCALES) == (set(operations.OPERATIONS) - PLAIN) | {"cutout"}


def auto_value(name, magnitude, sign, size):
  """Returns one of the ten evenly spaced values of the paper's Table 6, the mildest first."""
  if name in PLAIN:
    return None
  if name in ("posterize", "solarize"):
    start, end = {"posterize": (8, 4), "solarize": (256, 0)}[name]
    value = np.linspace(start, end, 10)[magnitude]
    return round(value) if name == "posterize" else value
  if name in ENHANCE:
    return np.linspace(1, 1 + 0.9 * sign, 10)[magnitude]
  end = {"rotate": 30, "shear_x": 0.3, "shear_y": 0.3}.get(name, 150 / 331 * size)
  value = sign * np.linspace(0, end, 10)[magnitude]
  return round(value) if name.startswith("translate") else value


@pytest.mark.parametrize("size", [7, 32, 224])
@pytest.mark.parametrize("policy", POLICIES)
def test_auto_augment_applies_the_drawn_row_with_the_papers_values(monkeypatch, policy, size):
  calls = record(monkeypatch, operations.OPERATIONS)
  every_row = [(row[0], 1.0, row[2], row[3], 1.0, row[5]) for row in POLICIES[policy]]
  seen = set()
  for index, row in enumerate(every_row):
    monkeypatch.setitem(POLICIES, policy, (row,))
    for seed in range(8):
      calls.clear()
      auto_augment(policy)(noise(size, size), np.random.default_rng(seed))
      assert [name for name, _ in calls] == [row[0], row[3]]
      for (name, value), magnitude in zip(calls, (row[2], row[5])):
        either = [auto_value(name, magnitude, sign, size) for sign in (1, -1)]
        assert value in [None if v is None else pytest.approx(v, abs=1e-9) for v in either]
        if name not in PLAIN and either[0] != either[1]:
          seen.add((index, name, value > (1 if name in ENHANCE else 0)))
  directed = {key[:2] for key in seen}
  assert directed
  assert len(seen) == 2 * len(directed)  # both directions of each


def test_auto_augment_draws_rows_uniformly_and_each_operation_with_its_probability(monkeypatch):
  count, draws = 25, 20_000
  chances = [(index / 24, 1 - index / 24) for index in range(count)]
  rows = tuple((f"a{i}", first, 0, f"b{i}", second, 0) for i, (first, second) in enumerate(chances))
  calls = record(monkeypatch, [row[0] for row in rows] + [row[3] for row in rows])
  monkeypatch.setitem(POLICIES, "imagenet", rows)
  step, rng, image = auto_augment(), np.random.default_rng(0), noise(2, 2)
  seen = collections.Counter()
  for _ in range(draws):
    calls.clear()
    step(image, rng)
    seen[tuple(name for name, _ in calls)] += 1
  for i, (first, second) in enumerate(chances):
    expected = {
      (f"a{i}",): first * (1 - second),
      (f"b{i}",): (1 - first) * second,
      (f"a{i}", f"b{i}"): first * second,
    }
    for names, chance in expected.items():
      mean = draws / count * chance
      assert abs(seen[names] - mean) <= 5 * mean**0.5
  assert set(seen) <= {()} | {(f"a{i}",) for i in range(25)} | {(f"b{i}",) for i in range(25)} | {
    (f"a{i}", f"b{i}") for i in range(25)
  }


# magnitude: posterize, solarize, solarize_add, the four enhancements, cutout.
RAND_VALUES = {
  0: (0, 0, 0, 0.1, 2),
  2: (0, 51, 22, 0.46, 8),
  5: (2, 128, 55, 1.0, 20),
  9: (3, 230, 99, 1.72, 36),
  10: (4, 256, 110, 1.9, 40),
  14: (5, 358, 154, 2.62, 56),
  30: (8, 768, 330, 5.5, 120),
}
INCREASING_VALUES = {
  0: (4, 256, 0, 0.0, 2),
  5: (2, 128, 55, 0.45, 20),
  7: (2, 77, 77, 0.63, 28),
  10: (0, 0, 110, 0.9, 40),
  30: (0, -512, 330, 2.7, 120),
}
RECIPES = [(False, *item) for item in RAND_VALUES.items()]
RECIPES += [(True, *item) for item in INCREASING_VALUES.items()]


@pytest.mark.parametrize("size", [7, 224])
@pytest.mark.parametrize(("increasing", "magnitude", "values"), RECIPES)
def test_rand_augment_applies_the_ranges_of_timm(monkeypatch, increasing, magnitude, values, size):
  calls = record(monkeypatch, operations.OPERATIONS)
  step = rand_augment(1, magnitude, probability=1, increasing=increasing, cutout=True)
  rng = np.random.default_rng(0)
  for _ in range(600):
    step(noise(size, size), rng)
  seen = collections.defaultdict(set)
  for name, value in calls:
    seen[name].add(value if value is None else round(float(value), 9))
  posterize, solarize, solarize_add, enhance, side = values
  m = magnitude
  shift = round(0.045 * m * size)
  expected = {
    **{name: {None} for name in PLAIN},
    "shear_x": {0.03 * m, -0.03 * m},
    "shear_y": {0.03 * m, -0.03 * m},
    "rotate": {3.0 * m, -3.0 * m},
    "translate_x": {shift, -shift},
    "translate_y": {shift, -shift},
    "posterize": {posterize},
    "solarize": {solarize},
    "solarize_add": {solarize_add},
    "cutout": {side},
  }
  for name in ENHANCE:
    expected[name] = {1 + enhance, max(0.1, 1 - enhance)} if increasing else {enhance}
  for name, found in seen.items():
    ordered = sorted(expected[name], key=str)
    assert sorted(found, key=str) == [v if v is None else pytest.approx(v) for v in ordered]
  assert set(seen) == set(expected)


@pytest.mark.parametrize("cutout", [False, True])
@pytest.mark.parametrize(("num_ops", "probability"), [(1, 1), (2, 0.5), (3, 0.2)])
def test_rand_augment_draws_with_replacement_and_applies_by_chance(
  monkeypatch, num_ops, probability, cutout
):
  calls = record(monkeypatch, operations.OPERATIONS)
  step = rand_augment(num_ops, probability=probability, cutout=cutout)
  names = [*operations.OPERATIONS, *["cutout"] * cutout]
  rng, image, lengths, draws = np.random.default_rng(0), noise(4, 4), collections.Counter(), 8000
  twice = 0
  for _ in range(draws):
    before = len(calls)
    step(image, rng)
    applied = [name for name, _ in calls[before:]]
    lengths[len(applied)] += 1
    twice += len(applied) == 2 and applied[0] == applied[1]
  chosen = collections.Counter(name for name, _ in calls)
  mean = draws * num_ops * probability / len(names)
  assert set(chosen) == set(names)
  assert max(abs(count - mean) for count in chosen.values()) < 5 * mean**0.5
  none, every = draws * (1 - probability) ** num_ops, draws * probability**num_ops
  assert abs(lengths[0] - none) <= 5 * none**0.5
  assert abs(lengths[num_ops] - every) <= 5 * every**0.5
  if num_ops == 2:
    mean = every / len(names)
    assert abs(twice - mean) < 5 * mean**0.5


def drawn_magnitudes(monkeypatch, count=4000, **arguments):
  """Returns the drawn magnitudes and their signs, read off the angles of rotations."""
  calls = record(monkeypatch, ["rotate"])
  step = rand_augment(2, probability=1, **arguments)
  rng, image = np.random.default_rng(0), noise(2, 2)
  for _ in range(count // 2):
    step(image, rng)
  angles = np.array([value for _, value in calls])
  return abs(angles) / 3, np.sign(angles)


def test_without_noise_all_magnitudes_are_the_same_and_directions_are_even(monkeypatch):
  magnitudes, signs = drawn_magnitudes(monkeypatch, magnitude=7.5)
  np.testing.assert_allclose(magnitudes, 7.5, rtol=1e-12)
  assert abs(signs.mean()) < 0.07


@pytest.mark.parametrize(("magnitude", "noise_std"), [(5, 0.5), (9, 0.2), (12, 0.5)])
def test_noise_is_normal_about_the_magnitude(monkeypatch, magnitude, noise_std):
  magnitudes, signs = drawn_magnitudes(monkeypatch, magnitude=magnitude, noise=noise_std)
  if magnitude > 10:  # cut off in the middle
    assert magnitudes.max() == pytest.approx(magnitude)
    below = magnitudes[magnitudes < magnitude - 1e-9]
    assert abs(len(below) / len(magnitudes) - 0.5) < 0.04
    assert np.mean((below - magnitude) ** 2) ** 0.5 == pytest.approx(noise_std, rel=0.06)
    return
  assert magnitudes.mean() == pytest.approx(magnitude, abs=0.05)
  assert magnitudes.std() == pytest.approx(noise_std, rel=0.06)
  assert np.mean(abs(magnitudes - magnitude) < noise_std) == pytest.approx(0.683, abs=0.04)
  # Each operation of an image has its own.
  assert abs(np.corrcoef(magnitudes[::2], magnitudes[1::2])[0, 1]) < 0.08
  assert abs(np.corrcoef(magnitudes, signs)[0, 1]) < 0.08


def test_noise_is_cut_off_at_both_ends_of_the_scale(monkeypatch):
  magnitudes, _ = drawn_magnitudes(monkeypatch, magnitude=9, noise=0.5)
  assert magnitudes.max() == pytest.approx(10)
  assert np.mean(magnitudes > 10 - 1e-9) == pytest.approx(0.0228, abs=0.012)
  magnitudes, _ = drawn_magnitudes(monkeypatch, magnitude=5, noise=5)
  for end in (0, 10):
    assert np.mean(abs(magnitudes - end) < 1e-9) == pytest.approx(0.1587, abs=0.03)


def test_uniform_magnitudes_are_whole_and_below_the_one_given(monkeypatch):
  magnitudes, signs = drawn_magnitudes(monkeypatch, magnitude=15, noise="uniform")
  counts = np.bincount(np.rint(magnitudes).astype(int))
  np.testing.assert_allclose(magnitudes, np.rint(magnitudes), atol=1e-9)
  assert len(counts) == 15
  assert abs(counts - len(magnitudes) / 15).max() < 5 * (len(magnitudes) / 15) ** 0.5
  assert abs(signs.mean()) < 0.07


@pytest.mark.parametrize("size", [1, 7, 32, 224])
@pytest.mark.parametrize("name", FACTORIES)
def test_steps_follow_the_generator_and_keep_size_type_and_input(name, size):
  step, image = FACTORIES[name], noise(size, size)
  copy = pickle.loads(pickle.dumps(step))  # as it travels to worker processes
  before = image.copy()
  image.flags.writeable = False
  results = []
  for seed in range(40 if size < 50 else 12):
    result, again = (
      step(image, np.random.default_rng(seed)),
      copy(image, np.random.default_rng(seed)),
    )
    assert result.dtype == np.uint8
    assert result.shape == (size, size, 3)
    assert result.flags.c_contiguous
    np.testing.assert_array_equal(result, again)
    results.append(result.tobytes())
  np.testing.assert_array_equal(image, before)
  assert len(set(results)) > (5 if size > 1 else 1)


@pytest.mark.parametrize("name", FACTORIES)
def test_steps_take_mirrored_images(name):
  step, image = FACTORIES[name], noise(16, 16)[:, ::-1]
  for seed in range(40):
    result = step(image, np.random.default_rng(seed))
    plain = step(np.ascontiguousarray(image), np.random.default_rng(seed))
    np.testing.assert_array_equal(result, plain)


def test_the_defaults_of_all_steps_work():
  for make in (auto_augment, rand_augment, color_jitter, random_erasing):
    step, rng, image = make(), np.random.default_rng(0), noise(32, 32)
    assert any(not np.array_equal(step(image, rng), image) for _ in range(20))


@pytest.mark.parametrize("policy", ["imagent", "ImageNet", "", None, 3, ["imagenet"]])
def test_an_unknown_policy_is_refused(policy):
  with pytest.raises(InputError, match=r"^unknown AutoAugment policy .*(imagenet|cifar10)"):
    auto_augment(policy)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"num_ops": 0}, "num_ops is 0; it must be a whole number from 1 to 100"),
    ({"num_ops": 1.5}, "num_ops is 1.5; it must be a whole number"),
    ({"magnitude": -1}, "magnitude is -1; it must be a number from 0 to 30"),
    ({"magnitude": 31}, "magnitude is 31; "),
    ({"magnitude": "9"}, "magnitude is '9'; "),
    ({"noise": -0.5}, 'noise, if not "uniform", is -0.5; it must be a number from 0 to 30'),
    ({"noise": "normal"}, "noise, if not .* is 'normal'; "),
    ({"noise": None}, "noise, if not .* is None; "),
    ({"noise": "uniform", "magnitude": 0}, "magnitude is 0; it must be a whole number from 1"),
    ({"noise": "uniform", "magnitude": 7.5}, "magnitude is 7.5; it must be a whole number"),
    ({"probability": 2}, "probability is 2; it must be a number from 0 to 1"),
    ({"increasing": 1}, "increasing is 1; it must be True or False"),
    ({"cutout": "no"}, "cutout is 'no'; it must be True or False"),
  ],
)
def test_rand_augment_refuses(arguments, message):
  with pytest.raises(InputError, match=f"^rand_augment's {message}"):
    rand_augment(**arguments)
