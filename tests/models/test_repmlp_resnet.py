"""RepMLP-ResNet50: published counts, both forms computing the same, what it refuses."""

import jax
import jax.numpy as jnp
import pytest

import repjax
from repjax import analysis
from tests import helpers
from tests.helpers import F64, init_shapes, random_input
from tests.models import repmlp_cases

LIGHT, BOTTLENECK = "repmlp_resnet50_light", "repmlp_resnet50_bottleneck_g8"
AT_320 = {"tile": 10, "local_kernels": (1, 3, 5, 7)}
NETWORKS = {
  "repmlp_resnet50_light": ("repmlp_resnet50_light", {}),
  "repmlp_resnet50_bottleneck_g4": ("repmlp_resnet50_bottleneck_g4", {}),
  "repmlp_resnet50_bottleneck_g8": ("repmlp_resnet50_bottleneck_g8", {}),
  "repmlp_resnet50_bottleneck_g8_320": ("repmlp_resnet50_bottleneck_g8", AT_320),
}
SMALL = {
  "num_classes": 5,
  "stage_sizes": (1, 2, 2, 1),
  "widths": (16, 64, 64, 32),
  "stem_features": 8,
  "tile": 3,
  "local_kernels": (1, 3),
  "fc3_groups": (2, 4),
}


def small(name, **overrides):
  return repjax.create_model(name, **SMALL | overrides)


def test_all_published_networks_are_counted():
  assert NETWORKS.keys() == repmlp_cases.counts().keys()


@pytest.mark.parametrize("name", helpers.spread([LIGHT, f"{BOTTLENECK}_320"], [LIGHT]))
def test_counts_are_those_of_the_authors_networks(name):
  model, overrides = NETWORKS[name]
  model, counts = repjax.create_model(model, **overrides), repmlp_cases.counts()[name]
  assert model.image_size == (320 if overrides else 224)
  found = analysis.summary(model, model.image_size)
  assert found.train[:2] == (counts["train_params"], counts["train_macs"])
  assert found.deploy[:2] == (counts["deploy_params"], counts["deploy_macs"])


@pytest.mark.parametrize("form", ["train", "deploy"])
@pytest.mark.parametrize("groups", helpers.spread([4, 8], [8]))
def test_parameters_of_bottlenecks_are_those_of_the_authors_networks(groups, form):
  name = f"repmlp_resnet50_bottleneck_g{groups}"
  model = repjax.create_model(name, deploy=form == "deploy")
  images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
  counts, variables = repmlp_cases.counts()[name], init_shapes(model, images)
  sizes = {kind: sum(x.size for x in jax.tree.leaves(tree)) for kind, tree in variables.items()}
  expected = {"params": counts[f"{form}_params"]}
  assert sizes == expected | ({"batch_stats": counts["bn_buffers"]} if form == "train" else {})


@pytest.mark.parametrize(
  ("stages", "groups", "params", "macs"),
  [((4, 8), 4, 87_383_144, 8_354_185_216), ((8, 16), 8, 59_223_144, 8_057_225_216)],
)
def test_counts_of_the_papers_mixed_groups_at_320_px(stages, groups, params, macs):
  name = f"repmlp_resnet50_bottleneck_g{groups}"
  model = repjax.create_model(name, deploy=True, fc3_groups=stages, **AT_320)
  images = jax.ShapeDtypeStruct((1, 320, 320, 3), jnp.float32)
  tree = init_shapes(model, images)["params"]
  assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == params
  # One product a tile: 16 in stage 2, four in stage 3.
  kernels = {
    path.split("/")[0]: leaf.size
    for path, leaf in helpers.leaves(tree).items()
    if path.endswith("RepDense_0/dense/kernel")
  }
  plain = repmlp_cases.counts()["repmlp_resnet50_bottleneck_g8_320"]["deploy_macs"]
  of_g8 = {"stage2": 6400**2 // 8, "stage3": 6400**2 // 8}
  more = 3 * 16 * (kernels["stage2"] - of_g8["stage2"])
  more += 5 * 4 * (kernels["stage3"] - of_g8["stage3"])
  assert plain + more == macs


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", helpers.spread([LIGHT, BOTTLENECK], [LIGHT]))
def test_both_forms_agree(name):
  assert helpers.forms_differ_by(small(name, **F64), random_input(1, 96, 96, 3)) <= 1e-12


@pytest.mark.usefixtures("x64")
def test_both_forms_agree_with_repmlp_in_other_stages_and_oblong_tiles():
  overrides = {"repmlp_stages": (1, 4), "tile": (3, 4), "stage_sizes": (2, 1, 1, 2)}
  overrides |= {"narrowing": (1, 2), "fc3_groups": 2, "reduction": 2, "act": "silu"}
  model = small(BOTTLENECK, **overrides, **F64)
  x = random_input(1, 96, 128, 3)
  assert helpers.forms_differ_by(model, x) <= 1e-12
  params = init_shapes(model, x)["params"]
  held = {path.split("/")[0] for path in helpers.leaves(params) if "btnk_repmlp" in path}
  assert held == {"stage1", "stage4"}
  assert "GlobalPerceptron_0" not in params["stage4"]["block1"]["btnk_repmlp"]  # one tile


def test_without_perceptrons_only_the_fully_connected_layer_is_left():
  model = small(BOTTLENECK, global_perceptron=False, local_kernels=())
  params = init_shapes(model, jnp.ones((1, 96, 96, 3)))["params"]
  block = params["stage2"]["block1"]["btnk_repmlp"]
  assert {scope: held.keys() for scope, held in block.items()} == {"RepDense_0": {"fc"}}


def test_lists_as_json_gives_them_are_taken():
  lists = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}
  model = repjax.create_model(BOTTLENECK, narrowing=[2, 4], repmlp_stages=[2, 3], **lists)
  images = jnp.ones((1, 96, 96, 3))
  assert hash(model) == hash(small(BOTTLENECK))
  assert helpers.shapes(init_shapes(model, images)) == helpers.shapes(
    init_shapes(small(BOTTLENECK), images)
  )


