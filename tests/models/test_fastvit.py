"""FastViT: what its stages hold, what stays in deploy form, and refusals."""

import functools

import jax
import jax.numpy as jnp
import pytest

import repjax
from repjax.errors import InputError
from tests import helpers
from tests.helpers import init_shapes

IMAGES = jnp.ones((1, 64, 64, 3))
SMALL = {"stage_sizes": (1, 1, 1), "widths": (8, 16, 32), "expansion": 2}
small = functools.partial(repjax.create_model, "fastvit_sa12", num_classes=3, **SMALL)


def test_the_last_stages_have_attention_and_begin_with_positions():
  params = init_shapes(small(attention_stages=2, head_features=8), IMAGES)["params"]
  assert params.keys() == {"stem", "stage1", "stage2", "stage3", "final", "head"}
  assert params["stem"].keys() == {"block0", "block1", "block2"}
  assert params["stage1"].keys() == {"block0"}
  assert params["stage1"]["block0"].keys() == {"RepMixer_0", "ConvFFN_0"}
  for stage in ("stage2", "stage3"):
    assert params[stage].keys() == {"downsample", "SkipConv_positions", "block0"}
    assert params[stage]["block0"].keys() == {"RepAttention_0", "ConvFFN_0"}


def test_the_deploy_form_holds_layers_with_a_kernel_and_a_bias_alone():
  params = init_shapes(small(deploy=True), IMAGES)["params"]
  paths = helpers.leaves(params)
  assert {path.rpartition("/")[2] for path in paths} == {"kernel", "bias"}
  assert len(paths) == 2 * len({path.rpartition("/")[0] for path in paths})


def test_any_number_of_stages_makes_a_network():
  for sizes, widths in (((1,), (8,)), ((1, 1, 1, 1, 1), (8, 8, 8, 8, 8))):
    model = small(stage_sizes=sizes, widths=widths, attention_stages=0, features_only=True)
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    maps = jax.eval_shape(model.apply, init_shapes(model, images), images)
    assert [each.shape[1] for each in maps.values()] == [16 >> n for n in range(len(sizes))]


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    ({"attention_stages": 4}, "attention_stages is a number from 0 to 3"),
    ({"widths": (8, 12, 32)}, "each of widths is a multiple of the one before it"),
    ({"head_features": 5}, "widths of stages with attention are multiples of head_features"),
    ({"widths": (4, 4, 4), "attention_stages": 0}, "the last of widths is at least 8"),
    ({"expansion": 0}, "expansion takes a whole number above 0"),
    ({"stage_sizes": ()}, "stage_sizes takes a whole number above 0 for each stage"),
  ],
  ids=str,
)
def test_values_that_make_no_network(overrides, said):
  with pytest.raises(InputError, match=said):
    small(**overrides)


def test_images_are_as_large_as_the_total_stride():
  with pytest.raises(InputError, match="shrinks images 16 times"):
    init_shapes(small(), jnp.ones((1, 16, 15, 3)))
  assert repjax.create_model("fastvit_t8").image_size == 256
