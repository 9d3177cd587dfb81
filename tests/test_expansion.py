"""The way back: an expanded form folds into what it was, computes the same, or says why not."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax.errors import InputError
from repjax.layers import AuxHead, RepConv, RepDense, RepNorm, SkipSqueezeExcite
from repjax.layers.remainder import SHARE
from tests import helpers
from tests.helpers import F64, assert_close, halves, quick_jit, random_input, random_variables
from tests.models.families import small
from tests.test_recognition import LAYERS, WRAPPED, Around, Ensemble, InSetup, Scanned

KEY = jax.random.key(1)
X = random_input(3, 4, 4, 4)
X32 = X.astype("float32")

BRANCHES = {
  "RepVGG": {"branches": ("conv3x3", "conv1x1", "identity")},
  "repeats": {"branches": ("conv3x3", "conv3x3_1", "conv1x3", "conv3x1"), "conv_bias": True},
  "groups": {"branches": ("conv1x1", "conv3x3"), "groups": 2},
  "depthwise": {"branches": ("conv5x5", "conv3x3_d2", "avg3x3", "identity"), "groups": 4},
  "two steps": {"branches": ("conv3x3", "conv1x1_conv3x3", "conv1x1_avg3x3")},
  "norm after the sum": {"branches": ("conv3x3", "conv1x1", "skip"), "norm": ("after_sum",)},
  "both norms": {"branches": ("conv3x3", "conv1x1", "skip"), "norm": ("after_sum", "conv3x3")},
  "pooled": {"branches": ("avg2x2_conv1x1", "conv3x3"), "strides": 2},
  "reflected": {"branches": ("conv3x3", "conv1x1"), "padding_mode": "reflect"},
}


class OwnNorm(nn.Module):
  """A RepConv, and a batch norm of somebody's own."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    x = RepConv(4, deploy=self.deploy, name="first")(x, train)
    return nn.BatchNorm(use_running_average=not train, name="norm")(x)


class WithHead(nn.Module):
  """A RepConv with an auxiliary head."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    x = RepConv(4, deploy=self.deploy, name="first", **F64)(x, train)
    if not self.deploy:
      AuxHead(3, **F64)(x, train)
    return x


def shape_of(x: Any) -> jax.ShapeDtypeStruct:
  """Returns the shape and dtype of an array, for `expand` without images."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype)


def folded(model: Any, x: Any, seed: int = 0) -> Any:
  """Returns random parameters of a model's deploy form."""
  return repjax.reparameterize(*halves(random_variables(model, x, seed)))


def check_laws(model: Any, x: Any, params: Any, tolerance: float = 1e-12) -> Any:
  """Checks both laws of an expanded form, with and without images, and returns the first one."""
  deploy = model.clone(deploy=True)

  @quick_jit
  def compute(params):
    expanded = [repjax.expand(model, params, KEY, images=images) for images in (x, shape_of(x))]
    trained, updates = model.apply(expanded[0], x, train=True, mutable=["batch_stats"])
    return {
      "expanded": expanded,
      "back": [repjax.reparameterize(*halves(each)) for each in expanded],
      "evaluated": [model.apply(each, x) for each in expanded],
      "deployed": deploy.apply({"params": params}, x),
      "trained": trained,
      "updates": updates["batch_stats"],
    }

  found = compute(params)
  for expanded, back, evaluated in zip(found["expanded"], found["back"], found["evaluated"]):
    assert helpers.shapes(expanded) == helpers.shapes(helpers.init_shapes(model, x))
    jax.tree.map(lambda a, b: assert_close(a, b, tolerance), back, params)
    assert_close(evaluated, found["deployed"], tolerance)
  assert_close(found["trained"], found["deployed"], tolerance)
  check_rest(found["updates"], found["expanded"][0]["batch_stats"], tolerance)
  return found["expanded"][0]


