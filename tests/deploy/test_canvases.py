"""Tests of class maps on canvases, with functions of pixels in place of compiled networks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.deploy.canvases import Canvases, canvas_of, shared_canvas_of, stretching
from repjax.errors import InputError
from repjax.models import create_model
from repjax.training.tasks.segmentation import Segmentation, slide

pytest_plugins = ["tests.training.fixtures"]

FILL = (10, 20, 30)
FCN = create_model(
  "fcn",
  num_classes=3,
  backbone="repvgg_a0",
  backbone_overrides={"stage_sizes": (1, 1, 1, 1), "width_multipliers": (0.125,) * 4},
)
SHARED = functools.partial(shared_canvas_of, FCN)
WINDOW = functools.partial(shared_canvas_of, FCN, window=16)


def scores(images):
  """Logits that depend on the place: pixels less the mean of their row."""
  x = images.astype(np.float32) / 40
  return x - x.mean(2, keepdims=True)


def noise(height, width, seed=0):
  return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@pytest.fixture
def built():
  """The sizes for which a network was built, and a function that builds one."""
  sizes = []

  def build(size):
    sizes.append(size)

    def network(images):
      assert images.shape[1:3] == size
      return scores(images)

    return network

  return sizes, build


def test_images_of_any_sizes_keep_them_and_share_programs(built):
  sizes, build = built
  images = [noise(20, 40), noise(34, 65), noise(33, 64, 1), noise(20, 40, 2)]
  maps = Canvases(build, FILL, SHARED)(images)
  assert sizes == [(33, 65), (65, 65)]
  for image, classes in zip(images, maps, strict=True):
    assert classes.dtype == np.uint8
    canvas = np.tile(np.array(FILL, np.uint8), (65 if len(image) == 34 else 33, 65, 1))
    canvas[: image.shape[0], : image.shape[1]] = image
    wanted = scores(canvas[None])[0].argmax(-1)[: image.shape[0], : image.shape[1]]
    np.testing.assert_array_equal(classes, wanted)


def test_only_the_latest_programs_are_kept(built):
  sizes, build = built
  canvases = Canvases(build, FILL, SHARED)
  for side in (33, 65, 97, 129, 33, 161, 65):
    canvases([noise(side, 33)])
  assert [height for height, _ in sizes] == [33, 65, 97, 129, 161, 65]


def test_windows_are_those_of_evaluation(built):
  sizes, build = built
  images = np.stack([noise(24, 40, seed) for seed in range(2)])
  found = Canvases(build, FILL, WINDOW, window=16).scores(images)
  assert sizes == [(16, 16)]

  def network(images):
    x = images.astype(jnp.float32) / 40
    return x - x.mean(2, keepdims=True)

  wanted = np.exp(np.asarray(jax.jit(lambda x: slide(network, x, 16))(images)))
  np.testing.assert_allclose(found, wanted, rtol=1e-4)


def test_an_image_smaller_than_a_window_lies_on_a_canvas(built):
  _, build = built
  (classes,) = Canvases(build, FILL, WINDOW, window=16)([noise(9, 21)])
  assert classes.shape == (9, 21)


def test_a_network_of_one_size_is_told_to_use_windows():
  def build(size):
    raise InputError("it takes 224 x 224 alone")

  with pytest.raises(InputError, match=r"canvas of 65 x 33 .* takes 224 x 224 alone.*window"):
    Canvases(build, FILL, SHARED)([noise(20, 40)])


@pytest.mark.parametrize("window", [0, 16])
def test_mirror_images_are_those_of_evaluation(built, window):
  _, build = built
  images = np.stack([noise(24, 40, seed) for seed in range(2)])
  found = Canvases(build, FILL, WINDOW, window=window, flip=True).scores(images)
  task = Segmentation(eval_window=window, eval_flip=True)

  def network(images):
    x = images.astype(jnp.float32) / 40
    return x - x.mean(2, keepdims=True)

  # Both are probabilities up to a factor.
  wanted = np.exp(np.asarray(jax.jit(lambda x: task.predict(network, x))(images)))
  found, wanted = (each / each.sum(-1, keepdims=True) for each in (found, wanted))
  np.testing.assert_allclose(found, wanted, rtol=1e-4)


@pytest.mark.parametrize(
  ("how", "size", "wanted"),
  [
    ({}, (128, 97), (129, 97)),
    ({}, (20, 33), (33, 33)),
    ({"multiple": 24}, (128, 97), (144, 120)),
    ({"window": 100, "multiple": 24}, (128, 97), (128, 100)),
  ],
)
def test_the_canvas_of_evaluation_fits_the_network_or_the_window(how, size, wanted):
  assert canvas_of(FCN, size, **how) == wanted


def test_sizes_that_stretch_maps_are_named_with_one_that_does_not():
  assert stretching(FCN, "crops", (97, 33)) == ""
  said = stretching(FCN, "crops", (97, 32))
  assert said.startswith("crops of 97 x 32 px")
  assert said.endswith("97 x 33 px do not")
