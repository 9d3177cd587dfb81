"""RepViT: what its blocks hold, both kinds of token mixers, one or two classifiers, refusals."""

import functools

import jax
import jax.numpy as jnp
import pytest

import repjax
from repjax.errors import InputError
from repjax.models.repvit import gate_width
from tests import helpers
from tests.helpers import init_shapes

IMAGES = jnp.ones((1, 32, 32, 3))
SMALL = {"stage_sizes": (2, 1, 1, 1), "widths": (8, 8, 16, 16)}
small = functools.partial(repjax.create_model, "repvit_m0_9", num_classes=3, **SMALL)


def test_every_second_block_has_a_gate_and_stages_begin_with_a_block_without():
  params = init_shapes(small(), IMAGES)["params"]
  assert "SqueezeExcite_0" in params["stage1"]["block0"]
  assert "SqueezeExcite_0" not in params["stage1"]["block1"]
  assert params["stage2"].keys() == {"downsample", "block0"}
  parts = {"before", "RepConv_spatial", "RepConv_channel", "RepConv_expand", "RepConv_project"}
  assert params["stage2"]["downsample"].keys() == parts
  assert "SqueezeExcite_0" not in params["stage2"]["downsample"]["before"]


def test_token_mixers_have_a_norm_after_the_sum_or_in_both_branches():
  mixers = [
    init_shapes(small(normed_branches=normed), IMAGES)["params"]["stage1"]["block0"]
    for normed in (False, True)
  ]
  after, inside = (each["RepConv_mixer"] for each in mixers)
  assert {name: set(held) for name, held in after.items()} == {
    "conv3x3": {"conv", "bn"},
    "conv1x1": {"conv"},
    "bn": {"scale", "bias"},
  }
  assert after["conv1x1"]["conv"].keys() == {"kernel", "bias"}
  assert {name: set(held) for name, held in inside.items()} == {
    "conv3x3": {"conv", "bn"},
    "conv1x1": {"conv", "bn"},
  }


def test_one_or_two_classifiers_have_the_same_deploy_form():
  for distilled, heads in ((True, {"head0", "head1"}), (False, {"head0"})):
    variables = init_shapes(small(distilled=distilled), IMAGES)
    assert variables["params"]["head"]["RepHeads_0"].keys() == heads
    folded = jax.eval_shape(repjax.reparameterize, *helpers.halves(variables))
    assert folded["head"]["RepHeads_0"]["dense"]["kernel"].shape == (16, 3)


def test_gates_are_a_quarter_wide_in_steps_of_eight():
  widths = {48: 16, 56: 16, 64: 16, 80: 24, 112: 32, 224: 56, 448: 112, 640: 160, 8: 8}
  assert {width: gate_width(width) for width in widths} == widths


@pytest.mark.parametrize("output_stride", [8, 16, 32])
def test_maps_are_as_large_as_the_output_stride_says(output_stride):
  images = jax.ShapeDtypeStruct((1, 64, 96, 3), jnp.float32)
  model = small(output_stride=output_stride, features_only=True)
  variables = init_shapes(model, images)
  assert helpers.shapes(variables) == helpers.shapes(init_shapes(small(features_only=True), images))
  maps = jax.eval_shape(model.apply, variables, images)
  strides = (4, 8, min(16, output_stride), min(32, output_stride))
  assert [each.shape[1:3] for each in maps.values()] == [(64 // s, 96 // s) for s in strides]


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    ({"widths": (1, 8, 8, 8)}, "the first of widths is at least 2"),
    ({"widths": (8, 8, 8)}, "widths takes 4 whole numbers above 0"),
    ({"output_stride": 4}, "output_stride is 32, 16 or 8, got 4"),
  ],
  ids=str,
)
def test_values_that_make_no_network(overrides, said):
  with pytest.raises(InputError, match=said):
    small(**overrides)