def check_rest(updates: Any, held: Any, tolerance: float) -> None:
  """Checks that statistics of the batch do not move, but for n / (n - 1) of running variances."""
  updates, held = helpers.leaves(updates), helpers.leaves(held)
  assert updates.keys() == held.keys()
  for path, value in held.items():
    wanted = np.asarray(value)
    if path.endswith("/var") and wanted.any():
      excess = (np.asarray(updates[path]).sum() / wanted.sum() - 1) / 0.1  # 1 / (n - 1)
      count = 1 / excess + 1 if excess > 1e-9 else np.inf
      assert count == np.inf or abs(count - round(count)) < 1e-3
      wanted = wanted * (1 + 0.1 * excess)
    np.testing.assert_allclose(updates[path], wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("x64")
class TestLaws:
  @pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
  @pytest.mark.parametrize("epsilon", helpers.spread([1e-5, 1e-2], [1e-2]))
  def test_every_layer(self, layer, epsilon):
    model = Around(lambda deploy: layer(deploy=deploy, epsilon=epsilon, name="layer1", **F64))
    variables = random_variables(model, X)
    # The network knows its own epsilon; a random tree has some other one.
    stats = jax.tree_util.tree_map_with_path(
      lambda path, leaf: jnp.full_like(leaf, epsilon) if path[-1].key == "epsilon" else leaf,
      variables["batch_stats"],
    )
    check_laws(model, X, repjax.reparameterize(variables["params"], stats))

  @pytest.mark.parametrize("attributes", BRANCHES.values(), ids=BRANCHES)
  def test_every_kind_of_branch(self, attributes):
    # The border between two steps follows from running statistics, which must not move at all.
    model = RepConv(4, **attributes, running_variance="biased", **F64)
    check_laws(model, X, folded(model, X))

  @pytest.mark.parametrize("model", [InSetup(), Scanned(), Ensemble()], ids=lambda m: str(type(m)))
  def test_attributes_and_lifted_layers(self, model):
    check_laws(model, X, folded(model, X))

  @pytest.mark.parametrize("build", WRAPPED.values(), ids=WRAPPED)
  def test_a_layer_under_any_name(self, build):
    model = Around(build)
    check_laws(model, X, folded(model, X))

  @pytest.mark.parametrize("kept", [0.0, 3.0])
  def test_channels_that_are_constant_on_the_images(self, kept):
    x = np.array(X)
    x[..., 1:3] = kept
    branches = BRANCHES["two steps"]["branches"] + ("identity",)
    model = RepConv(4, branches, running_variance="biased", **F64)
    params = folded(model, x)
    params["conv"]["kernel"] = params["conv"]["kernel"].at[..., 0].set(0.0)
    variables = check_laws(model, x, params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))

  def test_an_auxiliary_head_is_fresh_with_the_statistics_of_the_images(self):
    model = WithHead()
    head = check_laws(model, X, folded(model, X))["params"]["AuxHead_0"]
    norm = head["RepConv_0"]["conv3x3"]["bn"]
    assert (norm["scale"] == 1).all()
    assert (norm["bias"] == 0).all()

  def test_a_gate_whose_scale_is_zero_in_some_channels(self):
    model = Around(lambda deploy: SkipSqueezeExcite(deploy=deploy, name="gate", **F64))
    variables = random_variables(model, X)
    norm = variables["params"]["gate"]["bn"]
    norm["scale"] = norm["scale"].at[:2].set(0.0)
    check_laws(model, X, repjax.reparameterize(*halves(variables)))


class TestChoice:
  """The choice among the many training forms that compute the same."""

  def expanded(self, **attributes):
    model = RepConv(4, **attributes)
    params = folded(model, X32)
    return params["conv"]["kernel"], repjax.expand(model, params, KEY, images=X32)

  @pytest.mark.parametrize("name", ["conv1x1", "identity"])
  def test_a_small_branch_has_its_share_of_the_kernel(self, name):
    kernel, variables = self.expanded(branches=("conv3x3", name))
    found = {scope: variables[scope] for scope in ("params", "batch_stats")}
    without = jax.tree.map(lambda leaf: leaf, found)
    without["params"][name]["bn"]["scale"] *= 0
    difference = (
      repjax.reparameterize(*halves(found))["conv"]["kernel"]
      - repjax.reparameterize(*halves(without))["conv"]["kernel"]
    )
    share = np.linalg.norm(difference.reshape(-1, 4), axis=0)
    np.testing.assert_allclose(
      share, SHARE * np.linalg.norm(kernel.reshape(-1, 4), axis=0), rtol=1e-4
    )

  def test_the_first_of_two_largest_branches_takes_the_remainder(self):
    model = RepConv(4, ("conv1x1", "conv3x3_1", "conv3x3"))
    params = folded(model, X32)
    one, two = (
      repjax.expand(model, params, jax.random.key(seed), images=X32)["params"] for seed in (0, 1)
    )
    whole = np.linalg.norm(params["conv"]["kernel"])

    def moved(name):
      """Returns how far apart two draws of a branch lie, relative to the whole kernel."""
      kernels = [each[name]["conv"]["kernel"] for each in (one, two)]
      return np.linalg.norm(kernels[0] - kernels[1]) / whole

    # Small branches depend on the key. The largest branch does so only by what they leave to it.
    assert 0 < moved("conv3x3") < 2.5 * SHARE
    assert moved("conv3x3_1") > 0.3
    assert moved("conv1x1") > 0.3

  def test_a_layer_of_one_branch_holds_the_kernel_itself(self):
    kernel, variables = self.expanded(branches=("conv3x3",))
    np.testing.assert_array_equal(variables["params"]["conv3x3"]["conv"]["kernel"], kernel)

  @pytest.mark.usefixtures("x64")
  def test_everything_else_is_passed_by_reference_without_images(self):
    model = Around(lambda deploy: RepConv(4, deploy=deploy, **F64))
    params = folded(model, X)
    variables = repjax.expand(model, params, KEY, images=shape_of(X))
    assert variables["params"]["own"]["kernel"] is params["own"]["kernel"]


