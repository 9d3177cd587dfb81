"""Layers are recognised by what they hold, and trees say what a fold needs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import repjax
from repjax.errors import InputError
from repjax.layers import (
  AuxHead,
  ConvFFN,
  GlobalPerceptron,
  RepAttention,
  RepConv,
  RepDense,
  RepFFN,
  RepHead,
  RepHeads,
  RepMixer,
  RepNorm,
  ScaledConv,
  SkipConv,
  SkipSqueezeExcite,
)
from tests import helpers
from tests.helpers import F64, halves, quick_jit, random_input, random_variables, relative_error

X = random_input(2, 4, 4, 4)
LAYERS = {
  "RepConv": functools.partial(RepConv, 4),
  "RepDense": functools.partial(RepDense, 4, 2),
  "share-sets": functools.partial(RepDense, 4, 2, share_sets=2, local_kernels=(1, 3)),
  "GlobalPerceptron": functools.partial(GlobalPerceptron, 2),
  "RepFFN": RepFFN,
  "RepHead": functools.partial(RepHead, 4),
  "RepNorm": RepNorm,
  "ScaledConv": functools.partial(ScaledConv, 4),
  "SkipSqueezeExcite": SkipSqueezeExcite,
  "RepHeads": functools.partial(RepHeads, 4, 2),
  "RepMixer": RepMixer,
  "ConvFFN": functools.partial(ConvFFN, 2, 3),
  "RepAttention": functools.partial(RepAttention, 2),
  "SkipConv": functools.partial(SkipConv, 3),
}


class Subclass(RepConv):
  """A RepConv under a different class name."""


class Around(nn.Module):
  """A module of somebody that calls `build(deploy)` once or twice, and a layer of its own.

  Attributes:
    build: function of (deploy, name) that builds the layer under test.
    deploy: build the deploy form.
    calls: number of calls of the layer.
  """

  build: Any
  deploy: bool = False
  calls: int = 1

  @nn.compact
  def __call__(self, x, train=False):
    layer = self.build(self.deploy)
    for _ in range(self.calls):
      x = layer(x, train)
    return nn.Dense(3, name="own", **F64)(x)


class InSetup(nn.Module):
  """Layers as attributes, in a list and in a dictionary."""

  deploy: bool = False

  def setup(self):
    shared = {"deploy": self.deploy, **F64}
    self.stem = RepConv(4, **shared)
    self.blocks = [RepConv(4, **shared), RepNorm(**shared)]
    self.heads = {"first": RepConv(4, ("conv1x1",), **shared)}

  def __call__(self, x, train=False):
    x = self.stem(x, train)
    for block in self.blocks:
      x = jnp.tanh(block(x, train))
    return self.heads["first"](x, train)


class Block(nn.Module):
  """The body of a scan."""

  deploy: bool

  @nn.compact
  def __call__(self, x, train):
    shared = {"deploy": self.deploy, **F64}
    return jnp.tanh(RepNorm(name="norm", **shared)(RepConv(4, **shared)(x, train), train)), None


class Scanned(nn.Module):
  """Three blocks with stacked parameters."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    stacked = nn.scan(
      Block,
      variable_axes={"params": 0, "batch_stats": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=3,
    )
    return stacked(self.deploy)(x, train)[0]


class Ensemble(nn.Module):
  """Two layers over two halves of a batch, each half with parameters of its own."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    lifted = nn.vmap(
      RepConv,
      variable_axes={"params": 0, "batch_stats": 0},
      split_rngs={"params": True},
      in_axes=(0, None),
    )
    return lifted(4, deploy=self.deploy, epsilon=1e-2, **F64)(x[:, None], train)


class OrdinaryNames(nn.Module):
  """Layers under the names that parts of other layers have."""

  deploy: bool = False

  def setup(self):
    shared = {"deploy": self.deploy, **F64}
    self.bn = RepNorm(**shared)
    self.expand = RepConv(8, ("conv1x1",), **shared)
    self.project = RepConv(4, ("conv1x1",), **shared)

  def __call__(self, x, train=False):
    return x + self.project(jnp.tanh(self.expand(self.bn(x, train), train)), train)


class NamesOfBranches(nn.Module):
  """Layers and blocks under the names of branches."""

  deploy: bool = False

  def setup(self):
    shared = {"deploy": self.deploy, **F64}
    self.conv3x3 = RepConv(4, **shared)
    self.conv1x1 = RepConv(4, ("conv1x1",), **shared)

  def __call__(self, x, train=False):
    return self.conv1x1(jnp.tanh(self.conv3x3(x, train)), train)


class NamesOfSteps(nn.Module):
  """A block called as a branch, which holds layers called as its convolution and its norm."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    return ConvAndNorm(self.deploy, name="conv3x3")(x, train)


