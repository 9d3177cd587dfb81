"""The custom L2 penalty: the authors' values, its definition, its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.layers import RepConv
from repjax.training.custom_l2 import custom_l2
from tests.helpers import (
  F64,
  fill_variables,
  goldens,
  halves,
  init_shapes,
  leaves,
  random_variables,
  relative_error,
)
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

CASES = [name for name, case in goldens().items() if "custom_l2" in case["expect"]]


@pytest.fixture
def network(x64):
  """A float64 RepVGG of every kind of scope, as a function of the parameters alone."""
  del x64
  model = repjax.create_model("repvgg_a0", groups=2, **tiny.WITH_GATES_AND_HEADS, **F64)
  variables = random_variables(model, jnp.ones((1, 16, 16, 3)))
  return variables["params"], variables["batch_stats"]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", CASES)
def test_a_block_has_the_authors_value(name):
  case = goldens()[name]
  spec = case["spec"]
  block = RepConv(
    spec["out_channels"],
    branches=("conv3x3", "conv1x1") + ("identity",) * ("rbr_identity" in spec["branches"]),
    strides=spec["stride"],
    groups=spec["groups"],
    **F64,
  )
  shape = case["input"]["shape_nchw"]
  shapes = init_shapes(block, jnp.ones((1, *shape[2:], shape[1])))
  variables = fill_variables({kind: {"RepConv_0": tree} for kind, tree in shapes.items()})
  value = custom_l2(variables["params"], variables["batch_stats"])
  assert relative_error(value, case["expect"]["custom_l2"]) <= 1e-11


def test_there_are_values_for_strides_groups_and_missing_identities():
  assert {case.split("_")[-1] for case in CASES} == {"fuse", "stride2", "groups4", "se"}


def of_block(params, stats):
  """By loops, from the words of the definition."""
  t3, t1 = (
    np.asarray(params[name]["bn"]["scale"]) / np.sqrt(np.asarray(stats[name]["bn"]["var"]) + 1e-5)
    for name in ("conv3x3", "conv1x1")
  )
  k3, k1 = (np.asarray(params[name]["conv"]["kernel"]) for name in ("conv3x3", "conv1x1"))
  total = 0.0
  for row, column, i, o in np.ndindex(*k3.shape):
    if (row, column) == (1, 1):
      fused = k3[1, 1, i, o] * t3[o] + k1[0, 0, i, o] * t1[o]
      total += fused**2 / (t3[o] ** 2 + t1[o] ** 2)
    else:
      total += k3[row, column, i, o] ** 2
  return total


def test_a_network_has_the_sum_over_its_blocks_and_heads_have_no_part_in_it(network):
  params, stats = network
  blocks = {tuple(path.split("/")[:-3]) for path in leaves(params) if "conv1x1/conv" in path}
  assert len(blocks) == 6
  expected = 0.0
  for path in blocks:
    ours, theirs = params, stats
    for name in path:
      ours, theirs = ours[name], theirs[name]
    expected += of_block(ours, theirs)
  assert relative_error(custom_l2(params, stats), expected) <= 1e-12


def test_no_gradient_flows_through_the_scales(network):
  params, stats = network
  gradients = leaves(jax.jit(jax.grad(custom_l2))(params, stats))
  learning = {path for path, value in gradients.items() if np.any(value)}
  assert learning == {
    path for path in gradients if path.endswith("conv/kernel") and "AuxHead" not in path
  }
  assert not any(
    np.any(value) for value in jax.tree.leaves(jax.grad(custom_l2, argnums=1)(params, stats))
  )


def test_it_is_that_of_the_fused_kernel_where_the_scales_are_one(network):
  # Then the ninth tap is (K3c + K1)^2 / 2.
  params, stats = network
  ones = jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.ones_like(x) if path[-1].key == "scale" else x, params
  )
  flat = jax.tree.map(lambda x: jnp.full_like(x, 1 - 1e-5), stats)
  params = {"stem": ones["stem"]}
  branches = ones["stem"]["RepConv_0"]
  outer = branches["conv3x3"]["conv"]["kernel"].at[1, 1].set(0)
  middle = branches["conv3x3"]["conv"]["kernel"][1, 1] + branches["conv1x1"]["conv"]["kernel"][0, 0]
  expected = jnp.sum(outer**2) + jnp.sum(middle**2) / 2
  assert relative_error(custom_l2(params, flat), expected) <= 1e-12


def test_half_precision_parameters_are_summed_in_float32():
  params = {
    "RepConv_0": {
      name: {
        "conv": {"kernel": jnp.full((size, size, 2, 4), 0.5, jnp.bfloat16)},
        "bn": {"scale": jnp.ones(4, jnp.bfloat16), "bias": jnp.zeros(4, jnp.bfloat16)},
      }
      for name, size in (("conv3x3", 3), ("conv1x1", 1))
    }
  }
  stats = {
    "RepConv_0": {
      name: {"bn": {"mean": jnp.zeros(4), "var": jnp.full(4, 1 - 1e-5)}}
      for name in ("conv3x3", "conv1x1")
    }
  }
  value = custom_l2(params, stats)
  assert value.dtype == jnp.float32
  assert value == pytest.approx(8 * 8 * 0.25 + 8 * 0.5)


def test_a_network_without_such_a_block_is_refused():
  params = {"stem": {"RepConv_0": {"conv3x3": {"conv": {"kernel": jnp.ones((3, 3, 2, 2))}}}}}
  with pytest.raises(InputError, match="this model has none"):
    custom_l2(params, {})


@pytest.mark.usefixtures("x64")
def test_a_layer_with_a_note_of_its_epsilon_has_that_epsilon():
  layer = RepConv(4, epsilon=0.1, **F64)
  params, stats = halves(random_variables(layer, jnp.ones((1, 4, 4, 4))))
  alone = {name: below for name, below in stats.items() if name != "epsilon"}
  noted, told, silent = (
    custom_l2({"stem": params}, {"stem": stats}, *epsilon)
    for stats, epsilon in ((stats, ()), (alone, (0.1,)), (alone, ()))
  )
  assert relative_error(noted, told) <= 1e-15
  assert relative_error(noted, silent) > 1e-3


@pytest.mark.parametrize("norms", [("after_sum",), ("conv3x3", "after_sum"), ("conv3x3",)], ids=str)
def test_a_layer_whose_scales_are_not_those_of_its_branches_has_no_part_in_it(norms):
  layer = RepConv(4, ("conv3x3", "conv1x1"), norm=norms)
  variables = random_variables(layer, np.ones((1, 5, 5, 4), np.float32))
  with pytest.raises(InputError, match="this model has none"):
    custom_l2(variables["params"], variables["batch_stats"])
