"""A line of steps is read, and mistakes in the line are named."""

import numpy as np
import pytest

from repjax.data.augmentation import parser
from repjax.data.decode import Picture
from repjax.errors import InputError
from tests.data.images import noise

LINES = [
  "none",
  "random_resized_crop | flip",
  "random_resized_crop((0.5, 1), ratio=(0.9, 1.1))|flip(0.1)",
  "pad_and_crop(3) | flip | auto_augment('cifar10')",
  "random_resized_crop | flip | color_jitter(0.4, hue=0.1) | auto_augment",
  "random_resized_crop | flip | rand_augment(2, 9, noise=0.5) | random_erasing(1)",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("size", [(16, 16), (9, 40), (40, 9), (1, 1)], ids=str)
def test_a_line_gives_the_size_and_type_and_follows_the_generator(line, size):
  first, again = (
    parser.parse(line)(Picture(noise(*size)), 16, "bilinear", np.random.default_rng(3))
    for _ in range(2)
  )
  assert first.shape == (16, 16, 3)
  assert first.dtype == np.uint8
  np.testing.assert_array_equal(first, again)


def test_steps_run_from_left_to_right(monkeypatch):
  steps = {
    "add": lambda n: lambda pixels, rng: pixels + np.uint8(n),
    "double": lambda: lambda pixels, rng: pixels * np.uint8(2),
  }
  monkeypatch.setattr(parser, "STEPS", steps)
  ones = np.ones((4, 4, 3), np.uint8)
  for line, value in (("none|add(3)|double", 8), ("none | double | add(n=3)", 5), ("none", 1)):
    result = parser.parse.__wrapped__(line)(Picture(ones), 4, "bilinear", None)
    assert (result == value).all()


def test_the_names_of_steps():
  assert set(parser.CROPS) == {"none", "pad_and_crop", "random_resized_crop"}
  assert set(parser.STEPS) == {
    *("flip", "auto_augment", "rand_augment", "color_jitter", "random_erasing"),
  }


@pytest.mark.parametrize("name", parser.STEPS)
def test_every_step_has_defaults(name):
  rng = np.random.default_rng(0)
  result = parser.parse(f"none | {name}")(Picture(noise(16, 16)), 16, "bilinear", rng)
  assert result.shape == (16, 16, 3)


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("", "'' is no step. A step is a name, such as flip"),
    ("random_resized_crop |", "'' is no step"),
    ("random_resized_crop flip", "'random_resized_crop flip' is no step"),
    ("none | flip(", r"'flip\(' is no step"),
    ("none | flip(x)", r"'flip\(x\)' is no step"),
    ("none | flip(**{})", "is no step"),
    ("none | 3", "'3' is no step"),
    ("none | np.flip(1)", "is no step"),
    ("flip", "flip may stand after the first step only. The line begins with one of none"),
    ("none | none", "none may stand at the beginning only"),
    ("random_resize_crop", "unknown step of config.augment 'random_resize_crop'; did you mean"),
    ("none | randaugment", "unknown step of config.augment 'randaugment'; did you mean"),
    (
      "none | flip(1, 2)",
      r"flip\(1, 2\): too many positional arguments; write flip\(probability=0.5\)",
    ),
    ("none | flip(chance=1)", r"got an unexpected keyword argument 'chance'; write flip"),
    (3, "one line of steps, such as 'none | flip'; got 3"),
    ("none | flip(2)", "flip's probability is 2; it must be a number from 0 to 1"),
  ],
)
def test_a_mistake_is_named(line, message):
  with pytest.raises(InputError, match=message):
    parser.parse(line)


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "flip(__import__('os').getcwd())"])
def test_nothing_in_a_line_is_run(text):
  with pytest.raises(InputError, match="is no step"):
    parser.parse(f"none | {text}")
