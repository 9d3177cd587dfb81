"""Weights of RepMLP-ResNet50 (2021): every published name, in and out, at the model's own size."""

import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.errors import InputError
from tests import helpers
from tests.models import repmlp_cases
from tests.models.test_repmlp_resnet import BOTTLENECK, LIGHT, SMALL
from tests.weights import cases
from tests.weights.cases import KINDS, assert_same_bits

JSON = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}
OVERRIDES = {key: value for key, value in JSON.items() if key != "num_classes"}


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


def test_the_model_is_found_by_names_and_shapes(monkeypatch):
  few = ["resnet50", "repmlp_resnet50_bottleneck_g4", BOTTLENECK]
  monkeypatch.setattr(weights.convert, "list_models", lambda: few)
  state = cases.numbered(repmlp_cases.key_lists()[BOTTLENECK]["train"])
  assert weights.recognize(state) == (BOTTLENECK, "official", "train", 1000)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model", [LIGHT, BOTTLENECK])
def test_networks_of_other_sizes_are_taken_at_the_image_size_that_they_are_made_for(model, kind):
  spec = repjax.ModelSpec.usual(model, 5, OVERRIDES)
  assert (spec.preprocessing.image_size, spec.preprocessing.resize_size) == (96, 110)
  state = cases.random_state(model, kind, num_classes=5, counters=False, **OVERRIDES)
  variables = weights.from_torch(model, state, num_classes=5, **OVERRIDES)
  expected = spec.variable_shapes(deploy=kind == "deploy")
  assert helpers.shapes(variables) == helpers.shapes(expected)
  assert_same_bits(weights.to_torch(model, variables), state)


def test_a_new_classifier_is_drawn_without_the_size_or_the_draw_of_others(monkeypatch):
  monkeypatch.delattr("repjax.models.initialize._orthogonal")
  state = cases.random_state(LIGHT, num_classes=5, **OVERRIDES)
  variables = weights.from_torch(LIGHT, state, num_classes=3, drop_head=True, **OVERRIDES)
  assert variables["params"]["head"]["kernel"].shape == (32, 3)


def test_there_are_no_weights_for_cifar():
  with pytest.raises(InputError, match="unknown model with importable weights 'repmlp_cifar'"):
    weights.from_torch("repmlp_cifar", {"linear.weight": np.zeros((10, 64))})
