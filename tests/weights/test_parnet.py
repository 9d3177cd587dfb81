"""The authors' files of ParNet: names, outputs, norms in fused files, and the activation."""

import functools
import json
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
from tests.weights import cases
from tests.weights.cases import KINDS, assert_same_bits

pytest_plugins = ["tests.training.fixtures"]

NAME = "parnet_s"
SHALLOW = {"stage_sizes": [1, 1, 1]}
TINY = SHALLOW | {"widths": [4, 6, 8, 10]}
RELU = {"act": "relu"}


def shapes(model, kind, **overrides):
  """Names and shapes of a state dict of 1000 classes."""
  wanted = sources.expected(model, "official", kind, 1000, overrides)
  return {name: list(entry.shape) for name, entry in wanted.items()}


def ones(model, kind, **overrides):
  """Returns a state dict of ones."""
  wanted = shapes(model, kind, **overrides)
  return {name: np.broadcast_to(np.float32(1), shape) for name, shape in wanted.items()}


def repeated(one, depth):
  """Names and shapes of a network from those of one with a block a stream."""
  for name, shape in one.items():
    match = re.fullmatch(r"streams\.(\d)\.0\.(.*)", name)
    for block in range(depth[int(match[1])] if match else 1):
      yield f"streams.{match[1]}.{block}.{match[2]}" if match else name, shape


@pytest.mark.parametrize("model", cases.parnet_keys())
def test_names_and_shapes_are_the_authors(model):
  depth = repjax.create_model(model).stage_sizes
  for kind in KINDS:  # blocks of a stream are alike: one of each is traced
    theirs = cases.parnet_keys()[model][kind]
    assert dict(repeated(shapes(model, kind, **SHALLOW), depth)) == theirs


@pytest.mark.parametrize("model", cases.parnet_keys())
def test_published_names_and_shapes_have_the_published_counts(model):
  # The test before holds the models to the same lists.
  counts = helpers.parnet_goldens()["counts"][model]
  for kind, buffers in (("train", "bn_buffers"), ("deploy", "deploy_bn_buffers")):
    sizes = {name: math.prod(shape) for name, shape in cases.parnet_keys()[model][kind].items()}
    assert sum(size for name, size in sizes.items() if "running_" in name) == counts[buffers]
    assert sum(sizes.values()) == counts[f"{kind}_params"] + counts[buffers]


@pytest.mark.parametrize("kind", KINDS)
def test_files_say_their_model_by_shapes(monkeypatch, kind):
  models = [name for name in sources.NAMINGS if name.startswith("parnet")]
  monkeypatch.setattr(recognition, "list_models", lambda: ["repvgg_a0", *models])
  for model in models:
    state = {f"module.{name}": x for name, x in ones(model, kind, **SHALLOW).items()}
    state |= {"module.combine.0.b1.num_batches_tracked": np.asarray(3)}
    assert weights.recognize(state, **SHALLOW) == (model, "official", kind, 1000)


def test_a_backbone_takes_a_classifiers_weights_and_says_how():
  with pytest.raises(InputError, match="features_only"):
    weights.from_torch(NAME, ones(NAME, "train", **TINY), features_only=True, **RELU, **TINY)


def test_a_training_file_comes_in_and_goes_out_as_it_was():
  state = cases.numbered(cases.parnet_keys()[NAME]["train"])
  variables = weights.from_torch(NAME, state, **RELU)
  assert variables.keys() == {"params", "batch_stats"}
  assert_same_bits(weights.to_torch(NAME, variables), state)
  fusion = variables["params"]["fusion2"]
  gate = state["downsamples_2.1.2.block.se.cvsig.conv.weight"]
  np.testing.assert_array_equal(fusion["gate"]["kernel"], gate[:, :, 0, 0].T)
  pooled = fusion["RepConv_0"]["avg2x2_conv1x1"]["conv"]["kernel"]
  theirs = state["downsamples_2.1.2.block.rbr_1x1.1.conv.weight"]
  np.testing.assert_array_equal(pooled, theirs.transpose(2, 3, 1, 0))


def fused(state):
  """Converts a training-form state dict as the authors do, who fold convolutions only."""

  def convolution(prefix):
    scale, bias, mean, var = (
      state[f"{prefix}.bn.{name}"] for name in ("weight", "bias", "running_mean", "running_var")
    )
    scale = scale / np.sqrt(var + 1e-5)
    return state[f"{prefix}.conv.weight"] * scale[:, None, None, None], bias - mean * scale

  plain = {name: value for name, value in state.items() if not re.search("rbr_(dense|1x1)", name)}
  for block in {name.split(".rbr_dense")[0] for name in state if "rbr_dense" in name}:
    kernel, bias = convolution(f"{block}.rbr_dense")
    if f"{block}.rbr_1x1.conv.weight" in state:
      small, small_bias = convolution(f"{block}.rbr_1x1")
      kernel[:, :, 1:2, 1:2] += small
    else:
      small, small_bias = convolution(f"{block}.rbr_1x1.1")
      kernel[:, :, 1:, 1:] += small / 4
    plain |= {f"{block}.rbr_dense.weight": kernel, f"{block}.rbr_dense.bias": bias + small_bias}
  return plain


