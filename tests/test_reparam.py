"""The walk: what it folds, leaves alone and refuses, and that it is a pure function."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import FrozenDict
from hypothesis import given, settings
from hypothesis import strategies as st

import repjax
from repjax.algebra import ConvParams, add, fuse_bn, identity_kernel, pad_kernel
from repjax.errors import InputError
from repjax.layers import AuxHead, RepConv, RepNorm, linear
from repjax.recognition import layer_name
from tests import helpers
from tests.helpers import F64, halves, quick_jit, random_input, random_variables, relative_error

X = random_input(2, 5, 4, 4)
X32 = X.astype("float32")


class Neck(nn.Module):
  """Somebody's module: RepConv and RepNorm under Linen's own names, next to a plain convolution."""

  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  epsilon: float = 1e-5

  @nn.compact
  def __call__(self, x, train=False):
    own = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    ours = own | {"deploy": self.deploy, "epsilon": self.epsilon}
    x = nn.relu(RepConv(4, **ours)(x, train))
    x = nn.Conv(4, (1, 1), **own)(x)
    x = RepNorm(**ours)(x, train)
    return nn.relu(RepConv(4, ("conv3x3", "conv1x1"), **ours)(x, train))


class Detector(nn.Module):
  """Two levels of scopes, an auxiliary head, and a batch norm of its own that nobody folds."""

  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32
  own_norm: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    own = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    for _ in range(2):
      x = Neck(self.deploy, **own)(x, train)
    if not self.deploy:
      AuxHead(3, **own)(x, train)
    if self.own_norm:
      x = nn.BatchNorm(not train, force_float32_reductions=False, name="norm", **own)(x)
    return linear(x.mean((1, 2)), 3, name="head", **own)


class TestFunction:
  @pytest.mark.usefixtures("x64")
  def test_nested_modules_compute_the_same(self):
    model, deploy = Detector(**F64), Detector(deploy=True, **F64)
    variables = random_variables(model, X)

    def outputs(variables):
      params = repjax.reparameterize(*halves(variables))
      return deploy.apply({"params": params}, X), model.apply(variables, X)

    assert relative_error(*quick_jit(outputs)(variables)) <= 1e-12

  @pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
  def test_the_result_has_the_structure_shapes_and_dtypes_of_the_deploy_form(self, param_dtype):
    variables = helpers.init_shapes(Detector(param_dtype=param_dtype), X32)
    wanted = helpers.init_shapes(Detector(deploy=True, param_dtype=param_dtype), X32)
    assert wanted.keys() == {"params"}
    folded = jax.eval_shape(repjax.reparameterize, *halves(variables))
    assert helpers.shapes(folded) == helpers.shapes(wanted["params"])


class TestTree:
  def test_untagged_leaves_pass_by_reference(self):
    params, stats = halves(random_variables(Neck(), X32))
    params = {"neck": params, "loose": object()}
    folded = repjax.reparameterize(params, {"neck": stats})
    assert folded["loose"] is params["loose"]
    for leaf in ("kernel", "bias"):
      assert folded["neck"]["Conv_0"][leaf] is params["neck"]["Conv_0"][leaf]

  def test_the_arguments_are_not_changed(self):
    params, stats = halves(random_variables(Neck(), X32))
    before = [helpers.leaves(params), helpers.leaves(stats)]
    repjax.reparameterize(params, stats)
    for old, new in zip(before, [helpers.leaves(params), helpers.leaves(stats)]):
      assert old.keys() == new.keys()
      assert all(old[path] is new[path] for path in old)

  def test_a_deploy_tree_maps_to_itself(self):
    params = random_variables(Detector(deploy=True), X32)["params"]
    again = repjax.reparameterize(params, {})
    assert jax.tree.structure(again) == jax.tree.structure(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(params)))

  def test_folding_twice_is_folding_once(self):
    once = repjax.reparameterize(*halves(random_variables(Neck(), X32)))
    twice = repjax.reparameterize(once, {})
    assert jax.tree.structure(twice) == jax.tree.structure(once)
    assert all(a is b for a, b in zip(jax.tree.leaves(twice), jax.tree.leaves(once)))

  def test_a_tree_may_hold_both_forms(self):
    params, stats = halves(random_variables(Neck(), X32))
    folded = repjax.reparameterize(params, stats)
    rest = {name: stats[name] for name in ("RepNorm_0", "RepConv_1")}
    mixed = repjax.reparameterize({**params, "RepConv_0": folded["RepConv_0"]}, rest)
    assert jax.tree.structure(mixed) == jax.tree.structure(folded)
    jax.tree.map(np.testing.assert_array_equal, mixed, folded)

  @pytest.mark.parametrize("deploy", [False, True])
  def test_frozen_dicts_give_plain_dicts(self, deploy):
    variables = random_variables(Neck(deploy=deploy), X32)
    params, stats = variables["params"], variables.get("batch_stats", {})
    frozen = repjax.reparameterize(FrozenDict(params), FrozenDict(stats))
    plain = repjax.reparameterize(params, stats)
    assert jax.tree.structure(frozen) == jax.tree.structure(plain)
    jax.tree.map(np.testing.assert_array_equal, frozen, plain)

  def test_auxiliary_heads_disappear(self):
    folded = repjax.reparameterize(*halves(random_variables(Detector(), X32)))
    assert sorted(folded) == ["Neck_0", "Neck_1", "head"]

  def test_nothing_gives_nothing(self):
    assert repjax.reparameterize({}, {}) == {}


NAMES = st.sampled_from(["stem", "RepConv_0", "RepConv_rbr", "RepConvolution", "RepNorm", "neck"])
TREES = st.recursive(
  st.builds(object), lambda inner: st.dictionaries(NAMES, inner, max_size=3), max_leaves=12
).filter(lambda tree: isinstance(tree, dict))


@settings(max_examples=50, deadline=None, derandomize=True)
@given(TREES)
def test_at_any_depth_tagged_scopes_are_folded_once_and_all_else_is_kept(tree):
  folded = []

  def fold(params, stats, epsilon):
    folded.append(params)
    return {"conv": params}

  def statistics(params):
    """A statistic for every tagged scope, none elsewhere."""
    return {
      name: {"mean": 0.0} if tagged(name, below) else statistics(below)
      for name, below in params.items()
      if isinstance(below, dict)
    }

  def tagged(name, below):
    return isinstance(below, dict) and name in ("RepConv_0", "RepConv_rbr", "RepNorm")

  def check(before, after):
    assert before.keys() == after.keys()
    for name, below in before.items():
      if tagged(name, below):
        assert after[name] == {"conv": below}
        assert any(below is seen for seen in folded)
      elif isinstance(below, dict):
        check(below, after[name])
      else:
        assert after[name] is below

  folds = {"RepConv": fold, "RepNorm": fold}
  check(tree, repjax.reparameterize(tree, statistics(tree), folds=folds))


@pytest.mark.parametrize(
  ("scope", "layer"),
  [
    ("RepConv", "RepConv"),
    ("RepConv_0", "RepConv"),
    ("RepConv_stem", "RepConv"),
    ("AuxHead_stage3_first", "AuxHead"),
    ("RepConvolution", None),
    ("RepConv0", None),
    ("repconv_0", None),
    ("MyRepConv_0", None),
    ("stem", None),
  ],
)
def test_the_tag_of_a_scope_is_its_class_name(scope, layer):
  assert layer_name(scope) == layer


def test_of_two_matching_tags_the_longer_wins():
  folds = {"Rep": None, "Rep_Conv": None}
  assert layer_name("Rep_Conv_0", folds) == "Rep_Conv"
  assert layer_name("Rep_0", folds) == "Rep"


class TestRefusals:
  def test_missing_statistics_are_named(self):
    variables = random_variables(Detector(), X32)
    del variables["batch_stats"]["Neck_1"]["RepConv_0"]
    with pytest.raises(ValueError, match=r"^Neck_1/RepConv_0 is in training form .*no batch stat"):
      repjax.reparameterize(*halves(variables))

  @pytest.mark.parametrize("layer", ["RepNorm_0", "AuxHead_0"])
  def test_missing_statistics_of_other_layers_are_named(self, layer):
    variables = random_variables(Detector(), X32)
    params = {**variables["params"], **variables["params"]["Neck_0"]}
    with pytest.raises(ValueError, match=f"^{layer} is in training form"):
      repjax.reparameterize({layer: params[layer]}, {})

  @pytest.mark.parametrize(
    ("path", "named"),
    [
      (("Neck_1", "RepConv_0", "conv1x1"), "^Neck_1/RepConv_0: .*do not belong together"),
      (("Neck_1", "RepConv_0", "conv1x1", "bn"), "^Neck_1/RepConv_0: .*do not belong together"),
      (("Neck_1", "RepConv_0", "identity", "bn", "var"), "^Neck_1/RepConv_0: .*missing: var"),
      (("Neck_0", "RepNorm_0", "bn", "mean"), "^Neck_0/RepNorm_0: .*missing: mean"),
    ],
    ids=str,
  )
  def test_partly_missing_statistics_are_named(self, path, named):
    variables = random_variables(Detector(), X32)
    *above, last = path
    scope = variables["batch_stats"]
    for name in above:
      scope = scope[name]
    del scope[last]
    with pytest.raises(ValueError, match=named):
      repjax.reparameterize(*halves(variables))

  @pytest.mark.parametrize(
    "path",
    [
      ("norm",),
      ("Neck_0", "BatchNorm_0"),
      ("Neck_7", "RepConv_0"),
      ("Neck_0", "RepConv_0", "conv9x9"),
      ("Neck_0", "RepConv_0", "conv3x3", "norm"),
      ("Neck_0", "RepNorm_0", "norm"),
    ],
    ids="/".join,
  )
  def test_foreign_statistics_are_named(self, path):
    variables = random_variables(Detector(), X32)
    scope = variables["batch_stats"]
    for name in path[:-1]:
      scope = scope.setdefault(name, {})
    scope[path[-1]] = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    named = "/".join(path[:2])  # the layer, at least
    with pytest.raises(ValueError, match=named):
      repjax.reparameterize(*halves(variables))

  @pytest.mark.parametrize("path", ["RepConv_0/conv3x3/bn", "RepNorm_0/bn"])
  def test_a_statistic_that_no_norm_has_is_named(self, path):
    params, stats = halves(random_variables(Neck(), X32))
    scope = stats
    for name in path.split("/"):
      scope = scope[name]
    scope["momentum"] = jnp.zeros(4)
    with pytest.raises(ValueError, match=rf"^{path.split('/')[0]}.*momentum"):
      repjax.reparameterize(params, stats)

  @pytest.mark.parametrize("layer", ["RepConv_0", "RepNorm_0"])
  def test_statistics_for_a_deploy_tree_are_refused(self, layer):
    stats = helpers.init_shapes(Neck(), X32)["batch_stats"]
    params = helpers.init_shapes(Neck(deploy=True), X32)["params"]
    with pytest.raises(ValueError, match=f"^{layer}: "):
      repjax.reparameterize(params, {layer: stats[layer]})

  def test_statistics_of_another_width_are_refused(self):
    params, stats = halves(random_variables(Detector(), X32))
    stats["Neck_1"]["RepConv_0"] = random_variables(RepConv(6), jnp.ones((1, 5, 5, 6)))[
      "batch_stats"
    ]
    with pytest.raises(ValueError, match=r"^Neck_1/RepConv_0: .*one common shape"):
      repjax.reparameterize(params, stats)

  def test_a_norm_of_another_width_is_refused(self):
    params, stats = halves(random_variables(Detector(), X32))
    wide = random_variables(RepConv(6), jnp.ones((1, 5, 5, 6)))
    for branch in ("conv3x3", "conv1x1", "identity"):
      params["Neck_0"]["RepConv_0"][branch]["bn"] = wide["params"][branch]["bn"]
      stats["Neck_0"]["RepConv_0"][branch]["bn"] = wide["batch_stats"][branch]["bn"]
    with pytest.raises(ValueError, match=r"^Neck_0/RepConv_0: .*6 channels cannot follow"):
      repjax.reparameterize(params, stats)

  @pytest.mark.parametrize("width", [2, 6])
  def test_an_identity_of_another_width_is_refused(self, width):
    params, stats = halves(random_variables(Neck(), X32))
    other = random_variables(RepConv(width), jnp.ones((1, 5, 5, width)))
    params["RepConv_0"]["identity"] = other["params"]["identity"]
    stats["RepConv_0"]["identity"] = other["batch_stats"]["identity"]
    with pytest.raises(ValueError, match=r"^RepConv_0: "):
      repjax.reparameterize(params, stats)


class TestKeep:
  @staticmethod
  def detector():
    return halves(random_variables(Detector(own_norm=True), X32))

  @pytest.mark.usefixtures("x64")
  def test_a_detector_keeps_its_own_norm(self):
    model, deploy = Detector(own_norm=True, **F64), Detector(own_norm=True, deploy=True, **F64)
    variables = random_variables(model, X)

    def outputs(variables):
      params = repjax.reparameterize(*halves(variables), keep=("norm",))
      stats = {"norm": variables["batch_stats"]["norm"]}
      return deploy.apply({"params": params, "batch_stats": stats}, X), model.apply(variables, X)

    assert relative_error(*quick_jit(outputs)(variables)) <= 1e-12

  def test_without_it_the_error_says_how(self):
    with pytest.raises(ValueError, match=r"batch_stats hold norm/mean.*keep=\('norm',\)"):
      repjax.reparameterize(*self.detector())

  @pytest.mark.parametrize("entry", ["norm", "norm/", "/norm", "norm/mean"])
  def test_entries_are_paths(self, entry):
    params, stats = self.detector()
    stats["norm"] = {"mean": stats["norm"]["mean"]}
    folded = repjax.reparameterize(params, stats, keep=(entry,))
    assert folded["norm"]["scale"] is params["norm"]["scale"]

  @pytest.mark.parametrize("entry", ["no", "nor", "norm_0", "norm/me", "Neck_0/norm", ""])
  def test_an_entry_that_names_nothing_is_refused(self, entry):
    with pytest.raises(InputError, match=rf"unknown path in keep '{entry}'") as told:
      repjax.reparameterize(*self.detector(), keep=("norm", entry))
    helpers.assert_one_paragraph(told.value)

  @pytest.mark.parametrize("entry", ["norn", "neck/norm", "Norm"])
  def test_near_paths_are_proposed(self, entry):
    with pytest.raises(InputError, match=r"did you mean .*\bnorm\b"):
      repjax.reparameterize(*self.detector(), keep=entry)

  def test_a_path_without_the_scopes_above_it_is_completed(self):
    params, stats = self.detector()
    params, stats = ({"a_long_name": {"of_a_scope": tree}} for tree in (params, stats))
    with pytest.raises(InputError, match="a_long_name/of_a_scope/norm"):
      repjax.reparameterize(params, stats, keep="norm")

  def test_a_tree_in_deploy_form_takes_the_same_paths(self):
    params = repjax.reparameterize(*self.detector(), keep="norm")
    again = repjax.reparameterize(params, {}, keep="norm")
    assert again["norm"]["scale"] is params["norm"]["scale"]

  def test_deeper_norms_and_several_entries(self):
    params, stats = halves(random_variables(Neck(), X32))
    own = {"mean": jnp.zeros(4), "var": jnp.ones(4)}
    stats = {"head": {"neck": {**stats, "BatchNorm_0": own}}, "BatchNorm_0": own}
    keep = ("BatchNorm_0", "head/neck/BatchNorm_0")
    folded = repjax.reparameterize({"head": {"neck": params}}, stats, keep=keep)
    assert folded["head"]["neck"].keys() == params.keys()
    for entry, missed in zip(keep, reversed(keep)):
      with pytest.raises(ValueError, match=f"batch_stats hold {missed}/mean"):
        repjax.reparameterize({"head": {"neck": params}}, stats, keep=(entry,))

  def test_training_forms_still_fold(self):
    folded = repjax.reparameterize(*self.detector(), keep=("norm",))
    assert folded["Neck_0"]["RepConv_0"].keys() == {"conv"}


class PostNorm(nn.Module):
  """A layer of a user: one batch norm after the sum of a 3x3, a 1x1 and the input itself.

  Ding et al., RepVGG, CVPR 2021, Table 7, "post-addition BN".
  """

  deploy: bool = False
  dtype: Any = jnp.float32
  param_dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x, train=False):
    own = {"dtype": self.dtype, "param_dtype": self.param_dtype}
    same = {"padding": [(1, 1), (1, 1)], **own}
    if self.deploy:
      return nn.Conv(x.shape[-1], (3, 3), name="conv", **same)(x)
    y = nn.Conv(x.shape[-1], (3, 3), use_bias=False, name="dense", **same)(x)
    y = y + nn.Conv(x.shape[-1], (1, 1), use_bias=False, name="pointwise", **own)(x) + x
    return nn.BatchNorm(not train, epsilon=1e-5, force_float32_reductions=False, name="bn", **own)(
      y
    )


def fold_post_norm(params, stats, epsilon):
  kernel = params["dense"]["kernel"]
  features, none = kernel.shape[-1], jnp.zeros(kernel.shape[-1], kernel.dtype)
  pointwise = pad_kernel(params["pointwise"]["kernel"], (3, 3))
  identity = identity_kernel(features, 1, (3, 3), kernel.dtype)
  total = add(*(ConvParams(part, none) for part in (kernel, pointwise, identity)))
  fused = fuse_bn(total, params["bn"], stats["bn"], epsilon)
  return {"conv": {"kernel": fused.kernel, "bias": fused.bias}}


@pytest.mark.parametrize("returned", [3, [1.0], "text", jnp.ones(2), dict], ids=repr)
def test_a_fold_that_returns_no_dictionary_is_named(returned):
  params, stats = halves(random_variables(PostNorm(), X32))
  folds = {**repjax.FOLDS, "PostNorm": lambda params, stats, epsilon: returned}
  with pytest.raises(InputError, match=r"^neck/PostNorm_7: the fold of PostNorm returned") as told:
    repjax.reparameterize(
      {"neck": {"PostNorm_7": params}}, {"neck": {"PostNorm_7": stats}}, folds=folds
    )
  helpers.assert_one_paragraph(told.value)


@pytest.mark.parametrize("folds", [{"Mine": 3}, {3: fold_post_norm}, {"Mine": None}], ids=range(3))
def test_folds_are_functions_by_name(folds):
  with pytest.raises(InputError, match="folds must be a dictionary of functions by class name"):
    repjax.reparameterize({}, {}, folds=folds)


@pytest.mark.parametrize(
  ("scope", "key"), [("post", "PostNorm"), ("PostNorm_0", "PostNrom"), ("OldPostNorm", "PostNorm")]
)
def test_a_key_of_folds_that_names_no_scope_is_told(scope, key):
  params, stats = halves(random_variables(PostNorm(), X32))
  folds = {**repjax.FOLDS, key: fold_post_norm}
  told = rf"class name at the beginning of the scope's name.* called by these keys.*{key}'"
  with pytest.raises(ValueError, match=told):
    repjax.reparameterize({scope: params}, {scope: stats}, folds=folds)


def test_without_such_keys_no_key_is_told():
  params, stats = halves(random_variables(PostNorm(), X32))
  with pytest.raises(ValueError, match=r"class name at the beginning") as told:
    repjax.reparameterize({"post": params}, {"post": stats})
  assert "keys" not in str(told.value)


class Outsider(nn.Module):
  """A network that mixes an outsider's layers with repjax's."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    x = nn.relu(PostNorm(self.deploy, **F64)(x, train))
    return PostNorm(self.deploy, name="PostNorm_last", **F64)(
      RepConv(4, deploy=self.deploy, **F64)(x, train), train
    )


