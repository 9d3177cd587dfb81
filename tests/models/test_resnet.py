"""ResNet: counts, the plain definition, both forms computing the same, dilation for strides."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax import weights
from repjax.models.resnet import Bottleneck, Place, ResidualBlock, ResNet
from repjax.weights.naming import entries
from repjax.weights.resnet import NAMINGS
from tests import helpers
from tests.helpers import F64, halves, init_shapes, quick_jit, random_input, random_variables
from tests.models import plain
from tests.models.dilation import dilated_maps

# Parameters as torchvision states them, and channels that are normalised: as many as there are
# scales, which the deploy form has not, and of each two statistics.
PARAMETERS = {
  "resnet18": 11_689_512,
  "resnet34": 21_797_672,
  "resnet50": 25_557_032,
  "resnet101": 44_549_160,
  "resnet152": 60_192_808,
}
NORMALISED = {
  "resnet18": 4_800,
  "resnet34": 8_512,
  "resnet50": 26_560,
  "resnet101": 52_672,
  "resnet152": 75_712,
}
# Millions in deploy form as in Table 4 of the RepVGG paper, cut off after two digits.
DEPLOYED = {
  "resnet18": 11.68,
  "resnet34": 21.78,
  "resnet50": 25.53,
  "resnet101": 44.49,
  "resnet152": 60.11,
}
# Multiply-accumulates at 224 px: that of 50 as counted on the RepMLP authors' plain ResNet-50.
MACS = {"resnet18": 1_814_073_344, "resnet50": 4_089_184_256}

TINY = {"num_classes": 10, "stage_sizes": (1, 1, 2, 1), "stem_features": 6}
BASIC = TINY | {"block": "basic", "widths": (6, 8, 12, 16)}
BOTTLENECK = TINY | {"block": "bottleneck", "widths": (8, 16, 24, 32)}
BLOCKS = {"basic": BASIC, "bottleneck": BOTTLENECK}
IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

both_blocks = pytest.mark.parametrize("block", BLOCKS)


def tiny(block="bottleneck", **overrides):
  return repjax.create_model("resnet50", **BLOCKS[block] | overrides)


def size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", helpers.spread(PARAMETERS, ["resnet18", "resnet50"]))
def test_parameters_are_those_published(name):
  train, deploy = (
    init_shapes(repjax.create_model(name, deploy=form), IMAGES) for form in (False, True)
  )
  assert size(train["params"]) == PARAMETERS[name]
  assert size(train["batch_stats"]) == 2 * NORMALISED[name]
  assert size(deploy["params"]) == PARAMETERS[name] - NORMALISED[name]
  assert math.floor(size(deploy["params"]) / 1e4) / 100 == DEPLOYED[name]
  if name == "resnet50":  # as on the RepMLP authors' plain ResNet-50
    assert size(deploy["params"]) == 25_530_472


@pytest.mark.parametrize("name", MACS)
def test_multiplications_are_those_published(name):
  found = repjax.analysis.summary(repjax.create_model(name), 224)
  assert found.deploy is not None
  assert (found.train.macs, found.deploy.macs) == (MACS[name], MACS[name])
  names = ["stem", "stage1", "stage2", "stage3", "stage4", "head"]
  assert [stage.name for stage in found.stages] == names


@both_blocks
def test_the_deploy_form_holds_convolutions_and_the_classifier_only(block):
  shapes = init_shapes(tiny(block, deploy=True), IMAGES)
  assert shapes.keys() == {"params"}
  scopes = {tuple(path.split("/")[-2:]) for path in helpers.leaves(shapes["params"])}
  assert scopes == {(scope, leaf) for scope in ("conv", "head") for leaf in ("kernel", "bias")}


def test_scopes_are_named():
  block = {"conv1": "conv1x1", "conv2": "conv3x3", "conv3": "conv1x1", "shortcut": "conv1x1"}
  params = init_shapes(tiny(), IMAGES)["params"]
  assert params.keys() == {"stem", "stage1", "stage2", "stage3", "stage4", "head"}
  assert params["stem"]["RepConv_0"].keys() == {"conv7x7"}
  assert params["stage3"].keys() == {"block0", "block1"}
  first, second = params["stage3"]["block0"], params["stage3"]["block1"]
  assert {name: set(first[f"RepConv_{name}"]) for name in block} == {
    name: {branch} for name, branch in block.items()
  }
  assert second.keys() == first.keys() - {"RepConv_shortcut"}


def test_a_basic_block_of_the_first_stage_needs_no_convolution_in_its_shortcut():
  params = init_shapes(tiny("basic"), IMAGES)["params"]
  shortcuts = {
    stage: "RepConv_shortcut" in params[stage]["block0"]
    for stage in params.keys() - {"stem", "head"}
  }
  assert shortcuts == {"stage1": False, "stage2": True, "stage3": True, "stage4": True}


@pytest.mark.usefixtures("x64")
@both_blocks
def test_the_network_is_the_one_of_its_definition(block):
  # Read from torchvision's names, so that these are proven too.
  x, model = random_input(2, 45, 38, 3), tiny(block, **F64)
  variables = random_variables(model, x)
  state = weights.to_torch("resnet50", variables)
  expected = plain.resnet(state, x, TINY["stage_sizes"])
  helpers.assert_close(quick_jit(model.apply)(variables, x), expected, 1e-12)


@pytest.mark.usefixtures("x64")
def test_the_outputs_are_torchvisions_and_dilated_those_of_timm():
  shapes = repjax.ModelSpec("resnet18").variable_shapes()
  names = entries(NAMINGS["resnet18"]["official"], shapes)
  state = helpers.fill_state_dict({name: entry.shape for name, entry in names.items()})
  variables = weights.from_torch("resnet18", state, param_dtype=np.float64)
  params = quick_jit(repjax.reparameterize)(*halves(variables))
  for case in json.loads((helpers.GOLDENS / "resnet.json").read_text()):
    x = helpers.golden_input(tuple(case["input"]["shape_nchw"]))
    deploy = bool(case["spec"]["overrides"])  # each form once
    model = repjax.create_model("resnet18", deploy=deploy, **case["spec"]["overrides"], **F64)
    logits = quick_jit(model.apply)({"params": params} if deploy else variables, x)
    helpers.assert_golden(logits, case["expect"]["logits"])


def forms_differ_by(dtype, shape=(1, 97, 75, 3), **overrides):
  """Relative error of the deploy form against the training form, random statistics."""
  dtypes = {"dtype": dtype, "param_dtype": dtype}
  model, deploy = (tiny(deploy=form, **overrides, **dtypes) for form in (False, True))
  x = random_input(*shape).astype(dtype)

  @quick_jit
  def outputs(variables):
    params = repjax.reparameterize(*halves(variables))
    return deploy.apply({"params": params}, x), model.apply(variables, x)

  return helpers.relative_error(*outputs(random_variables(model, x)))


class TestBothFormsAgree:
  @pytest.mark.usefixtures("x64")
  def test_in_float64_on_odd_sizes(self):
    assert forms_differ_by(jnp.float64) <= 1e-12

  @pytest.mark.usefixtures("x64")
  def test_in_float64_with_dilation_and_another_activation(self):
    overrides = {"block": "basic", "output_stride": 8, "act": "silu"}
    assert forms_differ_by(jnp.float64, (1, 64, 41, 3), **overrides) <= 1e-12

  def test_in_float32(self):
    assert forms_differ_by(jnp.float32, (1, 64, 41, 3), block="basic", stage_sizes=(1,) * 4) <= 1e-5


class TestFeatures:
  @pytest.mark.usefixtures("x64")
  def test_the_head_reads_the_mean_of_the_last(self):
    build = functools.partial(tiny, stage_sizes=(1,) * 4, **F64)
    x, model = random_input(2, 33, 40, 3), build(features_only=True)
    variables = random_variables(build(), x)
    expected = plain.resnet(weights.to_torch("resnet50", variables), x, (1,) * 4)
    head = variables["params"].pop("head")
    assert helpers.shapes(variables) == helpers.shapes(init_shapes(model, x))
    features = quick_jit(model.apply)(variables, x)
    logits = np.asarray(features["stage4"]).mean((1, 2)) @ np.asarray(head["kernel"])
    helpers.assert_close(logits + np.asarray(head["bias"]), expected, 1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("output_stride", [16, 8])
def test_a_dilated_network_has_every_pixel_of_the_strided_one(output_stride):
  # Depth 2: the first block of a stage dilates unlike the blocks after it. One width: the shortcut
  # of a first block has its convolution for the stride alone, and keeps it.
  sizes = {"stage_sizes": (1, 1, 2, 2) if output_stride == 8 else (1, 1, 1, 2), "widths": (8,) * 4}
  build = functools.partial(tiny, **sizes, features_only=True, **F64)
  assert dilated_maps(build, output_stride)["stage4"].shape[1:3] == (
    -(-75 // output_stride),
    64 // output_stride,
  )


class TestOverrides:
  @pytest.mark.parametrize(("block", "deploy"), [("basic", False), ("bottleneck", True)])
  def test_the_activation_ends_every_block(self, block, deploy):
    x = random_input(1, 32, 32, 3).astype("float32")
    model = tiny(block, stage_sizes=(1,) * 4, act="silu", features_only=True, deploy=deploy)
    features = quick_jit(model.apply)(random_variables(model, x), x)
    lowest = np.array([feature.min() for feature in features.values()])
    assert (lowest < 0).all()
    assert (lowest > -0.279).all()  # the minimum of silu


class Wider(ResidualBlock):
  """A bottleneck with two plain 1x1 convolutions in front of it."""

  inner: int

  @nn.compact
  def __call__(self, x, train):
    x = self.conv_bn("before", self.inner, 1)(x, train)
    x = self.conv_bn("after", self.place.features, 1)(x, train)
    return Bottleneck(self.place, act=self.act, **self.shared(), name="rest")(x, train)


class Replaced(ResNet, kw_only=True):
  """A ResNet with blocks of its own at stride 1 in stages 2 and 3."""

  inner: int = 4

  def block_at(self, place):
    if place.stage in (2, 3) and place.number:
      return Wider, {"inner": self.inner}
    return super().block_at(place)


class TestAnotherFamily:
  sizes = BOTTLENECK | {"stage_sizes": (2, 3, 2, 1)}
  few = BOTTLENECK | {"stage_sizes": (1, 2, 1, 1)}

  def test_only_the_places_that_it_names_are_its_own(self):
    params = init_shapes(Replaced(inner=5, **self.sizes), IMAGES)["params"]
    own = {
      f"{stage}/{block}"
      for stage in params.keys() - {"stem", "head"}
      for block, scopes in params[stage].items()
      if "rest" in scopes
    }
    assert own == {"stage2/block1", "stage2/block2", "stage3/block1"}
    before = params["stage2"]["block1"]["RepConv_before"]["conv1x1"]["conv"]["kernel"]
    assert before.shape == (1, 1, 16, 5)

  @pytest.mark.usefixtures("x64")
  def test_it_is_folded_as_any_network(self):
    x, model = random_input(1, 64, 33, 3), Replaced(remat=True, **self.few, **F64)
    variables = random_variables(model, x)

    @quick_jit
    def outputs(variables):
      params = repjax.reparameterize(*halves(variables))
      return model.clone(deploy=True).apply({"params": params}, x), model.apply(variables, x)

    helpers.assert_close(*outputs(variables), 1e-12)

  def test_a_place_says_what_a_block_needs(self):
    stages = dict(ResNet(output_stride=16, stage_sizes=(1, 1, 2, 2)).stages())
    assert stages == {
      "stage1": (Place(1, 0, 256, 1, 1, 1),),
      "stage2": (Place(2, 0, 512, 2, 1, 1),),
      "stage3": (Place(3, 0, 1024, 2, 1, 1), Place(3, 1, 1024, 1, 1, 1)),
      "stage4": (Place(4, 0, 2048, 1, 1, 2), Place(4, 1, 2048, 1, 2, 2)),
    }


class TestRefusals:
  @pytest.mark.parametrize("shape", [(1, 31, 32, 3), (1, 32, 16, 3), (64, 64, 3)], ids=str)
  def test_images_that_are_too_small_or_no_batch(self, shape):
    with pytest.raises(ValueError, match=r"this ResNet shrinks images 32 times.*\(N, H, W, C\)"):
      init_shapes(tiny(), jnp.ones(shape))

  def test_a_dilated_network_takes_smaller_ones(self):
    dilated = tiny(output_stride=8)
    assert jax.eval_shape(dilated.init_with_output, jax.random.key(0), jnp.ones((1, 8, 9, 3)))
    with pytest.raises(ValueError, match="shrinks images 8 times"):
      init_shapes(dilated, jnp.ones((1, 8, 7, 3)))

  @pytest.mark.parametrize(
    ("overrides", "said"),
    [
      ({"stage_sizes": (1, 2, 3)}, "stage_sizes takes 4 whole numbers above 0, got"),
      ({"stage_sizes": 3}, "stage_sizes must be a list, each a whole number, got 3"),
      ({"widths": (8, 8, 8, 0)}, "widths takes 4 whole numbers above 0"),
      ({"widths": (8, 8, 8, 8.0)}, r"widths\[3\] must be a whole number, got 8.0"),
      ({"widths": (8, 8, 8, 6)}, "widths must be multiples of 4, got"),
      ({"stem_features": 0}, "stem_features takes a whole number above 0"),
      ({"block": "bottelneck"}, "unknown block of a ResNet 'bottelneck'; did you mean bottleneck"),
      ({"output_stride": 4}, "output_stride is 32, 16 or 8, got 4"),
      ({"width": 2}, "unknown override of resnet50 'width'; did you mean widths"),
    ],
    ids=str,
  )
  def test_values_that_make_no_network(self, overrides, said):
    with pytest.raises(repjax.errors.InputError, match=said):
      repjax.create_model("resnet50", **overrides)