class ConvAndNorm(nn.Module):
  """A convolution and a norm with something between."""

  deploy: bool = False

  def setup(self):
    self.conv = RepConv(4, deploy=self.deploy, **F64)
    self.bn = RepNorm(deploy=self.deploy, **F64)

  def __call__(self, x, train=False):
    return self.bn(jnp.tanh(self.conv(x, train)), train)


WRAPPED = {
  "a name of its own": lambda deploy: RepConv(4, deploy=deploy, name="conv1", **F64),
  "subclass": lambda deploy: Subclass(4, deploy=deploy, **F64),
  "remat": lambda deploy: nn.remat(RepConv, static_argnums=(2,))(4, deploy=deploy, **F64),
  "jit": lambda deploy: nn.jit(RepConv, static_argnums=(2,))(4, deploy=deploy, **F64),
  "scope called conv": lambda deploy: RepConv(4, deploy=deploy, name="conv", **F64),
  "scope called bn": lambda deploy: RepConv(4, deploy=deploy, name="bn", **F64),
}


@pytest.mark.usefixtures("x64")
class TestNames:
  @pytest.mark.parametrize("build", WRAPPED.values(), ids=WRAPPED)
  @pytest.mark.parametrize("calls", [1, 2])
  def test_a_layer_under_any_name(self, build, calls):
    assert helpers.forms_differ_by(Around(build, calls=calls), X) <= 1e-12

  @pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
  @pytest.mark.parametrize("epsilon", [1e-5, 1e-2])
  def test_every_layer_under_any_name_and_with_any_epsilon(self, layer, epsilon):
    model = Around(lambda deploy: layer(deploy=deploy, epsilon=epsilon, name="layer1", **F64))
    assert helpers.forms_differ_by(model, X) <= 1e-12

  @pytest.mark.parametrize("model", [InSetup(), Scanned(), Ensemble()], ids=lambda m: str(type(m)))
  def test_attributes_and_lifted_layers(self, model):
    assert helpers.forms_differ_by(model, X) <= 1e-12

  @pytest.mark.parametrize(
    "block", [OrdinaryNames, NamesOfBranches, NamesOfSteps], ids=lambda m: m.__name__
  )
  def test_names_of_parts_of_layers(self, block):
    around = Around(lambda deploy: block(deploy=deploy, name="block"))
    assert helpers.forms_differ_by(around, X) <= 1e-12
    params = helpers.init_shapes(around.clone(deploy=True), X)["params"]
    assert repjax.reparameterize(params, {}) == params

  @pytest.mark.parametrize(
    "layer",
    [
      functools.partial(RepNorm, epsilon=0.3),
      functools.partial(RepConv, 4, epsilon=0.3),
      functools.partial(RepConv, 4, ("conv3x3", "skip")),
      functools.partial(RepConv, 4, ("conv3x3", "skip"), norm=("after_sum",), epsilon=0.3),
    ],
    ids=str,
  )
  def test_statistics_that_training_makes_have_their_notes(self, layer):
    model = Around(lambda deploy: layer(deploy=deploy, name="layer1", **F64))
    params = random_variables(model, X)["params"]
    _, made = model.apply({"params": params}, X, train=True, mutable=["batch_stats"])
    folded = repjax.reparameterize(params, made["batch_stats"])
    y = model.clone(deploy=True).apply({"params": folded}, X)
    assert relative_error(y, model.apply({"params": params, **made}, X)) <= 1e-12

  def test_in_a_sequential(self):
    forms = [
      nn.Sequential([RepConv(4, deploy=deploy, **F64), nn.relu, RepNorm(deploy=deploy, **F64)])
      for deploy in (False, True)
    ]
    variables = random_variables(forms[0], X)
    params = repjax.reparameterize(*halves(variables))
    folded = forms[1].apply({"params": params}, X)
    assert relative_error(folded, forms[0].apply(variables, X)) <= 1e-12

  @pytest.mark.parametrize("name", ["AuxHead_0", "aux", "AuxHead"])
  def test_an_auxiliary_head_disappears_under_any_name(self, name):
    class Net(nn.Module):
      deploy: bool = False

      @nn.compact
      def __call__(self, x, train=False):
        if not self.deploy:
          AuxHead(3, name=name, **F64)(x, train)
        return RepConv(4, name="conv3", deploy=self.deploy, **F64)(x, train)

    assert helpers.forms_differ_by(Net(), X) <= 1e-12

  def test_a_lone_layer_is_a_tree_too(self):
    variables = random_variables(RepConv(4, epsilon=0.1), X.astype("float32"))
    params = repjax.reparameterize(*halves(variables))
    assert helpers.shapes(params) == helpers.shapes(
      helpers.init_shapes(RepConv(4, deploy=True), X.astype("float32"))["params"]
    )


