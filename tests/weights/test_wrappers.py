"""Parts of names that wrappers add are removed wherever they stand, and never by a guess."""

import re

import numpy as np
import pytest

from repjax import weights
from repjax.errors import InputError
from repjax.weights import recognition, wrappers
from tests.weights import cases
from tests.weights.cases import TINY, assert_same_bits

ARGUMENTS = {"num_classes": 10, **TINY}


@pytest.fixture(scope="module", params=["official", "timm", "mmpretrain"])
def state(request):
  """A small network's state dict in one naming; tests rename it."""
  return cases.random_state("repvgg_a0", source=request.param, **TINY)


def inside(segment):
  """Returns a function that puts a segment after the first one that is followed by a number."""
  return lambda name: re.sub(r"^((?:backbone\.)?[a-z_]+\d*\.)", rf"\1{segment}.", name, count=1)


def in_front(prefix):
  """Returns a function that puts a prefix in front of a name."""
  return lambda name: f"{prefix}.{name}"


WRAPPED = {
  "a compiled region": inside("_orig_mod"),
  "an FSDP unit": inside("_fsdp_wrapped_module"),
  "a checkpointed FSDP unit": inside("_fsdp_wrapped_module._checkpoint_wrapped_module"),
  "a data-parallel part": inside("module"),
  "an old FSDP unit": inside("_fpw_module"),
  "data-parallel and compiled": in_front("module._orig_mod"),
  "a wrapper that nobody knows": inside("_somebodys_wrapper"),
  "Lightning": in_front("model"),
  "Lightning around a compiled network": in_front("net._orig_mod"),
  "Fabric": in_front("_forward_module"),
  "an average": in_front("ema_model.module"),
  "somebody's own classes": in_front("task.siamese.left"),
  "both": lambda name: in_front("averaged_model")(inside("_orig_mod")(name)),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_a_wrapped_network_is_read_as_the_plain_one(state, wrap):
  wrapped = {wrap(name): value for name, value in state.items()}
  assert wrapped.keys().isdisjoint(state)
  found = weights.recognize(wrapped, "repvgg_a0", **TINY)
  assert found == weights.recognize(state, "repvgg_a0", **TINY)
  ours = weights.from_torch("repvgg_a0", wrapped, **ARGUMENTS)
  theirs = weights.from_torch("repvgg_a0", state, **ARGUMENTS)
  for collection in theirs:
    assert_same_bits(flat(ours[collection]), flat(theirs[collection]))


def flat(tree, path=""):
  """Returns the leaves of a tree by path."""
  return {
    key: leaf
    for name, value in tree.items()
    for key, leaf in (
      flat(value, f"{path}/{name}") if isinstance(value, dict) else {f"{path}/{name}": value}
    ).items()
  }


def test_a_wrapped_backbone_beside_a_classifier_is_one_network(state):
  wrapped = {
    name if name.startswith(("linear", "head")) else f"encoder.trunk.{name}": value
    for name, value in state.items()
  }
  assert weights.from_torch("repvgg_a0", wrapped, **ARGUMENTS)


@pytest.mark.parametrize(
  "counters",
  [
    {"n_averaged": np.asarray(5)},
    {"initted": np.asarray(True), "step": np.asarray(3.0)},
    {"stage0.total_ops": np.zeros(1), "stage0.total_params": np.zeros(1)},
    {"module.n_averaged": np.asarray(5, np.int32)},
    {"ema.decay": np.asarray(0.999), "ema.num_updates": np.asarray(7)},
  ],
  ids=lambda counters: "+".join(counters),
)
def test_counters_are_left_out(state, counters):
  assert weights.from_torch("repvgg_a0", {**state, **counters}, **ARGUMENTS)


def test_the_model_is_found_without_its_name(state, monkeypatch):
  monkeypatch.setattr("repjax.weights.recognition.list_models", lambda: ["repvgg_a0", "resnet18"])
  wrapped = {f"lightning.net.{name}": value for name, value in state.items()}
  assert weights.recognize(wrapped, **TINY).model == "repvgg_a0"


def test_two_networks_of_the_same_names_are_refused_with_the_choice(tmp_path, state):
  both = {
    f"{prefix}.{name}": value + index
    for index, prefix in enumerate(("student", "ema_model"))
    for name, value in state.items()
  }
  with pytest.raises(InputError, match=r"below student\. and below ema_model\..*entry="):
    weights.from_torch("repvgg_a0", both, **ARGUMENTS)
  np.savez(tmp_path / "a.npz", **both)
  chosen = weights.read(tmp_path / "a.npz", entry="ema_model")
  assert_same_bits(chosen, {name: value + 1 for name, value in state.items()})


def test_a_different_classifier_elsewhere_is_never_taken_for_the_missing_one(state):
  name = next(name for name in state if name.endswith(("linear.bias", "fc.bias")))
  moved = {n: x for n, x in state.items() if n != name} | {f"projector.{name}": state[name]}
  with pytest.raises(InputError, match=f"unexpected projector.{name}"):
    weights.from_torch("repvgg_a0", moved, **ARGUMENTS)


def test_a_tensor_that_is_there_twice_is_not_dropped(state):
  name = next(name for name in state if name.endswith(("linear.bias", "fc.bias")))
  twice = {f"model.{n}": x for n, x in state.items()} | {name: state[name] + 1}
  with pytest.raises(InputError, match=rf"unexpected \(the other\) {name}"):
    weights.from_torch("repvgg_a0", twice, **ARGUMENTS)


def test_tensors_beside_a_whole_network_are_told_with_the_way_out(tmp_path, state):
  lightning = {f"model.{name}": value for name, value in state.items()}
  lightning |= {"criterion.weight": np.ones(10), "accuracy.tp": np.ones(10, np.int64)}
  with pytest.raises(InputError, match=r"below model\. .*--entry model\."):
    weights.from_torch("repvgg_a0", lightning, **ARGUMENTS)
  np.savez(tmp_path / "a.npz", **lightning)
  assert_same_bits(weights.read(tmp_path / "a.npz", entry="model"), state)


def test_many_problems_are_told_in_groups(state):
  wrong = {f"criterion.terms.{index}.weight": np.ones(3) for index in range(300)}
  with pytest.raises(InputError, match="Problems: 300") as caught:
    weights.from_torch("repvgg_a0", {**state, **wrong}, **ARGUMENTS)
  assert "unexpected: 300 tensors of criterion" in str(caught.value)
  assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", ["a\x1b[2Jweight", "a\nall is well", "w" * 2000], ids=repr)
def test_names_that_no_tensor_has_are_refused_in_one_printable_line(tmp_path, state, name):
  with pytest.raises(InputError) as caught:
    weights.from_torch("repvgg_a0", {**state, name: np.ones(3)}, **ARGUMENTS)
  assert str(caught.value).isprintable()
  assert len(str(caught.value)) < 500
  np.savez(tmp_path / "a.npz", **{name.replace("/", ""): np.ones(3)})
  with pytest.raises(InputError) as caught:
    weights.read(tmp_path / "a.npz")
  assert str(caught.value).isprintable()


def test_a_row_of_parameters_of_fsdp_is_explained():
  with pytest.raises(InputError, match="FULL_STATE_DICT"):
    weights.from_torch("repvgg_a0", {"_fsdp_wrapped_module._flat_param": np.ones(9)})


def test_wanted_names_stay_apart_without_wrappers():
  for model in ("repvgg_a0", "resnet18", "vgg16", "repmlpnet_t224", "parnet_s"):
    for _, _, names in recognition.candidates(model, {}):
      assert len({wrappers.without_wrappers(name) for name in names}) == len(names)
