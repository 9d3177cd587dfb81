"""Which parameters decay, against the names in the authors' two training scripts."""

import functools

import jax
import jax.numpy as jnp
import pytest

import repjax
from repjax.models.repmlp import RepMLP
from repjax.training.custom_l2 import penalised_kernels
from repjax.training.decay import DECAY_RULES, bias_mask, decay_mask
from repjax.weights.naming import entries
from repjax.weights.repmlp import BLOCK
from tests.helpers import leaves, official_name

pytest_plugins = ["tests.training.fixtures"]

NAMED = functools.partial(official_name, plus=True)


@pytest.fixture(scope="module")
def params():
  """The parameters, as shapes, of a RepVGG with every kind of scope there is."""
  model = repjax.create_model(
    "repvgg_a0", stage_sizes=(1, 1, 2, 1), se="post", se_reduction=4, aux_heads=True
  )
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def decays_in_june(name, axes):
  # train.py at 9a1de4a: no decay where the name holds "bias" or "bn".
  del axes
  return not any(word in name for word in ("bias", "bn"))


def decays_with_custom_l2(name, axes):
  # The same with `use_custwd`.
  return decays_in_june(name, axes) and not any(word in name for word in ("rbr_dense", "rbr_1x1"))


def decays_at_head(name, axes):
  # train/optimizer.py at eae7c52, set_weight_decay.
  return "identity.weight" in name or not (axes == 1 or name.endswith(".bias"))


@pytest.mark.parametrize(
  ("rule", "by_name"),
  [
    ("kernels_and_fast_biases", decays_in_june),
    ("all_but_penalised_kernels", decays_with_custom_l2),
    ("more_than_one_axis", decays_at_head),
  ],
)
def test_what_decays_is_what_the_authors_script_lets_decay(params, rule, by_name):
  expected = {path: by_name(NAMED(path), leaf.ndim) for path, leaf in leaves(params).items()}
  assert leaves(decay_mask(DECAY_RULES[rule], params)) == expected
  assert len(set(expected.values())) == 2


@pytest.mark.parametrize(
  ("rule", "by_name"),
  [("kernels_and_fast_biases", decays_in_june), ("more_than_one_axis", decays_at_head)],
)
def test_norms_over_tiles_decay_no_more_than_their_vectors_in_pytorch(rule, by_name):
  shapes = jax.eval_shape(RepMLP(4, 2).init, jax.random.key(0), jnp.ones((1, 4, 4, 4)))
  mask = leaves(decay_mask(DECAY_RULES[rule], shapes["params"]))
  for name, entry in entries(BLOCK, {"params": shapes["params"]}).items():
    assert mask["/".join(entry.path[1:])] == by_name(name, len(entry.shape)), name


def test_there_is_a_test_for_every_rule():
  assert DECAY_RULES.keys() == {
    "kernels_and_fast_biases",
    "all_but_penalised_kernels",
    "more_than_one_axis",
  }


def test_what_decays_in_words(params):
  mask = leaves(decay_mask(DECAY_RULES["kernels_and_fast_biases"], params))
  paths = [path.split("/") for path, decays in mask.items() if decays]
  assert {tuple(path[-2:]) for path in paths} == {
    ("conv", "kernel"),
    ("head", "kernel"),
    ("down", "kernel"),
    ("up", "kernel"),
    ("bn", "scale"),
  }
  assert {path[-3] for path in paths if path[-1] == "scale"} == {"identity"}
  scales = {path.split("/")[-3] for path in mask if path.endswith("scale")}
  assert scales == {"identity", "conv3x3", "conv1x1"}


def test_a_layer_of_one_branch_is_not_spared_with_the_penalised_ones(params):
  mask = leaves(decay_mask(DECAY_RULES["all_but_penalised_kernels"], params))
  kernels = {path for path, decays in mask.items() if decays and path.endswith("conv/kernel")}
  assert kernels == {
    f"AuxHead_{stage}/RepConv_0/conv3x3/conv/kernel"
    for stage in ("stage1", "stage2", "stage3_first")
  }
  spared = {"/".join(path) for path in penalised_kernels(params)}
  assert spared == {path for path in mask if path.endswith("conv/kernel")} - kernels


def test_biases_are_what_the_script_calls_so(params):
  expected = {path: "bias" in NAMED(path) for path in leaves(params)}
  assert leaves(bias_mask(params)) == expected


def test_a_vector_that_is_no_norms_scale_and_a_bias_of_two_axes_differ_by_rule():
  params = {"layer": {"kernel": jnp.ones(3), "bias": jnp.ones((2, 3)), "table": jnp.ones((2, 3))}}
  by_name, by_axes = (
    leaves(decay_mask(DECAY_RULES[rule], params))
    for rule in ("kernels_and_fast_biases", "more_than_one_axis")
  )
  assert by_name == {"layer/kernel": True, "layer/bias": False, "layer/table": False}
  assert by_axes == {"layer/kernel": False, "layer/bias": False, "layer/table": True}
