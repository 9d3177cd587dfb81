"""RepConv: both forms compute the same, and they compute what the authors' code does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.layers import RepConv, fold_rep_conv
from repjax.models.dilation import Striding
from repjax.models.repvgg import RepVGGBlock
from tests import helpers
from tests.helpers import F64, random_input, random_variables, relative_error

EPSILON = 1e-5
THREE = ("conv3x3", "conv1x1", "identity")
TWO = ("conv3x3", "conv1x1")
POOLED = ("conv3x3", "avg2x2_conv1x1")


def both_forms(x, **attributes):
  """The outputs of the training form, with random statistics, and of its fold in deploy form."""
  train = RepConv(**attributes, **F64)
  deploy = RepConv(**attributes, **F64, deploy=True)
  variables = random_variables(train, x)

  def outputs(variables, x):
    folded = fold_rep_conv(variables["params"], variables["batch_stats"], EPSILON)
    return train.apply(variables, x), deploy.apply({"params": folded}, x), folded

  trained, deployed, folded = helpers.quick_jit(outputs)(variables, x)
  assert helpers.shapes(folded) == helpers.shapes(helpers.init_shapes(deploy, x)["params"])
  return trained, deployed


@pytest.mark.usefixtures("x64")
class TestBothFormsAgree:
  @pytest.mark.parametrize(
    "branches",
    [
      THREE,
      ("conv3x3", "conv1x3", "conv3x1"),
      ("conv1x3", "conv3x1", "identity"),
      ("conv5x5", "conv3x3", "conv1x1", "identity"),
      ("conv3x3", "conv3x3_1", "conv1x1", "conv1x1_1", "identity", "identity_1"),
      ("conv2x2", "conv4x4"),
      ("conv1x1", "identity"),
    ],
    ids=" ".join,
  )
  def test_for_branches(self, branches):
    outputs = both_forms(random_input(2, 7, 6, 4), features=4, branches=branches)
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize("groups", [2, 4])
  @pytest.mark.parametrize("branches", [THREE, TWO], ids=" ".join)
  def test_for_groups(self, branches, groups):
    x, features = random_input(2, 5, 6, 8), 8 if branches is THREE else 12
    outputs = both_forms(x, features=features, branches=branches, groups=groups)
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize("strides", [2, (1, 2), [3, 2]], ids=str)
  @pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 1)], ids=str)
  def test_for_strides_on_odd_even_and_oblong_maps(self, strides, size):
    x = random_input(2, *size, 3)
    outputs = both_forms(x, features=4, branches=TWO, strides=strides)
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize("dilation", [1, 2, 4, (1, 3)], ids=str)
  def test_for_dilations(self, dilation):
    x = random_input(2, 9, 8, 4)
    outputs = both_forms(x, features=4, branches=THREE, dilation=dilation)
    assert outputs[0].shape == x.shape
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize("dilation", [1, 2])
  @pytest.mark.parametrize("padding", [None, 0, 2, (0, 2)], ids=str)
  def test_for_paddings(self, padding, dilation):
    x = random_input(2, 7, 8, 3)
    outputs = both_forms(x, features=4, branches=TWO, padding=padding, dilation=dilation)
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize("mode", ["constant", "edge"])
  @pytest.mark.parametrize("padding", [0, 2, (0, 2)], ids=str)
  def test_for_paddings_that_resize_what_the_identity_reads(self, padding, mode):
    x = random_input(2, 7, 8, 4)
    outputs = both_forms(x, features=4, branches=THREE, padding=padding, padding_mode=mode)
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize("mode", ["edge", "reflect", "wrap"])
  def test_for_padding_modes(self, mode):
    x = random_input(2, 7, 6, 4)
    outputs = both_forms(x, features=4, branches=("conv5x3", *THREE), padding_mode=mode)
    assert outputs[0].shape == x.shape
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize("mode", ["constant", "edge"])
  def test_for_everything_at_once(self, mode):
    x = random_input(2, 9, 8, 4)
    how = {"strides": (2, 1), "dilation": (1, 2), "padding": (0, 3), "groups": 2}
    outputs = both_forms(x, features=6, branches=TWO, padding_mode=mode, **how)
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize(
    ("branch", "strides", "padding", "size"),
    [("conv7x7", 2, None, (8, 6)), ("conv4x4", 4, 0, (4, 2))],
  )
  def test_for_a_plain_conv_bn(self, branch, strides, padding, size):
    x = random_input(2, 16, 11, 3)
    outputs = both_forms(x, features=4, branches=(branch,), strides=strides, padding=padding)
    assert outputs[0].shape == (2, *size, 4)
    assert relative_error(*outputs) <= 1e-12

  def test_for_convolutions_with_a_bias(self):
    x = random_input(2, 7, 6, 4)
    outputs = both_forms(x, features=4, branches=THREE, conv_bias=True)
    assert relative_error(*outputs) <= 1e-12
    variables = random_variables(RepConv(4, THREE, conv_bias=True, **F64), x)
    params = variables["params"]
    assert [sorted(params[name]["conv"]) for name in TWO] == [["bias", "kernel"]] * 2
    # It is there to be read: two biases moved by one each move the norms' outputs.
    for name in TWO:
      params[name]["conv"]["bias"] += 1
    moved = RepConv(4, THREE, conv_bias=True, **F64).apply(variables, x) - outputs[0]
    factors = (
      params[name]["bn"]["scale"] / np.sqrt(variables["batch_stats"][name]["bn"]["var"] + EPSILON)
      for name in TWO
    )
    assert relative_error(moved, np.broadcast_to(sum(factors), moved.shape)) <= 1e-12


@pytest.mark.usefixtures("x64")
class TestPooledBranch:
  @pytest.mark.parametrize(
    ("size", "attributes"),
    [
      ((8, 8), {}),
      ((9, 9), {"groups": 2}),
      ((5, 8), {"branches": (*POOLED, "conv1x1", "avg2x2_conv1x1_1", "conv1x3", "conv3x1")}),
      ((1, 1), {"conv_bias": True}),
      ((2, 1), {"strides": (2, 2), "padding": (1, 1), "groups": 4}),
    ],
    ids=str,
  )
  def test_both_forms_agree(self, size, attributes):
    x = random_input(2, *size, 4)
    attributes = {"features": 8, "branches": POOLED, "strides": 2} | attributes
    outputs = both_forms(x, **attributes)
    assert outputs[0].shape == (2, -(-size[0] // 2), -(-size[1] // 2), 8)
    assert relative_error(*outputs) <= 1e-12

  @pytest.mark.parametrize("groups", [1, 2])
  @pytest.mark.parametrize("size", [(6, 4), (5, 3)], ids=str)
  def test_it_is_the_mean_of_four_pixels_and_a_1x1(self, size, groups):
    # Both forms could be wrong alike.
    x, layer = random_input(2, *size, 4), RepConv(6, POOLED, strides=2, groups=groups, **F64)
    variables = random_variables(layer, x)
    variables["params"]["conv3x3"]["bn"] = jax.tree.map(
      jnp.zeros_like, variables["params"]["conv3x3"]["bn"]
    )
    held, stats = variables["params"][POOLED[1]], variables["batch_stats"][POOLED[1]]["bn"]
    even = np.pad(x, ((0, 0), (0, size[0] % 2), (0, size[1] % 2), (0, 0)))
    means = sum(even[:, row::2, column::2] for row, column in np.ndindex(2, 2)) / 4
    products = helpers.convolve(means, held["conv"]["kernel"], groups=groups)
    factor = np.asarray(held["bn"]["scale"] / np.sqrt(stats["var"] + EPSILON))
    expected = (products - np.asarray(stats["mean"])) * factor + np.asarray(held["bn"]["bias"])
    assert relative_error(helpers.quick_jit(layer.apply)(variables, x), expected) <= 1e-12

  def test_the_fold_has_the_gradients_of_the_training_form(self):
    x, train = random_input(2, 5, 4, 2), RepConv(2, POOLED, strides=2, **F64)
    variables = random_variables(train, x)
    weights = random_input(2, 3, 2, 2, seed=3)

    def loss(params, folded):
      if folded:
        params = fold_rep_conv(params, variables["batch_stats"], EPSILON)
        return (train.clone(deploy=True).apply({"params": params}, x) * weights).sum()
      return (train.apply({**variables, "params": params}, x) * weights).sum()

    one, other = (
      helpers.leaves(helpers.quick_jit(jax.grad(lambda p, form=form: loss(p, form)))(held))
      for form, held in ((form, variables["params"]) for form in (False, True))
    )
    assert one.keys() == other.keys()
    assert all(relative_error(one[path], other[path]) <= 1e-12 for path in one)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("how", "numpy_how"),
  [
    ({}, {"padding": (1, 1)}),
    ({"strides": (2, 1), "dilation": (1, 2)}, {"padding": (1, 2)}),
    ({"strides": (1, 3), "padding": (0, 2)}, {}),
    ({"groups": 2}, {"padding": (1, 1)}),
  ],
  ids=str,
)
def test_deploy_form_is_one_convolution(how, numpy_how):
  # Both forms share the code for strides and padding, so comparing them could not show it wrong.
  x, layer = random_input(2, 7, 8, 4), RepConv(6, TWO, deploy=True, **how, **F64)
  params = random_variables(layer, x)["params"]
  expected = helpers.convolve(
    x, params["conv"]["kernel"], params["conv"]["bias"], **how | numpy_how
  )
  assert relative_error(layer.apply({"params": params}, x), expected) <= 1e-12


def test_padding_modes_are_those_of_numpy():
  x, layer = random_input(1, 5, 6, 2).astype("float32"), RepConv(2, THREE, padding_mode="reflect")
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
  params = random_variables(layer.clone(deploy=True), x)["params"]
  expected = helpers.convolve(padded, params["conv"]["kernel"], params["conv"]["bias"])
  actual = layer.clone(deploy=True).apply({"params": params}, x)
  assert relative_error(actual, expected) <= 1e-5


def block(features, groups=1, strides=1, se=None, deploy=False):
  return RepVGGBlock(
    features=features,
    striding=Striding(strides, 1, 1),
    groups=groups,
    se=se,
    se_reduction=16,
    act="relu",
    axis_name=None,
    deploy=deploy,
    **F64,
  )


def golden_block(case, deploy=False):
  """The RepVGG block of a golden case and its NHWC input."""
  spec, se = case["spec"], case["spec"]["se"]
  module = block(
    spec["out_channels"],
    groups=spec["groups"],
    strides=spec["stride"],
    se="pre" if se else None,
    deploy=deploy,
  )
  assert se is None or se == {"where": "before ReLU", "reduction": 16}
  return module, helpers.golden_input(tuple(case["input"]["shape_nchw"]))


@pytest.mark.usefixtures("x64")
class TestGoldens:
  @pytest.mark.parametrize(
    "name",
    [
      "repvgg_block_fuse",
      "repvgg_block_stride2",
      "repvgg_block_groups4",
      "repvgg_block_se",
    ],
  )
  def test_block(self, name):
    case = helpers.goldens()[name]
    expect = case["expect"]
    module, x = golden_block(case)
    variables = helpers.fill_variables(helpers.init_shapes(module, x))
    assert set(variables["params"]["RepConv_0"]) == {
      {"rbr_dense": "conv3x3", "rbr_1x1": "conv1x1", "rbr_identity": "identity"}[branch]
      for branch in case["spec"]["branches"]
    }
    output = helpers.quick_jit(lambda v: module.apply(v, x, False))(variables)
    helpers.assert_golden(helpers.nchw(output), expect["output"])

    layer = variables["params"]["RepConv_0"], variables["batch_stats"]["RepConv_0"]
    folded = helpers.quick_jit(lambda layer: fold_rep_conv(*layer, EPSILON))(layer)
    kernel = helpers.oihw(folded["conv"]["kernel"])
    helpers.assert_golden(kernel, expect["equivalent_kernel"])
    helpers.assert_golden(folded["conv"]["bias"], expect["equivalent_bias"])
    if "equivalent_kernel_0_0" in expect:
      known = expect["equivalent_kernel_0_0"]
      np.testing.assert_allclose(kernel[0, 0].ravel(), np.ravel(known), rtol=1e-9)

    deploy, _ = golden_block(case, deploy=True)
    params = {"params": {**variables["params"], "RepConv_0": folded}}
    output = helpers.quick_jit(lambda v: deploy.apply(v, x, False))(params)
    helpers.assert_golden(helpers.nchw(output), expect["output"])

  def test_train_step(self):
    case = helpers.goldens()["repvgg_block_train_step"]
    module, x = golden_block(case)
    variables = helpers.fill_variables(helpers.init_shapes(module, x))
    step = helpers.quick_jit(lambda v: module.apply(v, x, True, mutable=["batch_stats"]))
    output, updates = step(variables)
    helpers.assert_golden(helpers.nchw(output), case["expect"]["output"])
    for path, after in helpers.leaves(updates["batch_stats"]).items():
      helpers.assert_golden(after, case["expect"][helpers.official_name(path)])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("kind", "ddof"), [("unbiased", 1), ("biased", 0)])
def test_running_statistics_move_a_tenth_of_the_way_to_the_batch(kind, ddof):
  x, layer = random_input(3, 5, 4, 6), RepConv(6, running_variance=kind, **F64)
  variables = random_variables(layer, x)
  step = helpers.quick_jit(lambda v: layer.apply(v, x, train=True, mutable=["batch_stats"]))
  _, updates = step(variables)
  old, new = (tree["batch_stats"]["identity"]["bn"] for tree in (variables, updates))
  expected = {"mean": x.mean((0, 1, 2)), "var": x.var((0, 1, 2), ddof=ddof)}
  for name, batch in expected.items():
    assert relative_error(new[name], 0.9 * np.asarray(old[name]) + 0.1 * batch) <= 1e-12


def test_evaluation_reads_running_statistics_and_training_the_batch():
  x, layer = random_input(3, 4, 4, 2).astype("float32"), RepConv(2, ("conv1x1",))
  variables = random_variables(layer, x)
  step = helpers.quick_jit(lambda v: layer.apply(v, x, train=True, mutable=["batch_stats"]))
  y, _ = step(variables)
  bn = variables["params"]["conv1x1"]["bn"]
  # Over the batch: mean is the norm's bias, standard deviation its scale.
  np.testing.assert_allclose(y.mean((0, 1, 2)), bn["bias"], atol=1e-5)
  np.testing.assert_allclose(y.std((0, 1, 2)), bn["scale"], rtol=1e-3)
  assert not np.allclose(layer.apply(variables, x).mean((0, 1, 2)), bn["bias"], atol=1e-2)


class TestDtypes:
  def test_bfloat16_computation_keeps_parameters_and_statistics_in_float32(self):
    x, layer = jnp.ones((2, 4, 4, 4)), RepConv(4, dtype=jnp.bfloat16)
    variables = helpers.init_shapes(layer, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    train = jax.eval_shape(
      lambda v, x: layer.apply(v, x, train=True, mutable=["batch_stats"]), variables, x
    )
    assert train[0].dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(train[1])} == {jnp.dtype(jnp.float32)}

  @pytest.mark.parametrize("deploy", [False, True])
  @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
  def test_the_output_has_the_dtype_asked_for(self, dtype, deploy):
    x, layer = jnp.ones((2, 4, 4, 4)), RepConv(4, deploy=deploy, dtype=dtype)
    assert jax.eval_shape(layer.apply, helpers.init_shapes(layer, x), x).dtype == dtype

  def test_bfloat16_parameters_fold_to_bfloat16(self):
    layer = RepConv(4, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = helpers.init_shapes(layer, jnp.ones((1, 4, 4, 4)))
    folded = jax.eval_shape(
      lambda v: fold_rep_conv(v["params"], v["batch_stats"], EPSILON), variables
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}

  def test_forms_agree_to_bfloat16_precision_when_computed_in_it(self):
    x, layer = random_input(2, 6, 6, 8).astype("float32"), RepConv(8, dtype=jnp.bfloat16)
    variables = random_variables(layer, x)

    def outputs(variables):
      folded = fold_rep_conv(variables["params"], variables["batch_stats"], EPSILON)
      return layer.clone(deploy=True).apply({"params": folded}, x), layer.apply(variables, x)

    # Each form rounds its kernels and its result to 8 bits.
    assert relative_error(*helpers.quick_jit(outputs)(variables)) <= 4 * 2**-8


class TestRefusals:
  @staticmethod
  def init(channels=4, **attributes):
    layer = RepConv(**{"features": 4} | attributes)
    jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 6, 6, channels)))

  @pytest.mark.parametrize(
    "name",
    [
      "conv3",
      "conv0x3",
      "conv3x3x3",
      "3x3",
      "Conv3x3",
      "identity_",
      "identity3x3",
      "conv3x3_a",
      "avg2x2_conv3x3",
      "avg3x3_conv1x1",
      "avg3x3_d2",
      "conv3x3_d0",
      "conv3x3_d1",
      "conv3x3_conv1x1",
      "conv1x1_identity",
      "conv1x1_dirac3x3",
      "dirac3x3_d2",
      "conv1x1_conv1x1_conv3x3",
      "conv3x3_1_relu",
      "conv3x3_relu_d2",
      "conv10000x1",
      "conv3x3_d10000",
      "",
    ],
  )
  def test_an_unknown_branch_is_named(self, name):
    with pytest.raises(ValueError, match=rf"unknown branch '{name}'"):
      self.init(branches=("conv3x3", name))

  def test_a_number_of_thousands_of_digits_is_no_branch(self):
    with pytest.raises(ValueError, match="unknown branch 'conv9999"):
      self.init(branches=("conv3x3", f"conv{'9' * 5000}x1"))

  def test_one_name_in_place_of_several_is_answered_with_the_tuple(self):
    with pytest.raises(ValueError, match=r"Pass \('conv3x3',\)"):
      self.init(branches=("conv3x3",), conv_bias="conv3x3")

  def test_a_layer_that_stands_alone_is_named_without_a_path(self):
    with pytest.raises(ValueError, match=r"^RepConv: branch names must differ"):
      self.init(branches=("conv3x3", "conv3x3"))

  @pytest.mark.parametrize("branches", [(), ("identity",)])
  def test_a_layer_needs_a_convolution(self, branches):
    with pytest.raises(ValueError, match="at least one convolution"):
      self.init(branches=branches)

  def test_branches_must_differ(self):
    with pytest.raises(ValueError, match="branch names must differ"):
      self.init(branches=("conv3x3", "conv3x3"))

  @pytest.mark.parametrize("branches", [("conv3x3", "conv2x2"), ("conv3x3", "conv3x2")])
  def test_odd_and_even_sizes_have_no_common_centre(self, branches):
    with pytest.raises(ValueError, match=f"{branches[1]} has no centre in the layer's 3x3 kernel"):
      self.init(branches=branches)

  @pytest.mark.parametrize(("channels", "features"), [(6, 8), (8, 6)])
  def test_channels_must_divide_into_groups(self, channels, features):
    with pytest.raises(ValueError, match=f"{channels} input and {features} output .* 4 groups"):
      self.init(channels, features=features, groups=4, branches=TWO)

  @pytest.mark.parametrize(
    "attributes",
    [{"strides": 2}, {"strides": (1, 2)}, {"features": 8}, {"branches": ("conv2x2", "identity")}],
    ids=str,
  )
  def test_an_identity_needs_equal_shapes_and_a_centre(self, attributes):
    with pytest.raises(ValueError, match="an identity branch needs stride 1"):
      self.init(**attributes)

  @pytest.mark.parametrize(
    "attributes",
    [
      {"strides": 1},
      {"strides": (2, 1)},
      {"dilation": 2},
      {"padding": 0},
      {"padding_mode": "edge"},
      {"branches": ("conv5x5", "avg2x2_conv1x1")},
      {"branches": ("avg2x2_conv1x1",)},
    ],
    ids=str,
  )
  def test_a_pooled_branch_lies_in_a_3x3_at_stride_2(self, attributes):
    with pytest.raises(ValueError, match=r"avg2x2_conv1x1 lies beside a 3x3 .* Use conv1x1"):
      self.init(**{"branches": POOLED, "strides": 2} | attributes)

  def test_an_unknown_padding_mode_is_named(self):
    with pytest.raises(ValueError, match="padding_mode 'zeros' is none of"):
      self.init(padding_mode="zeros")

  def test_deploy_form_cannot_train(self):
    layer, x = RepConv(4, deploy=True), jnp.ones((1, 4, 4, 4))
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      jax.eval_shape(lambda v: layer.apply(v, x, train=True), helpers.init_shapes(layer, x))

  def test_trees_of_different_branches_do_not_belong_together(self):
    variables = helpers.init_shapes(RepConv(4), jnp.ones((1, 4, 4, 4)))
    stats = {name: variables["batch_stats"][name] for name in TWO}
    with pytest.raises(ValueError, match="the two trees do not belong together"):
      fold_rep_conv(variables["params"], stats, EPSILON)


def test_branches_and_their_parameters_have_their_names():
  params = helpers.init_shapes(RepConv(8, THREE, groups=2), jnp.ones((1, 5, 5, 8)))["params"]
  assert helpers.shapes(helpers.leaves(params)) == {
    "conv3x3/conv/kernel": ((3, 3, 4, 8), jnp.float32),
    "conv3x3/bn/scale": ((8,), jnp.float32),
    "conv3x3/bn/bias": ((8,), jnp.float32),
    "conv1x1/conv/kernel": ((1, 1, 4, 8), jnp.float32),
    "conv1x1/bn/scale": ((8,), jnp.float32),
    "conv1x1/bn/bias": ((8,), jnp.float32),
    "identity/bn/scale": ((8,), jnp.float32),
    "identity/bn/bias": ((8,), jnp.float32),
  }


def test_fresh_kernels_and_biases_are_uniform_within_one_over_the_root_of_fan_in():
  layer = RepConv(64, ("conv3x3",), groups=2, deploy=True)
  variables = helpers.quick_jit(layer.init)(jax.random.key(0), jnp.ones((1, 3, 3, 32)))
  held = jax.tree.map(np.asarray, variables["params"]["conv"])
  bound = 1 / np.sqrt(3 * 3 * 16)
  assert 0.99 * bound < np.abs(held["kernel"]).max() <= bound
  assert abs(np.std(held["kernel"]) / bound - 1 / np.sqrt(3)) < 0.02
  assert 0.8 * bound < np.abs(held["bias"]).max() <= bound
