"""RepMLP (2021): the authors' outputs, both forms computing the same, the network for CIFAR-10."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax import analysis
from repjax.models.repmlp import RepMLP
from repjax.weights.naming import entries
from repjax.weights.repmlp import BLOCK
from tests import helpers
from tests.helpers import F64, halves, init_shapes, quick_jit, random_input
from tests.models import repmlp_cases

IMAGES = jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32)
SMALL = {"num_classes": 10, "widths": (4, 6, 8), "tile": 4, "local_kernels": (1, 3)}
TWIN = {"mixer": "conv3x3", "widths": (32, 64, 128)}
ABLATIONS = {
  "whole": {},
  "no local perceptron": {"local_kernels": ()},
  "no global perceptron": {"global_perceptron": False},
  "FC3 as a convolution": {"fc3": "conv9x9"},
  "FC3 as a convolution of a local one's size": {"fc3": "conv3x3"},
  "a convolution instead": {"mixer": "conv9x9"},
}

small = functools.partial(repjax.create_model, "repmlp_cifar", **SMALL)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", repmlp_cases.blocks())
def test_a_block_gives_what_the_authors_does(name):
  case = repmlp_cases.blocks()[name]
  block, x = repmlp_cases.block_of(case)
  expect, deploy = case["expect"], block.clone(deploy=True)
  variables = repmlp_cases.fill(init_shapes(block, x), BLOCK)
  assert names_and_shapes(variables) == expect["train_keys"]

  @quick_jit
  def outputs(variables):
    params = repjax.reparameterize(*halves(variables))
    return block.apply(variables, x), deploy.apply({"params": params}, x), params

  trained, deployed, params = outputs(variables)
  helpers.assert_golden(helpers.nchw(trained), expect["output"])
  helpers.assert_golden(helpers.nchw(deployed), expect["output"])
  assert helpers.relative_error(deployed, trained) <= 1e-12
  assert names_and_shapes({"params": params}) == expect["deploy_keys"]
  for key, entry in entries(BLOCK, {"params": params}).items():
    leaf = functools.reduce(lambda tree, scope: tree[scope], entry.path[1:], params)
    if key in expect["fused"]:
      helpers.assert_golden(entry.layout.to_torch(np.asarray(leaf)), expect["fused"][key])
  for tree, count in ((variables["params"], "train_params"), (params, "deploy_params")):
    assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == expect[count]


def names_and_shapes(variables):
  return {name: list(entry.shape) for name, entry in entries(BLOCK, variables).items()}


class TestBlock:
  def test_a_map_of_one_tile_has_no_global_perceptron(self):
    for size, scopes in ((4, {"RepDense_0"}), (8, {"RepDense_0", "GlobalPerceptron_0"})):
      params = init_shapes(RepMLP(4, 4), jnp.ones((1, size, size, 4)))["params"]
      assert params.keys() == scopes

  @pytest.mark.parametrize("deploy", [False, True])
  @pytest.mark.parametrize("fc3", ["dense", "conv3x3"])
  def test_a_global_perceptron_is_neither_dropped_nor_missed_in_silence(self, fc3, deploy):
    block = RepMLP(4, 4, fc3=fc3, local_kernels=(3,), deploy=deploy)
    small, large = (jnp.ones((1, size, size, 4)) for size in (4, 8))
    for made_for, given, said in (
      (
        large,
        small,
        r"hold a Global Perceptron, and a map \(1, 4, 4, 4\) .* has none",
      ),
      (small, large, r"hold no Global Perceptron, and a map \(1, 8, 8, 4\) .* needs one"),
    ):
      variables = init_shapes(block, made_for)
      jax.eval_shape(block.apply, variables, made_for)
      with pytest.raises(repjax.errors.InputError, match=said):
        jax.eval_shape(block.apply, variables, given)

  def test_a_global_perceptron_that_an_attribute_leaves_out_is_noticed(self):
    x = jnp.ones((1, 8, 8, 4))
    with pytest.raises(repjax.errors.InputError, match="global_perceptron=False has none"):
      jax.eval_shape(RepMLP(4, 4, global_perceptron=False).apply, init_shapes(RepMLP(4, 4), x), x)

  def test_a_network_names_the_block_whose_perceptron_is_missing(self):
    model = small(stage_sizes=(1,), widths=(4,), remat=True)
    variables = init_shapes(model, jnp.ones((1, 4, 4, 3)))
    with pytest.raises(repjax.errors.InputError, match=r"RepMLP stage1/block0/repmlp: .* hold no"):
      jax.eval_shape(model.apply, variables, jnp.ones((1, 8, 8, 3)))

  @pytest.mark.parametrize("size", [(6, 8), (8, 7)], ids=str)
  @pytest.mark.parametrize("global_perceptron", [False, True])
  def test_maps_that_do_not_divide_into_tiles_are_refused(self, size, global_perceptron):
    block = RepMLP(4, 4, global_perceptron=global_perceptron)
    with pytest.raises(ValueError, match=r"do not divide into tiles of 4x4 pixels; H and W"):
      init_shapes(block, jnp.ones((1, *size, 4)))


class TestCifar:
  @pytest.mark.usefixtures("x64")
  # Without a perceptron there is less of the whole.
  @pytest.mark.parametrize("name", ["whole", *(name for name in ABLATIONS if "convol" in name)])
  def test_both_forms_agree(self, name):
    overrides = ABLATIONS[name] | {"stage_sizes": (1, 1), "widths": (4, 6)}
    assert helpers.forms_differ_by(small(**overrides, **F64), random_input(2, 8, 8, 3)) <= 1e-12

  @pytest.mark.usefixtures("x64")
  def test_both_forms_agree_for_oblong_tiles_and_images(self):
    model = small(stage_sizes=(1, 1), widths=(4, 6), tile=(3, 4), act="gelu", **F64)
    assert helpers.forms_differ_by(model, random_input(2, 12, 16, 3)) <= 1e-12

  @pytest.mark.parametrize("name", ABLATIONS)
  def test_an_ablation_takes_out_what_it_says(self, name):
    params = init_shapes(small(**ABLATIONS[name]), IMAGES)["params"]
    below = [path.split("/") for path in helpers.leaves(params) if "block0" in path]
    scopes = {scope for path in below for scope in path}
    wanted = {"GlobalPerceptron_0", "RepDense_0", "fc", "local", "RepConv_0", "RepConv_mixer"}
    assert (
      scopes & wanted
      == {
        "whole": {"GlobalPerceptron_0", "RepDense_0", "fc", "local"},
        "no local perceptron": {"GlobalPerceptron_0", "RepDense_0", "fc"},
        "no global perceptron": {"RepDense_0", "fc", "local"},
        "FC3 as a convolution": {"GlobalPerceptron_0", "RepConv_0"},
        "FC3 as a convolution of a local one's size": {"GlobalPerceptron_0", "RepConv_0"},
        "a convolution instead": {"RepConv_mixer"},
      }[name]
    )
    kernels = [leaf for path, leaf in helpers.leaves(params).items() if "conv9x9/conv" in path]
    inputs = {"a convolution instead": 4, "FC3 as a convolution": 2}  # of which the block has two
    assert not kernels or kernels[0].shape == (9, 9, inputs[name], 4)

  @pytest.mark.parametrize(
    ("overrides", "macs", "params"), [({}, 52_544_128, 22_377_994), (TWIN, 64_062_720, 442_826)]
  )
  def test_what_the_docstring_says_it_costs(self, overrides, macs, params):
    # Computed by hand: six FC3 of 2 * (64 * C / 2)^2 weights on (32 / 2^i / 8)^2 tiles, and so on.
    model = repjax.create_model("repmlp_cifar", num_classes=10, **overrides)
    found = analysis.summary(model, 32)
    assert found.deploy == (params, macs, found.deploy.winograd)
    assert f"{macs / 1e6:.1f}" in type(model).__doc__
    assert f"{params / 1e6:.2f}" in type(model).__doc__ or not overrides

  def test_a_model_is_hashable_and_knows_its_image_size(self):
    model, other = (small(widths=[4, 6, 8], tile=tile) for tile in (4, [4, 4]))
    assert hash(model) == hash(small())
    assert (model.image_size, other.image_size) == (16, 16)
    assert repjax.create_model("repmlp_cifar").image_size == 32


class TestRefusals:
  @pytest.mark.parametrize("size", [(24, 16), (16, 8), (16, 12)], ids=str)
  def test_images_that_do_not_divide_into_tiles(self, size):
    said = rf"tiles of 4x4 .* H a multiple of 16 and W of 16; got \(1, {size[0]}, {size[1]}, 3\)"
    with pytest.raises(ValueError, match=said):
      init_shapes(small(), jnp.ones((1, *size, 3)))

  @pytest.mark.parametrize(
    ("overrides", "said"),
    [
      ({"stage_sizes": (1, 2)}, r"widths takes 2 .* each stage in stage_sizes, got \(4, 6, 8\)"),
      ({"stage_sizes": (1, 2, 0)}, "stage_sizes takes a whole number above 0 for each stage"),
      ({"widths": 5}, "widths must be a list, each a whole number, got 5"),
      ({"reduction": 1.5}, "reduction must be a whole number, got 1.5"),
      ({"fc3_groups": "2"}, "fc3_groups must be a whole number, got '2'"),
      ({"tile": 0}, "tile takes a whole number above 0"),
      ({"tile": (4, 4, 4)}, r"tile takes a whole number above 0, or two \(height, width\)"),
      ({"local_kernels": (1, 2)}, "local_kernels are different odd numbers"),
      ({"tile": "7"}, "tile must be a whole number or a list.* got '7'"),
      ({"tile": 7.0}, "tile must be a whole number or a list.* got 7.0"),
      ({"tile": True}, "tile must be a whole number or a list.* got True"),
      ({"local_kernels": 3}, "local_kernels must be a list, each a whole number, got 3"),
      ({"local_kernels": (3, 3)}, "local_kernels are different odd numbers"),
      ({"local_kernels": (1, 5)}, "at most as large as the tile, 4"),
      ({"mixer": "conv3"}, 'mixer is "repmlp", or a convolution of odd size .*conv3'),
      ({"fc3": "conv4x4"}, 'fc3 is "dense", or a convolution of odd size'),
      ({"fc3": "conv3x5"}, 'fc3 is "dense", or a convolution of odd size'),
    ],
    ids=str,
  )
  def test_values_that_make_no_network(self, overrides, said):
    with pytest.raises(repjax.errors.InputError, match=said):
      small(**overrides)
