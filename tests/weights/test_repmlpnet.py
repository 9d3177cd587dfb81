"""The authors' files of RepMLPNet: names, counts, outputs, and norms in their deploy files."""

import math
import re

import jax
import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.errors import InputError
from repjax.weights import recognition, sources
from tests import helpers
from tests.weights.cases import KINDS, assert_same_bits

NAME = "repmlpnet_t224"
TINY = {
  "stage_sizes": [1, 1],
  "widths": [8, 16],
  "tiles": [[4, 2], [2, 3]],
  "share_sets": [2, 4],
  "local_kernels": [1, 3],
}
SHALLOW = {"stage_sizes": [1, 1, 1, 1]}
NETWORKS = ["repmlpnet_tiny_2stage", "repmlpnet_tiny_4stage"]


def size(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(
  "model", helpers.spread(sorted(helpers.repmlpnet_goldens()["counts"]), ["repmlpnet_t224"])
)
def test_names_shapes_and_counts_are_the_authors(model):
  golden, lists = helpers.repmlpnet_goldens()["counts"][model], helpers.repmlpnet_keys()[model]
  depth = repjax.create_model(model).stage_sizes
  for kind in KINDS:  # blocks of a stage are alike: one of each is traced
    wanted = sources.expected(model, "official", kind, 1000, SHALLOW)
    one = {name: list(entry.shape) for name, entry in wanted.items()}
    assert dict(repeated(one, depth)) == lists[kind]
  stats = {name for name in lists["train"] if "running_" in name}
  assert count(lists["train"], stats) == golden["bn_buffers"]
  assert count(lists["train"], lists["train"].keys() - stats) == golden["train_params"]
  theirs = count(lists["deploy"], lists["deploy"].keys() - stats)
  assert theirs == golden["deploy_params"]

  spec = repjax.ModelSpec.usual(model, overrides=SHALLOW)
  plain = spec.variable_shapes(deploy=True)
  assert plain.keys() == {"params"}
  folded = helpers.folded_beyond_the_authors(spec.create_model())
  assert size(plain["params"]) == count(one, one.keys() - stats) - folded


def repeated(one, depth):
  """Names and shapes of a network from those of one with a block a stage."""
  for name, shape in one.items():
    match = re.fullmatch(r"stages\.(\d)\.0\.(.*)", name)
    if not match:
      yield name, shape
      continue
    for block in range(depth[int(match[1])]):
      yield f"stages.{match[1]}.{block}.{match[2]}", shape


def count(shapes, names):
  """Numbers in some tensors of a state dict."""
  return sum(math.prod(shapes[name]) for name in names)


def train_state(num_classes=1000, **overrides):
  """Returns a training-form state dict by the fill rule, in float64."""
  wanted = sources.expected(NAME, "official", "train", num_classes, overrides)
  return helpers.fill_state_dict({name: entry.shape for name, entry in wanted.items()})


def fold_fc3(state, params):
  """Converts a training-form state dict as the authors do, who fold fc3 only.

  Args:
    state: state dict of TINY.
    params: parameters of the deploy form of TINY.
  """
  plain = {name: value for name, value in state.items() if not re.search("repconv|fc3", name)}
  for stage in (0, 1):
    dense = params[f"stage{stage + 1}"]["block0"]["RepDense_0"]["dense"]
    kernel = np.asarray(dense["kernel"])  # (S, h, w, 1, h, w, 1)
    pixels = kernel.shape[1] * kernel.shape[2]
    matrix = kernel.reshape(-1, pixels, pixels).swapaxes(1, 2).reshape(-1, pixels, 1, 1)
    name = f"stages.{stage}.0.repmlp_block.fc3"
    plain |= {f"{name}.weight": matrix, f"{name}.bias": np.ravel(dense["bias"])}
  return plain


@pytest.fixture(scope="module")
def deploy_state():
  """A deploy file by the fill rule."""
  wanted = sources.expected(NAME, "official", "deploy", 1000, TINY)
  return helpers.fill_state_dict({name: entry.shape for name, entry in wanted.items()})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", NETWORKS)
def test_the_authors_outputs_come_out(name):
  (case,) = (case for case in helpers.repmlpnet_goldens()["cases"] if case["id"] == name)
  spec, expect = case["spec"], case["expect"]
  overrides = {
    "stage_sizes": spec["num_blocks"],
    "widths": spec["channels"],
    "tiles": [list(tile) for tile in zip(spec["hs"], spec["ws"])],
    "share_sets": spec["sharesets"],
    "local_kernels": spec["reparam_conv_k"],
    "patch_size": spec["patch_size"],
  }
  x, state = helpers.golden_input(tuple(case["input"]["shape_nchw"])), train_state(10, **overrides)
  arguments = {"num_classes": 10, **overrides}
  variables = weights.from_torch(NAME, state, param_dtype=np.float64, **arguments)
  assert_same_bits(weights.to_torch(NAME, variables), state)
  model, plain = (
    repjax.create_model(NAME, deploy=form, **arguments, **helpers.F64) for form in (False, True)
  )
  params = helpers.quick_jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  helpers.assert_golden(helpers.quick_jit(model.apply)(variables, x), expect["logits"])
  helpers.assert_golden(helpers.quick_jit(plain.apply)({"params": params}, x), expect["logits"])
  assert size(variables["params"]) == expect["train_params"]
  assert size(params) == expect["deploy_params"] - helpers.folded_beyond_the_authors(model)


class TestDeployFiles:
  @pytest.mark.usefixtures("x64")
  def test_what_they_hold_of_norms_is_folded_on_the_way_in(self):
    state = train_state(**TINY)
    trained = weights.from_torch(NAME, state, param_dtype=np.float64, **TINY)
    fold = helpers.quick_jit(repjax.reparameterize)
    expected = fold(trained["params"], trained["batch_stats"])
    state = fold_fc3(state, expected)
    assert weights.recognize(state, NAME, **TINY) == (NAME, "official", "deploy", 1000)
    read = weights.from_torch(NAME, state, param_dtype=np.float64, **TINY)
    assert read.keys() == {"params"}
    assert helpers.shapes(read["params"]) == helpers.shapes(expected)
    jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-12), read["params"], expected)

  def test_float64_stays_float64_without_jaxs_64_bits(self, deploy_state):
    read = weights.from_torch(NAME, deploy_state, param_dtype=np.float64, **TINY)
    leaves = jax.tree.leaves(read)
    assert {(type(leaf), leaf.dtype) for leaf in leaves} == {(np.ndarray, np.dtype(np.float64))}
    affine = read["params"]["stage1"]["block0"]["RepNorm_0"]["affine"]["scale"]
    bn, var = (deploy_state[f"stages.0.0.prebn1.{name}"] for name in ("weight", "running_var"))
    assert helpers.relative_error(affine, bn / np.sqrt(var + 1e-5)) <= 1e-14

  def test_a_file_of_both_forms_is_refused(self):
    state = train_state(**TINY)
    state["stages.0.0.repmlp_block.fc3.bias"] = np.zeros(16)
    with pytest.raises(InputError, match="It mixes both kinds: of the deploy form are"):
      weights.from_torch(NAME, state, **TINY)

  def test_they_cannot_be_written(self):
    spec = repjax.ModelSpec.usual(NAME, 10, TINY)
    with pytest.raises(InputError, match=f"the deploy form of {NAME} has no names .* --form train"):
      weights.to_torch(NAME, spec.variable_shapes(deploy=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_new_classifier_keeps_the_norm_in_front_of_it(kind, deploy_state):
  state = deploy_state if kind == "deploy" else train_state(**TINY)
  with pytest.raises(InputError, match="The file has 1000 classes"):
    weights.from_torch(NAME, state, num_classes=7, **TINY)
  read = weights.from_torch(NAME, state, num_classes=7, drop_head=True, **TINY)
  head = read["params"]["head"]["RepHead_0"]
  model = repjax.create_model(NAME, num_classes=7, **TINY)
  fresh = repjax.init(model, jax.random.key(0), 48)["params"]["head"]["RepHead_0"]["dense"]
  assert fresh["kernel"].shape == (16, 7)
  if kind == "train":
    assert helpers.relative_error(head["bn"]["scale"], state["head_norm.weight"]) <= 1e-6
    np.testing.assert_array_equal(head["dense"]["kernel"], fresh["kernel"])
  else:
    scale = state["head_norm.weight"] / np.sqrt(state["head_norm.running_var"] + 1e-5)
    assert helpers.relative_error(head["dense"]["kernel"], fresh["kernel"] * scale[:, None]) <= 1e-5


def test_an_imported_model_sees_whole_squares_of_its_own_size(tmp_path, deploy_state):
  np.savez(tmp_path / "net.npz", **{k: np.float32(v) for k, v in deploy_state.items()})
  weights.import_weights(
    str(tmp_path / "net.npz"), tmp_path / "net", model_name=NAME, overrides=TINY
  )
  _, variables, spec = repjax.load(tmp_path / "net")
  assert (spec.preprocessing.image_size, spec.preprocessing.resize_size) == (48, 48)
  assert spec.preprocessing.interpolation == "bilinear"
  expected = weights.from_torch(NAME, deploy_state, **TINY)
  jax.tree.map(np.testing.assert_array_equal, variables, expected)
  with pytest.raises(InputError, match="the deploy form of"):
    weights.export_weights(tmp_path / "net", tmp_path / "out.safetensors")


def shallow_state(kind):
  """Returns a state dict of ones with one block in each stage."""
  wanted = sources.expected(NAME, "official", kind, 1000, SHALLOW)
  return {name: np.broadcast_to(np.float32(1), entry.shape) for name, entry in wanted.items()}


def test_a_file_says_its_model_by_shapes(monkeypatch):
  monkeypatch.setattr(recognition, "list_models", lambda: ["repvgg_a0", "repmlpnet_t256", NAME])
  state = {f"module.{name}": value for name, value in shallow_state("train").items()}
  state |= {"module.head_norm.num_batches_tracked": np.asarray(3)}
  assert weights.recognize(state, **SHALLOW) == (NAME, "official", "train", 1000)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_for_another_image_size_say_of_which_model(kind):
  with pytest.raises(InputError, match=rf"Its names and shapes are those of {NAME}\."):
    weights.from_torch("repmlpnet_t256", shallow_state(kind), **SHALLOW)
