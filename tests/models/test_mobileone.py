"""MobileOne: what its blocks hold, dilation for strides, and refusals."""

import functools

import jax.numpy as jnp
import pytest

import repjax
from repjax.errors import InputError
from tests.helpers import F64, init_shapes
from tests.models.dilation import dilated_maps

IMAGES = jnp.ones((1, 32, 32, 3))
SMALL = {"stage_sizes": (1, 1, 1, 2), "width_multipliers": (0.125, 0.125, 0.125, 0.03125)}
small = functools.partial(repjax.create_model, "mobileone_s0", num_classes=3, **SMALL)


def test_blocks_are_depthwise_and_pointwise_in_turn():
  params = init_shapes(small(copies=2, se_sizes=(0, 0, 0, 1)), IMAGES)["params"]
  names = {name: set(held["RepConv_0"]) for name, held in params["stage4"].items()}
  depthwise, pointwise = {"conv3x3", "conv3x3_1", "conv1x1"}, {"conv1x1", "conv1x1_1"}
  assert names == {
    "block0": depthwise,  # at stride 2
    "block1": pointwise,  # to a different number of channels
    "block2": depthwise | {"identity"},
    "block3": pointwise | {"identity"},
  }
  assert {name for name, held in params["stage4"].items() if "SqueezeExcite_0" in held} == {
    "block2",
    "block3",
  }
  assert params["stem"]["RepConv_0"].keys() == {"conv3x3", "conv1x1"}
  assert params["stage4"]["block0"]["RepConv_0"]["conv3x3"]["conv"]["kernel"].shape[2] == 1


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("output_stride", [16, 8])
def test_a_dilated_network_has_every_pixel_of_the_strided_one(output_stride):
  build = functools.partial(small, copies=1, features_only=True, deploy=True, **F64)
  dilated_maps(build, output_stride)


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    ({"copies": 0}, "copies takes a whole number above 0"),
    ({"copies": 17}, "copies is at most 16"),
    ({"se_sizes": (0, 0, 0, 3)}, "se_sizes takes 4 whole numbers, each at most"),
    ({"se_sizes": (0, 0, 0)}, "se_sizes takes 4 whole numbers"),
    ({"output_stride": 3}, "output_stride is one of 2, 4, 8, 16, 32"),
    ({"stage_sizes": (1, 1, 1)}, "stage_sizes takes 4 numbers above 0"),
  ],
  ids=str,
)
def test_values_that_make_no_network(overrides, said):
  with pytest.raises(InputError, match=said):
    small(**overrides)
