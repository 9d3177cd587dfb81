"""A value in place of a tree, a flag or a size is named in one sentence."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

import repjax
from repjax.errors import InputError
from repjax.inference import training_layers
from repjax.layers import RepConv, linear
from tests.helpers import random_variables
from tests.models import families
from tests.training import tiny

IMAGES = np.zeros((1, 32, 32, 3), np.float32)


@pytest.fixture(scope="module")
def model():
  """A small RepVGG in training form."""
  return repjax.create_model("repvgg_a0", num_classes=10, **tiny.OVERRIDES)


@pytest.fixture(scope="module")
def variables(model):
  """Variables of the small RepVGG, which no test may change."""
  return random_variables(model, IMAGES)


def folded(variables):
  return repjax.reparameterize(variables["params"], variables["batch_stats"])


def mapped(function, variables):
  return {name: jax.tree.map(function, tree) for name, tree in variables.items()}


WRONG_TREES = {
  "a device axis": (lambda v: mapped(lambda x: np.stack([x] * 8), v), "first axis of 8.*leaf.0."),
  "one device": (lambda v: mapped(lambda x: x[None], v), "first axis of 1.*pmap"),
  "flat, with slashes": (
    lambda v: {name: flatten_dict(tree, sep="/") for name, tree in v.items()},
    'flat one.*unflatten_dict.tree, sep="/"',
  ),
  "flat, with dots": (
    lambda v: {name: flatten_dict(tree, sep=".") for name, tree in v.items()},
    'flat one.*unflatten_dict.tree, sep="."',
  ),
  "numbers for names": (
    lambda v: {name: {0: tree} for name, tree in v.items()},
    "names of scopes for keys, got 0",
  ),
  "flat, with tuples": (
    lambda v: {name: flatten_dict(tree) for name, tree in v.items()},
    "flat one.*unflatten_dict.tree.",
  ),
  "integers": (lambda v: mapped(lambda x: (x * 100).astype(np.int8), v), "got int8"),
  "booleans": (lambda v: mapped(lambda x: x > 0, v), "got bool"),
  "complex numbers": (lambda v: mapped(lambda x: x.astype(np.complex64), v), "got complex64"),
}


@pytest.mark.parametrize(("change", "said"), WRONG_TREES.values(), ids=WRONG_TREES)
@pytest.mark.parametrize("jit", [False, True])
def test_reparameterize_names_what_came(variables, change, said, jit):
  function = jax.jit(folded) if jit else folded
  if jit and "flat" in said:
    return  # jax.jit refuses tuples and strings together as keys
  with pytest.raises(InputError, match=said) as caught:
    function(change(variables))
  assert len(str(caught.value)) < 400


@pytest.mark.parametrize("collection", ["params", "batch_stats"])
@pytest.mark.parametrize("value", [[1, 2], (np.ones(3),), np.ones(3), None, "params"], ids=repr)
def test_reparameterize_takes_dictionaries_only(variables, collection, value):
  with pytest.raises(ValueError, match=rf"takes two dictionaries.*{type(value).__name__}"):
    folded({**variables, collection: value})


def test_a_list_in_the_place_of_an_array_is_named(variables):
  stem = {"RepConv_0": jax.tree.map(lambda x: x.tolist(), variables["params"]["stem"]["RepConv_0"])}
  with pytest.raises(InputError, match=r"^stem/RepConv_0/\w+/\w+/\w+ must be an array, got a list"):
    folded({**variables, "params": {**variables["params"], "stem": stem}})


@pytest.mark.parametrize("collection", ["params", "batch_stats"])
def test_a_list_of_scopes_is_named(variables, collection):
  tree = variables[collection]
  listed = {**variables, collection: {**tree, "blocks": [tree["stem"]]}}
  with pytest.raises(InputError, match=rf"^{collection} must .* list of 1 at blocks\. .*to_state_"):
    folded(listed)


def test_both_collections_in_one_are_told_apart(variables):
  with pytest.raises(InputError, match=r'variables\["params"\], variables\["batch_stats"\]'):
    repjax.reparameterize(variables, {})


def test_one_integer_leaf_is_found_and_foreign_layers_may_have_them(variables):
  params = jax.tree.map(np.asarray, variables["params"])
  foreign = {**params, "neck": {"indices": np.arange(3)}}
  assert folded({**variables, "params": foreign})["neck"]["indices"].dtype == np.arange(3).dtype
  norm = params["stage1"]["block0"]["RepConv_0"]["conv3x3"]["bn"]
  norm["scale"] = norm["scale"].astype(np.int32)
  with pytest.raises(InputError, match=r"^stage1/block0/RepConv_0/conv3x3/bn/scale .*got int32"):
    folded({**variables, "params": params})


@pytest.mark.parametrize(("change", "said"), WRONG_TREES.values(), ids=WRONG_TREES)
@pytest.mark.parametrize("plain", [False, True])
def test_compile_names_what_came(model, variables, change, said, plain):
  given = {"params": folded(variables)} if plain else variables
  with pytest.raises(InputError, match=said) as caught:
    repjax.deploy.compile(model, change(given), image_size=32, batch_sizes=(1,))
  assert len(str(caught.value)) < 400


@pytest.mark.parametrize("change", ["a device axis", "flat, with slashes", "flat, with tuples"])
def test_to_torch_names_what_came(variables, change):
  change, said = WRONG_TREES[change]
  with pytest.raises(InputError, match=said):
    repjax.weights.to_torch("repvgg_a0", change(variables))


@pytest.mark.parametrize("value", [[1], None, np.ones(3), "params"], ids=repr)
def test_compile_takes_dictionaries_only(model, value):
  with pytest.raises(InputError, match="variables must be nested dictionaries of arrays, got"):
    repjax.deploy.compile(model, value, image_size=32, batch_sizes=(1,))


FLAGS = ("no", "False", 0, 1, None)


@pytest.mark.parametrize("value", FLAGS, ids=repr)
@pytest.mark.parametrize("name", ["deploy", "remat", "features_only"])
def test_flags_of_models_are_true_or_false(name, value):
  with pytest.raises(InputError, match=rf"{name} .*(?i:true or false), got {value!r}"):
    repjax.create_model("repvgg_a0", **{name: value})


@pytest.mark.parametrize("value", FLAGS, ids=repr)
@pytest.mark.parametrize("name", ["deploy", "verify"])
def test_flags_of_load_are_true_or_false(tmp_path, name, value):
  with pytest.raises(InputError, match=f"{name} must be true or false, got {value!r}"):
    repjax.load(tmp_path, **{name: value})


@pytest.mark.parametrize("value", ["3", True, 2.5, None, 0], ids=repr)
def test_the_number_of_classes_is_a_whole_number(value):
  with pytest.raises(InputError, match=f"num_classes must be .* got {value!r}"):
    repjax.create_model("repvgg_a0", num_classes=value)


@pytest.mark.parametrize("name", [None, 5, ["a"]], ids=repr)
def test_the_name_of_a_folder_is_text_or_a_path(name):
  with pytest.raises(InputError, match=f"text or a path, got {type(name).__name__}"):
    repjax.load(name)


@pytest.mark.parametrize("value", FLAGS, ids=repr)
def test_flags_of_layers_are_true_or_false(value):
  with pytest.raises(InputError, match=f"deploy takes True or False, got {value!r}"):
    RepConv(4, deploy=value).init(jax.random.key(0), np.zeros((1, 8, 8, 4), np.float32))


@pytest.mark.parametrize("value", [int, "int8", jnp.complex64, bool, "half-ish"], ids=repr)
@pytest.mark.parametrize("name", ["dtype", "param_dtype"])
def test_dtypes_of_models_are_floating_point(name, value):
  with pytest.raises(InputError, match=f"{name} takes a floating-point type"):
    repjax.create_model("repvgg_a0", **{name: value})


@pytest.mark.parametrize(
  "size", ["64", 64.0, [64, 64], (64,), (64, "64"), True, None, 10**9], ids=repr
)
def test_sizes_of_images_are_whole_numbers(model, variables, size):
  for call in (
    lambda: repjax.init(model, jax.random.key(0), image_size=size),
    lambda: repjax.analysis.summary(model, size),
    lambda: repjax.deploy.compile(model, variables, image_size=size),
    lambda: repjax.onnx.to_onnx(model, variables, image_size=size),
  ):
    with pytest.raises(InputError, match="image_size must be a whole number of pixels or a tuple"):
      call()


@pytest.mark.parametrize("dtype", ["uint8", "int32"])
def test_images_that_nobody_normalized_are_warned_of_once(model, variables, dtype):
  images = IMAGES.astype(dtype)
  with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    for _ in range(3):
      jax.eval_shape(model.apply, variables, images)
  assert [str(each.message).partition(",")[0] for each in caught] == [
    f"the network was given images of {dtype}"
  ]
  assert "preprocessing.normalize(images)" in str(caught[0].message)


def test_complex_images_are_refused(model, variables):
  with pytest.raises(InputError, match="got complex64"):
    model.apply(variables, IMAGES.astype(np.complex64))


def test_a_function_that_keeps_its_branches_is_warned_of():
  pytest.importorskip("onnx")
  held = random_variables(Fused(), IMAGES)
  layer = repjax.nnx.RepConv(3, 3, rngs=nnx.Rngs(0))
  layer.eval()
  graph, state = nnx.split(layer)
  in_nnx = (lambda tree, images: nnx.merge(graph, tree)(images)), state
  for (function, tree), said in (((Fused().apply, held), "RepConv_0"), (in_nnx, "a RepConv")):
    with pytest.warns(UserWarning, match=f"training form, such as {said}: .*repjax.fuse"):
      repjax.onnx.to_onnx(function, tree, image_size=8)
  fused = repjax.fuse(Fused().apply, held, IMAGES)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    repjax.onnx.to_onnx(fused, fused.fold(held), image_size=32)
    repjax.onnx.to_onnx(Fused(fused=True).apply, {"params": folded(held)}, image_size=8)


class Fused(nn.Module):
  """Somebody's network, whose attribute for the deploy form is not called `deploy`."""

  fused: bool = False
  layer_name: str | None = None

  @nn.compact
  def __call__(self, x, train=False):
    layer = RepConv(4, ("conv3x3", "conv1x1"), deploy=self.fused, name=self.layer_name)
    x = nn.relu(layer(x, train))
    return linear(x.mean((1, 2)), 3, name="head", dtype=jnp.float32, param_dtype=jnp.float32)


