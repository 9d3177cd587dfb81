"""Weights of RepMLP-ResNet50 (2021): every published name, in and out, outputs, what is told."""

import json
import re

import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.errors import InputError
from repjax.weights import sources
from tests import helpers
from tests.models import repmlp_cases
from tests.models.test_repmlp_resnet import BOTTLENECK, LIGHT, SMALL
from tests.weights import cases, plain_repmlp
from tests.weights.cases import KINDS, assert_same_bits

JSON = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}
OVERRIDES = {key: value for key, value in JSON.items() if key != "num_classes"}
READABLE = ("tile", "local_kernels", "fc3_groups")
SIZES = {key: value for key, value in OVERRIDES.items() if key not in READABLE}


@pytest.mark.parametrize("model", repmlp_cases.key_lists())
def test_every_checkpoint_comes_in_and_goes_out_as_it_was(model):
  for kind in KINDS:
    state = cases.numbered(repmlp_cases.key_lists()[model][kind])
    assert len(state) == entries_without_counters(model, kind)
    assert weights.recognize(state, model) == (model, "official", kind, 1000)
    variables = weights.from_torch(model, state)
    assert variables.keys() == {"train": {"params", "batch_stats"}, "deploy": {"params"}}[kind]
    assert_same_bits(weights.to_torch(model, variables), state)


def entries_without_counters(model, kind):
  counts = repmlp_cases.counts()[model]
  entries = counts[f"{kind}_state_dict_entries"]
  norms = sum(name.endswith("running_var") for name in repmlp_cases.key_lists()[model][kind])
  return entries - norms


def test_tiles_are_turned_as_the_layer_needs_them():
  state = cases.numbered(repmlp_cases.key_lists()[LIGHT]["train"])
  block = weights.from_torch(LIGHT, state)["params"]["stage2"]["block1"]["light_repmlp"]
  prefix = "stage2.1.light_repmlp."
  ours = block["RepDense_0"]["fc"]["dense"]["kernel"]
  theirs = state[f"{prefix}fc3.weight"].reshape(4, 16, 7, 7, 16, 7, 7)  # (g, O/g, h, w, C/g, h, w)
  np.testing.assert_array_equal(ours, theirs.transpose(0, 5, 6, 4, 2, 3, 1))
  assert np.shares_memory(ours, theirs)
  scale = state[f"{prefix}fc3_bn.weight"].reshape(4, 16, 7, 7).transpose(0, 2, 3, 1)
  np.testing.assert_array_equal(block["RepDense_0"]["fc"]["bn"]["scale"], scale)
  fc1 = block["GlobalPerceptron_0"]["dense"]["fc1"]["kernel"]
  np.testing.assert_array_equal(fc1, state[f"{prefix}fc1_fc2.fc1.weight"].T)


def test_a_new_classifier_is_drawn_without_the_size_or_the_draw_of_others(monkeypatch):
  monkeypatch.delattr("repjax.models.initialize._orthogonal")
  state = cases.random_state(LIGHT, num_classes=5, **OVERRIDES)
  variables = weights.from_torch(LIGHT, state, num_classes=3, drop_head=True, **OVERRIDES)
  assert variables["params"]["head"]["kernel"].shape == (32, 3)


def test_there_are_no_weights_for_cifar():
  with pytest.raises(InputError, match="unknown model with importable weights 'repmlp_cifar'"):
    weights.from_torch("repmlp_cifar", {"linear.weight": np.zeros((10, 64))})


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("model", helpers.spread([LIGHT, BOTTLENECK], [LIGHT]))
def test_networks_of_other_sizes_compute_what_the_definition_says_of_their_state_dicts(model):
  sizes = OVERRIDES | {"stage_sizes": [1, 2, 1, 1], "repmlp_stages": [2], "fc3_groups": 2}
  sizes |= {"narrowing": [2]}
  arguments = {"num_classes": 5, "param_dtype": np.float64, **sizes}
  wanted = sources.expected(model, "official", "train", 5, sizes)
  state = helpers.fill_state_dict({name: entry.shape for name, entry in wanted.items()})
  x = helpers.golden_input((1, 3, 96, 96))
  expected = plain_repmlp.resnet(state, x, sizes["stage_sizes"], tile=3)

  spec = repjax.ModelSpec.usual(model, 5, sizes)
  trained = weights.from_torch(model, state, **arguments)
  logits = helpers.quick_jit(spec.create_model(**helpers.F64).apply)(trained, x)
  helpers.assert_close(logits, expected, 1e-12)

  assert_same_bits(weights.to_torch(model, trained), state)
  assert (spec.preprocessing.image_size, spec.preprocessing.resize_size) == (96, 110)

  params = helpers.quick_jit(repjax.reparameterize)(trained["params"], trained["batch_stats"])
  deployed = weights.to_torch(model, {"params": params})
  theirs = plain_repmlp.resnet(deployed, x, sizes["stage_sizes"], tile=3)
  helpers.assert_close(theirs, expected, 1e-12)
  again = weights.from_torch(model, deployed, **arguments)
  assert helpers.shapes(again["params"]) == helpers.shapes(params)
  assert_same_bits(weights.to_torch(model, again), deployed)
  logits = helpers.quick_jit(spec.create_model(deploy=True, **helpers.F64).apply)(again, x)
  helpers.assert_close(logits, expected, 1e-12)


def refusal(model, state, **arguments):
  """Returns the first line of the text with which `from_torch` refuses a state dict."""
  with pytest.raises(InputError) as caught:
    weights.from_torch(model, state, num_classes=5, **arguments)
  return str(caught.value).split("\n")[0]


def blank(model, kind, **overrides):
  """Returns a state dict of ones."""
  wanted = sources.expected(model, "official", kind, 5, overrides)
  return {name: np.broadcast_to(np.float32(1), entry.shape) for name, entry in wanted.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_tile_kernels_and_groups_that_are_not_the_models_are_named(kind):
  state = blank(LIGHT, kind, **OVERRIDES)
  text = refusal(LIGHT, state, **SIZES)
  said = {key: OVERRIDES[key] for key in READABLE if (key, kind) != ("local_kernels", "deploy")}
  spelled = ", ".join(f"{key}={SMALL[key]}" for key in said)
  assert f"Its layers have {spelled}: pass this" in text
  way_out = json.loads(re.search("--overrides '(.*)'", text)[1])
  assert way_out == SIZES | said
  # Local convolutions, which a deploy form does not show, are no larger than tiles.
  weights.from_torch(LIGHT, state, num_classes=5, **way_out | {"local_kernels": [1, 3]})


def test_the_tile_is_not_guessed_from_a_damaged_layer():
  state = blank(LIGHT, "train", **OVERRIDES)
  for name in [name for name in state if name.endswith("fc3.weight")]:
    state[name] = state[name][:-1, :, 0]
  state = {name: value for name, value in state.items() if "stage3.1.light_conv" not in name}
  assert "Its" not in refusal(LIGHT, state, **OVERRIDES)


@pytest.mark.parametrize("kind", helpers.spread(KINDS, ["deploy"]))
def test_weights_of_other_groups_say_of_which_model(kind):
  sizes = {key: value for key, value in OVERRIDES.items() if key != "fc3_groups"}
  sizes |= {"widths": [16, 128, 128, 32], "stage_sizes": [1, 3, 3, 1]}
  state = blank(BOTTLENECK, kind, **sizes)
  text = refusal("repmlp_resnet50_bottleneck_g4", state, **sizes)
  assert f"Its names and shapes are those of {BOTTLENECK}." in text
  assert weights.recognize(state, **sizes) == (BOTTLENECK, "official", kind, 5)
