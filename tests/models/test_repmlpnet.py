"""RepMLPNet: the authors' outputs and counts, both forms equal, overrides and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax import analysis
from repjax.layers import RepDense, RepHead, SqueezeExcite
from repjax.layers.rep_dense import partition
from repjax.weights.naming import entries
from repjax.weights.repmlpnet import NAMINGS
from tests import helpers
from tests.helpers import F64, halves, init_shapes, quick_jit, random_input, random_variables

VARIANTS = sorted(NAMINGS)
TINY = {
  "stage_sizes": (1, 2),
  "widths": (8, 16),
  "tiles": ((4, 2), (2, 3)),
  "share_sets": (2, 4),
  "num_classes": 5,
}
IMAGES = jax.ShapeDtypeStruct((2, 32, 48, 3), jnp.float32)  # several tiles a stage, H != W

create = functools.partial(repjax.create_model, "repmlpnet_t224")
tiny = functools.partial(create, **TINY)


def test_counts_are_the_authors_less_what_we_fold_beyond_them():
  # Of one here; those of all are in tests/weights/test_repmlpnet.py, with their names.
  golden = helpers.repmlpnet_goldens()["counts"]["repmlpnet_t224"]
  found = analysis.summary(create(), 224)
  folded = helpers.folded_beyond_the_authors(create())
  assert found.train[:2] == (golden["train_params"], golden["train_macs"])
  assert found.deploy[:2] == (golden["deploy_params"] - folded, golden["deploy_macs"])
  assert {stage.name: stage.output_shape for stage in found.stages} == {
    "stem": (56, 56, 64),
    "stage1": (56, 56, 64),
    "stage2": (28, 28, 128),
    "stage3": (14, 14, 256),
    "stage4": (7, 7, 512),
    "head": (1000,),
  }


class Perceptrons(nn.Module):
  """The part of a block that the authors' own class holds, and the gate by itself."""

  deploy: bool

  @nn.compact
  def __call__(self, x):
    y = RepDense(8, 4, share_sets=2, local_kernels=(1, 3), deploy=self.deploy, **F64)(x)
    gate = SqueezeExcite(4, **F64)
    return gate(y, x), y, gate(jnp.ones_like(y), x)


