"""Tables of names: every leaf has one name, and the layouts are what both sides mean."""

import re

import numpy as np
import pytest

import repjax
from repjax.weights import naming, sources
from repjax.weights.naming import NoNameError, Row, entries, tensor_name
from repjax.weights.repvgg import NAMINGS
from tests import helpers

IN_THREE = [  # path, axes, then official, timm and mmpretrain
  (
    "stem/RepConv_0/conv3x3/conv/kernel",
    "stage0.rbr_dense.conv.weight",
    "stem.conv_kxk.conv.weight",
    "backbone.stem.branch_3x3.conv.weight",
  ),
  (
    "stage1/block0/RepConv_0/conv1x1/bn/mean",
    "stage1.0.rbr_1x1.bn.running_mean",
    "stages.0.0.conv_1x1.bn.running_mean",
    "backbone.stage_1.0.branch_1x1.norm.running_mean",
  ),
  (
    "stage3/block13/RepConv_0/identity/bn/var",
    "stage3.13.rbr_identity.running_var",
    "stages.2.13.identity.running_var",
    "backbone.stage_3.13.branch_norm.running_var",
  ),
  (
    "stage2/block1/RepConv_0/conv3x3/bn/scale",
    "stage2.1.rbr_dense.bn.weight",
    "stages.1.1.conv_kxk.bn.weight",
    "backbone.stage_2.1.branch_3x3.norm.weight",
  ),
  (
    "stage4/block0/RepConv_0/conv/bias",
    "stage4.0.rbr_reparam.bias",
    "stages.3.0.reparam_conv.bias",
    "backbone.stage_4.0.branch_reparam.bias",
  ),
  (
    "stem/SqueezeExcite_0/down/kernel",
    "stage0.se.down.weight",
    "stem.attn.fc1.weight",
    "backbone.stem.se_layer.conv1.conv.weight",
  ),
  (
    "stage1/block2/SqueezeExcite_0/up/bias",
    "stage1.2.se.up.bias",
    "stages.0.2.attn.fc2.bias",
    "backbone.stage_1.2.se_layer.conv2.conv.bias",
  ),
  ("head/kernel", "linear.weight", "head.fc.weight", "head.fc.weight"),
]
OF_PLUS = {
  "stem/RepConv_0/conv3x3/conv/kernel": "stage0.rbr_dense.conv.weight",
  "stage3_first/block2/RepConv_0/identity/bn/bias": "stage3_first.blocks.2.rbr_identity.bias",
  "stage4/block0/SqueezeExcite_0/down/kernel": "stage4.blocks.0.post_se.down.weight",
  "AuxHead_stage1/RepConv_0/conv3x3/bn/mean": "stage1_aux.0.bn.running_mean",
  "AuxHead_stage3_first/head/kernel": "stage3_first_aux.3.weight",
  "head/bias": "linear.bias",
}
LAYOUTS = [
  (naming.SAME, (5,), (5,)),
  (naming.CONV, (3, 2, 4, 5), (5, 4, 3, 2)),
  (naming.DENSE, (4, 5), (5, 4)),
  (naming.DENSE_AS_CONV, (4, 5), (5, 4, 1, 1)),
]


def name_of(table, path):
  return tensor_name(table, tuple(path.split("/")), axes=4)[0]


@pytest.mark.parametrize(("path", "official", "timm", "mmpretrain"), IN_THREE)
def test_a_leaf_has_the_name_that_each_source_gives_it(path, official, timm, mmpretrain):
  names = {"official": official, "timm": timm, "mmpretrain": mmpretrain}
  assert {source: name_of(NAMINGS["repvgg_d2se"][source], path) for source in names} == names


@pytest.mark.parametrize(("path", "name"), OF_PLUS.items())
def test_repvggplus_has_names_of_its_own(path, name):
  assert NAMINGS["repvggplus_l2pse"].keys() == {"official"}
  assert name_of(NAMINGS["repvggplus_l2pse"]["official"], path) == name


def test_every_model_can_be_imported():
  # There never were weights, nor a network by that name, outside of repjax.
  assert sources.NAMINGS.keys() == set(repjax.list_models()) - {
    "repmlp_cifar",
    *(f"parnet_cifar_{size}" for size in "sml"),
    *("fcn", "pspnet", "pspnet_repmlp"),  # the weights of a backbone are a classifier's
  }


@pytest.mark.parametrize(("layout", "ours", "theirs"), LAYOUTS)
def test_a_layout_goes_there_and_back_without_a_copy(layout, ours, theirs):
  x = np.arange(np.prod(ours)).reshape(ours)
  y = layout.to_torch(x)
  assert y.shape == theirs
  assert np.shares_memory(x, y)
  np.testing.assert_array_equal(layout.from_torch(y), x)
  assert np.shares_memory(layout.from_torch(y), x)


