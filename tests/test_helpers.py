"""Tests of the helpers: a wrong helper would fail every golden test, or let a wrong law pass."""

import jax
import numpy as np
import pytest
from jax import lax

from tests import helpers

CHECK_VALUES = {
  "input": [0.433117652545, -0.291609983891, 0.26319820201],
  "stage0.rbr_dense.conv.weight": [0.163360153092, -0.2932018172, 0.411368378438],
  "rbr_dense.conv.weight": [0.249992589001, -0.227722175186, -0.115450003883],
  "rbr_identity.running_var": [0.300287989434, -0.326956399484, -0.008087190799],
  "linear.weight": [0.475530766184, -0.21415944933, 0.309101638151],
}
FILLED = {
  ("stage0.rbr_dense.conv.weight", (48, 3, 3, 3)): [0.108906768728, -0.195467878133],
  ("linear.weight", (1000, 1280)): [0.046043068451, -0.020735899517],
  ("stage1.1.rbr_identity.weight", (48,)): [0.929752391204, 1.105625071842],
  ("stage1.1.rbr_identity.bias", (48,)): [0.061417711293, -0.076378304325],
  ("stage1.1.rbr_identity.running_mean", (48,)): [0.062478690315, 0.082387750037],
  ("stage1.1.rbr_identity.running_var", (48,)): [1.111831083428, 0.783737421501],
}


@pytest.mark.parametrize("name", CHECK_VALUES)
def test_uniform_numbers_have_the_published_check_values(name):
  np.testing.assert_allclose(helpers._uniform(name, 3), CHECK_VALUES[name], atol=1e-11)


def test_uniform_numbers_are_right_beyond_32_bits():
  assert abs(helpers._uniform("linear.weight", 1280000)[-1] - 0.144850196550) < 1e-11


@pytest.mark.parametrize(("name", "shape"), FILLED)
def test_fill_has_the_published_check_values(name, shape):
  filled = helpers.fill(name, shape)
  assert filled.shape == shape
  np.testing.assert_allclose(filled.ravel()[:2], FILLED[name, shape], atol=1e-11)


def test_golden_input_has_the_published_check_values():
  x = helpers.golden_input((2, 3, 64, 64))
  assert x.shape == (2, 64, 64, 3)
  assert abs(x[-1, -1, -1, -1] - 0.898862543516) < 1e-11
  assert abs(x.sum() - 76.834480611) < 1e-8


@pytest.mark.parametrize(
  ("path", "plus", "name"),
  [
    ("stem/RepConv_0/conv1x1/bn/var", False, "stage0.rbr_1x1.bn.running_var"),
    ("stage1/block0/RepConv_0/conv3x3/conv/kernel", False, "stage1.0.rbr_dense.conv.weight"),
    ("stage4/block0/RepConv_0/conv/bias", False, "stage4.0.rbr_reparam.bias"),
    ("stage2/block10/SqueezeExcite_0/up/bias", False, "stage2.10.se.up.bias"),
    ("stem/SqueezeExcite_0/down/kernel", True, "stage0.post_se.down.weight"),
    (
      "stage3_second/block1/RepConv_0/identity/bn/scale",
      True,
      "stage3_second.blocks.1.rbr_identity.weight",
    ),
    ("AuxHead_stage3_first/RepConv_0/conv3x3/bn/mean", True, "stage3_first_aux.0.bn.running_mean"),
    ("AuxHead_stage1/head/kernel", True, "stage1_aux.3.weight"),
    ("head/bias", True, "linear.bias"),
    ("RepConv_0/conv3x3/bn/bias", False, "rbr_dense.bn.bias"),
  ],
)
def test_official_names(path, plus, name):
  assert helpers.official_name(path, plus) == name


@pytest.mark.parametrize(
  ("strides", "padding", "dilation", "groups"),
  [((1, 1), (0, 0), (1, 1), 1), ((2, 1), (1, 2), (1, 3), 2), ((3, 2), ((0, 1), (2, 0)), (2, 1), 4)],
)
@pytest.mark.usefixtures("x64")
def test_convolve_is_the_convolution_of_lax(strides, padding, dilation, groups):
  x, kernel = helpers.random_input(2, 9, 8, 4), helpers.random_input(3, 2, 4 // groups, 8, seed=2)
  sides = [(pad, pad) if isinstance(pad, int) else pad for pad in padding]
  expected = lax.conv_general_dilated(
    x,
    kernel,
    strides,
    sides,
    rhs_dilation=dilation,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    feature_group_count=groups,
  )
  actual = helpers.convolve(
    x, kernel, strides=strides, padding=padding, dilation=dilation, groups=groups
  )
  assert helpers.relative_error(actual, expected) <= 1e-12


def test_relative_error_is_measured_against_the_largest_value_of_the_second():
  assert helpers.relative_error(np.array([1.0, 4.5]), np.array([1.0, 5.0])) == pytest.approx(0.1)


def test_randomise_keeps_shapes_and_dtypes_and_moves_every_statistic():
  leaf = jax.ShapeDtypeStruct((64,), np.float32)
  tree = {"bn": dict.fromkeys(("scale", "bias", "mean", "var"), leaf)}
  drawn = helpers.randomise(tree)
  assert helpers.shapes(drawn) == helpers.shapes(tree)
  assert all(np.std(values) > 0.1 for values in drawn["bn"].values())
  assert min(drawn["bn"]["var"]) >= 0.5
