"""Every branch of the grammar against its definition in NumPy, in training and in deploy form."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

import repjax
from repjax.errors import InputError
from repjax.layers import RepConv, recognize_rep_conv
from repjax.layers.branches import branch_parts, merge_branches
from repjax.layers.composition import convolutions
from repjax.layers.grammar import branch_order, layer_size, parse
from tests import helpers
from tests.helpers import F64, halves, random_input, random_variables, relative_error
from tests.layers import plain_branches

QAREP = ("conv3x3", "conv1x1", "skip")
BORDERED = ("conv3x3", "conv1x1_conv3x3", "conv1x1_avg3x3")
DEPTHWISE = ("conv5x5", "conv3x3_d2", "conv1x1_conv3x3", "avg3x3", "conv1x1", "identity", "skip")


def errors(x, **attributes):
  """Returns the relative errors of the training form and of the deploy form."""
  layer = RepConv(**attributes, **F64)
  variables = random_variables(layer, x)
  variables["batch_stats"].pop("epsilon", None)  # the random trees have their own

  @helpers.quick_jit
  def outputs(variables):
    params = repjax.reparameterize(*halves(variables), epsilon=attributes.get("epsilon", 1e-5))
    deploy = layer.clone(deploy=True)
    return layer.apply(variables, x), deploy.apply({"params": params}, x), params

  trained, deployed, params = outputs(variables)
  wanted = helpers.init_shapes(layer.clone(deploy=True), x)["params"]
  assert helpers.shapes(params) == helpers.shapes(wanted)
  size = layer_size(map(parse, attributes["branches"]))
  own = {name: value for name, value in attributes.items() if name != "features"}
  expected = plain_branches.layer(x, jax.tree.map(np.asarray, variables), size, **own)
  return relative_error(trained, expected), relative_error(deployed, expected)


@pytest.mark.usefixtures("x64")
class TestDefinition:
  @pytest.mark.parametrize(
    "branches",
    [
      BORDERED,
      ("conv1x1_conv3x3",),
      ("conv1x1_avg3x3", "conv1x1"),
      ("conv3x3", "avg3x3", "avg1x3", "avg5x5"),
      ("conv3x3", "skip"),
      ("conv7x7", "conv3x3_d2", "conv3x3_d3", "conv5x5"),
      ("conv3x3_d2", "conv1x1_conv3x3_d2"),
      ("conv2x2", "avg4x4", "conv1x1_conv2x2", "conv1x1_avg2x2"),
      ("conv3x3", *(f"{name}_1" for name in ("conv3x3", "conv1x1_conv3x3", "avg3x3", "skip"))),
    ],
    ids=" ".join,
  )
  @pytest.mark.parametrize("groups", helpers.spread([1, 2, 4], [2]))
  def test_for_branches_and_groups(self, branches, groups):
    x = random_input(2, 7, 6, 4)
    assert max(errors(x, features=4, branches=branches, groups=groups)) <= 1e-12

  @pytest.mark.parametrize("size", [(8, 6), (7, 9), (1, 1)], ids=str)
  @pytest.mark.parametrize("strides", [1, 2, (1, 2)], ids=str)
  def test_for_strides_on_odd_even_and_oblong_maps(self, size, strides):
    x = random_input(2, *size, 4)
    how = {"branches": BORDERED, "strides": strides, "groups": 2}
    assert max(errors(x, features=6, **how)) <= 1e-12

  @pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
  @pytest.mark.parametrize("padding", [None, (0, 2)], ids=str)
  def test_for_padding_modes(self, mode, padding):
    x = random_input(2, 7, 6, 4)
    how = {"branches": ("conv5x3", *DEPTHWISE), "padding_mode": mode, "padding": padding}
    assert max(errors(x, features=4, **how)) <= 1e-12

  @pytest.mark.parametrize("branches", [BORDERED, DEPTHWISE], ids=" ".join)
  @pytest.mark.parametrize("padding", [0, 1, 3, (0, 2)], ids=str)
  @pytest.mark.parametrize("dilation", [1, (1, 2)], ids=str)
  def test_for_paddings_and_dilations(self, branches, padding, dilation):
    x = random_input(1, 9, 10, 4)
    how = {"padding": padding, "dilation": dilation, "groups": 4}
    assert max(errors(x, features=4, branches=branches, **how)) <= 1e-12

  @pytest.mark.parametrize(
    "how",
    [
      {"branches": QAREP, "norm": ("conv3x3", "after_sum")},
      {"branches": QAREP, "norm": ("after_sum",)},
      {"branches": QAREP, "norm": ("conv3x3", "after_sum"), "conv_bias": ("conv1x1",), "groups": 4},
      {"branches": QAREP, "norm": ("conv3x3",), "conv_bias": True},
      {"branches": ("conv3x3",), "norm": "after_sum", "strides": 2},
      {"branches": BORDERED, "norm": ("after_sum",), "conv_bias": True},
      {"branches": DEPTHWISE, "norm": ("avg3x3", "identity", "after_sum"), "groups": 4},
      {"branches": ("conv3x3", "conv1x1_avg3x3"), "norm": ("conv3x3",)},
    ],
    ids=str,
  )
  def test_for_norms_in_other_places(self, how):
    assert max(errors(random_input(2, 6, 5, 4), features=4, **how)) <= 1e-12

  def test_a_pool_at_stride_2_beside_two_steps(self):
    branches = (*BORDERED, "avg2x2_conv1x1", "avg3x3")
    x = random_input(2, 7, 8, 4)
    for norms in (None, ("avg3x3", "after_sum")):
      how = {"branches": branches, "strides": 2, "norm": norms}
      assert max(errors(x, features=4, **how)) <= 1e-12

  @pytest.mark.parametrize("features", [3, 4, 6])
  @pytest.mark.parametrize("strides", [1, 2])
  def test_dirac(self, features, strides):
    how = {"branches": ("dirac3x3", "conv5x5"), "strides": strides, "conv_bias": True}
    for norms in (None, ("conv5x5", "after_sum")):
      x = random_input(2, 6, 7, 4)
      assert max(errors(x, features=features, norm=norms, dilation=(2, 1), **how)) <= 1e-12

  def test_one_channel(self):
    branches = ("conv3x3", "conv1x1_conv3x3", "conv1x1_avg3x3", "avg3x3", "skip")
    assert max(errors(random_input(2, 5, 6, 1), features=1, branches=branches)) <= 1e-12


NAMES = ("conv3x3", "conv1x1", "conv1x3", "conv5x5", "conv3x3_d2", "conv1x1_conv3x3")
MORE = ("conv1x1_avg3x3", "conv1x1_conv3x3_d2", "avg3x3", "identity", "skip")


@st.composite
def layers(draw):
  """Draws the attributes of a layer and the shape of a map."""
  groups = draw(st.sampled_from([1, 2, 4]))
  kept = draw(st.booleans())  # the numbers of channels in and out are the same
  strides = draw(st.tuples(*[st.integers(1, 3)] * 2))
  names = [*NAMES, "conv1x1_avg3x3", "conv1x1_conv3x3_d2"]
  names += ["avg3x3"] * kept + ["identity", "skip"] * (kept and strides == (1, 1))
  branches = draw(st.lists(st.sampled_from(names), min_size=1, max_size=4, unique=True))
  branches = [draw(st.sampled_from(NAMES)), *branches]
  branches = list(dict.fromkeys(branches))
  must = [name for name in branches if name in ("avg3x3", "identity")]
  free = [name for name in branches if name not in (*must, "skip")]
  norms = draw(
    st.none() | st.sets(st.sampled_from(free[1:] or free)).map(lambda few: [*few, *must])
  )
  after = (
    [] if norms is None or set(free) <= set(norms) else draw(st.sampled_from([[], ["after_sum"]]))
  )
  norms = None if norms is None else [*norms, *after] or ["after_sum"]
  attributes = {
    "features": 4 if kept else 8,
    "branches": branches,
    "groups": groups,
    "strides": strides,
    "dilation": draw(st.tuples(*[st.integers(1, 2)] * 2)),
    "padding": draw(st.none() | st.tuples(*[st.integers(0, 5)] * 2)),
    "padding_mode": draw(st.sampled_from(["constant", "edge"])),
    "conv_bias": draw(st.booleans() | st.just(branches[:1]).filter(lambda b: b[0] in free)),
    "norm": norms,
    "epsilon": draw(st.sampled_from([1e-5, 1e-2])),
  }
  return attributes, draw(st.tuples(st.integers(11, 14), st.integers(11, 14)))


@pytest.mark.usefixtures("x64")
@settings(max_examples=25, deadline=None, derandomize=True)
@given(layers())
def test_any_layer_is_its_definition(drawn):
  attributes, size = drawn
  assert max(errors(random_input(1, *size, 4), **attributes)) <= 1e-12


@pytest.mark.usefixtures("x64")
class TestTraining:
  @pytest.mark.parametrize("how", [{"groups": 4}, {"groups": 2, "dilation": 2}], ids=str)
  def test_the_fold_has_the_gradients_of_the_training_form(self, how):
    branches = (*DEPTHWISE, "conv1x1_avg3x3", "conv1x1_conv3x3_d2")
    x, layer = random_input(2, 5, 4, 4), RepConv(4, branches, **how, **F64)
    variables = random_variables(layer, x)
    weights = random_input(2, 5, 4, 4, seed=3)

    def loss(params, x, folded):
      if folded:
        params = repjax.reparameterize(params, variables["batch_stats"])
        return (layer.clone(deploy=True).apply({"params": params}, x) * weights).sum()
      return (layer.apply({**variables, "params": params}, x) * weights).sum()

    def gradients(form):
      grad = jax.grad(lambda params, x: loss(params, x, form), argnums=(0, 1))
      params, inputs = helpers.quick_jit(grad)(variables["params"], x)
      return helpers.leaves({"params": params, "x": inputs})

    one, other = gradients(False), gradients(True)
    for path in one:
      assert relative_error(one[path], other[path]) <= 1e-11, path

  def test_statistics_are_of_the_map_without_its_border(self):
    x, layer = 3 + random_input(2, 5, 4, 4), RepConv(4, ("conv1x1_conv3x3",), **F64)
    variables = random_variables(layer, x)
    _, updates = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    kernel = variables["params"]["conv1x1_conv3x3"]["first"]["conv"]["kernel"]
    expected = helpers.convolve(x, kernel).mean((0, 1, 2))
    old, new = (
      tree["batch_stats"]["conv1x1_conv3x3"]["first"]["bn"]["mean"] for tree in (variables, updates)
    )
    assert relative_error(new - 0.9 * old, 0.1 * expected) <= 1e-12

  def test_a_norm_after_the_sum_has_the_statistics_of_the_sum(self):
    x, layer = random_input(3, 5, 4, 4), RepConv(4, QAREP, norm=("after_sum",), **F64)
    variables = random_variables(layer, x)
    y, _ = layer.apply(variables, x, train=True, mutable=["batch_stats"])
    assert relative_error(y.mean((0, 1, 2)), variables["params"]["bn"]["bias"]) <= 1e-12
    assert sorted(variables["params"]) == ["bn", "conv1x1", "conv3x3"]
    assert sorted(variables["batch_stats"]) == ["bn", "skip"]

  def test_relu_is_applied_at_the_end_of_the_branch(self):
    x = random_input(2, 5, 4, 4)
    plain = RepConv(4, ("conv3x3", "conv1x1"), **F64)
    variables = random_variables(plain, x)
    renamed = {
      collection: {f"{name}_relu": below for name, below in tree.items()}
      for collection, tree in variables.items()
    }
    y = RepConv(4, ("conv3x3_relu", "conv1x1_relu"), **F64).apply(renamed, x)
    size, how = (3, 3), {}
    expected = sum(
      np.maximum(
        plain_branches.branch(
          name, x, variables["params"][name], variables["batch_stats"][name], how, size
        ),
        0,
      )
      for name in ("conv3x3", "conv1x1")
    )
    assert relative_error(y, expected) <= 1e-12
    with pytest.raises(InputError, match=r"^the tree: conv\dx\d_relu has a ReLU .* no affine"):
      repjax.reparameterize(*halves(renamed))


class Block(nn.Module):
  """The body of a scan."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train):
    branches, norms = (*BORDERED, "skip"), ("conv1x1_avg3x3", "after_sum")
    return jnp.tanh(RepConv(4, branches, norm=norms, deploy=self.deploy, **F64)(x, train)), None


