"""Image and mask stay aligned to the pixel, and the image is what resizing a whole one gives."""

import cv2
import numpy as np
import pytest
from PIL import Image

from repjax.data.augmentation import PAIR_STEPS, parse
from repjax.data.augmentation.pairs import scale_and_crop
from repjax.data.masks import IGNORED
from repjax.data.pairs import Pair
from repjax.errors import InputError
from tests.data.images import noise, scripted, smooth
from tests.data.pairs import classes_of

FILL = (7, 8, 9)


def its_own_mask(width, height):
  """Returns a pair whose image shows the class of each pixel in its three channels."""
  classes = np.random.default_rng(0).integers(0, 200, (height, width)).astype(np.uint8)
  return Pair(np.repeat(classes[..., None], 3, -1), classes, (IGNORED,) * 3)


@pytest.mark.parametrize("seed", range(12))
def test_an_image_that_is_its_mask_stays_its_mask(seed):
  pair = its_own_mask(*np.random.default_rng(seed).integers(10, 60, 2))
  rng = np.random.default_rng(seed)
  result = parse("scale_and_crop | flip", "segmentation")(pair, 33, "nearest", rng)
  assert result.pixels.shape == (33, 33, 3)
  np.testing.assert_array_equal(result.pixels, np.repeat(result.classes[..., None], 3, -1))
  assert len(np.unique(result.classes)) > 20


def cropped(pair, factor, corner, size, interpolation):
  rng = scripted(integers=corner, random=[factor - 0.5])
  return scale_and_crop((0.5, 1.5))(pair, size, interpolation, rng)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("factor", "corner"), [(0.7, (3, 5)), (1.3, (11, 2)), (1.0, (4, 4))])
def test_the_square_is_cut_out_of_the_resized_image(interpolation, factor, corner):
  pixels, classes = smooth(50, 40), classes_of(50, 40)
  result = cropped(Pair(pixels, classes, FILL), factor, corner, 24, interpolation)
  shape = round(50 * factor), round(40 * factor)
  method = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}[interpolation]
  whole = cv2.resize(pixels, shape, interpolation=method)
  square = tuple(slice(start, start + 24) for start in corner)
  # OpenCV rounds positions to parts of a pixel in one of the two functions.
  assert np.abs(result.pixels.astype(int) - whole[square]).max() <= 3
  by_pillow = Image.fromarray(classes).resize(shape, Image.Resampling.NEAREST)
  np.testing.assert_array_equal(result.classes, np.asarray(by_pillow)[square])


def test_nothing_changes_at_scale_1():
  pair = Pair(noise(30, 30), classes_of(30, 30), FILL)
  result = cropped(pair, 1.0, (2, 5), 20, "bilinear")
  np.testing.assert_array_equal(result.pixels, pair.pixels[2:22, 5:25])
  np.testing.assert_array_equal(result.classes, pair.classes[2:22, 5:25])


def test_around_a_small_pair_lie_its_colour_and_no_class():
  pair = Pair(noise(6, 10), classes_of(6, 10), FILL)
  result = cropped(pair, 1.0, (-1, -2), 12, "bilinear")
  inside = np.zeros((12, 12), bool)
  inside[1:11, 2:8] = True
  np.testing.assert_array_equal(result.pixels[inside].reshape(pair.pixels.shape), pair.pixels)
  np.testing.assert_array_equal(result.classes[inside].reshape(10, 6), pair.classes)
  assert (result.pixels[~inside] == FILL).all()
  assert (result.classes[~inside] == IGNORED).all()


def test_the_scale_is_uniform_and_every_place_is_reached():
  step = scale_and_crop((0.5, 1.5))
  pair = Pair(np.full((20, 20, 3), 9, np.uint8), np.zeros((20, 20), np.uint8), FILL)
  rng = np.random.default_rng(0)
  shown = [step(pair, 20, "bilinear", rng).classes == 0 for _ in range(400)]
  sides = [np.sqrt(each.sum()) for each in shown]
  assert min(sides) == 10
  assert np.mean([side == 20 for side in sides]) == pytest.approx(0.5, abs=0.1)
  assert np.mean(sides) == pytest.approx(17.5, abs=0.5)
  small = [each for each, side in zip(shown, sides) if side < 12]
  assert {tuple(np.argwhere(each)[0] > 4) for each in small} == {
    (row, column) for row in (False, True) for column in (False, True)
  }


def test_an_image_of_any_length_is_cut_out_without_resizing_all_of_it():
  pair = Pair(np.zeros((1, 40_000, 3), np.uint8), np.zeros((1, 40_000), np.uint8), FILL)
  result = scale_and_crop((10, 10))(pair, 16, "bicubic", np.random.default_rng(0))
  assert (result.classes == 0).sum() == 160


def test_a_flip_mirrors_both():
  pair = Pair(noise(9, 9), classes_of(9, 9), FILL)
  result = PAIR_STEPS["flip"](1)(pair, np.random.default_rng(0))
  np.testing.assert_array_equal(result.pixels, pair.pixels[:, ::-1])
  np.testing.assert_array_equal(result.classes, pair.classes[:, ::-1])
  assert PAIR_STEPS["flip"](0)(pair, np.random.default_rng(0)) is pair


def test_colours_change_in_the_image_alone():
  pair = Pair(noise(9, 9), classes_of(9, 9), FILL)
  result = PAIR_STEPS["color_jitter"](hue=0.1)(pair, np.random.default_rng(0))
  assert (result.pixels != pair.pixels).any()
  assert result.classes is pair.classes


@pytest.mark.parametrize(
  ("line", "said"),
  [
    ("random_resized_crop | flip", "random_resized_crop is no step for segmentation"),
    ("scale_and_crop | random_erasing", "random_erasing is no step for segmentation. The line"),
    ("flip", "flip may stand after the first step only. The line begins with one of scale_and"),
    ("scale_and_crop | color_jiter", "unknown step .* did you mean color_jitter"),
    ("scale_and_crop(0.5, 2)", r"too many .* write scale_and_crop\(scale=\(0.5, 2.0\)\)"),
    ("scale_and_crop((0, 2))", "a bound of scale_and_crop's scale is 0"),
    ("scale_and_crop | color_jitter(hue=1)", "color_jitter's hue is 1"),
    ("scale_and_crop | color_jitter(light=1)", r"write color_jitter\(brightness=0.4"),
    (None, "such as 'scale_and_crop | flip'; got None"),
  ],
)
def test_a_mistake_is_named(line, said):
  with pytest.raises(InputError, match=said):
    parse(line, "segmentation")


def test_steps_for_masks_are_refused_without_masks():
  with pytest.raises(InputError, match="scale_and_crop is no step for classification"):
    parse("scale_and_crop | flip")