@pytest.mark.parametrize("write", ["compile", "to_onnx", "export"])
def test_a_network_that_keeps_its_branches_is_warned_of(tmp_path, write):
  if write != "compile":
    pytest.importorskip("onnx")
  held = random_variables(Fused(), IMAGES)
  plain = {"params": folded(held)}
  spec = repjax.ModelSpec("repvgg_a0", 3, preprocessing=repjax.spec.Preprocessing(32, 32))

  def call(module, variables, name):
    if write == "compile":
      repjax.deploy.compile(module, variables, image_size=32, batch_sizes=(1,), tune=False)
    elif write == "to_onnx":
      repjax.onnx.to_onnx(module, variables, image_size=32)
    else:
      repjax.deploy.export(module, variables, spec, tmp_path / name, format="onnx")

  with pytest.warns(
    UserWarning, match=r"1 layers in training form, such as RepConv_0.*deploy=True"
  ):
    call(Fused(), held, "a")
  named = Fused(layer_name="stem")
  with pytest.warns(UserWarning, match=r"1 layers in training form, such as stem:"):
    call(named, random_variables(named, IMAGES), "c")
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    call(Fused(fused=True), plain, "b")


@pytest.mark.parametrize("name", families.FAMILIES)
def test_deploy_forms_hold_no_layer_in_training_form(name):
  size = 64 if name != "repmlp_cifar" else 16
  assert training_layers(families.small(name), size)
  assert not training_layers(families.small(name, deploy=True), size)