def as_the_authors_put_tiles_back(y, tile, sets):
  """Their code reads results that lie as (tile, channels / sets) as (channels / sets, tile).

  With one tile, as in all that was published, or a set for each channel, that changes nothing;
  else it moves what one tile gave to another one. RepDense puts it back where it came from.
  """
  rows, (height, width) = y.shape[-1] // sets, y.shape[1:3]
  tiles = np.asarray(partition(y, (tile, tile), rows))  # (N * tiles * rows, h, w, sets)
  reread = tiles.reshape(-1, rows, height // tile, width // tile, tile, tile, sets)
  return reread.transpose(0, 2, 4, 3, 5, 1, 6).reshape(y.shape)


@pytest.mark.usefixtures("x64")
def test_the_authors_block_comes_out():
  (case,) = (c for c in helpers.repmlpnet_goldens()["cases"] if c["id"] == "repmlpnet_block")
  x, expect = helpers.golden_input(tuple(case["input"]["shape_nchw"])), case["expect"]
  table, shapes = NAMINGS["repmlpnet_t224"]["official"], init_shapes(Perceptrons(False), x)
  named = {name.removeprefix("repmlp_block."): e for name, e in entries(table, shapes).items()}
  assert {name: list(entry.shape) for name, entry in named.items()} == expect["train_keys"]
  filled = {e.path: e.layout.from_torch(helpers.fill(name, e.shape)) for name, e in named.items()}
  variables = jax.tree_util.tree_map_with_path(
    lambda path, _: jnp.asarray(filled[tuple(key.key for key in path)]), shapes
  )
  params = quick_jit(repjax.reparameterize)(*halves(variables))
  for model, held in ((Perceptrons(False), variables), (Perceptrons(True), {"params": params})):
    whole, y, gate = quick_jit(model.apply)(held, x)
    theirs = as_the_authors_put_tiles_back(y, 4, 2) * np.asarray(gate)
    helpers.assert_golden(helpers.nchw(theirs), expect["output"])
    assert helpers.relative_error(whole, y * gate) <= 1e-12
  deploy_names = entries(table, {"params": params})
  fused = {
    name.removeprefix("repmlp_block."): entry.layout.to_torch(
      np.asarray(params["RepDense_0"]["dense"][entry.path[-1]])
    )
    for name, entry in deploy_names.items()
    if "fc3" in name
  }
  assert fused.keys() == expect["fused"].keys()
  for name, record in expect["fused"].items():
    helpers.assert_golden(fused[name], record)


def forms_differ_by(dtype, size, **overrides):
  """Relative error of the deploy form against the training form, random statistics."""
  overrides = {"stage_sizes": (1, 1), "dtype": dtype, "param_dtype": dtype} | overrides
  return helpers.forms_differ_by(tiny(**overrides), random_input(2, *size, 3).astype(dtype))


class TestBothFormsAgree:
  @pytest.mark.usefixtures("x64")
  @pytest.mark.parametrize(
    ("size", "overrides"),
    [
      ((32, 48), {"act": "silu"}),  # several tiles a stage
      (
        (9, 30),
        {
          "stage_sizes": (1,),
          "widths": (6,),
          "tiles": ((1, 5),),
          "share_sets": (3,),
          "patch_size": 3,
          "local_kernels": (1, 3, 5),
        },
      ),
      (
        (12, 8),
        {
          "widths": (4, 12),
          "tiles": ((3, 2), 1),
          "share_sets": (1, 3),
          "patch_size": 1,
          "local_kernels": (),
        },
      ),
    ],
    ids=["two stages", "one stage", "no local kernel"],
  )
  def test_in_float64(self, size, overrides):
    assert forms_differ_by(jnp.float64, size, **overrides) <= 1e-12

  def test_in_float32(self):
    one_stage = {"stage_sizes": (2,), "widths": (8,), "tiles": ((4, 2),), "share_sets": (2,)}
    assert forms_differ_by(jnp.float32, (16, 24), **one_stage) <= 1e-5


def test_the_deploy_form_holds_what_the_docstring_says():
  params = init_shapes(tiny(deploy=True), IMAGES)["params"]
  block = params["stage2"]["block1"]
  assert params.keys() == {"stem", "stage1", "stage2", "head"}
  assert params["stage2"].keys() == {"RepConv_embed", "block0", "block1"}
  assert {name: list(layer) for name, layer in block.items()} == {
    "RepNorm_0": ["affine"],
    "RepDense_0": ["dense"],
    "SqueezeExcite_0": ["down", "up"],
    "RepFFN_0": ["dense"],
  }
  assert not any("/bn/" in path for path in helpers.leaves(params))


class TestFeatures:
  def test_the_head_reads_the_last(self):
    small = {
      "stage_sizes": (1,),
      "widths": (4,),
      "tiles": (2,),
      "share_sets": (2,),
      "local_kernels": (1,),
    }
    model, x = tiny(**small), random_input(2, 8, 16, 3).astype("float32")
    variables = random_variables(model, x)
    body = {
      half: {k: v for k, v in tree.items() if k != "head"} for half, tree in variables.items()
    }
    head = {half: tree["head"]["RepHead_0"] for half, tree in variables.items()}

    @quick_jit
    def outputs(variables, body, head):
      last = model.clone(features_only=True).apply(body, x)["stage1"]
      return model.apply(variables, x), RepHead(5).apply(head, last)

    assert helpers.relative_error(*outputs(variables, body, head)) <= 1e-6


class TestOverrides:
  def test_variants_are_made_for_the_size_in_their_names(self):
    for name in VARIANTS:
      assert repjax.create_model(name).image_size == int(name[-3:])
      assert repjax.ModelSpec.usual(name).preprocessing.image_size == int(name[-3:])
    assert tiny().unit() == (16, 24)
    assert tiny().image_size == 48
    assert tiny(tiles=((4, 3), (3, 1))).unit() == (48, 24)  # 16 and 24, 12 and 8

  def test_parameters_do_not_depend_on_the_image_size(self):
    larger = jax.ShapeDtypeStruct((1, 16, 72, 3), jnp.float32)
    assert helpers.shapes(init_shapes(tiny(), larger)) == helpers.shapes(
      init_shapes(tiny(), IMAGES)
    )

  def test_each_reaches_its_layer(self):
    params = init_shapes(tiny(patch_size=2, local_kernels=(3,)), IMAGES)["params"]
    assert params["stem"]["RepConv_0"]["conv2x2"]["conv"]["kernel"].shape == (2, 2, 3, 8)
    dense = params["stage2"]["block0"]["RepDense_0"]
    assert dense["fc"]["dense"]["kernel"].shape == (4, 2, 3, 1, 2, 3, 1)
    assert dense["local"]["conv3x3"]["conv"]["kernel"].shape == (3, 3, 1, 4)
    assert list(dense["local"]) == ["conv3x3"]

  @pytest.mark.parametrize("deploy", [False, True])
  def test_the_activation_is_that_of_the_ffns(self, deploy):
    def program(act):
      model = tiny(stage_sizes=(1, 1), act=act, deploy=deploy)
      return str(jax.make_jaxpr(model.apply)(init_shapes(model, IMAGES), IMAGES))

    exact, other = program("gelu"), program("silu")
    assert (exact.count("= erfc ") + exact.count("= erf "), exact.count("= tanh")) == (2, 0)
    assert other.count("= logistic") == exact.count("= logistic") + 2  # besides those of gates


class TestRefusals:
  @pytest.mark.parametrize(
    "shape", [(1, 32, 32, 3), (1, 24, 24, 3), (1, 0, 24, 3), (32, 48, 3)], ids=str
  )
  def test_images_that_do_not_divide_into_tiles(self, shape):
    said = (
      r"tiles of 4x2 at stride 4, 2x3 at stride 8, .* H a multiple of 16 and W of 24; "
      rf"got {str(shape)[:-1]}"
    ).replace("(", r"\(")
    with pytest.raises(ValueError, match=said):
      init_shapes(tiny(), jnp.ones(shape))

  @pytest.mark.parametrize(
    ("overrides", "said"),
    [
      ({"stage_sizes": ()}, r"stage_sizes takes a whole number above 0 for each stage, got \(\)"),
      ({"stage_sizes": 2}, "stage_sizes must be a list, each a whole number"),
      ({"stage_sizes": (1, 0)}, "stage_sizes takes a whole number"),
      (
        {"stage_sizes": (1,)},
        r"widths takes 1 whole numbers .* each stage in stage_sizes, got \(8, 16\)",
      ),
      ({"widths": (8, 16.0)}, r"widths\[1\] must be a whole number, got 16.0"),
      ({"share_sets": (2,)}, "share_sets takes 2 whole numbers above 0, one for each stage"),
      ({"tiles": (4,)}, "tiles takes a tile for each of the 2 stages in stage_sizes"),
      ({"tiles": 4}, "tiles must be a list, .* got 4"),
      ({"tiles": (4, (2, 3, 1))}, r"tiles\[1\] takes a whole number above 0, or two \(height"),
      ({"tiles": (4, (2, 0))}, r"tiles\[1\] takes"),
      ({"tiles": ("4", 2)}, r"tiles\[0\] must be .* got '4'"),
      ({"share_sets": (3, 4)}, r"a multiple of its stage's share_sets, got \(8, 16\) and \(3, 4\)"),
      ({"widths": (2, 16)}, "each of widths is at least 4"),
      ({"patch_size": 0}, "patch_size takes a whole number above 0"),
      ({"local_kernels": 3}, "local_kernels must be a list, each a whole number, got 3"),
      ({"local_kernels": (2,)}, "local_kernels are different odd numbers"),
      ({"local_kernels": ("3",)}, r"local_kernels\[0\] must be a whole number, got '3'"),
      ({"local_kernels": (1, 5)}, "at most as large as the tile, 4 pixels on its longest side"),
    ],
    ids=str,
  )
  def test_values_that_make_no_network(self, overrides, said):
    with pytest.raises(ValueError, match=said):
      tiny(**overrides)