class TestFusedFiles:
  @pytest.mark.proof
  @pytest.mark.usefixtures("x64")
  def test_their_norms_are_folded_on_the_way_in_and_the_authors_outputs_come_out(self):
    golden = {case["id"]: case for case in helpers.parnet_goldens()["cases"]}
    golden = {act: golden[f"parnet_tiny_{act}"] for act in ("relu", "silu")}
    spec = golden["relu"]["spec"]
    sizes = {"stage_sizes": [count - 1 for count in spec["num_blocks"][:3]]}
    sizes |= {"widths": spec["planes"]}
    wanted = sources.expected(NAME, "official", "train", 10, sizes)
    state = helpers.fill_state_dict({name: entry.shape for name, entry in wanted.items()})
    assert weights.recognize(fused(state), NAME, **sizes) == (NAME, "official", "deploy", 10)
    trained, read = (
      weights.from_torch(NAME, each, num_classes=10, param_dtype=np.float64, **RELU, **sizes)
      for each in (state, fused(state))
    )
    assert_same_bits(weights.to_torch(NAME, trained), state)
    params = helpers.quick_jit(repjax.reparameterize)(*helpers.halves(trained))
    assert helpers.shapes(read) == helpers.shapes({"params": params})
    jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-12), read["params"], params)

    x = helpers.golden_input(tuple(golden["relu"]["input"]["shape_nchw"]))

    @helpers.quick_jit
    def logits(variables):
      build = functools.partial(repjax.create_model, NAME, num_classes=10, deploy=True)
      return {act: build(act=act, **sizes, **helpers.F64).apply(variables, x) for act in golden}

    for act, ours in logits(read).items():
      helpers.assert_golden(ours, golden[act]["expect"]["logits"])

  def test_a_file_of_both_forms_is_refused(self):
    state = ones(NAME, "train", **TINY) | {"combine.2.block.rbr_dense.bias": np.zeros(8)}
    with pytest.raises(InputError, match=r"mixes both kinds: of the deploy form are combine\.2"):
      weights.from_torch(NAME, state, **RELU, **TINY)

  def test_they_cannot_be_written(self):
    params = repjax.ModelSpec.usual(NAME, 10, TINY).variable_shapes(deploy=True)
    with pytest.raises(InputError, match=f"the deploy form of {NAME} has no names .* --form train"):
      weights.to_torch(NAME, params)


class TestActivation:
  @pytest.mark.parametrize("kind", KINDS)
  def test_it_has_to_be_said(self, kind):
    said = r"do not show their act\. .* weights need act='relu', .* silu .* Pass act"
    with pytest.raises(InputError, match=said):
      weights.from_torch(NAME, ones(NAME, kind, **TINY), **TINY)

  def test_what_does_not_fit_is_said_first(self):
    with pytest.raises(InputError, match=f"do not fit {NAME}.* Its names and .* of parnet_m"):
      weights.from_torch(NAME, ones("parnet_m", "train", **SHALLOW), **SHALLOW)

  def test_the_script_takes_the_released_weights(self, run_command, tmp_path):
    state = helpers.fill_state_dict(shapes(NAME, "deploy", **TINY))
    np.savez(tmp_path / "net.npz", **{name: np.float32(x) for name, x in state.items()})

    def imported(folder, overrides):
      arguments = ("--model", NAME, "--overrides", json.dumps(overrides))
      workdir = tmp_path / folder
      source = ("--from", tmp_path / "net.npz", "--workdir", workdir)
      printed = run_command("import", *source, *arguments)
      return repjax.load(workdir), printed, json.loads((workdir / "import.json").read_text())

    (model, variables, spec), printed, record = imported("relu", TINY)
    assert (model.act, model.deploy, spec.overrides) == ("relu", True, {**RELU, **TINY})
    assert f"recognized: {NAME}, official names, deploy form" in printed
    assert 'act: relu, as the released weights need it (--overrides \'{"act": ' in printed
    assert record["assumed"] == RELU
    expected = weights.from_torch(NAME, state, **RELU, **TINY)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
    assert (spec.preprocessing.image_size, spec.preprocessing.resize_size) == (224, 256)

    (model, *_), printed, record = imported("silu", {"act": "silu", **TINY})
    assert (model.act, record["assumed"]) == ("silu", {})
    assert "act:" not in printed


class TestOtherModels:
  @pytest.mark.parametrize("kind", KINDS)
  @pytest.mark.parametrize("given", ["parnet_s_96", "parnet_xl"])
  def test_weights_of_another_say_of_which(self, given, kind):
    with pytest.raises(InputError, match=rf"Its names and shapes are those of {given}\."):
      weights.from_torch(NAME, ones(given, kind, **SHALLOW), **RELU, **SHALLOW)

  def test_names_of_another_family_are_none_of_its_own(self):
    said = rf"no name in this state dict is one of {NAME}'s.*recognize\(state_dict\)"
    with pytest.raises(InputError, match=said):
      weights.from_torch(NAME, cases.random_state("repvgg_a0", **cases.TINY), **RELU)

  def test_there_are_no_names_for_what_the_authors_have_not(self):
    state = ones(NAME, "train", **TINY)
    with pytest.raises(InputError, match=rf"no names are known for a {NAME} with .*stem_blocks"):
      weights.from_torch(NAME, state, stem_blocks=1, **RELU, **TINY)
    with pytest.raises(InputError, match="with importable weights 'parnet_cifar_s'; did you mean"):
      weights.from_torch("parnet_cifar_s", state, **RELU)