class TestOthers:
  """Scopes of other people are left alone, whatever they are called."""

  def norm(self):
    return {"scale": jnp.ones(4), "bias": jnp.ones(4)}, {"mean": jnp.zeros(4), "var": jnp.ones(4)}

  @pytest.mark.parametrize("name", ["RepConv_Block", "RepConv_0", "RepNorm", "RepHead_0", "block"])
  @pytest.mark.parametrize("inner", ["conv", "dense", "stem", "identity", "conv3x3"])
  def test_a_scope_with_a_layer_in_it(self, name, inner):
    layer = random_variables(RepConv(4), X.astype("float32"))
    params = {name: {inner: layer["params"], "linear": {"kernel": jnp.ones((4, 4))}}}
    folded = repjax.reparameterize(params, {name: {inner: layer["batch_stats"]}})
    assert folded[name][inner].keys() == {"conv"}
    assert folded[name]["linear"]["kernel"] is params[name]["linear"]["kernel"]

  @pytest.mark.parametrize("scope", ["norm1", "AuxHead_0", "RepConv_1"])
  def test_a_classifier_is_no_auxiliary_head(self, scope):
    conv = random_variables(RepConv(4, ("conv1x1",)), X.astype("float32"))
    head = {"kernel": jnp.ones((4, 2)), "bias": jnp.ones(2)}
    params = {scope: {"RepConv_0": conv["params"], "head": head}}
    folded = repjax.reparameterize(params, {scope: {"RepConv_0": conv["batch_stats"]}})
    assert folded[scope]["head"].keys() == head.keys()

  @pytest.mark.parametrize("name", ["norm1", "RepConv_0"])
  def test_a_norm_that_nobody_marked_has_two_readings(self, name):
    scale, stats = self.norm()
    params, stats = {name: {"bn": scale}}, {name: {"bn": stats}}
    with pytest.raises(
      ValueError, match=rf'{name}.*two ways.*"RepNorm".*keep=\(.{name}/bn'
    ) as told:
      repjax.reparameterize(params, stats)
    helpers.assert_one_paragraph(told.value)
    kept = repjax.reparameterize(params, stats, keep=f"{name}/bn")
    assert kept[name]["bn"].keys() == {"scale", "bias"}
    folds = {**repjax.FOLDS, name: repjax.FOLDS["RepNorm"]}
    assert repjax.reparameterize(params, stats, folds=folds)[name].keys() == {"affine"}

  @pytest.mark.parametrize("layer", [RepFFN(), GlobalPerceptron(2)], ids=lambda m: type(m).__name__)
  def test_a_norm_before_two_layers_has_two_readings(self, layer):
    variables, name = random_variables(layer, X.astype("float32")), type(layer).__name__
    with pytest.raises(ValueError, match=rf"block holds .* two ways.*{name}.*keep=\('block/bn',\)"):
      repjax.reparameterize({"block": variables["params"]}, {"block": variables["batch_stats"]})

  @pytest.mark.parametrize(
    ("layer", "kept"), [("RepHeads", "'head0/bn', 'head1/bn',"), ("SkipConv", "'skip',")]
  )
  def test_a_layer_that_is_the_whole_tree_has_two_readings(self, layer, kept):
    variables = helpers.init_shapes(LAYERS[layer](), jnp.ones((1, 4)) if "Heads" in layer else X)
    found = variables["params"], variables["batch_stats"]
    with pytest.raises(ValueError, match=f"the tree holds .* two ways.*{layer}") as told:
      repjax.reparameterize(*found)
    assert f"keep=({kept})" in str(told.value)
    assert repjax.FOLDS[layer](*helpers.randomise(found), 1e-5).keys() <= {"conv", "dense"}

  def test_a_norm_after_branches_with_norms_has_two_readings(self):
    layer, (scale, stats) = random_variables(RepConv(4), X.astype("float32")), self.norm()
    params = {"block": {**layer["params"], "bn": scale}}
    with pytest.raises(ValueError, match=r"block holds conv1x1, conv3x3.*one more norm, bn"):
      repjax.reparameterize(params, {"block": {**layer["batch_stats"], "bn": stats}})

  def test_branches_beside_something_else_have_two_readings(self):
    layer = random_variables(RepConv(4), X.astype("float32"))
    params = {"gated": {**layer["params"], "gate": {"kernel": jnp.ones((4, 4))}}}
    with pytest.raises(ValueError, match=r"gated holds conv1x1, conv3x3.*beside gate.*subclass"):
      repjax.reparameterize(params, {"gated": layer["batch_stats"]})

  def test_convolutions_in_a_row_are_not_branches(self):
    x = X.astype("float32")
    down = random_variables(RepConv(2, ("conv1x1",)), x)
    up = random_variables(RepConv(4, ("conv3x3",)), x[..., :2])
    params, stats = ({"block": {**down[name], **up[name]}} for name in ("params", "batch_stats"))
    with pytest.raises(ValueError, match=r"^block: .*cannot be summed.*one after the other.*keep"):
      repjax.reparameterize(params, stats)
    assert (
      repjax.reparameterize(params, stats, keep="block")["block"].keys() == params["block"].keys()
    )

  def test_what_is_kept_is_not_folded(self):
    layer = random_variables(RepConv(4), X.astype("float32"))
    params, stats = {"a": layer["params"]}, {"a": layer["batch_stats"]}
    assert repjax.reparameterize(params, stats, keep="a")["a"].keys() == layer["params"].keys()

  @pytest.mark.parametrize("name", ["RepMixer", "ConvFFN"])
  def test_a_layer_that_holds_a_layer_is_kept_whole(self, name):
    layer = random_variables(LAYERS[name](), X.astype("float32"))
    params, stats = {"a": {"b": layer["params"]}}, {"a": {"b": layer["batch_stats"]}}
    for keep in ("a/b", "a", [f"a/b/{part}" for part in stats["a"]["b"]]):
      kept = repjax.reparameterize(params, stats, keep=keep)
      assert jax.tree.map(lambda leaf, own: leaf is own, kept, params) == jax.tree.map(
        lambda _: True, params
      )

  def test_a_part_of_a_layer_is_not_kept_alone(self):
    layer = random_variables(RepMixer(), X.astype("float32"))
    params, stats = {"a": layer["params"]}, {"a": layer["batch_stats"]}
    said = r"a holds a RepMixer.*a/mixer/.* is not kept.*keep=\('a',\)"
    with pytest.raises(ValueError, match=said) as told:
      repjax.reparameterize(params, stats, keep="a/bn")
    helpers.assert_one_paragraph(told.value)
    with pytest.raises(ValueError, match=r"keep=\('bn', 'mixer',?\)|keep=\('mixer', 'bn',?\)"):
      repjax.reparameterize(layer["params"], layer["batch_stats"], keep="bn")

  def test_no_message_advises_to_keep_a_layer(self):
    layer = random_variables(RepConv(4, epsilon=0.1), X.astype("float32"))
    stats = {name: dict(below) for name, below in layer["batch_stats"].items() if name != "epsilon"}
    for broken in ({}, {"conv3x3": stats["conv3x3"]}, {**stats, "conv5x5": stats["conv3x3"]}):
      with pytest.raises(ValueError, match=r"^stem") as told:
        repjax.reparameterize({"stem": layer["params"]}, {"stem": broken})
      assert "keep" not in str(told.value)

  @pytest.mark.parametrize(
    "layer", [RepConv(4), RepNorm(), RepHead(4)], ids=lambda m: type(m).__name__
  )
  def test_statistics_beside_a_deploy_form_are_explained(self, layer):
    layer, x = layer.clone(name="stem"), X.astype("float32")
    variables = helpers.init_shapes(layer, x)
    params = helpers.init_shapes(layer.clone(deploy=True), x)["params"]
    with pytest.raises(ValueError, match=r"^stem: .*in deploy form already") as told:
      repjax.reparameterize({"stem": params}, {"stem": variables["batch_stats"]})
    assert "keep" not in str(told.value)

  @pytest.mark.parametrize(
    "layer", [RepConv(4), RepNorm(), RepHead(4)], ids=lambda m: type(m).__name__
  )
  def test_folds_without_those_of_repjax_are_named(self, layer):
    variables = helpers.init_shapes(layer.clone(name="stem"), X.astype("float32"))
    trees = [{"stem": half} for half in halves(variables)]
    with pytest.raises(InputError, match=r"^stem holds a Rep.*\{\*\*repjax.FOLDS") as told:
      repjax.reparameterize(*trees, folds={"Mine": repjax.FOLDS["RepConv"]})
    helpers.assert_one_paragraph(told.value)
    assert "keep" not in str(told.value)

  @pytest.mark.parametrize("keep", [None, ("norm", 3), [("neck", "norm")]], ids=str)
  def test_keep_takes_paths(self, keep):
    with pytest.raises(InputError, match="keep takes paths") as told:
      repjax.reparameterize({}, {}, keep=keep)
    helpers.assert_one_paragraph(told.value)