def test_kernels_lie_as_each_side_reads_them():
  x = np.arange(3 * 2 * 4 * 5).reshape(3, 2, 4, 5)
  for h, w, i, o in np.ndindex(*x.shape):
    assert naming.CONV.to_torch(x)[o, i, h, w] == x[h, w, i, o]
  for i, o in np.ndindex(4, 5):
    assert naming.DENSE.to_torch(x[0, 0])[o, i] == x[0, 0, i, o]
    assert naming.DENSE_AS_CONV.to_torch(x[0, 0])[o, i, 0, 0] == x[0, 0, i, o]


def test_kernels_over_tiles_lie_channel_by_channel_on_the_other_side():
  x = np.arange(2 * 3 * 4 * 2 * 3 * 4 * 5).reshape(2, 3, 4, 2, 3, 4, 5)
  kernel, vector = naming.tile_kernel(x.shape), naming.tile_vector(x.shape[:1] + x.shape[4:])
  theirs, theirs_vector = kernel.to_torch(x), vector.to_torch(x[:, 0, 0, 0])
  assert theirs.shape == (2 * 5 * 12, 2 * 12, 1, 1)
  for g, h, w, i, v, u, o in np.ndindex(*x.shape):
    row, column = ((g * 5 + o) * 3 + v) * 4 + u, (i * 3 + h) * 4 + w
    assert theirs[row, column, 0, 0] == x[g, h, w, i, v, u, o]
    assert theirs_vector[row] == x[g, 0, 0, 0, v, u, o]
  back = kernel.from_torch(theirs)
  np.testing.assert_array_equal(back, x)
  assert np.shares_memory(back, theirs)
  np.testing.assert_array_equal(vector.from_torch(theirs_vector), x[:, 0, 0, 0])


def test_the_layout_of_a_kernel_follows_its_row_and_then_its_axes():
  table = (Row("gate", "g", naming.DENSE_AS_CONV), Row("up", "up"), Row("head", "h"))
  assert tensor_name(table, ("gate", "up", "kernel"), 2) == ("g.up.weight", naming.DENSE_AS_CONV)
  assert tensor_name(table, ("gate", "up", "bias"), 1) == ("g.up.bias", naming.SAME)
  assert tensor_name(table, ("head", "kernel"), 2) == ("h.weight", naming.DENSE)
  assert tensor_name(table, ("head", "kernel"), 4) == ("h.weight", naming.CONV)
  assert tensor_name(table, ("head", "kernel"), 7) == ("h.weight", naming.tile_kernel)
  assert tensor_name(table, ("head", "bias"), 4) == ("h.bias", naming.tile_vector)


def test_rows_match_whole_segments_in_their_order():
  table = (Row("a/b", "first"), Row("a", "second"), Row(r"b(\d+)", r"third_\1"), Row("b", "last"))
  assert name_of(table, "a/b/bias") == "first.bias"
  assert name_of(table, "a/b12/bias") == "second.third_12.bias"
  assert name_of(table, "b/a/bias") == "last.second.bias"


@pytest.mark.parametrize(
  ("path", "said"),
  [
    ("stage3_first/block0/RepConv_0/conv/kernel", "stage3_first/block0/RepConv_0/conv (from 's"),
    ("stage1/block0/Gate_0/kernel", "stage1/block0/Gate_0 (from 'Gate_0' on)"),
    ("heads/kernel", "heads (from 'heads' on)"),
    ("stage5/block0/RepConv_0/conv/kernel", "stage5/block0"),
    ("head/embedding", "embedding is none of kernel, scale, bias, mean, var"),
  ],
)
def test_what_a_table_does_not_cover_is_named(path, said):
  with pytest.raises(NoNameError, match=re.escape(said)):
    name_of(NAMINGS["repvgg_a0"]["timm"], path)


def test_entries_say_where_a_tensor_goes_and_its_shape_on_the_other_side():
  spec = repjax.ModelSpec("repvgg_d2se", overrides={"stage_sizes": [2, 1, 1, 1]})
  found = entries(NAMINGS["repvgg_d2se"]["timm"], spec.variable_shapes())
  kernel = found["stages.0.1.conv_kxk.conv.weight"]
  assert kernel.path == ("params", "stage1", "block1", "RepConv_0", "conv3x3", "conv", "kernel")
  assert kernel.shape == (160, 160, 3, 3)
  mean = found["stem.conv_kxk.bn.running_mean"]
  assert mean.path == ("batch_stats", "stem", "RepConv_0", "conv3x3", "bn", "mean")
  assert found["stem.attn.fc1.weight"].shape == (4, 64, 1, 1)
  assert {name for name, entry in found.items() if entry.in_head} == {
    "head.fc.weight",
    "head.fc.bias",
  }


def test_official_names_of_helpers_are_those_of_the_key_lists():
  shapes = repjax.ModelSpec("repvgg_a0").variable_shapes()
  paths = [path.partition("/")[2] for path in helpers.leaves(shapes)]
  names = [helpers.official_name(path) for path in paths]
  assert sorted(names) == sorted(helpers.keys("official", "repvgg_a0")["train"])
