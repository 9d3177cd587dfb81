"""MobileOne, RepViT and FastViT: names of the authors and of timm, and timm's outputs."""

import functools
import itertools
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
from repjax.weights.sources import FOLDED
from tests import helpers
from tests.helpers import F64, quick_jit
from tests.weights import cases
from tests.weights.cases import KINDS, assert_same_bits

pytest_plugins = ["tests.training.fixtures"]

MODELS = helpers.mobile_keys()
SMALL = {case["id"]: case for case in helpers.mobile_goldens()["small"]}
SHALLOW = {"stage_sizes": [1, 1, 1, 1]}
TINY = {
  "mobileone_s4": SHALLOW | {"width_multipliers": [0.25] * 4, "se_sizes": [0, 0, 0, 1]},
  "repvit_m0_9": SHALLOW | {"widths": [8, 8, 8, 8]},
  "repvit_m1": SHALLOW | {"widths": [8, 8, 8, 8]},
  "fastvit_sa12": SHALLOW | {"widths": [8, 8, 8, 32]},
}


def shapes(model, source, kind, **overrides):
  """Names and shapes of a state dict of 1000 classes."""
  wanted = sources.expected(model, source, kind, 1000, overrides)
  return {name: list(entry.shape) for name, entry in wanted.items()}


def shallow(model):
  """Overrides that leave one block in each stage, or one pair of blocks."""
  return SHALLOW | ({"se_sizes": [0, 0, 0, 1]} if model == "mobileone_s4" else {})