class TestTrees:
  @pytest.mark.parametrize(
    "param_dtype", helpers.spread([jnp.float32, jnp.bfloat16], [jnp.bfloat16])
  )
  @pytest.mark.parametrize("given", helpers.spread([jnp.float32, jnp.bfloat16], [jnp.bfloat16]))
  def test_dtypes_are_those_of_init_and_values_are_kept_to_rounding(self, param_dtype, given):
    model = small("parnet_s", param_dtype=param_dtype)
    x = random_input(2, 32, 32, 3).astype("float32")
    params = jax.tree.map(lambda leaf: leaf.astype(given), folded(small("parnet_s"), x))
    variables = repjax.expand(model, params, KEY, images=x)
    assert helpers.shapes(variables) == helpers.shapes(helpers.init_shapes(model, x))
    back = repjax.reparameterize(*halves(variables))
    half = jnp.bfloat16 in (param_dtype, given)
    jax.tree.map(lambda a, b: assert_close(a, b, 0.05 if half else 1e-4), back, params)

  def test_eager_and_traced_calls_agree_and_the_key_decides(self):
    model = RepConv(4)
    params = folded(model, X32)
    expand = functools.partial(repjax.expand, model)
    eager = expand(params, KEY, images=X32)
    traced = jax.jit(lambda params, key, x: expand(params, key, images=x))(params, KEY, X32)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), traced, eager)
    other = expand(params, jax.random.key(2), images=X32)
    assert not np.array_equal(
      other["params"]["conv1x1"]["conv"]["kernel"], eager["params"]["conv1x1"]["conv"]["kernel"]
    )

  def test_raw_keys_are_keys(self):
    model = RepConv(4)
    params = folded(model, X32)
    shapes = repjax.expand(model, params, jax.random.PRNGKey(0), images=shape_of(X32))
    assert shapes["params"].keys() == {"conv3x3", "conv1x1", "identity"}


MODEL = small("repvgg_a0")
IMAGES = random_input(2, 32, 32, 3).astype("float32")


@functools.cache
def plain():
  """Returns parameters of a small RepVGG in deploy form."""
  return folded(MODEL, IMAGES)


def refused(said: str, model: Any, params: Any, key: Any = KEY, images: Any = IMAGES) -> None:
  """Checks that `expand` refuses its arguments in one paragraph with these words."""
  with pytest.raises(InputError, match=said) as told:
    repjax.expand(model, params, key, images=images)
  helpers.assert_one_paragraph(told.value)


