"""VGG-16: counts, the plain definition with and without norms, both forms computing the same."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.layers.resampling import pool_to
from repjax.models.vgg import STAGE_SIZES
from tests import helpers
from tests.helpers import F64, halves, init_shapes, quick_jit, random_input, random_variables
from tests.models import plain

TINY = {"num_classes": 5, "widths": (3, 4, 4, 6, 5), "hidden": 12}
IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

tiny = functools.partial(repjax.create_model, "vgg16", **TINY)


def size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def test_parameters_and_multiplications_are_those_published():
  # Parameters as torchvision states them for vgg16_bn and vgg16; the RepVGG paper's Table 4 has
  # 138.35 million parameters, 15.5 billion multiplications, 6.9 of them with Winograd's algorithm.
  train, deploy = (
    init_shapes(repjax.create_model("vgg16", deploy=form), IMAGES) for form in (False, True)
  )
  assert size(train["params"]) == 138_365_992
  assert size(train["batch_stats"]) == 2 * 4_224
  assert size(deploy["params"]) == 138_357_544
  found = repjax.analysis.summary(repjax.create_model("vgg16"), 224)
  assert found.deploy is not None
  assert found.train.macs == found.deploy.macs == 15_470_264_320
  assert round(found.deploy.winograd / 1e9, 1) == 6.9
  stages = [*(f"stage{number}" for number in range(1, 6)), "fc1", "fc2", "head"]
  assert [stage.name for stage in found.stages] == stages


def test_the_deploy_form_holds_convolutions_and_fully_connected_layers_only():
  train, deploy = (init_shapes(tiny(deploy=form), IMAGES) for form in (False, True))
  assert deploy.keys() == {"params"}
  scopes = {path.split("/")[-2] for path in helpers.leaves(deploy["params"])}
  assert scopes == {"conv", "fc1", "fc2", "head"}
  assert deploy["params"]["fc1"]["kernel"].shape == (7, 7, 5, 12)
  folded = jax.eval_shape(repjax.reparameterize, *halves(train))
  assert helpers.shapes(folded) == helpers.shapes(deploy["params"])


@pytest.mark.usefixtures("x64")
class TestOutputs:
  def test_both_forms_are_the_network_of_the_definition(self):
    # Read from torchvision's names. The last map is 7x7, of rows that the pools leave out.
    x, model, deploy = random_input(1, 224, 250, 3), tiny(**F64), tiny(deploy=True, **F64)
    variables = random_variables(model, x)

    @quick_jit
    def outputs(variables):
      params = repjax.reparameterize(*halves(variables))
      return model.apply(variables, x), deploy.apply({"params": params}, x), params

    trained, deployed, params = outputs(variables)
    for got, held, norms in ((trained, variables, True), (deployed, {"params": params}, False)):
      state = weights.to_torch("vgg16", held)
      helpers.assert_close(got, plain.vgg(state, x, STAGE_SIZES, norms), 1e-12)

  def test_both_forms_agree_where_the_last_map_is_pooled(self):
    x, model, deploy = (
      random_input(2, 37, 70, 3),
      *(tiny(deploy=d, act="gelu", **F64) for d in (False, True)),
    )
    variables = random_variables(model, x)

    @quick_jit
    def outputs(variables):
      params = repjax.reparameterize(*halves(variables))
      return deploy.apply({"params": params}, x), model.apply(variables, x)

    helpers.assert_close(*outputs(variables), 1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (2, 9), (7, 7), (8, 14), (13, 3)], ids=str)
def test_pooling_takes_the_mean_of_every_window(shape):
  x = random_input(2, *shape, 3)
  expected = np.empty((2, 7, 7, 3))
  for row, column in np.ndindex(7, 7):
    rows, columns = (
      slice(math.floor(place * pixels / 7), math.ceil((place + 1) * pixels / 7))
      for place, pixels in zip((row, column), shape)
    )
    expected[:, row, column] = x[:, rows, columns].mean((1, 2))
  helpers.assert_close(pool_to(jnp.asarray(x, jnp.float32), 7), expected, 1e-6)


class TestOverrides:
  @pytest.mark.parametrize("deploy", [False, True])
  def test_features(self, deploy):
    model = tiny(features_only=True, deploy=deploy)
    images = jax.ShapeDtypeStruct((2, 70, 33, 3), jnp.float32)
    variables = init_shapes(model, images)
    features = jax.eval_shape(model.apply, variables, images)
    assert {name: value.shape for name, value in features.items()} == {
      "stage2": (2, 17, 8, 4),
      "stage3": (2, 8, 4, 4),
      "stage4": (2, 4, 2, 6),
      "stage5": (2, 2, 1, 5),
    }
    assert not {"fc1", "fc2", "head"} & variables["params"].keys()


class TestRefusals:
  def test_images_that_are_too_small(self):
    with pytest.raises(ValueError, match="this VGG shrinks images 32 times"):
      init_shapes(tiny(), jnp.ones((1, 31, 64, 3)))

  @pytest.mark.parametrize(
    ("overrides", "said"),
    [
      ({"widths": (8, 8, 8, 8)}, "widths takes 5 whole numbers above 0, got"),
      ({"hidden": 0}, "hidden takes a whole number above 0"),
      ({"stage_sizes": (1,) * 5}, "unknown override of vgg16 'stage_sizes'"),
    ],
    ids=str,
  )
  def test_values_that_make_no_network(self, overrides, said):
    with pytest.raises(repjax.errors.InputError, match=said):
      repjax.create_model("vgg16", **overrides)