def depth(model):
  """Number of blocks in each stage that the names of timm's deploy files show."""
  pattern = re.compile(r"stages\.(\d)\.(?:blocks\.)?(\d+)\.")
  blocks = {match.groups() for match in map(pattern.match, MODELS[model]["deploy"]) if match}
  pair = 2 if model.startswith("mobileone") else 1
  return tuple(sum(stage == str(n) for stage, _ in blocks) // pair for n in range(4))


@pytest.mark.parametrize("model", ["mobileone_s0", "repvit_m1_1", "repvit_m2", "fastvit_sa12"])
def test_names_and_shapes_are_timms(model):
  for kind in KINDS:
    assert shapes(model, "timm", kind) == MODELS[model][kind]


@pytest.mark.parametrize(
  "model", helpers.spread(MODELS, ["mobileone_s4", "repvit_m1_1", "fastvit_sa12"])
)
def test_every_variant_has_the_depth_and_the_shapes_of_timms(model):
  # Blocks of a stage are alike: one of each is traced.
  assert repjax.create_model(model).stage_sizes == depth(model)
  kind = "deploy" if model not in FOLDED else "train"
  assert shapes(model, "timm", kind, **shallow(model)).items() <= MODELS[model][kind].items()


@pytest.mark.parametrize("model", MODELS)
def test_published_names_and_shapes_have_the_published_counts(model):
  counts = helpers.mobile_goldens()["counts"][model]
  for kind in KINDS:
    sizes = {name: math.prod(shape) for name, shape in MODELS[model][kind].items()}
    held = sum(size for name, size in sizes.items() if "running_" not in name)
    assert held == counts[f"{kind}_params"]


AUTHORS = {
  ("mobileone_s4", "stage4/block0/RepConv_0/conv1x1/bn/mean"): (
    "stage4.0.rbr_scale.bn.running_mean"
  ),
  ("mobileone_s4", "stage4/block1/RepConv_0/conv1x1/conv/kernel"): (
    "stage4.1.rbr_conv.0.conv.weight"
  ),
  ("mobileone_s4", "stem/RepConv_0/conv/kernel"): "stage0.reparam_conv.weight",
  ("mobileone_s4", "stage3/block19/SqueezeExcite_0/up/bias"): "stage3.19.se.expand.bias",
  ("mobileone_s4", "head/kernel"): "linear.weight",
  ("repvit_m0_9", "stage1/block1/RepConv_mixer/conv1x1/conv/bias"): (
    "features.2.token_mixer.0.conv1.bias"
  ),
  ("repvit_m0_9", "stage2/downsample/before/RepConv_expand/conv1x1/conv/kernel"): (
    "features.3.channel_mixer.m.0.c.weight"
  ),
  ("repvit_m0_9", "stage2/downsample/RepConv_channel/conv1x1/bn/var"): (
    "features.4.token_mixer.2.bn.running_var"
  ),
  ("repvit_m0_9", "stage4/block1/RepConv_project/conv/kernel"): (
    "features.26.channel_mixer.m.2.weight"
  ),
  ("repvit_m1", "stage1/block0/RepConv_mixer/conv1x1/conv/kernel"): (
    "features.1.token_mixer.0.conv1.c.weight"
  ),
  ("fastvit_sa12", "stage1/block1/RepMixer_0/layer_scale/gamma"): (
    "network.0.1.token_mixer.layer_scale"
  ),
  ("fastvit_sa12", "stage2/downsample/RepConv_large/conv7x7/conv/kernel"): (
    "network.1.proj.0.lkb_origin.conv.weight"
  ),
  ("fastvit_sa12", "stage4/SkipConv_positions/inner/kernel"): "network.6.pe.weight",
  ("fastvit_sa12", "stage4/block0/ConvFFN_0/layer_scale/gamma"): "network.7.0.layer_scale_2",
  ("fastvit_s12", "stage4/block0/ConvFFN_0/layer_scale/gamma"): "network.6.0.layer_scale",
  ("fastvit_s12", "final/SqueezeExcite_0/down/kernel"): "conv_exp.se.reduce.weight",
}


@pytest.mark.parametrize(("place", "name"), AUTHORS.items(), ids=map(str, AUTHORS.values()))
def test_the_authors_call_it(place, name):
  model, path = place
  table = sources.naming_of(model, "official")
  assert weights.naming.tensor_name(table, tuple(path.split("/")), axes=4)[0] == name


@pytest.mark.parametrize("kind", KINDS)
def test_files_say_their_model_source_and_kind(monkeypatch, kind):
  monkeypatch.setattr(recognition, "list_models", lambda: ["repvgg_a0", *TINY])
  for model, source in itertools.product(TINY, ("official", "timm")):
    wanted = shapes(model, source, kind, **TINY[model])
    state = {f"module.{name}": np.broadcast_to(np.float32(1), x) for name, x in wanted.items()}
    state |= {"module.x.num_batches_tracked": np.asarray(3)}
    # Both kinds of branches of a RepViT have the same deploy form.
    known = None if kind == "train" or "repvit" not in model else model
    found = weights.recognize(state, known, **TINY[model])
    assert found == (model, source, kind, 1000)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("title", SMALL)
class TestSmall:
  @staticmethod
  @functools.cache
  def found(title):
    """Computes what the tests compare, in one program."""
    case = SMALL[title]
    name, overrides = case["model"], case["overrides"]
    settings = {"num_classes": case["num_classes"], **overrides}
    wanted = sources.expected(name, "timm", "train", case["num_classes"], overrides)
    state = helpers.fill_state_dict({key: entry.shape for key, entry in wanted.items()})
    variables = weights.from_torch(name, state, param_dtype=np.float64, **settings)
    build = functools.partial(repjax.create_model, name, **settings, **F64)
    x = helpers.golden_input(tuple(case["input"]["shape_nchw"]))

    @quick_jit
    def compute(variables):
      params = repjax.reparameterize(*helpers.halves(variables))
      maps = build(features_only=True, deploy=True).apply({"params": params}, x)
      logits = build(deploy=True).apply({"params": params}, x)
      return params, {"logits": logits, **maps}

    return state, variables, *compute(variables)

  def test_the_deploy_form_computes_timms_logits_and_every_map(self, title):
    *_, outputs = self.found(title)
    for name, record in SMALL[title]["expect"].items():
      array = outputs[name] if name == "logits" else helpers.nchw(outputs[name])
      helpers.assert_golden(array, record)

  @pytest.mark.parametrize("source", ["official", "timm"])
  def test_files_come_in_and_go_out_bit_for_bit(self, title, source):
    state, variables, params, _ = self.found(title)
    case = SMALL[title]
    name = case["model"]
    settings = {"num_classes": case["num_classes"], "param_dtype": np.float64, **case["overrides"]}
    exported = weights.to_torch(name, variables, source)
    if source == "timm":
      assert_same_bits(exported, state)
    jax.tree.map(
      np.testing.assert_array_equal, weights.from_torch(name, exported, **settings), variables
    )
    if name in FOLDED:
      with pytest.raises(InputError, match=f"the deploy form of {name} has no names"):
        weights.to_torch(name, {"params": params}, source)
    else:
      plain = weights.to_torch(name, {"params": params}, source)
      again = weights.from_torch(name, plain, **settings)
      jax.tree.map(np.testing.assert_array_equal, again["params"], params)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("source", ["official", "timm"])
def test_norms_in_deploy_files_of_fastvit_are_folded_on_the_way_in(source):
  _, variables, params, _ = TestSmall.found("fastvit")
  case = SMALL["fastvit"]
  name, overrides = case["model"], case["overrides"]
  exported = weights.to_torch(name, variables, source)
  wanted = sources.expected(name, source, "deploy", 10, overrides)
  kept = {key: exported[key] for key in wanted if key in exported}
  for key, entry in wanted.items():  # what their conversion folds too
    if key not in kept:
      kept[key] = entry.layout.to_torch(
        np.asarray(functools.reduce(dict.get, entry.path[1:], params))
      )
  read = weights.from_torch(name, kept, num_classes=10, param_dtype=np.float64, **overrides)
  assert read.keys() == {"params"}
  assert helpers.shapes(read["params"]) == helpers.shapes(params)
  jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-12), read["params"], params)