@pytest.mark.usefixtures("x64")
class TestEpsilon:
  def test_two_epsilons_in_one_network(self):
    class Net(nn.Module):
      deploy: bool = False

      @nn.compact
      def __call__(self, x, train=False):
        shared = {"deploy": self.deploy, **F64}
        x = jnp.tanh(RepConv(4, epsilon=1e-3, **shared)(1e-2 * x, train))
        return RepConv(4, name="second", **shared)(x, train)

    model, x = Net(), jnp.asarray(X)
    variables = model.init(jax.random.key(0), x)
    assert variables["batch_stats"]["RepConv_0"]["epsilon"] == 1e-3
    assert "epsilon" not in variables["batch_stats"]["second"]
    for _ in range(3):  # statistics of small inputs, where epsilon matters
      _, updates = model.apply(variables, x, train=True, mutable=["batch_stats"])
      variables = {**variables, **updates}
    params = repjax.reparameterize(*halves(variables))
    folded = Net(deploy=True).apply({"params": params}, x)
    assert relative_error(folded, model.apply(variables, x)) <= 1e-12

  @pytest.mark.parametrize("wrong", [-1e-5, np.nan, np.inf, -np.inf])
  def test_a_note_that_is_no_epsilon_is_named(self, wrong):
    variables = random_variables(RepConv(4, epsilon=0.1, **F64), X)
    params, stats = halves(variables)
    for kind in (np.float64, jnp.float64):
      with pytest.raises(InputError, match=r"neck/conv/epsilon must be a finite number") as told:
        repjax.reparameterize(
          {"neck": {"conv": params}}, {"neck": {"conv": {**stats, "epsilon": kind(wrong)}}}
        )
      helpers.assert_one_paragraph(told.value)

  def test_so_are_other_notes_and_those_of_other_people(self):
    skip = random_variables(RepConv(4, ("conv3x3", "skip"), **F64), X)
    stats = {**skip["batch_stats"], "skip": jnp.asarray(jnp.nan)}
    with pytest.raises(InputError, match="conv/skip must be a finite number"):
      repjax.reparameterize({"conv": skip["params"]}, {"conv": stats})
    folds = {**repjax.FOLDS, "Mine": lambda params, stats, epsilon: {}}
    with pytest.raises(InputError, match="Mine/epsilon must be a finite number"):
      repjax.reparameterize({"Mine": {}}, {"Mine": {"epsilon": np.float32(-1)}}, folds=folds)

  def test_under_jit_a_note_is_not_known(self):
    params, stats = halves(random_variables(RepConv(4, epsilon=0.1, **F64), X))
    folded = jax.jit(repjax.reparameterize)(params, {**stats, "epsilon": jnp.asarray(jnp.nan)})
    assert np.isnan(folded["conv"]["bias"]).all()

  def test_a_tree_without_the_note_takes_the_argument(self):
    layer = RepConv(4, epsilon=0.1, **F64)
    variables = random_variables(layer, X)
    params, stats = halves(variables)
    before = {name: below for name, below in stats.items() if name != "epsilon"}
    expected = layer.apply({"params": params, "batch_stats": before}, X)
    folded = [
      RepConv(4, deploy=True, **F64).apply({"params": folded}, X)
      for folded in (
        repjax.reparameterize(params, before, epsilon=0.1),
        repjax.reparameterize(params, stats, epsilon=0.7),
        repjax.reparameterize(params, before),
      )
    ]
    assert relative_error(folded[0], expected) <= 1e-12
    assert relative_error(folded[1], expected) <= 1e-12
    assert relative_error(folded[2], expected) > 1e-3

  def test_a_layer_of_somebody_gets_its_own_epsilon(self):
    class Mine(RepConv):
      pass

    seen = []

    def fold(params, stats, epsilon):
      seen.append(float(epsilon))
      assert "epsilon" not in stats
      return repjax.FOLDS["RepConv"](params, stats, epsilon)

    variables = random_variables(Around(lambda _: Mine(4, epsilon=0.2, **F64)), X)
    repjax.reparameterize(*halves(variables), folds={"Mine": fold})
    assert seen == [0.1]  # of the random tree