@pytest.mark.usefixtures("x64")
def test_an_outsider_adds_a_layer_with_its_own_fold():
  model, deploy = Outsider(), Outsider(deploy=True)
  variables = random_variables(model, X)
  folds = {**repjax.FOLDS, "PostNorm": fold_post_norm}

  def outputs(variables):
    params = repjax.reparameterize(*halves(variables), folds=folds)
    return deploy.apply({"params": params}, X), model.apply(variables, X)

  assert relative_error(*quick_jit(outputs)(variables)) <= 1e-12
  assert "PostNorm" not in repjax.FOLDS
  with pytest.raises(ValueError, match="PostNorm_0/bn/mean"):
    repjax.reparameterize(*halves(variables))


def test_errors_of_a_fold_name_the_path():
  def fold(params, stats, epsilon):
    raise ValueError("seven is odd")

  with pytest.raises(ValueError, match=r"^a/My_0: seven is odd$"):
    repjax.reparameterize({"a": {"My_0": {}}}, {"a": {"My_0": {"mean": 0}}}, folds={"My": fold})


def check_member(stacked, index, tree):
  jax.tree.map(lambda a, b: helpers.assert_close(a[index], b, 1e-6), stacked, tree)


class TestTransformations:
  """Pure: the same under jit, vmap, pmap, and differentiable."""

  def test_under_jit(self):
    variables = random_variables(Neck(), X32)
    plain = repjax.reparameterize(*halves(variables))
    jitted = jax.jit(repjax.reparameterize)(*halves(variables))
    jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-6), jitted, plain)

  def test_under_vmap_over_stacked_checkpoints(self):
    checkpoints = [random_variables(Neck(), X32, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *checkpoints)
    together = quick_jit(jax.vmap(repjax.reparameterize))(*halves(stacked))
    for index, checkpoint in enumerate(checkpoints):
      check_member(together, index, repjax.reparameterize(*halves(checkpoint)))

  def test_under_pmap_over_stacked_checkpoints(self):
    checkpoints = [random_variables(Neck(), X32, seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *checkpoints)
    together = jax.pmap(repjax.reparameterize)(*halves(stacked))
    for index, checkpoint in enumerate(checkpoints):
      check_member(together, index, repjax.reparameterize(*halves(checkpoint)))

  @pytest.mark.usefixtures("x64")
  def test_gradients_through_the_fold_are_those_through_the_branches(self):
    model, deploy = Neck(**F64), Neck(deploy=True, **F64)
    variables = random_variables(model, X)
    weights = random_input(2, 5, 4, 4, seed=7)

    def branched(params, stats):
      return (weights * model.apply({"params": params, "batch_stats": stats}, X)).sum()

    def folded(params, stats):
      deployed = {"params": repjax.reparameterize(params, stats)}
      return (weights * deploy.apply(deployed, X)).sum()

    @quick_jit
    def gradients(params, stats):
      return [jax.grad(loss, argnums=(0, 1))(params, stats) for loss in (folded, branched)]

    for through_fold, through_branches in zip(*gradients(*halves(variables))):
      expected = helpers.leaves(through_branches)
      for path, gradient in helpers.leaves(through_fold).items():
        assert np.abs(expected[path]).max() > 0, path
        assert relative_error(gradient, expected[path]) <= 1e-10, path

  @pytest.mark.usefixtures("x64")
  @pytest.mark.parametrize("deploy", [False, True])
  def test_both_forms_on_four_devices_compute_what_one_does(self, deploy):
    model = Neck(deploy=deploy, **F64)
    variables, batch = random_variables(model, X), random_input(8, 5, 4, 4)
    shards = batch.reshape(4, 2, *batch.shape[1:])
    sharded = jax.pmap(model.apply, in_axes=(None, 0))(variables, shards)
    assert len(sharded.devices()) == 4
    alone = quick_jit(model.apply)(variables, batch)
    assert relative_error(np.reshape(sharded, batch.shape), alone) <= 1e-12