def layer_of(change):
  """Returns trees of one RepConv with one change: a path, and a value or None for nothing."""
  layer = random_variables(RepConv(4), np.zeros((1, 5, 6, 4), np.float32))
  flat, (place, value) = flatten_dict(layer), change
  flat = {path: leaf for path, leaf in flat.items() if path[: len(place)] != place}
  tree = unflatten_dict(flat if value is None else {**flat, place: value})
  return {"l": tree["params"]}, {"l": tree["batch_stats"]}


ONES = np.ones(4, np.float32)
MISPLACED = {
  "no kernel": (("params", "conv3x3", "conv", "kernel"), {}),
  "a kernel of one axis": (("params", "conv3x3", "conv", "kernel"), ONES),
  "a kernel of no inputs": (("params", "conv1x1", "conv", "kernel"), np.ones((1, 1, 0, 4), "f4")),
  "a convolution that is an array": (("params", "conv3x3", "conv"), ONES),
  "a norm that is an array": (("params", "identity", "bn"), ONES),
  "a scale that is a scope": (("params", "identity", "bn", "scale"), {"a": ONES}),
  "statistics that are an array": (("batch_stats", "identity"), ONES),
  "a mean that is a scope": (("batch_stats", "identity", "bn", "mean"), {"a": ONES}),
  "a norm in the place of a skip": (("batch_stats", "skip"), {"bn": {"mean": ONES, "var": ONES}}),
  "an epsilon for each channel": (("batch_stats", "epsilon"), ONES),
  "an epsilon that is a scope": (("batch_stats", "epsilon"), {}),
  "a number for a name": (("batch_stats", 0), ONES),
  "a bias of one number": (("params", "conv3x3", "conv", "bias"), np.ones(1, np.float32)),
}


