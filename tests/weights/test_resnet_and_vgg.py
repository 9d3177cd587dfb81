"""ResNet and VGG in the names of torchvision, timm and, for ResNet-50, the authors of RepMLP."""

import gzip
import json

import jax
import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.errors import InputError
from repjax.weights import recognition, sources
from repjax.weights.naming import entries
from repjax.weights.vgg import MAP_AS_DENSE
from tests import helpers
from tests.weights import cases
from tests.weights.cases import KINDS, assert_same_bits

RESNET = {"stage_sizes": [1, 2, 1, 1], "widths": [8, 8, 12, 16], "stem_features": 4}
VGG = {"widths": [2, 3, 4, 4, 5], "hidden": 6}
NARROW = {"resnet50": RESNET, "resnet18": RESNET | {"widths": [4, 6, 8, 10]}, "vgg16": VGG}


def torchvision_resnet(block, stage_sizes, kind):
  """Names and shapes in torchvision's order of layers: {name: shape}."""
  expansion, state = {"basic": 1, "bottleneck": 4}[block], {}

  def conv_bn(conv, norm, outputs, inputs, size):
    state[f"{conv}.weight"] = [outputs, inputs, size, size]
    if kind == "deploy":
      state[f"{conv}.bias"] = [outputs]
    else:
      leaves = ("weight", "bias", "running_mean", "running_var")
      state.update({f"{norm}.{leaf}": [outputs] for leaf in leaves})

  conv_bn("conv1", "bn1", 64, 3, 7)
  inputs = 64
  for stage, blocks in enumerate(stage_sizes):
    inner = 64 * 2**stage
    outputs = inner * expansion
    for number in range(blocks):
      at = f"layer{stage + 1}.{number}"
      widths = [inputs, inner, outputs] if block == "basic" else [inputs, inner, inner, outputs]
      sizes = [3, 3] if block == "basic" else [1, 3, 1]
      for layer, size in enumerate(sizes, 1):
        conv_bn(f"{at}.conv{layer}", f"{at}.bn{layer}", widths[layer], widths[layer - 1], size)
      if number == 0 and inputs != outputs:
        conv_bn(f"{at}.downsample.0", f"{at}.downsample.1", outputs, inputs, 1)
      inputs = outputs
  return state | {"fc.weight": [1000, inputs], "fc.bias": [1000]}


def torchvision_vgg(widths, hidden, num_classes, kind):
  """Names and shapes of vgg16_bn, or of vgg16 in deploy form."""
  state, number, inputs = {}, 0, 3
  for size, width in zip((2, 2, 3, 3, 3), widths):
    for _ in range(size):
      state[f"features.{number}.weight"] = [width, inputs, 3, 3]
      state[f"features.{number}.bias"] = [width]
      if kind == "train":
        for leaf in ("weight", "bias", "running_mean", "running_var"):
          state[f"features.{number + 1}.{leaf}"] = [width]
      number, inputs = number + (3 if kind == "train" else 2), width
    number += 1
  layers = {0: (hidden, inputs * 49), 3: (hidden, hidden), 6: (num_classes, hidden)}
  for layer, shape in layers.items():
    state[f"classifier.{layer}.weight"] = list(shape)
    state[f"classifier.{layer}.bias"] = [shape[0]]
  return state


def to_timm_vgg(state):
  """Renames torchvision's vgg16 to timm's names, where fully connected layers are convolutions."""
  names = {"classifier.0": "pre_logits.fc1", "classifier.3": "pre_logits.fc2"}
  names["classifier.6"] = "head.fc"
  result = {}
  for name, value in state.items():
    layer, _, leaf = name.rpartition(".")
    if leaf == "weight" and layer in ("classifier.0", "classifier.3"):
      size = 7 if layer == "classifier.0" else 1
      value = value.reshape(len(value), -1, size, size)
    result[f"{names.get(layer, layer)}.{leaf}"] = value
  return result


def beside_repmlp():
  """Names and shapes of the RepMLP authors' plain ResNet-50: {"train", "deploy"}."""
  with gzip.open(helpers.GOLDENS / "resnet50_beside_repmlp.json.gz", "rt") as file:
    return json.load(file)


