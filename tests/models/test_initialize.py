"""`repjax.init` gives what `model.init` gives, up to the draw."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from tests import helpers
from tests.models.families import FAMILIES

KEY = jax.random.key(0)
IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
NARROW = {"num_classes": 10, "width_multipliers": (0.25, 0.125, 0.125, 0.0625)}
SMALL = {"stage_sizes": (1,) * 4, "width_multipliers": (0.5, 0.25, 0.125, 0.0625)}

NARROW_OF = {
  "repmlp_cifar": {"num_classes": 10, "widths": (4, 4, 6, 6), "stage_sizes": (1, 1, 1, 1)}
  | {"tile": 4, "local_kernels": (1, 3)},
  "repmlp_resnet50": {"stage_sizes": (1, 2, 2, 1), "widths": (16, 32, 64, 64), "tile": 2}
  | {"local_kernels": (1,), "fc3_groups": (2, 4), "num_classes": 10},
  "resnet": {"num_classes": 10, "stage_sizes": (1, 2, 2, 1), "widths": (16, 32, 32, 64)},
  "vgg": {"num_classes": 10, "widths": (8, 8, 16, 16, 24), "hidden": 40},
  "repmlpnet": {
    "num_classes": 10,
    "stage_sizes": (1, 2),
    "widths": (8, 16),
    "tiles": (4, 2),
    "share_sets": (2, 4),
  },
  "parnet": {"num_classes": 10, "stage_sizes": (1, 1, 2), "widths": (8, 16, 24, 32)},
  "mobileone": {"stage_sizes": (1, 1, 1, 1), "se_sizes": (0, 0, 1, 0), "copies": 2, **NARROW},
  "repvit": {"num_classes": 10, "stage_sizes": (1, 1, 1, 1), "widths": (8, 16, 16, 24)}
  | {"normed_branches": False},
  "fastvit": {"num_classes": 10, "stage_sizes": (1, 1, 1, 1), "widths": (8, 16, 16, 32)}
  | {"expansion": 2, "attention_stages": 1},
  "repvgg": {"stage_sizes": (1, 2, 2, 1), **NARROW},
  **{name: FAMILIES[name].overrides for name in ("pspnet", "fcn")},
}

small = functools.partial(repjax.create_model, "repvgg_a0", **SMALL)


def cut(name, **settings):
  narrow = next(narrow for family, narrow in NARROW_OF.items() if name.startswith(family))
  return repjax.create_model(name, **narrow, **settings)


# Of those that are the same network when they are cut like this, the last one.
DISTINCT = {cut(name): name for name in repjax.list_models()}.values()
ONE_EACH = {
  next(family for family in NARROW_OF if name.startswith(family)): name for name in DISTINCT
}.values()


@pytest.mark.parametrize("deploy", helpers.spread([False, True], [False]))
@pytest.mark.parametrize("name", helpers.spread(DISTINCT, ONE_EACH))
def test_the_tree_is_that_of_the_model_s_init(name, deploy):
  model = cut(name, deploy=deploy)
  variables = repjax.init(model, KEY, image_size=32)
  assert helpers.shapes(variables) == helpers.shapes(helpers.init_shapes(model, IMAGES))


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.float64])
def test_values_have_the_parameters_dtype(param_dtype):
  model = small(dtype=param_dtype, param_dtype=param_dtype)
  variables = repjax.init(model, KEY, image_size=32)
  assert helpers.shapes(variables) == helpers.shapes(helpers.init_shapes(model, IMAGES))
  kernel = np.asarray(variables["params"]["head"]["kernel"])
  in_float32 = (kernel.astype(np.float32) == kernel).all()
  assert in_float32 == (param_dtype == jnp.float32)


@pytest.mark.parametrize("deploy", [False, True])
def test_every_kind_of_leaf_is_distributed_as_in_the_model_s_init(deploy):
  model = small(deploy=deploy)
  ours = repjax.init(model, KEY, image_size=32)
  flax = helpers.quick_jit(model.init)(KEY, jnp.ones((1, 32, 32, 3)))
  for kind in ("kernel", "bias of a kernel"):
    a, b = pooled(ours, kind), pooled(flax, kind)
    assert a.shape == b.shape
    # In units of the bound: uniform on (-1, 1). Quantiles, so that the whole law counts.
    quantiles = np.linspace(0, 1, 21)
    tolerance = 5 / math.sqrt(a.size)
    np.testing.assert_allclose(np.quantile(a, quantiles), 2 * quantiles - 1, atol=tolerance)
    np.testing.assert_allclose(np.quantile(b, quantiles), 2 * quantiles - 1, atol=tolerance)
    assert np.abs(a).max() <= 1
  ours, flax = helpers.leaves(ours), helpers.leaves(flax)
  constants = [path for path in flax if path.split("/")[-2] in ("bn", "affine")]
  assert bool(constants) != deploy
  for path in constants:
    np.testing.assert_array_equal(ours[path], flax[path])


@pytest.mark.parametrize("groups", [1, 2])
def test_kernels_over_tiles_start_orthogonal_as_in_the_model_s_init(groups):
  one = {"widths": (4,), "stage_sizes": (1,), "tile": 4, "local_kernels": ()}
  one["fc3_groups"] = groups
  model = repjax.create_model("repmlp_cifar", **one)
  params = repjax.init(model, KEY, image_size=4)["params"]["stage1"]["block0"]["repmlp"]
  kernel = np.asarray(params["RepDense_0"]["fc"]["dense"]["kernel"])  # (g, 4, 4, C/g, 4, 4, C/g)
  inputs = 64 // groups
  matrix = kernel.reshape(groups, inputs, inputs).transpose(1, 0, 2).reshape(inputs, 64)
  np.testing.assert_allclose(matrix @ matrix.T, np.eye(inputs), atol=1e-5)
  assert abs(kernel.mean()) < 0.02


def pooled(variables, kind):
  """All values of a kind in units of 1/sqrt(fan_in), which bounds them."""
  leaves = helpers.leaves(variables)
  values = []
  for path, kernel in leaves.items():
    if path.endswith("/kernel"):
      wanted = path if kind == "kernel" else path.removesuffix("kernel") + "bias"
      if wanted in leaves:
        values.append(np.ravel(leaves[wanted]) * math.sqrt(math.prod(kernel.shape[:-1])))
  return np.concatenate(values)


class TestDraws:
  @staticmethod
  def kernels(seed=0, key=jax.random.key):
    params = repjax.init(small(), key(seed), image_size=32)["params"]
    return {path: leaf for path, leaf in helpers.leaves(params).items() if path.endswith("kernel")}

  def test_one_key_gives_one_draw(self):
    jax.tree.map(np.testing.assert_array_equal, self.kernels(), self.kernels())

  def test_old_style_keys_are_taken(self):
    jax.tree.map(
      np.testing.assert_array_equal, self.kernels(), self.kernels(key=jax.random.PRNGKey)
    )

  def test_another_key_changes_every_leaf(self):
    other = self.kernels(seed=1)
    for path, kernel in self.kernels().items():
      assert np.abs(kernel - other[path]).max() > 0

  def test_no_two_leaves_are_alike(self):
    # In units of their bound, as equal streams of different fan-in would differ by a factor.
    starts = {
      tuple(np.round(np.ravel(kernel)[:4] * math.sqrt(math.prod(kernel.shape[:-1])), 4))
      for kernel in self.kernels().values()
    }
    assert len(starts) == len(self.kernels())

  def test_the_image_size_does_not_matter(self):
    larger = repjax.init(small(), KEY, image_size=(64, 96))
    jax.tree.map(np.testing.assert_array_equal, larger, repjax.init(small(), KEY, image_size=32))


class Table(nn.Module):
  """A module with a kind of parameter that repjax does not have."""

  @nn.compact
  def __call__(self, images):
    return nn.Embed(3, 4, name="words")(jnp.zeros(images.shape[0], jnp.int32))


def test_a_leaf_of_unknown_kind_is_named():
  with pytest.raises(
    ValueError, match=r"how params/words/embedding is distributed; use model.init"
  ):
    repjax.init(Table(), KEY, image_size=32)


def test_an_image_too_small_is_refused():
  with pytest.raises(ValueError, match="shrinks images 32 times"):
    repjax.init(small(), KEY, image_size=16)


@pytest.mark.usefixtures("x64")
def test_a_fresh_deploy_form_runs():
  model = small(deploy=True, **helpers.F64)
  variables = repjax.init(model, KEY, image_size=32)
  logits = helpers.quick_jit(model.apply)(variables, helpers.random_input(2, 32, 32, 3))
  assert np.isfinite(logits).all()
  assert np.std(logits) > 0


@pytest.mark.parametrize(
  ("shape", "way_out"),
  [
    ((64, 64, 3), r"images\[None\]"),
    ((1, 3, 64, 64), r"images\.transpose\(0, 2, 3, 1\)"),
    ((1, 16, 16, 3), "larger image size"),
  ],
)
def test_images_of_a_wrong_shape_are_answered_with_the_way_out(shape, way_out):
  model = repjax.create_model("repvgg_a0", deploy=True)
  with pytest.raises(ValueError, match=way_out):
    jax.eval_shape(model.init, KEY, jnp.ones(shape))


@pytest.mark.parametrize("key", [0, jnp.zeros(2)])
def test_a_key_that_is_none_is_refused(key):
  with pytest.raises(ValueError, match="key must be a JAX random key"):
    repjax.init(repjax.create_model("repvgg_a0", deploy=True), key, 32)
