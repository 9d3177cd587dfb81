"""The scenes: what they show, and that training and test scenes have nothing in common."""

import numpy as np
import pytest

from repjax.data import open_source, scenes
from repjax.data.masks import IGNORED
from repjax.data.pairs import pair_of

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture(scope="module")
def ingredients(tmp_path_factory):
  """Returns the parts of photographs, the digits and their labels of each split."""
  builder = scenes.Scenes(data_dir=str(tmp_path_factory.mktemp("tfds")))
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(scenes, "_scenes", lambda split, *rest: rest)
    return builder._split_generators(None)


def test_no_digit_and_no_part_of_a_photograph_is_in_both_splits(ingredients):
  (train, train_ink, _), (test, test_ink, _) = ingredients["train"], ingredients["test"]
  digits = [{image.tobytes() for image in ink} for ink in (train_ink, test_ink)]
  assert not digits[0] & digits[1]
  assert (len(train_ink), len(test_ink)) == (1437, 360)
  for first, second in zip(train, test):
    axis = int(first.shape[0] == second.shape[0])
    assert first.shape[1 - axis] == second.shape[1 - axis]
    np.testing.assert_allclose(first.shape[axis] / second.shape[axis], 7 / 3, rtol=0.02)
    # The two are neighbours: the row beyond the first part resembles its last row.
    edges = np.take(first, -1, axis).astype(int), np.take(second, 0, axis)
    assert np.abs(edges[0] - edges[1]).mean() < 30


def test_a_seed_fixes_a_scene(ingredients):
  (key, example), (again_key, again) = (
    next(scenes._scenes("test", *ingredients["test"])) for _ in range(2)
  )
  assert key == again_key
  for name in example:
    assert example[name].getvalue() == again[name].getvalue()


def test_a_pixel_of_a_digit_has_its_class_and_a_colour_of_its_own(ingredients):
  parts, ink, labels = ingredients["train"]
  pixels, classes = scenes._scene(parts[5], ink, labels, np.random.default_rng(0))
  assert classes.shape == pixels.shape[:2]
  assert set(np.unique(classes)) <= set(range(11))
  for each in np.unique(classes)[1:]:
    assert (classes == each).sum() > 30
  inside, around = pixels[classes > 0].astype(int), pixels[classes == 0].mean(0)
  assert np.median(np.linalg.norm(inside - around, axis=-1)) > 60


def test_scenes_are_prepared_on_first_use(digits_dir, capsys):
  source = open_source("scenes", "test", data_dir=str(digits_dir))
  assert (source.task, len(source.examples)) == ("segmentation", 128)
  assert source.class_names == ("background", *map(str, range(10)))
  assert source.canvas() == (128, 128)
  assert len(open_source("scenes", "train", data_dir=str(digits_dir)).examples) == 512
  pairs = [pair_of(source.examples[index], (0, 0, 0)) for index in range(0, 128, 4)]
  assert {side for pair in pairs for side in pair.classes.shape} == {96, 112, 128}
  counts = sum(np.bincount(pair.classes.ravel(), minlength=256) for pair in pairs)
  assert counts[IGNORED] == 0
  assert (counts[:11] / counts.sum() > 0.003).all()
  assert 0.7 < counts[0] / counts.sum() < 0.95