class TestRefusals:
  def test_images_whose_maps_do_not_divide_into_tiles(self):
    said = r"multiples of 48 by 48 pixels.*got \(1, 128, 96, 3\).* image size or the tile"
    with pytest.raises(ValueError, match=said):
      init_shapes(small(BOTTLENECK), jnp.ones((1, 128, 96, 3)))

  @pytest.mark.parametrize(
    ("overrides", "said"),
    [
      ({"repmlp_stages": (3, 2)}, "repmlp_stages are ascending numbers"),
      ({"repmlp_stages": (2, 5)}, "repmlp_stages are ascending numbers"),
      ({"repmlp_block": "heavy"}, "unknown repmlp_block 'heavy'"),
      ({"block": "basic"}, 'a RepMLP-ResNet has block="bottleneck"'),
      ({"repmlp_stages": 2}, "repmlp_stages must be a list, each a whole number, got 2"),
      ({"repmlp_stages": (2.0, 3)}, r"repmlp_stages\[0\] must be a whole number, got 2.0"),
      ({"repmlp_stages": (2, "3")}, r"repmlp_stages\[1\] must be a whole number, got '3'"),
      ({"fc3_groups": (2, 2, 2)}, "fc3_groups takes 2 whole numbers .* each of repmlp_stages"),
      ({"fc3_groups": None}, "fc3_groups must be a whole number or a list"),
      ({"narrowing": (1000, 4)}, r"stage 2 .* multiple of 4000 .* got widths=.* narrowing=\(1000"),
      ({"repmlp_block": "light", "widths": (4,) * 4}, r"stage 2 .* of 8 .* widths=\(4, 4, 4, 4\)"),
      ({"repmlp_block": "light", "widths": (12,) * 4}, "stage 2 .* a multiple of 8 channels"),
      ({"reduction": 1.5}, "reduction must be a whole number or a list.* got 1.5"),
      ({"reduction": "2"}, "reduction must be a whole number or a list.* got '2'"),
      ({"local_kernels": 3}, "local_kernels must be a list, each a whole number, got 3"),
      ({"local_kernels": None}, "local_kernels must be a list, each a whole number, got None"),
      ({"local_kernels": ("3",)}, r"local_kernels\[0\] must be a whole number, got '3'"),
      ({"local_kernels": (1.0, 3)}, r"local_kernels\[0\] must be a whole number, got 1.0"),
      ({"narrowing": (2,)}, "narrowing takes 2 whole numbers"),
      ({"tile": -7}, "tile takes a whole number above 0"),
      ({"local_kernels": (1, 5)}, "at most as large as the tile, 3"),
      ({"stage_sizes": (1, 2)}, "stage_sizes takes 4"),
    ],
    ids=str,
  )
  def test_values_that_make_no_network(self, overrides, said):
    with pytest.raises(repjax.errors.InputError, match=said):
      small(BOTTLENECK, **overrides)