@pytest.mark.parametrize("change", MISPLACED.values(), ids=MISPLACED)
def test_what_lies_in_the_wrong_place_of_a_layer_is_named(change):
  with pytest.raises(ValueError, match=r"^l(/|:| holds)") as told:
    repjax.reparameterize(*layer_of(change))
  assert str(told.value).isprintable()


def test_shapes_in_place_of_arrays_are_for_eval_shape():
  trees = layer_of((("params", "nothing"), None))
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), trees)
  with pytest.raises(InputError, match=r"^l/.*jax.eval_shape"):
    repjax.reparameterize(*shapes)
  assert jax.eval_shape(repjax.reparameterize, *shapes)["l"]["conv"]["kernel"].shape == (3, 3, 4, 4)


def test_a_tree_that_holds_itself_is_refused():
  circle = {}
  circle["a"] = circle
  for trees in ((circle, {}), ({}, circle)):
    with pytest.raises(InputError, match="holds itself"):
      repjax.reparameterize(*trees)


@pytest.mark.parametrize("held", [[ONES], {"q": (ONES, ONES)}], ids=["a list", "a tuple"])
def test_statistics_in_lists_are_strays(held):
  with pytest.raises(ValueError, match=r"batch_stats hold z.*keep="):
    repjax.reparameterize({"z": [ONES]}, {"z": held})


def test_names_of_strangers_are_escaped():
  params = {"RepNorm_0": {"x\x1b[2J": {"kernel": ONES}}}
  with pytest.raises(ValueError, match="no fold takes") as told:
    repjax.reparameterize(params, {"RepNorm_0": {"bn": {"mean": ONES}}})
  assert str(told.value).isprintable()


WRONG_ARGUMENTS = [
  *(("epsilon", value) for value in (-1e-3, float("nan"), float("inf"), "a", None, ONES)),
  *(("folds", value) for value in (None, ["RepConv"])),
  *(("keep", value) for value in (3, None, [("l", "bn")])),
]


@pytest.mark.parametrize(("name", "value"), WRONG_ARGUMENTS)
def test_wrong_arguments_are_named(name, value):
  trees = layer_of((("params", "nothing"), None))
  with pytest.raises(InputError, match=f"^{name} "):
    repjax.reparameterize(*trees, **{name: value})


def test_an_epsilon_may_be_traced():
  trees = layer_of((("params", "nothing"), None))
  plain = jax.jit(lambda epsilon: repjax.reparameterize(*trees, epsilon=epsilon))(1e-3)
  expected = repjax.reparameterize(*trees, epsilon=1e-3)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), plain, expected)