def test_weights_without_the_second_classifier_say_their_attribute():
  name = "repvit_m0_9"
  wanted = shapes(name, "timm", "train", distilled=False, **TINY[name])
  state = {key: np.ones(shape, np.float32) for key, shape in wanted.items()}
  with pytest.raises(InputError, match="Its layers have distilled=False: pass this"):
    weights.from_torch(name, state, **TINY[name])


@pytest.mark.parametrize("name", TINY)
def test_the_command_takes_a_file(run_command, tmp_path, name):
  wanted = shapes(name, "timm", "train", **TINY[name])
  state = cases.numbered(wanted)
  state = {key: np.abs(value) % 7 / 8 for key, value in state.items()}
  np.savez(tmp_path / "net.npz", **state)
  workdir = tmp_path / "run"
  overrides = ("--overrides", json.dumps(TINY[name]))
  source = ("--from", tmp_path / "net.npz", "--workdir", workdir)
  printed = run_command("import", *source, "--model", name, *overrides)
  assert f"recognized: {name}, timm names, train form" in printed
  _, variables, spec = repjax.load(workdir, deploy=False)
  assert spec.preprocessing == sources.PREPROCESSING[name, "timm"]
  assert_same_bits(weights.to_torch(name, variables, "timm"), state)


def test_a_repvit_without_heads_gets_new_ones_and_their_norms():
  overrides = TINY["repvit_m0_9"]
  whole = cases.random_state("repvit_m0_9", "train", "timm", **overrides)
  body = {name: x for name, x in whole.items() if not name.startswith("head.")}
  assert recognition.recognize(body, "repvit_m0_9", **overrides).num_classes is None
  with pytest.raises(InputError, match="no classifier: draw a new one") as caught:
    weights.from_torch("repvit_m0_9", body, **overrides)
  assert "No model was found" not in str(caught.value)
  variables = weights.from_torch("repvit_m0_9", body, num_classes=5, drop_head=True, **overrides)
  model = repjax.create_model("repvit_m0_9", num_classes=5, **overrides)
  fresh = repjax.init(model, jax.random.key(0), 64)
  assert helpers.shapes(variables) == helpers.shapes(fresh)
  heads = [{name: tree[name]["head"] for name in tree} for tree in (variables, fresh)]
  jax.tree.map(np.testing.assert_array_equal, *heads)
  # The norms of a file that has them are kept.
  kept = weights.from_torch("repvit_m0_9", whole, num_classes=5, drop_head=True, **overrides)
  mean = kept["batch_stats"]["head"]["RepHeads_0"]["head0"]["bn"]["mean"]
  np.testing.assert_array_equal(mean, whole["head.head.bn.running_mean"])
