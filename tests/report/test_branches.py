"""What branches contribute to the kernels that they become."""

import shutil

import jax
import numpy as np
import pytest

import repjax
from repjax import runs
from repjax.disk import trees
from repjax.errors import InputError
from repjax.layers import fold_rep_conv, fold_scaled_conv
from repjax.layers.branches import branch_parts
from repjax.report.branches import (
  FoldedLayer,
  KernelStats,
  choose,
  read_kernels,
  trace,
)
from repjax.spec import ModelSpec
from tests.helpers import random_input, random_variables, randomise, relative_error
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

EPSILON = 1e-5


def test_kernels_of_a_run_are_those_of_its_best_checkpoint(finished):
  workdir, report, _ = finished
  kernels = read_kernels(workdir)
  assert (kernels.name, kernels.model) == (workdir.name, "repvgg_a0")
  assert kernels.step == report["step"]
  _, deployed, _ = repjax.load(workdir)
  _, trained, _ = repjax.load(workdir, deploy=False)
  assert len(kernels.layers) == 5
  for layer in kernels.layers:
    scopes = layer.path.split("/")
    params, stats, deploy = trained["params"], trained["batch_stats"], deployed["params"]
    for scope in scopes:
      params, stats, deploy = params[scope], stats[scope], deploy[scope]
    fused = np.asarray(deploy["conv"]["kernel"])
    assert layer.channels == fused.shape[-1]
    parts = branch_parts(params, stats, EPSILON).branches
    expected = {name: parts[name].kernel for name in layer.branches}
    assert layer.branches.keys() == params.keys()
    for part, kernel in ((layer.fused, fused), *zip(layer.branches.values(), expected.values())):
      assert relative_error(part.taps, np.abs(kernel).mean((2, 3))) < 1e-5
      assert abs(part.norm / np.linalg.norm(np.ravel(kernel)) - 1) < 1e-5


def test_branches_come_in_the_order_in_which_people_name_them(finished):
  assert [list(layer.branches) for layer in read_kernels(finished[0]).layers][:2] == [
    ["conv3x3", "conv1x1"],
    ["conv3x3", "conv1x1", "identity"],
  ]


