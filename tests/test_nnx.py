"""Layers as modules of Flax NNX: the tree, the forward pass and the deploy form of Linen."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import repjax
from repjax import layers
from repjax.errors import InputError
from repjax.nnx import RepConv, RepNorm, load
from tests import helpers
from tests.helpers import F64, quick_jit, random_input, relative_error

X = random_input(4, 6, 6, 4)
GRAMMAR = {
  "branches": ("conv3x3", "conv1x1_conv3x3", "conv3x3_d2", "skip"),
  "norm": ("conv3x3", "conv1x1_conv3x3", "after_sum"),
}
POOLED = ("conv3x3", "conv1x1", "avg2x2_conv1x1")
LAYERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
  "RepConv": (RepConv, layers.RepConv, {"features": 4}),
  "pooled": (RepConv, layers.RepConv, {"features": 6, "branches": POOLED, "strides": 2}),
  "groups": (RepConv, layers.RepConv, {"features": 4, "groups": 2, "conv_bias": True}),
  "reflect": (RepConv, layers.RepConv, {"features": 4, "padding": 3, "padding_mode": "reflect"}),
  "epsilon": (RepConv, layers.RepConv, {"features": 4, "epsilon": 1e-2, "dilation": [2, 1]}),
  "grammar": (RepConv, layers.RepConv, {"features": 4, **GRAMMAR}),
  "RepNorm": (RepNorm, layers.RepNorm, {}),
  "norm with epsilon": (RepNorm, layers.RepNorm, {"epsilon": 1e-2}),
}
EACH_LAYER = pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)


def trees(model):
  """Returns the parameters and the statistics of a model as dictionaries."""
  return {
    "params": nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    "batch_stats": nnx.to_pure_dict(nnx.state(model, nnx.BatchStat)),
  }


def halves(model):
  """Returns what a user passes to `reparameterize`."""
  return nnx.state(model, nnx.Param), nnx.state(model, nnx.BatchStat)


def random_model(build, seed=0):
  """Builds a model with random variables, without compiling what draws the initial ones."""
  model = nnx.eval_shape(build)
  load(model, **helpers.randomise(trees(model), seed))
  return model


def converted(model, build, **options):
  """Returns the deploy form of a model, filled with the folded parameters."""
  deploy = nnx.eval_shape(build)
  load(deploy, repjax.reparameterize(*halves(model), **options), nnx.state(model, nnx.BatchStat))
  return deploy


def outputs(model, *arguments, train=False):
  """Computes a model in one fast compiled program; its statistics do not change."""
  graph, state = nnx.split(model)
  return quick_jit(lambda state: nnx.merge(graph, state)(*arguments, train))(state)


@pytest.mark.usefixtures("x64")
class TestLayers:
  @EACH_LAYER
  @pytest.mark.parametrize("deploy", [False, True])
  def test_the_tree_is_that_of_linen(self, layer, deploy):
    ours, linen, attributes = layer
    mine = nnx.eval_shape(lambda: ours(4, **attributes, deploy=deploy, rngs=nnx.Rngs(0), **F64))
    theirs = linen(**attributes, deploy=deploy, name="norm1", parent=None, **F64)
    expected = {"batch_stats": {}, **helpers.shapes(helpers.init_shapes(theirs, X))}
    assert helpers.shapes(trees(mine)) == expected

  @EACH_LAYER
  @pytest.mark.parametrize("train", [False, True])
  def test_the_forward_pass_is_that_of_linen(self, layer, train):
    ours, linen, attributes = layer
    mine = random_model(lambda: ours(4, **attributes, rngs=nnx.Rngs(0), **F64))
    variables = trees(mine)

    @quick_jit
    def expected(variables):
      return linen(**attributes, **F64).apply(variables, X, train, mutable=["batch_stats"])

    y, updates = expected(variables)
    graph, state = nnx.split(mine)

    @quick_jit
    def got(state):
      model = nnx.merge(graph, state)
      return model(jnp.asarray(X), train), trees(model)

    mine_y, after = got(state)
    assert relative_error(mine_y, y) <= 1e-14
    wanted = updates["batch_stats"] if train else variables["batch_stats"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-14), after["batch_stats"], wanted)
    moved = relative_error(*(tree_sum(tree["batch_stats"]) for tree in (after, variables)))
    assert (moved > 1e-3) == train

  @EACH_LAYER
  def test_both_forms_are_equal(self, layer):
    ours, _, attributes = layer

    def build(deploy=False):
      return ours(4, **attributes, deploy=deploy, rngs=nnx.Rngs(0), **F64)

    model = random_model(build)
    deploy = converted(model, lambda: build(deploy=True))
    assert relative_error(deploy(X), outputs(model, X)) <= 1e-12

  def test_fresh_values_are_those_of_linen(self):
    layer = RepConv(2, 3, branches=("conv1x1",), conv_bias=True, rngs=nnx.Rngs(7))
    linen = layers.RepConv(3, ("conv1x1",), conv_bias=True)
    expected = linen.init(nnx.Rngs(7).params(), jnp.ones((1, 1, 1, 2)))
    jax.tree.map(np.testing.assert_array_equal, trees(layer), dict(expected))
    assert not np.array_equal(layer.conv1x1.conv.kernel[...], 0)

  def test_statistics_may_be_shared_over_an_axis(self):
    model = random_model(lambda: RepNorm(4, axis_name="batch", rngs=nnx.Rngs(0), **F64))
    graph, state = nnx.split(model)

    def step(state, x):
      model = nnx.merge(graph, state)
      return model(x), trees(model)["batch_stats"]["bn"]

    parts = jnp.asarray(X).reshape(2, 2, 6, 6, 4)
    y, stats = jax.vmap(step, in_axes=(None, 0), axis_name="batch")(state, parts)
    model.axis_name = None
    assert relative_error(y.reshape(X.shape), model(jnp.asarray(X))) <= 1e-12
    assert relative_error(stats["mean"][0], model.bn.mean[...]) <= 1e-12


def tree_sum(tree):
  """Returns one number that tells two trees apart."""
  return sum(float(leaf.sum()) for leaf in jax.tree.leaves(tree))


class TestModes:
  X = X.astype("float32")

  def moves(self, model, call):
    """Returns whether a call changes the statistics."""
    before = model.bn.mean[...]
    call(model)
    return not np.array_equal(before, model.bn.mean[...])

  def test_the_model_or_the_call_chooses(self):
    model = RepNorm(4, rngs=nnx.Rngs(0))
    assert self.moves(model, lambda layer: layer(self.X))  # a fresh layer trains, as theirs
    assert not self.moves(model, lambda layer: layer(self.X, train=False))
    model.eval()
    assert not self.moves(model, lambda layer: layer(self.X))
    assert self.moves(model, lambda layer: layer(self.X, True))
    model.train()
    assert self.moves(model, lambda layer: layer(self.X))

  def test_a_view_chooses_for_itself(self):
    model = RepNorm(4, rngs=nnx.Rngs(0))
    view = nnx.view(model, use_running_average=True)
    assert not self.moves(view, lambda layer: layer(self.X))
    assert self.moves(model, lambda layer: layer(self.X))
    assert view.bn.mean is model.bn.mean

  def test_the_deploy_form_cannot_train(self):
    model = RepNorm(4, deploy=True, rngs=nnx.Rngs(0))
    model(self.X)
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      model(self.X, train=True)
    model.train()
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      model(self.X)


class TestAttributes:
  def test_they_are_those_of_linen(self):
    layer = nnx.eval_shape(lambda: RepConv(4, 4, dilation=[2, 1], rngs=nnx.Rngs(0)))
    linen = layers.RepConv(4, dilation=[2, 1])
    names = {field.name for field in dataclasses.fields(linen)} - {"name", "parent"}
    assert {"features", "branches", "epsilon", "dtype"} <= names
    for name in names:
      assert getattr(layer, name) == getattr(linen, name)
    assert layer.in_features == 4

  @pytest.mark.parametrize(("name", "value"), [("epsilon", 1e-5), ("groups", 2), ("deploy", True)])
  def test_what_the_tree_depends_on_cannot_change(self, name, value):
    layer = nnx.eval_shape(lambda: RepConv(4, 4, epsilon=1e-3, rngs=nnx.Rngs(0)))
    with pytest.raises(
      InputError, match=rf"{name} of a RepConv cannot change.*Build a new"
    ) as told:
      layer.set_attributes(**{name: value})
    helpers.assert_one_paragraph(told.value)
    setattr(layer, name, getattr(layer, name))

  def test_the_dtype_may_change(self):
    layer = RepNorm(4, rngs=nnx.Rngs(0))
    layer.set_attributes(RepNorm, dtype=jnp.bfloat16)
    assert layer(jnp.ones((2, 4))).dtype == jnp.bfloat16

  def test_unknown_ones_are_refused(self):
    for unknown in ({"kernel_size": (3, 3)}, {"name": "conv1"}, {"parent": None}):
      with pytest.raises(InputError, match=f"unknown attribute of RepConv .{next(iter(unknown))}"):
        RepConv(4, 4, **unknown, rngs=nnx.Rngs(0))

  @pytest.mark.parametrize("rngs", [None, 3, jax.random.key(0), nnx.Rngs(dropout=0)], ids=str)
  @pytest.mark.parametrize(
    "build",
    [functools.partial(RepConv, 4, 4), functools.partial(RepNorm, 4)],
    ids=["RepConv", "RepNorm"],
  )
  def test_random_streams_draw_parameters(self, rngs, build):
    with pytest.raises(InputError, match=r"rngs must be .*nnx\.Rngs\(0\), got") as told:
      build(rngs=rngs)
    helpers.assert_one_paragraph(told.value)

  @pytest.mark.parametrize("channels", ["4", 0, None])
  def test_channels_are_a_number(self, channels):
    with pytest.raises(InputError, match="in_features takes a whole number above 0"):
      RepNorm(channels, rngs=nnx.Rngs(0))

  def test_mistakes_are_told_when_the_layer_is_built(self):
    with pytest.raises(InputError, match=r"identity branch needs.*4 -> 8 channels"):
      RepConv(4, 8, rngs=nnx.Rngs(0))

  def test_an_input_has_the_promised_channels(self):
    layer = RepNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"RepNorm with in_features=4.*of 1 channels"):
      layer(jnp.ones((2, 1)))


class Block(nnx.Module):
  """A convolution, a norm and a gate of somebody."""

  def __init__(self, deploy, rngs):
    shared = {"deploy": deploy, "rngs": rngs, **F64}
    self.conv = RepConv(4, 4, epsilon=1e-2, **shared)
    self.norm = RepNorm(4, **shared)

  def __call__(self, x, train=None):
    return jnp.tanh(self.norm(jnp.tanh(self.conv(x, train)), train))


class Network(nnx.Module):
  """Layers as attributes, in a list, in a stack, recomputed, and beside a foreign norm."""

  def __init__(self, deploy=False, *, rngs):
    self.deploy = deploy
    stem = {"branches": ("conv3x3", "conv1x1"), "strides": 2, "deploy": deploy, **F64}
    self.stem = RepConv(3, 4, rngs=rngs, **stem)
    self.blocks = nnx.List([Block(deploy, rngs) for _ in range(2)])
    self.stack = nnx.vmap(lambda rngs: Block(deploy, rngs))(rngs.split(3))
    self.foreign = nnx.BatchNorm(4, rngs=rngs, **F64)
    for name in ("mean", "var"):  # which are float32 always
      setattr(self.foreign, name, nnx.BatchStat(jnp.zeros(4, jnp.float64)))
    self.head = nnx.Linear(4, 3, rngs=rngs, **F64)

  def __call__(self, x, train=None):
    x = nnx.remat(lambda stem, x: stem(x, train))(self.stem, x)
    for block in self.blocks:
      x = block(x, train)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def forward(block, x):
      return block(x, train)

    x = forward(self.stack, x)
    running = None if train is None else not train
    with jax.numpy_dtype_promotion("standard"):
      x = self.foreign(x, running)
    return self.head(x.mean((1, 2)))


@pytest.mark.usefixtures("x64")
class TestTransforms:
  IMAGES = random_input(2, 8, 8, 3)

  def build(self, deploy=False):
    return Network(deploy, rngs=nnx.Rngs(0))

  def test_a_network_learns_and_is_converted(self):
    model = random_model(self.build)
    model.train()
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    graph, state = nnx.split((model, optimizer))

    @quick_jit
    def step(state):
      model, optimizer = nnx.merge(graph, state)
      grads = nnx.grad(lambda model: (model(self.IMAGES) ** 2).sum())(model)
      optimizer.update(model, grads)
      return nnx.state((model, optimizer))

    before = trees(model)
    nnx.update((model, optimizer), step(state))
    same = jax.tree.map(np.array_equal, trees(model), before)
    same = {
      path.split("/")[-1]: leaf for path, leaf in helpers.leaves(listed(same)).items() if leaf
    }
    assert same.keys() == {"epsilon", "RepNorm"}  # of all variables, only the notes stayed
    assert trees(model)["batch_stats"]["stack"]["conv"]["epsilon"].shape == (3,)

    model.eval()
    deploy = converted(model, lambda: self.build(deploy=True), keep="foreign")
    deploy.eval()
    assert deploy.stack.conv.conv.kernel.shape == (3, 3, 3, 4, 4)
    graphs = [nnx.split(each) for each in (deploy, model)]
    run = quick_jit(
      lambda states: [nnx.merge(g, s)(self.IMAGES) for (g, _), s in zip(graphs, states)]
    )
    folded, trained = run([state for _, state in graphs])
    assert relative_error(folded, trained) <= 1e-12

  def test_foreign_statistics_are_not_lost(self):
    model = random_model(self.build)
    with pytest.raises(ValueError, match=r"foreign/mean.*keep=\('foreign',\)"):
      repjax.reparameterize(*halves(model))
    params = repjax.reparameterize(*halves(model), keep="foreign")
    said = r"batch_stats foreign/mean is missing.*load\(model, params, batch_stats\)"
    with pytest.raises(InputError, match=said):
      load(nnx.eval_shape(lambda: self.build(deploy=True)), params)

  @pytest.mark.parametrize("also", [{}, None], ids=["no statistics", "statistics"])
  def test_parameters_and_statistics_come_apart(self, also):
    model = random_model(lambda: Block(False, nnx.Rngs(0)))
    stats = nnx.state(model, nnx.BatchStat) if also is None else also
    for both in (nnx.state(model), nnx.to_pure_dict(nnx.state(model))):
      with pytest.raises(InputError, match=r"statistics too: .*bn/.*nnx\.Param") as told:
        repjax.reparameterize(both, stats)
      helpers.assert_one_paragraph(told.value)

  def test_an_ensemble_is_told_to_be_mapped(self):
    def several(deploy=False):
      return nnx.vmap(lambda rngs: Block(deploy, rngs))(nnx.Rngs(0).split(3))

    model = random_model(several)
    with pytest.raises(InputError, match=r"first axis of 3.*jax.vmap"):
      repjax.reparameterize(*halves(model))
    deploy = nnx.eval_shape(lambda: several(deploy=True))
    load(deploy, jax.vmap(repjax.reparameterize)(*halves(model)))
    run = nnx.vmap(lambda model, x: model(x, False), in_axes=(0, None))
    x = jnp.asarray(X)
    assert relative_error(run(deploy, x), run(model, x)) <= 1e-12

  def test_a_network_of_linen_may_hold_them(self):
    x = jnp.asarray(X)
    forms = [
      nnx.bridge.ToLinen(RepConv, args=(4, 4), kwargs={"deploy": deploy, **F64})
      for deploy in (False, True)
    ]
    shapes = [jax.eval_shape(form.init, jax.random.key(0), x) for form in forms]
    variables = helpers.randomise({key: shapes[0][key] for key in ("params", "batch_stats")})
    params = repjax.reparameterize(*helpers.halves(variables))
    assert helpers.shapes(params) == helpers.shapes(shapes[1]["params"])
    trained = forms[0].apply(variables, x, False)
    assert relative_error(forms[1].apply({"params": params}, x, False), trained) <= 1e-12


def listed(tree):
  """Returns a tree with texts for the numbers of lists."""
  return (
    {str(name): listed(below) for name, below in tree.items()} if isinstance(tree, dict) else tree
  )


class TestLoad:
  def build(self):
    return nnx.Dict(blocks=nnx.List([nnx.Linear(2, 3, rngs=nnx.Rngs(0))]))

  def test_texts_are_numbers_of_lists(self):
    model = self.build()
    load(model, {"blocks": {"0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}})
    np.testing.assert_array_equal(model.blocks[0](jnp.ones(2)), [3, 3, 3])

  @pytest.mark.parametrize(
    ("params", "said"),
    [
      ({"kernel": (2, 3)}, "params blocks/0/bias is missing"),
      ({"kernel": (2, 3), "bias": (3,), "scale": (3,)}, "blocks/0/scale has no place"),
      ({"kernel": (3, 2), "bias": (3,)}, r"kernel is \(3, 2\) float32, wanted \(2, 3\) float32"),
    ],
  )
  def test_what_does_not_fit_is_named_and_nothing_changes(self, params, said):
    model = self.build()
    before = trees(model)
    with pytest.raises(InputError, match=said) as told:
      load(
        model, {"blocks": {0: jax.tree.map(jnp.ones, params, is_leaf=lambda x: type(x) is tuple)}}
      )
    helpers.assert_one_paragraph(told.value)
    jax.tree.map(np.testing.assert_array_equal, trees(model), before)

  def test_dtypes_differ(self):
    model = self.build()
    params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), trees(model)["params"])
    with pytest.raises(InputError, match=r"kernel is .* bfloat16, wanted .* float32"):
      load(model, params)

  def test_a_linen_model_without_variables(self):
    model = nnx.bridge.ToNNX(layers.RepConv(4), rngs=nnx.Rngs(0))
    with pytest.raises(InputError, match=r"no parameters.*lazy_init"):
      load(model, {"conv": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.ones(4)}})


@pytest.mark.parametrize(
  "value",
  ["x", None, [[1.0]], np.array([None], object), jax.ShapeDtypeStruct((3, 3, 4, 8), jnp.float32)],
  ids=["text", "None", "list", "objects", "shape"],
)
def test_load_takes_arrays_alone(value):
  layer = repjax.nnx.RepConv(4, 8, branches=("conv3x3",), deploy=True, rngs=nnx.Rngs(0))
  params = {"conv": {"kernel": value, "bias": np.zeros(8, np.float32)}}
  with pytest.raises(InputError, match="params/conv/kernel must be an array"):
    repjax.nnx.load(layer, params)


@pytest.mark.parametrize("model", [3, repjax.nnx.RepConv, repjax.layers.RepConv(8)], ids=str)
def test_load_takes_models_of_nnx_alone(model):
  with pytest.raises(InputError, match=r"must be an nnx\.Module"):
    repjax.nnx.load(model, {})