class Lifted(nn.Module):
  """Layers in a scan, under remat, and under vmap."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    axes = {"variable_axes": {"params": 0, "batch_stats": 0}, "split_rngs": {"params": True}}
    stacked = nn.scan(nn.remat(Block, static_argnums=(2,)), in_axes=nn.broadcast, length=3, **axes)
    x = stacked(self.deploy)(x, train)[0]
    each = nn.vmap(RepConv, in_axes=(0, None), **axes)
    return each(4, BORDERED, deploy=self.deploy, **F64)(x[:, None], train)


@pytest.mark.usefixtures("x64")
def test_lifted_layers_compute_and_train_the_same():
  x = random_input(2, 5, 4, 4)
  assert helpers.forms_differ_by(Lifted(), x) <= 1e-12
  variables = random_variables(Lifted(), x)
  train = helpers.quick_jit(lambda v: Lifted().apply(v, x, True, mutable=["batch_stats"]))
  _, updates = train(variables)
  assert jax.tree.structure(updates["batch_stats"]) == jax.tree.structure(variables["batch_stats"])


class TestTree:
  X = jnp.ones((1, 6, 6, 4))

  @pytest.mark.parametrize(
    "how",
    [
      {"branches": BORDERED},
      {"branches": QAREP, "norm": ("conv3x3", "after_sum")},
      {"branches": ("conv1x1_conv3x3", "conv1x1_avg3x3", "skip"), "norm": ("after_sum",)},
      {"branches": DEPTHWISE, "conv_bias": ("conv5x5", "conv1x1_conv3x3"), "groups": 4},
      {"branches": ("avg2x2_conv1x1", "conv3x3", "avg3x3"), "strides": 2},
      {"deploy": True},
    ],
    ids=str,
  )
  def test_convolutions_are_what_init_makes(self, how):
    layer = RepConv(4, **how)
    variables = helpers.init_shapes(layer, self.X)
    convs = convolutions(layer, 4)
    leaves = helpers.leaves(variables["params"])
    found = {
      tuple(path.split("/")): leaf.shape
      for path, leaf in leaves.items()
      if path.split("/")[-2] == "conv"
    }
    expected = {
      (*path, "kernel"): (*conv.size, conv.inputs // conv.groups, conv.features)
      for path, conv in convs.items()
    }
    expected |= {(*p, "bias"): (conv.features,) for p, conv in convs.items() if conv.use_bias}
    assert found == expected
    assert (recognize_rep_conv(variables["params"]) is None) == layer.deploy

  @pytest.mark.parametrize(
    "params",
    [
      {"conv3x3": {"conv": {}, "bn": {}}, "bn": {}},
      {"conv3x3": {"conv": {}}, "bn": {}, "gate": {}},
      {"conv1x1_conv3x3": {"conv": {}, "bn": {}}},
      {"conv3x3": {"first": {"conv": {}, "bn": {}}}},
      {"conv1x1_conv3x3": {"first": {"conv1x1": {}}}},
      {"avg3x3": {"bn": {}}, "bn": {}},
      {"skip": {"conv": {}}},
    ],
    ids=str,
  )
  def test_other_scopes_are_no_layer(self, params):
    assert recognize_rep_conv(params) is None

  @pytest.mark.parametrize(
    ("params", "words"),
    [
      ({"conv3x3": {"conv": {}, "bn": {}}, "bn": {}}, "one more norm, bn"),
      ({"conv3x3": {"conv": {}, "bn": {}}, "bn": {}, "gate": {}}, "beside gate"),
      ({"conv3x3": {"conv": {}, "bn": {}}, "conv1x1": {"gate": {}}}, "beside conv1x1"),
    ],
    ids=str,
  )
  def test_a_scope_with_two_readings_is_refused(self, params, words):
    norm, stats = {"scale": jnp.ones(4), "bias": jnp.ones(4)}, {"mean": jnp.zeros(4)}
    params = jax.tree.map(lambda _: None, {"block": params}, is_leaf=lambda x: x == {})
    filled = jax.tree_util.tree_map_with_path(
      lambda path, _: norm if path[-1].key == "bn" else {"kernel": jnp.ones((3, 3, 4, 4))},
      params,
      is_leaf=lambda x: x is None,
    )
    with pytest.raises(ValueError, match=words):
      repjax.reparameterize(filled, {"block": {"conv3x3": {"bn": stats}}})

  def test_parts_add_up_to_the_whole(self):
    layer = RepConv(4, DEPTHWISE, groups=4, norm=("avg3x3", "identity", "after_sum"))
    variables = random_variables(layer, np.ones((1, 6, 6, 4), np.float32))
    parts = branch_parts(*halves(variables), 1e-5)
    whole = merge_branches(*halves(variables), 1e-5)
    assert parts.branches.keys() == set(DEPTHWISE)
    assert relative_error(sum(part.kernel for part in parts.branches.values()), whole.kernel) < 1e-5
    biases = sum(part.bias for part in parts.branches.values())
    assert relative_error(biases + parts.shift, whole.bias) < 1e-5

  def test_bfloat16_leaves_fold_to_bfloat16(self):
    how = {"branches": DEPTHWISE, "norm": ("avg3x3", "identity", "after_sum"), "groups": 4}
    layer = RepConv(4, **how, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    variables = helpers.init_shapes(layer, self.X)
    folded = jax.eval_shape(repjax.reparameterize, *halves(variables))
    assert {leaf.dtype for leaf in jax.tree.leaves(folded)} == {jnp.dtype(jnp.bfloat16)}
    train = jax.eval_shape(
      lambda v: layer.apply(v, self.X, train=True, mutable=["batch_stats"])[0], variables
    )
    assert train.dtype == jnp.bfloat16


class TestRefusals:
  @staticmethod
  def refuses(channels=4, **attributes):
    layer = RepConv(**{"features": 4} | attributes)
    with pytest.raises(InputError) as told:
      jax.eval_shape(layer.init, jax.random.key(0), jnp.ones((1, 6, 6, channels)))
    helpers.assert_one_paragraph(told.value)
    return str(told.value)

  @pytest.mark.parametrize(
    ("attributes", "words"),
    [
      ({"branches": ("conv3x3", "avg3x3"), "features": 8}, "avg3x3 .* conv1x1_avg3x3"),
      ({"branches": ("conv3x3", "avg2x2")}, "avg2x2 has no centre"),
      ({"branches": ("conv3x3", "conv1x1_conv2x2")}, "conv1x1_conv2x2 has no centre"),
      ({"branches": ("conv4x4", "conv2x2_d2")}, "conv2x2_d2 has no centre"),
      ({"branches": ("dirac3x3",), "groups": 2}, "dirac3x3 needs one group"),
      ({"branches": ("dirac2x2",)}, "dirac2x2 needs one group and an odd"),
      ({"branches": QAREP, "strides": 2}, "a skip branch needs stride 1"),
      ({"branches": ("avg3x3", "skip")}, "at least one convolution"),
      ({"branches": ("conv3x3_relu",), "deploy": True}, "conv3x3_relu .* no deploy form"),
      ({"norm": ("conv3x3", "conv5x5")}, "norm takes a tuple of names.*'conv5x5'"),
      ({"norm": "conv5x5"}, "norm takes a tuple of names.*'conv5x5'"),
      ({"norm": True}, "norm takes a tuple of names"),
      ({"conv_bias": None}, "conv_bias takes a tuple of names"),
      ({"conv_bias": ("after_sum",)}, "conv_bias takes a tuple of names"),
      ({"branches": QAREP, "norm": ("skip", "after_sum")}, "skip has no norm"),
      ({"norm": ("conv3x3", "after_sum")}, "identity holds nothing but a norm"),
      ({"norm": ("conv3x3", "conv1x1", "identity", "after_sum")}, "at least one convolution goes"),
      ({"branches": QAREP, "norm": ()}, "no norm at all"),
      ({"branches": 3}, "branches takes a tuple of names .*got 3"),
      ({"branches": None}, "branches takes a tuple of names .*got None"),
      ({"branches": "conv3x3"}, r"branches takes several names.*\('conv3x3',\)"),
      ({"conv_bias": None}, "conv_bias takes a tuple of names.* got None"),
      ({"groups": 0}, "groups takes a whole number of at least 1, got 0"),
      ({"features": 4.0}, r"features takes a whole number .* got 4\.0"),
      ({"strides": 0}, r"strides takes .* or two for \(vertical, horizontal\), got 0"),
      ({"dilation": (1,)}, r"dilation takes .* got \(1,\)"),
      ({"padding": 1.5}, r"padding takes a whole number, .* got 1\.5"),
      ({"padding": (0, -1), "padding_mode": "edge"}, r"padding takes .* at least 0"),
    ],
    ids=str,
  )
  def test_what_cannot_be_is_named(self, attributes, words):
    assert re.search(words, self.refuses(**attributes))

  @pytest.mark.parametrize(
    ("attributes", "shape"),
    [
      ({"padding": -2}, (1, 6, 6, 4)),
      ({"padding": (1, -2)}, (1, 9, 6, 4)),
      ({"padding": 0, "branches": ("conv5x5", "conv1x1")}, (2, 4, 9, 4)),
      ({"padding": -1, "dilation": 2}, (1, 6, 6, 4)),
      ({"padding": 0, "padding_mode": "edge"}, (1, 2, 2, 4)),
    ],
    ids=str,
  )
  def test_a_map_on_which_the_kernel_finds_no_place_is_refused(self, attributes, shape):
    for deploy in (False, True):
      layer = RepConv(4, deploy=deploy, **{"branches": ("conv3x3", "conv1x1"), **attributes})
      with pytest.raises(InputError, match=r"the kernel covers \d pixels, but the map") as told:
        helpers.init_shapes(layer, jnp.ones(shape))
      helpers.assert_one_paragraph(told.value)
      helpers.init_shapes(layer, jnp.ones((1, 11, 11, 4)))

  def test_an_input_that_is_no_map_is_refused(self):
    with pytest.raises(InputError, match=r"must be \(N, H, W, C\)"):
      helpers.init_shapes(RepConv(4), jnp.ones((2, 4)))

  @pytest.mark.parametrize(
    ("made", "used"), [("conv3x3 skip", "conv3x3"), ("conv3x3", "conv3x3 skip")]
  )
  def test_statistics_of_different_skips_are_refused(self, made, used):
    x = jnp.ones((1, 6, 6, 4))
    variables = helpers.init_shapes(RepConv(4, tuple(made.split())), x)
    with pytest.raises(InputError, match=r"has the skips \[.*\], but its statistics") as told:
      jax.eval_shape(RepConv(4, tuple(used.split())).apply, variables, x)
    helpers.assert_one_paragraph(told.value)

  def test_numbers_of_numpy_are_numbers(self):
    numbers: dict[str, Any] = {"strides": np.int64(2), "padding": (np.int64(1), 1)}
    layer = RepConv(4, ("conv3x3",), **numbers)
    x = jnp.ones((1, 6, 6, 4))
    y, _ = jax.eval_shape(layer.init_with_output, jax.random.key(0), x)
    assert y.shape == (1, 3, 3, 4)

  @pytest.mark.parametrize(
    ("params", "words"),
    [
      ({"conv1x1_conv3x3": {"first": {"conv": {}, "bn": {}}}}, "conv1x1_conv3x3/second holds"),
      ({"conv1x1_avg3x3": {"first": {"conv": {}}, "second": {"bn": {}}}}, "/first holds"),
      ({"dirac3x3": {"conv": {"kernel": 0}, "bn": {}}}, "dirac3x3/conv holds"),
      ({"conv3x3": {"conv": {"gain": 0, "diagonal": 0}, "bn": {}}}, "conv3x3/conv holds"),
      ({"conv3x3": {"conv": {}}, "identity": {"conv": {}, "bn": {}}}, "identity holds"),
    ],
    ids=str,
  )
  def test_a_tree_that_its_names_do_not_tell_is_refused(self, params, words):
    def norms(tree):
      found = {name: norms(below) for name, below in tree.items() if name not in ("conv", "bn")}
      return {name: below for name, below in found.items() if below} | (
        {"bn": {}} if "bn" in tree else {}
      )

    with pytest.raises(ValueError, match=words):
      merge_branches(params, norms(params), 1e-5)


@pytest.mark.parametrize(
  ("name", "kind", "span", "two_steps"),
  [
    ("conv3x3", "conv", (3, 3), False),
    ("conv1x3_2", "conv", (1, 3), False),
    ("conv11x7", "conv", (11, 7), False),
    ("conv3x5_d2_1", "conv", (5, 9), False),
    ("identity_1", "identity", (1, 1), False),
    ("skip_1", "skip", (1, 1), False),
    ("avg2x2_conv1x1_1", "avg2x2_conv1x1", (2, 2), False),
    ("avg2x2_1", "avg", (2, 2), False),
    ("conv1x1_1", "conv", (1, 1), False),
    ("dirac3x3", "dirac", (3, 3), False),
    ("conv1x1_avg3x3", "avg", (3, 3), True),
    ("conv1x1_conv3x3_d3_1", "conv", (7, 7), True),
  ],
)
def test_a_name_says_what_a_branch_is(name, kind, span, two_steps):
  branch = parse(name)
  assert (branch.kind, branch.span, branch.two_steps, branch.relu) == (kind, span, two_steps, False)
  plain = name.removesuffix("_1").removesuffix("_2")
  assert parse(f"{plain}_relu_1") == branch._replace(name=f"{plain}_relu_1", relu=True)


def test_branches_come_in_the_order_in_which_people_name_them():
  names = ["skip", "identity", "conv1x1", "conv1x3", "conv3x3_1", "conv10x10", "conv3x3"]
  assert branch_order([*names, "conv1x1_avg3x3", "conv3x3_d2"]) == [
    *("conv10x10", "conv3x3_d2", "conv3x3", "conv3x3_1", "conv1x1_avg3x3", "conv1x3", "conv1x1"),
    *("identity", "skip"),
  ]