def test_re_estimated_statistics_are_used(finished, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  before = read_kernels(workdir)
  step, variables, _ = runs.read_best(workdir, ModelSpec.read(workdir).variable_shapes())
  own = variables["batch_stats"]
  quartered = jax.tree_util.tree_map_with_path(
    lambda path, leaf: leaf / 4 if path[-1].key == "var" else leaf, own
  )
  runs.write_recalibrated(workdir, step, own, quartered, {"batches": 1})
  for old, new in zip(before.layers, read_kernels(workdir).layers):
    for name in old.branches:
      assert new.branches[name].norm == pytest.approx(2 * old.branches[name].norm, rel=1e-2)


def test_a_folder_of_the_deploy_form_has_kernels_without_branches(finished, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  shutil.rmtree(workdir / "checkpoints")
  expected = read_kernels(finished[0])
  for folder in (workdir, workdir / "deploy"):
    kernels = read_kernels(folder)
    assert kernels.step is None
    assert [layer.branches for layer in kernels.layers] == [{}] * 5
    for layer, other in zip(kernels.layers, expected.layers):
      assert (layer.path, layer.channels) == (other.path, other.channels)
      assert relative_error(layer.fused.taps, other.fused.taps) < 1e-5
      assert layer.shares() == {}


def test_weights_that_are_not_finite_are_named(finished, tmp_path):
  spec = ModelSpec.read(finished[0])
  variables = repjax.init(spec.create_model(), jax.random.key(0), 16)
  bn = variables["params"]["stage2"]["block0"]["RepConv_0"]["conv1x1"]["bn"]
  bn["scale"] = bn["scale"] * np.float32(np.nan)
  trees.write_tree(tmp_path / "checkpoints" / "0" / "variables", variables)
  spec.write(tmp_path)
  with pytest.raises(InputError, match=r"not finite .*/stage2/block0/RepConv_0/conv1x1/bn/scale"):
    read_kernels(tmp_path)


def test_layers_are_in_the_order_of_the_forward_pass():
  paths, shapes = trace(ModelSpec("repvgg_a0", 10))
  blocks = [f"stage3/block{number}" for number in range(14)]
  names = ["/".join(path[:-1]) for path in paths]
  assert names[0] == "stem"
  assert [name for name in names if name.startswith("stage3")] == blocks
  assert names[-1] == "stage4/block0"
  assert shapes == ModelSpec("repvgg_a0", 10).variable_shapes()


@pytest.mark.usefixtures("quick_programs")
def test_layers_of_one_branch_are_the_fused_kernel(tmp_path):
  spec = ModelSpec("resnet50", 3, {"stage_sizes": (1,) * 4, "widths": (4,) * 4, "stem_features": 4})
  variables = random_variables(spec.create_model(), random_input(1, 32, 32, 3).astype("float32"))
  trees.write_tree(tmp_path / "checkpoints" / "0" / "variables", variables)
  spec.write(tmp_path)
  layers = read_kernels(tmp_path).layers
  assert [layer.path for layer in layers][:2] == ["stem/RepConv_0", "stage1/block0/RepConv_conv1"]
  assert len(layers) == 1 + 3 + 3 * 4  # the first shortcut is the input itself
  assert [layer.branches for layer in layers] == [{}] * len(layers)
  params, stats = variables["params"]["stem"], variables["batch_stats"]["stem"]
  fused = fold_rep_conv(params["RepConv_0"], stats["RepConv_0"], EPSILON)["conv"]["kernel"]
  assert relative_error(layers[0].fused.taps, np.abs(fused).mean((2, 3))) < 1e-5


@pytest.mark.parametrize("deploy", [False, True])
def test_branches_with_scales_are_layers_too(tmp_path, deploy):
  spec = ModelSpec("repvgg_a0", 3, {**tiny.OVERRIDES, "scaled": True})
  variables = randomise(spec.variable_shapes())
  trees.write_tree(tmp_path / "checkpoints" / "0" / "variables", variables)
  spec.write(tmp_path)
  layers = read_kernels(tmp_path).layers
  names = [each.path for each in layers]
  assert names == ["/".join(path) for path in trace(spec, deploy=deploy)[0]]
  assert list(layers[1].branches) == ["conv3x3", "conv1x1", "identity"]
  params, stats = (variables[part]["stage1"]["block0"] for part in ("params", "batch_stats"))
  params, stats = params["ScaledConv_0"], stats["ScaledConv_0"]
  fused = fold_scaled_conv(params, stats, EPSILON)["conv"]["kernel"]
  assert relative_error(layers[1].fused.taps, np.abs(fused).mean((2, 3))) < 1e-5
  norm = np.asarray(params["bn"]["scale"]) / np.sqrt(np.asarray(stats["bn"]["var"]) + EPSILON)
  for name, part in layers[1].branches.items():
    kernel = params[name]["conv"]["kernel"] if name != "identity" else np.eye(8)
    own = np.asarray(kernel) * np.asarray(params[name]["scale"]) * norm
    assert part.norm == pytest.approx(np.linalg.norm(np.ravel(own)), rel=1e-5)


@pytest.mark.parametrize("deploy", [False, True])
def test_what_the_deploy_form_drops_is_no_layer(deploy):
  spec = ModelSpec("repvgg_a0", 10, tiny.WITH_GATES_AND_HEADS)
  assert "AuxHead_stage1" in spec.variable_shapes()["params"]
  assert ["/".join(path[:-1]) for path in trace(spec, deploy=deploy)[0]] == [
    *("stem", "stage1/block0", "stage2/block0"),
    *("stage3_first/block0", "stage3_second/block0", "stage4/block0"),
  ]


def layer(path, *branches):
  part = KernelStats(np.ones((3, 3)), 3.0)
  return FoldedLayer(path, 8, part, dict.fromkeys(branches, part))


def test_shares_are_of_the_sum_of_norms():
  parts = {
    "conv3x3": KernelStats(np.ones((3, 3)), 3.0),
    "conv1x1": KernelStats(np.ones((3, 3)), 1.0),
  }
  whole = FoldedLayer("stem", 8, KernelStats(np.ones((3, 3)), 3.5), parts)
  assert whole.shares() == {"conv3x3": 0.75, "conv1x1": 0.25}
  silent = {name: part._replace(norm=0.0) for name, part in parts.items()}
  assert whole._replace(branches=silent).shares() == {"conv3x3": 0.0, "conv1x1": 0.0}


def test_a_layer_of_each_stage_is_chosen_with_all_branches_and_from_the_middle():
  two, three = ("conv3x3", "conv1x1"), ("conv3x3", "conv1x1", "identity")
  stages = {"stem": 0, "stage1": 2, "stage2": 5, "stage3": 1}
  layers = [
    layer(f"{stage}/block{block}/RepConv_0", *(three if block else two))
    for stage, blocks in stages.items()
    for block in range(max(1, blocks))
  ]
  assert [each.path.removesuffix("/RepConv_0") for each in choose(layers)] == [
    *("stem/block0", "stage1/block1", "stage2/block3", "stage3/block0")
  ]


@pytest.mark.parametrize(
  ("stages", "blocks", "expected"),
  [
    (1, 4, [0, 1, 2, 3]),
    (1, 11, [0, 2, 4, 6, 8, 10]),
    (2, 3, [0, 1, 2, 3, 4, 5]),
    (7, 1, [0, 1, 2, 4, 5, 6]),
    (1, 1, [0]),
  ],
)
def test_where_stages_are_few_or_many_layers_are_chosen_at_equal_distances(
  stages, blocks, expected
):
  layers = [
    layer(f"s{stage}/b{block}", "conv3x3", "conv1x1")
    for stage in range(stages)
    for block in range(blocks)
  ]
  assert [layers.index(each) for each in choose(layers)] == expected


@pytest.mark.usefixtures("quick_programs")
def test_layers_of_one_branch_are_chosen_only_where_there_are_no_others():
  layers = [layer("a", "conv3x3"), layer("b", "conv3x3", "conv1x1"), layer("c", "conv3x3")]
  assert [each.path for each in choose(layers)] == ["b"]
  assert [each.path for each in choose([layers[0], layers[2]])] == ["a", "c"]
  assert choose([]) == []