class TestMappings:
  def state(self):
    layer = random_variables(RepConv(4), X.astype("float32"))
    params, stats = ({"blocks": {0: layer[name]}} for name in ("params", "batch_stats"))
    return params, stats

  def test_a_state_of_variables(self):
    params, stats = self.state()
    expected = repjax.reparameterize(params, stats)
    variables = [
      nnx.State(jax.tree.map(kind, tree))
      for kind, tree in zip((nnx.Param, nnx.BatchStat), (params, stats))
    ]
    for trees in (variables, [nnx.State(tree) for tree in (params, stats)]):
      folded = repjax.reparameterize(*trees)
      assert type(folded["blocks"][0]["conv"]) is dict
      jax.tree.map(np.testing.assert_array_equal, folded, expected)

  @pytest.mark.parametrize("count", [1, 5])
  def test_an_ensemble_is_told_to_be_mapped(self, count):
    model = repjax.create_model("repvgg_a0", num_classes=2, stage_sizes=(1, 1, 1, 1))
    variables = repjax.init(model, jax.random.key(0), image_size=32)
    several = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), variables)
    with pytest.raises(InputError, match=rf"first axis of {count}.*jax.vmap"):
      repjax.reparameterize(*halves(several))

  def test_axes_that_differ_are_refused(self):
    layer = random_variables(RepConv(4), X.astype("float32"))
    params = jax.tree.map(lambda leaf: leaf[None], layer["params"])
    with pytest.raises(ValueError, match=r"^stem: .*nn.vmap.*variable_axes"):
      repjax.reparameterize({"stem": params, "scale": jnp.ones(3)}, {"stem": layer["batch_stats"]})


@pytest.mark.usefixtures("x64")
def test_it_is_the_same_under_jit():
  model = Scanned()
  variables = random_variables(model, X)
  plain = repjax.reparameterize(*halves(variables))
  compiled = quick_jit(repjax.reparameterize)(*halves(variables))
  jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-14), compiled, plain)


@pytest.mark.parametrize("epsilon", [-1.0, float("nan"), float("inf"), "1e-5", None])
def test_an_epsilon_that_is_no_number_is_refused(epsilon):
  with pytest.raises(InputError, match="epsilon must be a number of at least 0"):
    RepNorm(epsilon=epsilon)


def test_parameters_in_the_place_of_statistics_are_named():
  variables = random_variables(RepConv(4), X.astype("float32"))
  params = {"stem": variables["params"]}
  for wrong in (params, {"params": params, "batch_stats": {"stem": variables["batch_stats"]}}):
    with pytest.raises(InputError, match=r"batch_stats hold parameters: .*kernel"):
      repjax.reparameterize(params, wrong)
