"""RepVGG and RepVGGplus: counts, the authors' outputs, and both forms computing the same."""

import functools
import itertools
import math
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from tests import helpers
from tests.helpers import (
  F64,
  halves,
  init_shapes,
  quick_jit,
  random_input,
  random_variables,
  relative_error,
)

NARROW = {"num_classes": 10, "width_multipliers": (0.25, 0.125, 0.125, 0.0625)}
TINY = {"num_classes": 10, "stage_sizes": (1, 1, 2, 1), "width_multipliers": (0.25,) * 4}
# Of every stage its first block and, where variants have some, another; at a variant's own widths.
FEW = {"stage_sizes": (2, 2, 4, 1)}
# Blocks whose input and output differ in their stride alone.
ONE_WIDTH = {"num_classes": 3, "width_multipliers": (0.125, 0.0625, 0.03125, 0.015625)}
IMAGES = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)

create = repjax.create_model
tiny = functools.partial(create, "repvgg_a0", **TINY)


def train_shapes(model, variables, images=IMAGES):
  """What a training step's forward pass returns: (output, updates), as shapes."""
  rngs = {"dropout": jax.random.key(0)}
  return jax.eval_shape(
    lambda v, x: model.apply(v, x, train=True, mutable=["batch_stats"], rngs=rngs),
    variables,
    images,
  )


def size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


class TestGoldens:
  pytestmark = pytest.mark.usefixtures("x64")

  @staticmethod
  def run(model, case, plus=False):
    """Filled by the rule: logits, outputs of all scopes, deploy parameters, deploy logits."""
    x = helpers.golden_input(tuple(case["input"]["shape_nchw"]))
    variables = helpers.fill_variables(init_shapes(model, x), plus)

    @quick_jit
    def outputs(variables):
      logits, captured = model.apply(variables, x, capture_intermediates=True)
      params = repjax.reparameterize(*halves(variables))
      deployed = model.clone(deploy=True).apply({"params": params}, x)
      return logits, captured["intermediates"], params, deployed

    return outputs(variables)

  def test_repvgg_a0(self):
    case = helpers.goldens()["repvgg_a0_64"]
    logits, captured, params, deployed = self.run(create("repvgg_a0", **F64), case)
    expect = case["expect"]
    for stage, record in expect["after_each_stage"].items():
      scope = "stem" if stage == "stage0" else stage
      helpers.assert_golden(helpers.nchw(captured[scope]["__call__"][0]), record)
    helpers.assert_golden(logits, expect["logits"])
    helpers.assert_golden(deployed, expect["logits"])
    assert np.abs(logits).max() == pytest.approx(expect["max_abs_logit"], rel=1e-9)
    check_fused(params, expect["fused"])

  def test_small_network_with_gates_and_groups(self):
    case = helpers.goldens()["repvgg_tiny_se_groups"]
    spec, expect = case["spec"], case["expect"]
    model = create(
      "repvgg_a0",
      stage_sizes=spec["num_blocks"],
      width_multipliers=spec["width_multiplier"],
      num_classes=spec["num_classes"],
      groups=spec["groups"],
      se="pre",
      se_reduction=spec["se"]["reduction"],
      **F64,
    )
    logits, _, params, deployed = self.run(model, case)
    helpers.assert_golden(logits, expect["logits"])
    helpers.assert_golden(deployed, expect["logits"])
    check_fused(params, expect["fused"])
    assert size(init_shapes(model, IMAGES)["params"]) == expect["train_params"]
    assert size(params) == expect["deploy_params"]

  def test_repvggplus(self):
    case = helpers.goldens()["repvggplus_tiny"]
    spec, expect = case["spec"], case["expect"]
    model = create(
      "repvggplus_l2pse",
      stage_sizes=spec["num_blocks"],
      width_multipliers=spec["width_multiplier"],
      num_classes=spec["num_classes"],
      **F64,
    )
    logits, captured, params, deployed = self.run(model, case, plus=True)
    helpers.assert_golden(logits, expect["main"])
    helpers.assert_golden(deployed, expect["main"])
    for head in spec["aux_heads"]:
      scope = f"AuxHead_{head.removesuffix('_aux')}"
      helpers.assert_golden(captured[scope]["__call__"][0], expect[head])
      assert scope not in params
    assert size(init_shapes(model, IMAGES)["params"]) == expect["train_params"]
    assert size(params) == expect["deploy_params"]