class TestRefusals:
  def test_a_tree_in_training_form(self):
    refused("in training form already", MODEL, helpers.init_shapes(MODEL, IMAGES)["params"])

  def test_collections(self):
    refused(r'deploy_variables\["params"\]', MODEL, {"params": plain()})

  def test_a_tree_of_a_different_model(self):
    refused(
      r"do not fit.*stage1/block1.*is missing",
      small("repvgg_a0", stage_sizes=(2, 1, 2, 1)),
      plain(),
    )
    refused(
      r"head/kernel is .*, 3\) where the model has .*, 4\)",
      small("repvgg_a0", num_classes=4),
      plain(),
    )
    refused("do not fit.*stem/RepConv_0/conv/kernel is missing", MODEL, {**plain(), "stem": {}})

  @pytest.mark.parametrize("params", [None, [1], {"stem/conv": 1}], ids=str)
  def test_no_tree(self, params):
    refused("deploy_params must be nested dictionaries", MODEL, params)

  def test_numbers_of_other_kinds(self):
    params = {**plain(), "head": jax.tree.map(lambda leaf: leaf.astype(jnp.int8), plain()["head"])}
    refused("head/bias must hold floating-point", MODEL, params)

  def test_the_deploy_form_as_model(self):
    refused("the deploy form of RepVGG", small("repvgg_a0", deploy=True), plain())
    refused("must be a flax.linen.Module", "repvgg_a0", plain())

  @pytest.mark.parametrize(
    "key",
    [None, 0, np.zeros(2), np.uint32(3), np.arange(3, dtype=np.uint32), jax.random.split(KEY)],
    ids=str,
  )
  def test_no_key(self, key):
    refused("key must be a JAX random key", MODEL, plain(), key=key)

  @pytest.mark.parametrize(
    ("images", "said"),
    [
      ("images", "images must be an array"),
      (np.zeros((2, 32, 32, 3), np.uint8), r"normalised.*uint8"),
      (np.zeros((0, 32, 32, 3), np.float32), "at least one"),
      (np.zeros((32, 32, 3), np.float32), r"\(N, H, W, C\).*got \(32, 32, 3\)"),
      (np.zeros((1, 8, 8, 3), np.float32), "8"),
      (np.full((1, 32, 32, 3), np.nan, np.float32), "images are not finite"),
    ],
    ids=["none", "uint8", "empty", "one image", "too small", "nan"],
  )
  def test_images(self, images, said):
    refused(said, MODEL, plain(), images=images)

  def test_images_far_from_zero_whose_statistics_lose_a_layer(self):
    images = np.full((2, 32, 32, 3), 1e6, np.float32)
    refused("does not compute the same in float32.*Normalise them", MODEL, plain(), images=images)

  def test_images_of_a_different_size_than_the_tree(self):
    model = small("repmlp_cifar")
    params = folded(model, IMAGES)
    wide = np.zeros((1, 64, 64, 3), np.float32)
    refused("do not fit.*images of its size", model, params, images=wide)

  def test_parameters_that_are_not_finite(self):
    params = jax.tree.map(lambda leaf: leaf, plain())
    params["stem"]["RepConv_0"]["conv"]["bias"] *= np.nan
    refused("stem/RepConv_0: no training form.*not finite", MODEL, params)

  def test_a_norm_of_somebody(self):
    params = {
      "first": folded(RepConv(4), X32),
      "norm": {"scale": X32[0, 0, 0], "bias": X32[0, 0, 0]},
    }
    refused("norm holds statistics.*RepNorm", OwnNorm(), params, images=X32)

  def test_a_network_without_layers(self):
    refused("holds no layer of repjax in training form", nn.Dense(3), {}, images=X32)

  def test_no_branch_as_large_as_the_kernel(self):
    model = RepConv(4, ("conv1x3", "conv3x1"))
    refused("conv1x3, conv3x1 is a 3x3.*branch conv3x3", model, folded(model, X32), images=X32)

  @pytest.mark.usefixtures("x64")
  def test_a_gate_that_was_trained_in_deploy_form(self):
    model = Around(lambda deploy: SkipSqueezeExcite(deploy=deploy))
    params = folded(model, X32)
    params["SkipSqueezeExcite_0"]["dense"]["bias"] += 1
    refused("no training form of this SkipSqueezeExcite", model, params, images=X32)

  def test_a_share_set_whose_bias_differs_between_pixels(self):
    model = RepDense(4, 2, share_sets=2)
    params = folded(model, X32)
    params["dense"]["bias"] = params["dense"]["bias"].at[0, 0].add(1)
    refused("no training form of this RepDense", model, params, images=X32)

  @pytest.mark.usefixtures("x64")
  def test_a_layer_that_is_called_twice(self):
    model = Around(lambda deploy: RepConv(4, deploy=deploy), calls=2)
    params = folded(model, X32)
    refused("RepConv_0/.*several times.*Leave images out", model, params, images=X32)
    variables = repjax.expand(model, params, KEY, images=shape_of(X32))
    x, deploy = jnp.asarray(X32), model.clone(deploy=True)
    assert_close(model.apply(variables, x), deploy.apply({"params": params}, x), 1e-5)

  def test_a_norm_that_evaluation_does_not_call(self):
    class Trained(nn.Module):
      deploy: bool = False

      @nn.compact
      def __call__(self, x, train=False):
        first, second = (
          RepNorm(deploy=self.deploy, name=name) for name in ("RepNorm_0", "RepNorm_1")
        )
        x = first(x, train)
        return second(x, train) if train or self.is_initializing() else x

    model = Trained()
    refused(
      "RepNorm_1/bn has no statistics.*in evaluation mode", model, folded(model, X32), images=X32
    )


def test_the_norm_of_a_user_under_a_mapped_axis_needs_no_axis():
  """The axis of pmap exists in training alone."""
  model = RepConv(4, axis_name="devices")
  params = folded(model, X32)
  variables = repjax.expand(model, params, KEY, images=X32)
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(variables))
