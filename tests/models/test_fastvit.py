"""FastViT: what its stages hold, what stays in deploy form, and refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax.errors import InputError
from repjax.models import fastvit
from tests import helpers
from tests.helpers import init_shapes, random_input, random_variables

IMAGES = jnp.ones((1, 64, 64, 3))
SMALL = {"stage_sizes": (1, 1, 1), "widths": (8, 16, 32), "expansion": 2}
small = partial(repjax.create_model, "fastvit_sa12", num_classes=3, **SMALL)


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
    ({"drop_path": 1.0}, "drop_path is at least 0 and below 1"),
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


class Same(nn.Module):
  """A layer that gives back its input, in place of the layers of a block."""

  @nn.compact
  def __call__(self, x, train=False):
    return x


def test_each_image_loses_attention_and_ffn_by_itself(monkeypatch):
  for layer in ("RepMixer", "ConvFFN", "RepAttention"):
    monkeypatch.setattr(fastvit, layer, lambda *args, name, **attributes: Same(name=name))
  x, key = jnp.ones((64, 2, 2, 3)), {"dropout": jax.random.key(0)}
  # With layers that give back x, each sum of a block multiplies an image by 1 + 1/0.75, or by 1.
  attention = partial(fastvit.AttentionBlock, head_features=1)
  for block, sums in ((fastvit.MixerBlock, 1), (attention, 2)):
    model = block(act="gelu", expansion=1, drop_path=0.25)
    y = np.asarray(model.apply({}, x, True, rngs=key))
    assert (y == y[:, :1, :1, :1]).all()  # A map is left out as a whole.
    expected = {round((7 / 3) ** number, 3) for number in range(sums + 1)}
    assert set(np.round(y[:, 0, 0, 0].astype(float), 3)) == expected
    np.testing.assert_array_equal(model.apply({}, x, True, rngs=key), y)
    np.testing.assert_array_equal(model.apply({}, x, False), 2**sums * x)


def test_drop_path_grows_linearly_over_the_blocks_of_all_stages():
  rates = {}

  def note(method, arguments, keywords, context):
    if isinstance(context.module, nn.Dropout):
      rates["/".join(context.module.path)] = context.module.rate
    return method(*arguments, **keywords)

  model = small(stage_sizes=(1, 2, 2), drop_path=0.4)
  with nn.intercept_methods(note):
    init_shapes(model, IMAGES)
  in_blocks = {path: rate for path, rate in rates.items() if "block" in path}
  assert in_blocks == pytest.approx(
    {
      "stage1/block0/Dropout_0": 0.0,
      "stage2/block0/Dropout_0": 0.1,
      "stage2/block1/Dropout_0": 0.2,
      **{f"stage3/block0/Dropout_{number}": 0.3 for number in (0, 1)},
      **{f"stage3/block1/Dropout_{number}": 0.4 for number in (0, 1)},
    }
  )


def test_rematerialised_blocks_leave_out_the_same_and_have_the_same_gradient():
  block = partial(fastvit.MixerBlock, act="gelu", expansion=1, drop_path=0.5, deploy=False)
  x, key = random_input(4, 3, 3, 2).astype("float32"), {"dropout": jax.random.key(1)}
  variables = random_variables(block(), x)

  def gradient(model):
    def loss(params):
      changed = {**variables, "params": params}
      y, _ = model.apply(changed, x, True, rngs=key, mutable=["batch_stats"])
      return (y**2).sum()

    return jax.tree.leaves(helpers.quick_jit(jax.grad(loss))(variables["params"]))

  rematerialised = nn.remat(fastvit.MixerBlock, static_argnums=(2,))
  plain, again = gradient(block()), gradient(rematerialised(**block.keywords))
  for ours, theirs in zip(plain, again, strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