def there_and_back(model, state, source, kind, **overrides):
  """Variables from a state dict, which must be recognized and come back bit by bit."""
  heads = ("fc.bias", "head.fc.bias", "classifier.6.bias", "linear.bias")
  num_classes = next(len(state[name]) for name in heads if name in state)
  assert weights.recognize(state, model, **overrides) == (model, source, kind, num_classes)
  variables = weights.from_torch(model, state, num_classes=num_classes, **overrides)
  assert_same_bits(weights.to_torch(model, variables, source), state)
  spec = repjax.ModelSpec(model, num_classes, overrides)
  shapes = spec.variable_shapes(deploy=kind == "deploy")
  assert helpers.shapes(variables) == helpers.shapes(shapes)
  return variables


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("model", "block", "stage_sizes"),
  [("resnet18", "basic", (2, 2, 2, 2)), ("resnet50", "bottleneck", (3, 4, 6, 3))],
)
def test_torchvisions_resnets_come_in_and_go_out_as_they_were(model, block, stage_sizes, kind):
  state = cases.numbered(torchvision_resnet(block, stage_sizes, kind))
  there_and_back(model, state, "official", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_the_resnet_beside_repmlp_is_the_same_under_other_names(kind):
  state = cases.numbered(beside_repmlp()[kind])
  variables = there_and_back("resnet50", state, "repmlp", kind)
  theirs = weights.to_torch("resnet50", variables)
  np.testing.assert_array_equal(
    theirs["layer2.0.downsample.0.weight"], state["stage2.0.shortcut.conv.weight"]
  )
  shapes = torchvision_resnet("bottleneck", (3, 4, 6, 3), kind)
  assert {name: list(value.shape) for name, value in theirs.items()} == shapes


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["official", "timm"])
def test_vgg_comes_in_and_goes_out_as_it_was(source, kind):
  state = cases.numbered(torchvision_vgg(VGG["widths"], VGG["hidden"], 7, kind))
  official = there_and_back("vgg16", state, "official", kind, **VGG)
  if source == "timm":
    other = there_and_back("vgg16", to_timm_vgg(state), "timm", kind, **VGG)
    jax.tree.map(np.testing.assert_array_equal, other, official)


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_vgg_has_torchvisions_names_and_shapes(kind):
  shapes = repjax.ModelSpec("vgg16").variable_shapes(deploy=kind == "deploy")
  found = entries(sources.NAMINGS["vgg16"]["official"], shapes)
  expected = torchvision_vgg((64, 128, 256, 512, 512), 4096, 1000, kind)
  assert {name: list(entry.shape) for name, entry in found.items()} == expected


def test_the_first_fully_connected_layer_reads_the_map_channels_first():
  ours = np.arange(7 * 7 * 3 * 2).reshape(7, 7, 3, 2)
  theirs = MAP_AS_DENSE.to_torch(ours)
  for row, column, channel, output in np.ndindex(*ours.shape):
    place = np.ravel_multi_index((channel, row, column), (3, 7, 7))
    assert theirs[output, place] == ours[row, column, channel, output]
  np.testing.assert_array_equal(MAP_AS_DENSE.from_torch(theirs), ours)
  assert np.shares_memory(MAP_AS_DENSE.from_torch(theirs), theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("model", "source"), [("resnet18", "official"), ("resnet50", "repmlp"), ("vgg16", "timm")]
)
def test_networks_of_other_shapes(model, source, kind):
  state = cases.random_state(model, kind, source, 7, counters=False, **NARROW[model])
  there_and_back(model, state, source, kind, **NARROW[model])


def test_timms_names_of_a_resnet_are_torchvisions():
  for model in ("resnet18", "resnet50"):
    assert sources.NAMINGS[model]["timm"] == sources.NAMINGS[model]["official"]


def test_a_name_in_the_file_s_name_finds_the_model(monkeypatch):
  monkeypatch.setattr(recognition, "list_models", lambda: ["resnet18", "vgg16", "resnet34"])
  state = cases.numbered(torchvision_resnet("basic", (3, 4, 6, 3), "train"))
  for hint in ("/models/resnet34-b627a593.pth", ""):
    assert weights.recognize(state, hint=hint) == ("resnet34", "official", "train", 1000)


@pytest.mark.parametrize(("model", "head"), [("resnet18", "fc"), ("vgg16", "classifier.6")])
def test_all_that_does_not_fit_is_in_one_error(model, head):
  state = cases.random_state(model, num_classes=7, **NARROW[model])
  name = next(name for name in state if name.endswith("0.weight") or name == "conv1.weight")
  mean = next(name for name in state if name.endswith("running_mean"))
  state["extra.weight"] = state.pop(mean)
  state[name] = state[name][:, :1]
  with pytest.raises(InputError) as caught:
    weights.from_torch(model, state, num_classes=9, **NARROW[model])
  text = str(caught.value)
  assert f"these weights do not fit {model} (read as official names, train form)" in text
  assert f"missing {mean}" in text
  assert "unexpected extra.weight" in text
  assert f"{name} is {state[name].shape}, wanted" in text
  assert f"{head}.bias is (7,), wanted (9,)" in text
  assert "pass num_classes=7" in text


@pytest.mark.parametrize("model", ["resnet18", "vgg16"])
def test_a_new_classifier_takes_the_place_of_the_file_s(model):
  state = cases.random_state(model, num_classes=7, **NARROW[model])
  keep = weights.from_torch(model, state, num_classes=7, **NARROW[model])
  drop = weights.from_torch(model, state, num_classes=3, drop_head=True, **NARROW[model])
  assert drop["params"]["head"]["kernel"].shape[-1] == 3
  for tree in (keep, drop):
    del tree["params"]["head"]
  jax.tree.map(np.testing.assert_array_equal, keep, drop)


def test_other_sources_are_refused_by_name():
  with pytest.raises(InputError, match=r"'mmpretrain' has no names for vgg16; .*official, timm"):
    weights.to_torch("vgg16", {"params": {}}, "mmpretrain")
  with pytest.raises(InputError, match=r"'repmlp' has no names for resnet18; .*official, timm"):
    weights.to_torch("resnet18", {"params": {}}, "repmlp")