def check_fused(params, fused):
  ours = {helpers.official_name(path): leaf for path, leaf in helpers.leaves(params).items()}
  for name, record in fused.items():
    helpers.assert_golden(helpers.oihw(ours[name]), record)


def forms_differ_by(name, dtype, **overrides):
  """Relative error of the deploy form against the training form at 96 px, random statistics."""
  dtypes = {"dtype": dtype, "param_dtype": dtype}
  model, deploy = (create(name, deploy=form, **overrides, **dtypes) for form in (False, True))
  x = random_input(1, 96, 96, 3).astype(dtype)

  @quick_jit
  def outputs(variables):
    params = repjax.reparameterize(*halves(variables))
    return deploy.apply({"params": params}, x), model.apply(variables, x)

  return relative_error(*outputs(random_variables(model, x)))


class TestBothFormsAgree:
  @pytest.mark.proof
  @pytest.mark.usefixtures("x64")
  def test_in_float64_at_full_width(self):
    assert forms_differ_by("repvgg_b0", jnp.float64, **FEW) <= 1e-12

  @pytest.mark.usefixtures("x64")
  # Of those that differ in width and depth only, one: cut like this they are the same network.
  @pytest.mark.parametrize(
    "name",
    helpers.spread(
      ["repvgg_b1g2", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse"],
      ["repvgg_b1g4", "repvggplus_l2pse"],
    ),
  )
  def test_in_float64_for_every_kind_of_block(self, name):
    assert forms_differ_by(name, jnp.float64, **FEW, **NARROW) <= 1e-12

  @pytest.mark.proof
  def test_in_float32_at_the_greatest_depth(self):
    assert forms_differ_by("repvgg_d2se", jnp.float32, **NARROW) <= 1e-5

  @pytest.mark.usefixtures("x64")
  def test_under_other_strides_and_activation(self):
    overrides = TINY | {"act": "gelu", "strides": (1, 2, 1, 2, 1)}
    assert forms_differ_by("repvgg_a0", jnp.float64, **overrides) <= 1e-12


class TestAuxiliaryHeads:
  model = staticmethod(functools.partial(create, "repvggplus_l2pse", **TINY))

  def test_training_returns_logits_of_every_head(self):
    model = self.model()
    (main, auxiliary), _ = train_shapes(model, init_shapes(model, IMAGES))
    assert main.shape == (2, 10)
    assert {name: head.shape for name, head in auxiliary.items()} == {
      "stage1": (2, 10),
      "stage2": (2, 10),
      "stage3_first": (2, 10),
    }

  def test_evaluation_returns_the_main_logits(self):
    model = self.model()
    assert jax.eval_shape(model.apply, init_shapes(model, IMAGES), IMAGES).shape == (2, 10)

  def test_deploy_form_has_none(self):
    params = init_shapes(self.model(deploy=True), IMAGES)["params"]
    assert not any("AuxHead" in scope for scope in params)

  def test_any_variant_takes_them(self):
    params = init_shapes(tiny(aux_heads=True), IMAGES)["params"]
    assert {"AuxHead_stage1", "AuxHead_stage2", "AuxHead_stage3_first"} <= params.keys()
    assert {"stage3_first", "stage3_second"} <= params.keys()
    assert "stage3" not in params


class TestFeatures:
  @pytest.mark.parametrize("deploy", [False, True])
  @pytest.mark.parametrize("aux_heads", [False, True])
  def test_shapes_and_keys(self, aux_heads, deploy):
    model = tiny(features_only=True, aux_heads=aux_heads, deploy=deploy)
    variables = init_shapes(model, IMAGES)
    features = jax.eval_shape(model.apply, variables, IMAGES)
    assert {name: value.shape for name, value in features.items()} == {
      "stage1": (2, 8, 8, 16),
      "stage2": (2, 4, 4, 32),
      "stage3": (2, 2, 2, 64),
      "stage4": (2, 1, 1, 128),
    }
    assert not any("head" in scope.lower() for scope in variables["params"])

  @pytest.mark.usefixtures("x64")
  def test_both_forms_agree_and_the_head_reads_the_last(self):
    classifier, x = tiny(**F64), random_input(2, 32, 32, 3)
    model, deploy = (tiny(features_only=True, deploy=form, **F64) for form in (False, True))
    variables = random_variables(classifier, x)
    head = variables["params"]["head"]
    variables["params"] = {k: v for k, v in variables["params"].items() if k != "head"}
    assert helpers.shapes(variables) == helpers.shapes(init_shapes(model, x))

    @quick_jit
    def outputs(variables):
      params = repjax.reparameterize(*halves(variables))
      whole = {**variables, "params": {**variables["params"], "head": head}}
      return (
        deploy.apply({"params": params}, x),
        model.apply(variables, x),
        classifier.apply(whole, x),
      )

    deployed, features, logits = outputs(variables)
    for name, feature in features.items():
      assert relative_error(deployed[name], feature) <= 1e-12
    expected = np.asarray(features["stage4"]).mean((1, 2)) @ np.asarray(head["kernel"])
    assert relative_error(logits, expected + np.asarray(head["bias"])) <= 1e-12


@pytest.mark.usefixtures("x64")
class TestDilation:
  @pytest.mark.parametrize(
    ("output_stride", "overrides"),
    [
      (16, {"stage_sizes": (1, 1, 1, 2), "groups": 2}),
      (8, {"stage_sizes": (1, 1, 2, 2), "aux_heads": True, "act": "silu"}),
      (4, {"stage_sizes": (1, 2, 1, 2), "strides": (1, 2, 2, 1, 3), "groups": {3: 4}}),
      (1, {"stage_sizes": (1, 1, 1, 1), "strides": (1, 2, 1, 2, 2)}),
    ],
    ids=str,
  )
  def test_a_dilated_network_has_every_pixel_of_the_strided_one(self, output_stride, overrides):
    build = functools.partial(create, "repvgg_a0", **ONE_WIDTH, **overrides, **F64)
    x, strided, dilated = random_input(1, 75, 64, 3), build(), build(output_stride=output_stride)
    variables = random_variables(strided, x)
    assert helpers.shapes(init_shapes(dilated, x)) == helpers.shapes(variables)

    @quick_jit
    def outputs(variables):
      params = repjax.reparameterize(*halves(variables))
      plain = dilated.clone(deploy=True, features_only=True).apply({"params": params}, x)
      maps = [m.apply(variables, x, capture_intermediates=True)[1] for m in (strided, dilated)]
      return [m["intermediates"] for m in maps], plain

    (coarse, fine), plain = outputs(variables)
    for scope, total in zip(plain, itertools.accumulate(strided.strides[1:], operator.mul)):
      own = total * strided.strides[0]
      step = max(1, own // output_stride)
      for half in (name for name in coarse if name.startswith(scope)):
        expected = coarse[half]["__call__"][0]
        actual = fine[half]["__call__"][0]
        assert actual.shape[1:3] == tuple(-(-side * step // own) for side in (75, 64))
        helpers.assert_close(actual[:, ::step, ::step], expected, 1e-12)
        if f"AuxHead_{half}" in coarse:
          heads = [maps[f"AuxHead_{half}"]["RepConv_0"]["__call__"][0] for maps in (fine, coarse)]
          helpers.assert_close(heads[0][:, ::step, ::step], heads[1], 1e-12)
      helpers.assert_close(plain[scope], actual, 1e-12)

  def test_it_is_off_unless_asked_for(self):
    for output_stride in (None, 32):
      stages = tiny(output_stride=output_stride).stages()
      assert [tuple(stage.stridings[0][:3]) for stage in stages] == [(2, 1, 1)] * 4

  def test_smaller_images_are_taken(self):
    images = jnp.ones((1, 8, 11, 3))
    features = jax.eval_shape(
      lambda: tiny(output_stride=8, features_only=True).init_with_output(jax.random.key(0), images)
    )[0]
    assert [feature.shape[1:3] for feature in features.values()] == [(2, 3)] + 3 * [(1, 2)]


class TestOverrides:
  def test_strides(self):
    model = tiny(features_only=True, strides=(1, 1, 2, 1, 1))
    shapes = jax.eval_shape(model.apply, init_shapes(model, IMAGES), IMAGES)
    assert [feature.shape[1:3] for feature in shapes.values()] == [(32, 32)] + 3 * [(16, 16)]

  def test_a_block_that_neither_shrinks_nor_widens_has_an_identity(self):
    # Stem and stage 1 are both 16 wide here.
    blocks = [
      init_shapes(tiny(strides=strides), IMAGES)["params"]["stage1"]["block0"]["RepConv_0"]
      for strides in ((2, 1, 2, 2, 2), (2, 2, 2, 2, 2))
    ]
    assert ["identity" in block for block in blocks] == [True, False]

  def test_groups_by_number_are_those_of_every_second_block(self):
    sizes = {"stage_sizes": (2, 2, 2, 1)}
    every_second = init_shapes(tiny(**sizes, groups=2), IMAGES)
    for numbers in ({2: 2, 4: 2, 6: 2}, {"2": 2, "4": 2, "6": 2}):
      by_number = init_shapes(tiny(**sizes, groups=numbers), IMAGES)
      assert helpers.shapes(by_number) == helpers.shapes(every_second)
    inputs = {
      path.split("/RepConv_0")[0]: leaf.shape[2]
      for path, leaf in helpers.leaves(every_second["params"]).items()
      if path.endswith("conv3x3/conv/kernel")
    }
    assert inputs == {
      "stem": 3,
      "stage1/block0": 16,
      "stage1/block1": 8,
      "stage2/block0": 16,
      "stage2/block1": 16,
      "stage3/block0": 32,
      "stage3/block1": 32,
      "stage4/block0": 64,
    }

  def test_block_28_is_never_grouped(self):
    groups = [create("repvgg_b1", groups=4).groups_of(block) for block in range(30)]
    assert groups == [1] + [1, 4] * 13 + [1] * 3

  def test_the_stem_is_at_most_64_wide(self):
    for multiplier, width in ((0.5, 32), (1, 64), (2.5, 64)):
      model = tiny(width_multipliers=(multiplier,) * 4)
      params = init_shapes(model, IMAGES)["params"]
      assert params["stem"]["RepConv_0"]["conv3x3"]["bn"]["scale"].shape == (width,)

  @pytest.mark.parametrize("se", ["pre", "post"])
  def test_gates_are_in_every_block_and_survive(self, se):
    model = tiny(se=se)
    params = init_shapes(model.clone(deploy=True), IMAGES)["params"]
    gates = {path for path in helpers.leaves(params) if path.endswith("SqueezeExcite_0/up/kernel")}
    assert len(gates) == 1 + sum(TINY["stage_sizes"])

  @pytest.mark.parametrize("deploy", [False, True])
  def test_the_activation_ends_every_block(self, deploy):
    x = random_input(1, 32, 32, 3).astype("float32")
    lowest = {}
    for act in ("relu", "silu"):
      model = tiny(stage_sizes=(1,) * 4, act=act, features_only=True, deploy=deploy)
      features = quick_jit(model.apply)(random_variables(model, x), x)
      lowest[act] = np.array([feature.min() for feature in features.values()])
    assert (lowest["relu"] == 0).all()
    assert (lowest["silu"] < 0).all()
    assert (lowest["silu"] > -0.279).all()  # the minimum of silu


class TestTraining:
  def test_shared_statistics_are_those_of_the_whole_batch(self):
    # The last maps of a device hold one pixel, and those of all devices four.
    x, model = random_input(4, 32, 32, 3).astype("float32"), tiny(axis_name="batch")
    variables = random_variables(tiny(), x)

    def step(model, x):
      return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]

    shared = jax.pmap(functools.partial(step, model), axis_name="batch")(x[:, None])
    whole = quick_jit(functools.partial(step, tiny()))(x)
    first, *others = (jax.tree.map(operator.itemgetter(device), shared) for device in range(4))
    jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-4), first, whole)
    for other in others:
      jax.tree.map(np.testing.assert_array_equal, other, first)


class TestRefusals:
  @pytest.mark.parametrize("size", [(31, 32), (32, 16), (1, 1)], ids=str)
  def test_images_smaller_than_the_total_stride(self, size):
    with pytest.raises(ValueError, match=rf"shrinks images 32 times.*{size[0]}, {size[1]}, 3\)"):
      init_shapes(tiny(), jnp.ones((1, *size, 3)))

  def test_smaller_strides_allow_smaller_images(self):
    init_shapes(tiny(strides=(1, 1, 2, 2, 2)), jnp.ones((1, 8, 8, 3)))
    with pytest.raises(ValueError, match="shrinks images 8 times"):
      init_shapes(tiny(strides=(1, 1, 2, 2, 2)), jnp.ones((1, 8, 7, 3)))

  def test_images_without_a_batch_axis(self):
    with pytest.raises(ValueError, match=r"must be \(N, H, W, C\)"):
      init_shapes(tiny(), jnp.ones((64, 64, 3)))

  @pytest.mark.parametrize(
    ("overrides", "said"),
    [
      ({"stage_sizes": (1, 2, 3)}, "stage_sizes takes 4 numbers"),
      ({"width_multipliers": (1,) * 5}, "width_multipliers takes 4 numbers"),
      ({"strides": (2, 2)}, "strides takes 5 numbers"),
      ({"strides": 2}, "strides must be a list"),
      ({"output_stride": 12}, "output_stride is one of 2, 4, 8, 16, 32, .* strides=.*, got 12"),
      ({"strides": (1, 2, 1, 2, 2), "output_stride": 16}, "one of 1, 2, 4, 8, .* got 16"),
      ({"se": "before"}, "se is None, .*got 'before'"),
    ],
    ids=str,
  )
  def test_values_that_make_no_network(self, overrides, said):
    with pytest.raises(ValueError, match=said):
      create("repvgg_a0", **overrides)


class TestScaled:
  """The network of the hyper-search, whose branches have scales."""

  scaled = functools.partial(create, "repvgg_a0", scaled=True)

  @pytest.mark.usefixtures("x64")
  @pytest.mark.parametrize(
    "overrides",
    [
      {},
      {"groups": 2},
      {"output_stride": 8},
      {"aux_heads": True},
      {"se": "post", "se_reduction": 4},
    ],
    ids=str,
  )
  def test_both_forms_agree(self, overrides):
    model = self.scaled(**TINY, **overrides, **F64)
    assert helpers.forms_differ_by(model, random_input(2, 32, 32, 3)) <= 1e-12

  @pytest.mark.parametrize("name", ["repvgg_b1", "repvgg_b2"])
  def test_a_branch_has_a_scale_and_the_sum_has_a_norm(self, name):
    # A norm has 2 C parameters and a scale has C. Two branches have 4 C with norms, and 4 C with
    # scales and one norm. Three branches, in all but the first block of a stage, have 6 C and 5 C.
    usual, scaled = (create(name, scaled=scaled) for scaled in (False, True))
    fewer = sum(stage.features * (stage.blocks - 1) for stage in usual.stages())
    sizes = [size(init_shapes(model, IMAGES)["params"]) for model in (usual, scaled)]
    assert sizes[0] - sizes[1] == fewer

  @pytest.mark.parametrize("name", ["repvgg_b1", "repvgg_b2"])
  def test_a_plain_network_has_the_parameters_of_the_deploy_form_and_scales_of_norms(self, name):
    params = helpers.leaves(init_shapes(create(name, branches=("conv3x3",)), IMAGES)["params"])
    scales = sum(leaf.size for path, leaf in params.items() if path.endswith("bn/scale"))
    assert size(params) == helpers.counts()[name]["deploy_params"] + scales

  def test_initial_scales_are_those_of_the_authors_in_both_inits(self):
    model = self.scaled(num_classes=3, stage_sizes=(1, 3, 4, 1), width_multipliers=(0.125,) * 4)
    ours = helpers.leaves(repjax.init(model, jax.random.key(0), 32)["params"])
    flax = helpers.leaves(
      quick_jit(model.init)(jax.random.key(0), jnp.ones((1, 32, 32, 3)))["params"]
    )
    scales = [path for path in ours if path.endswith("/scale")]
    for path in scales:
      np.testing.assert_array_equal(ours[path], flax[path])
    first = {path.partition("/ScaledConv_0/")[0]: ours[path][0] for path in scales if "3x3" in path}
    root = math.sqrt
    assert first == pytest.approx(
      {"stem": 1, "stage1/block0": 1, "stage2/block0": 1, "stage2/block1": root(2)}
      | {"stage2/block2": 1, "stage3/block0": 1, "stage3/block1": root(2), "stage3/block2": 1}
      | {"stage3/block3": root(2 / 3), "stage4/block0": 1}
    )
    assert {float(ours[path][0]) for path in scales if "identity" in path} == {1.0}

  def test_other_branches_are_refused(self):
    with pytest.raises(ValueError, match="Leave these out, or scaled"):
      self.scaled(branches=("conv3x3",))
