"""ParNet: the authors' outputs and counts, both forms equal, overrides and refusals."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax import analysis
from repjax.models.parnet import Downsample, Fusion, GatedBlock, StreamBlock, channel_shuffle
from repjax.weights.parnet import NAMINGS
from tests import helpers
from tests.helpers import F64, halves, init_shapes, quick_jit, random_input, random_variables
from tests.models.repmlp_cases import fill

GOLDENS = helpers.parnet_goldens()
CASES = {case["id"]: case for case in GOLDENS["cases"]}
IMAGENET = ["parnet_l", "parnet_m", "parnet_s", "parnet_s_96", "parnet_xl"]
CIFAR = ["parnet_cifar_l", "parnet_cifar_m", "parnet_cifar_s"]
IMAGES = jax.ShapeDtypeStruct((2, 64, 96, 3), jnp.float32)

NAMES = NAMINGS["parnet_s"]["official"]  # key lists hold it to the authors'

create = functools.partial(repjax.create_model, "parnet_s")
tiny = functools.partial(create, stage_sizes=(1, 1, 2), widths=(4, 6, 8, 10), num_classes=5)


def folded_beyond_the_authors(model):
  """Numbers that our deploy form has and the trainable ones of the authors' have not.

  In a stream block the norm in front of the gate becomes an affine map, of as many, and the gate
  gains a bias. The norms of fusion become affine maps of as many.
  """
  return sum(blocks * width for blocks, width in zip(model.stage_sizes, model.widths))


# Those of the released models are in tests/weights, with their names.
@pytest.mark.parametrize("name", ["parnet_s_96", "parnet_xl"])
def test_parameters_are_the_authors_but_for_what_we_fold_beyond_them(name):
  model, golden = repjax.create_model(name), GOLDENS["counts"][name]
  train, deploy = (init_shapes(model.clone(deploy=form), IMAGES) for form in (False, True))
  params, stats, deployed = (
    sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (*halves(train), deploy)
  )
  assert (params, stats) == (golden["train_params"], golden["bn_buffers"])
  assert deployed == golden["deploy_params"] + folded_beyond_the_authors(model)


def test_products_and_maps_are_the_authors():
  found, golden = analysis.summary(create(), 224), GOLDENS["counts"]["parnet_s"]
  assert (found.train.macs, found.deploy.macs) == (golden["train_macs"], golden["deploy_macs"])
  assert {stage.name: stage.output_shape for stage in found.stages} == {
    "downsample0": (112, 112, 64),
    "downsample1": (56, 56, 92),
    "downsample2": (28, 28, 192),
    "downsample3": (14, 14, 384),
    "stream1": (56, 56, 92),
    "stream2": (28, 28, 192),
    "stream3": (14, 14, 384),
    "fusion1": (28, 28, 192),
    "fusion2": (14, 14, 384),
    "fusion3": (14, 14, 384),
    "downsample4": (7, 7, 1280),
    "head": (1000,),
  }


class TestCifar:
  def test_maps_keep_32_pixels_in_the_first_stream(self):
    model = repjax.create_model("parnet_cifar_s", features_only=True, deploy=True)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    features = jax.eval_shape(model.apply, init_shapes(model, x), x)
    shapes = {name: value.shape[1:] for name, value in features.items()}
    assert shapes == {
      "stage1": (32, 32, 48),
      "stage2": (16, 16, 96),
      "stage3": (8, 8, 192),
      "stage4": (8, 8, 384),
    }

  @pytest.mark.parametrize("name", CIFAR)
  def test_it_has_a_block_less_in_each_stream_and_stream_blocks_in_front(self, name):
    model = repjax.create_model(name, deploy=True)
    params = init_shapes(model, IMAGES)["params"]
    assert [len(params[f"stream{n}"]) for n in (1, 2, 3)] == [3, 4, 4]
    assert params["downsample1"].keys() == params["stem"]["block0"].keys()
    assert params["downsample1"].keys() == {"RepConv_0", "SkipSqueezeExcite_0"}
    assert params["downsample0"].keys() == {"RepConv_0", "gate"}
    assert params["downsample4"].keys() == {"RepConv_0"}
    assert params["downsample4"]["RepConv_0"]["conv"]["kernel"].shape == (1, 1, *model.widths[2:])

  @pytest.mark.parametrize("name", CIFAR)
  def test_it_is_made_for_its_size(self, name):
    assert repjax.create_model(name).image_size == 32
    assert repjax.ModelSpec.usual(name, 10).preprocessing.image_size == 32


class GroupedBlock(GatedBlock):
  """A fusion without norms and concatenation, as the code of the authors has it in one class."""

  @nn.compact
  def __call__(self, x, train):
    return channel_shuffle(self.gated_conv(x, 2, train), 2)


def golden_block(spec, deploy):
  attributes = {"act": spec["act"], "deploy": deploy, **F64}
  if spec["in_channels"] == spec["out_channels"]:
    return StreamBlock(**attributes)
  block = {1: Downsample, 2: GroupedBlock}[spec["groups"]]
  return block(spec["out_channels"], spec["stride"], **attributes)


@pytest.mark.usefixtures("x64")
class TestGoldens:
  @pytest.mark.parametrize("kind", ["stream", "down", "fusion"])
  def test_a_block(self, kind):
    case = CASES[f"parnet_block_{kind}"]
    x, expect = helpers.golden_input(tuple(case["input"]["shape_nchw"])), case["expect"]
    train, deploy = (golden_block(case["spec"], form) for form in (False, True))
    shapes = jax.eval_shape(lambda x: train.init(jax.random.key(0), x, False), x)
    variables = fill(shapes, NAMES)

    @quick_jit
    def outputs(variables):
      params = repjax.reparameterize(*halves(variables))
      return train.apply(variables, x, False), deploy.apply({"params": params}, x, False), params

    *maps, params = outputs(variables)
    for y in maps:
      helpers.assert_golden(helpers.nchw(y), expect["output"])
    fused = params["RepConv_0"]["conv"]
    helpers.assert_golden(helpers.oihw(fused["kernel"]), expect["fused"]["rbr_dense.weight"])
    helpers.assert_golden(fused["bias"], expect["fused"]["rbr_dense.bias"])

  def test_the_network_with_either_activation(self):
    cases = [CASES[f"parnet_tiny_{act}"] for act in ("relu", "silu")]
    spec, given = cases[0]["spec"], cases[0]["input"]
    assert spec["num_blocks"] == [size + 1 for size in create().stage_sizes] + [1]
    overrides = {"widths": tuple(spec["planes"]), "num_classes": spec["num_classes"], **F64}
    x = helpers.golden_input(tuple(given["shape_nchw"]))
    shapes = init_shapes(create(**overrides), x)
    held = [sum(leaf.size for leaf in jax.tree.leaves(half)) for half in halves(shapes)]
    assert held[0] == cases[0]["expect"]["train_params"]
    variables = fill(shapes, NAMES)

    @quick_jit
    def outputs(variables):
      held = {"params": repjax.reparameterize(*halves(variables))}
      return (
        create(act="relu", **overrides).apply(variables, x),
        create(act="silu", deploy=True, **overrides).apply(held, x),
      )

    for case, logits in zip(cases, outputs(variables)):
      helpers.assert_golden(logits, case["expect"]["logits"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("dtype", "act", "bound"),
  [
    ("float64", "silu", 1e-12),
    pytest.param("float32", "relu", 1e-5, marks=pytest.mark.proof),
  ],
)
def test_both_forms_agree(dtype, act, bound):
  model = tiny(act=act, dtype=jnp.dtype(dtype), param_dtype=jnp.dtype(dtype))
  assert helpers.forms_differ_by(model, random_input(2, 97, 96, 3).astype(dtype)) <= bound


@pytest.mark.usefixtures("x64")
def test_both_forms_agree_where_every_map_is_odd():
  # The authors' training form refuses such maps. Blocks of CIFAR's networks are in it too.
  blocks = {"stage_sizes": (1, 1, 1), "stem_blocks": 1, "last_block": "conv1x1"}
  model = tiny(strides=(2, 1), act="gelu", **blocks, **F64)
  x = random_input(2, 33, 17, 3)  # maps of 17x9, 9x5 and 5x3 follow
  assert helpers.forms_differ_by(model, x) <= 1e-12


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("strides", [1, 2])
def test_fusion_reads_the_maps_channels_in_turn_and_shuffles_what_it_makes(strides):
  fusion, block = (kind(4, strides, act="relu", **F64) for kind in (Fusion, Downsample))
  stream, previous = random_input(2, 5, 4, 6), random_input(2, 5, 4, 6, seed=2)
  shapes = jax.eval_shape(
    lambda s, p: fusion.init(jax.random.key(0), s, p, False), stream, previous
  )
  variables = helpers.randomise(shapes)
  normed = []
  for name, x in (("RepNorm_stream", stream), ("RepNorm_previous", previous)):
    bn, stats = (jax.tree.map(np.asarray, half[name]["bn"]) for half in halves(variables))
    factor = bn["scale"] / np.sqrt(stats["var"] + 1e-5)
    normed.append((x - stats["mean"]) * factor + bn["bias"])
  x = np.stack(normed, -1).reshape(2, 5, 4, 12)
  # Two blocks, one for each half of the channels in and out.
  outputs = []
  for group in (0, 1):
    inputs, kernels = x[..., 6 * group : 6 * group + 6], slice(2 * group, 2 * group + 2)
    part = {
      half: jax.tree.map(
        lambda leaf, kernels=kernels: leaf[..., kernels],
        {name: tree for name, tree in variables[half].items() if not name.startswith("RepNorm")},
      )
      for half in variables
    }
    outputs.append(quick_jit(lambda v, x: block.clone(features=2).apply(v, x, False))(part, inputs))
  expected = np.stack(outputs, -1).reshape((*outputs[0].shape[:-1], 4))
  actual = quick_jit(lambda v: fusion.apply(v, stream, previous, False))(variables)
  assert helpers.relative_error(actual, expected) <= 1e-12


def test_the_shuffle_is_the_authors():
  shuffled = channel_shuffle(jnp.arange(8).reshape(1, 1, 1, 8), 2)
  assert shuffled.ravel().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


def test_the_deploy_form_holds_what_the_docstring_says():
  params = init_shapes(tiny(deploy=True), IMAGES)["params"]
  gated = {"RepConv_0": ["conv"], "gate": ["kernel"]}
  norms = {"RepNorm_stream": ["affine"], "RepNorm_previous": ["affine"]}
  assert {
    scope: {name: sorted(layer) for name, layer in params[scope].items()}
    for scope in params
    if scope.startswith(("downsample", "fusion"))
  } == {
    **{f"downsample{n}": gated for n in range(5)},
    "fusion1": gated,
    "fusion2": gated | norms,
    "fusion3": gated | norms,
  }
  block = params["stream3"]["block1"]
  assert {name: sorted(layer) for name, layer in block.items()} == {
    "RepConv_0": ["conv"],
    "SkipSqueezeExcite_0": ["affine", "dense"],
  }
  assert block["SkipSqueezeExcite_0"]["dense"].keys() == {"kernel", "bias"}
  assert not any("/bn/" in path for path in helpers.leaves(params))


class TestFeatures:
  def test_they_are_what_the_docstring_says(self):
    model, x = tiny(features_only=True), random_input(2, 32, 32, 3).astype("float32")
    whole = model.clone(features_only=False)
    variables = random_variables(whole, x)
    held = dict(variables["params"])
    head = held.pop("head")
    apply = quick_jit(lambda params: model.apply({**variables, "params": params}, x))
    features = apply(held)
    logits = np.asarray(features["stage4"]).mean((1, 2)) @ head["kernel"] + head["bias"][None]
    assert helpers.relative_error(quick_jit(whole.apply)(variables, x), logits) <= 1e-5
    # The first two see their own streams alone, the third and what comes of it see all.
    for stream, changed in (
      ("stream1", ["stage1", "stage3", "stage4"]),
      ("stream2", ["stage2", "stage3", "stage4"]),
      ("stream3", ["stage3", "stage4"]),
    ):
      bent = apply(held | {stream: jax.tree.map(lambda leaf: 1.5 * leaf, held[stream])})
      assert [name for name in bent if not np.array_equal(bent[name], features[name])] == changed


@pytest.mark.parametrize("features_only", [False, True])
@pytest.mark.parametrize(
  "overrides",
  [{}, {"strides": (1, 1), "stem_blocks": 1, "last_block": "conv1x1"}],
  ids=["images", "CIFAR"],
)
def test_the_table_of_streams_computes_what_the_forward_pass_does(overrides, features_only):
  model = tiny(stage_sizes=(1, 1, 1), features_only=features_only, **overrides)
  x = random_input(2, 32, 32, 3).astype("float32")
  variables = random_variables(model, x)

  def by_table(variables):
    maps = model.apply(variables, {"images": x}, model.stream_scopes, method="run")
    return jax.tree.map(lambda scope: maps[scope], model.outputs)

  expected, found = quick_jit(lambda v: (model.apply(v, x), by_table(v)))(variables)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_the_largest_variants_have_dropout():
  rates = {name: repjax.create_model(name).dropout for name in IMAGENET}
  assert rates == dict.fromkeys(IMAGENET, 0.0) | {"parnet_l": 0.1, "parnet_xl": 0.1}


class TestOverrides:
  def test_parameters_do_not_depend_on_the_image_size(self):
    larger = jax.ShapeDtypeStruct((1, 77, 32, 3), jnp.float32)
    found = [helpers.shapes(init_shapes(tiny(deploy=True), images)) for images in (larger, IMAGES)]
    assert found[0] == found[1]

  def test_the_first_block_has_at_most_64_channels(self):
    for width, first in ((60, 60), (92, 64)):
      params = init_shapes(tiny(widths=(width, 6, 8, 10), deploy=True), IMAGES)["params"]
      assert params["downsample0"]["gate"]["kernel"].shape == (3, first)
      assert params["downsample1"]["gate"]["kernel"].shape == (first, width)

  @pytest.mark.parametrize("deploy", [False, True])
  @pytest.mark.parametrize(
    ("overrides", "blocks"),
    [
      ({}, 2 + 2 + 3 + 3 + 1),
      ({"strides": (1, 1), "stem_blocks": 1, "last_block": "conv1x1"}, 2 + 1 + 2 + 3 + 3 + 1),
    ],
    ids=["images", "CIFAR"],
  )
  def test_the_activation_ends_every_block(self, deploy, overrides, blocks):
    def program(act):
      model = tiny(stage_sizes=(1, 1, 1), act=act, deploy=deploy, **overrides)
      return str(jax.make_jaxpr(model.apply)(init_shapes(model, IMAGES), IMAGES))

    relu, silu = program("relu"), program("silu")
    assert (silu.count("name=silu"), relu.count("name=silu")) == (blocks, 0)
    assert (silu.count("name=relu"), relu.count("name=relu")) == (0, 2 * blocks)
    assert create().act == "silu"


class TestRefusals:
  @pytest.mark.parametrize(
    ("shape", "overrides", "stride"),
    [
      ((1, 31, 64, 3), {}, 32),
      ((64, 64, 3), {}, 32),
      ((1, 7, 8, 3), {"strides": (1, 1)}, 8),
      ((1, 4, 3, 3), {"strides": (1, 1), "last_block": "conv1x1"}, 4),
    ],
    ids=str,
  )
  def test_images_that_are_too_small(self, shape, overrides, stride):
    with pytest.raises(ValueError, match=f"this ParNet shrinks images {stride} times"):
      init_shapes(tiny(**overrides), jnp.ones(shape))

  @pytest.mark.parametrize(
    ("overrides", "said"),
    [
      ({"stage_sizes": (1, 1)}, "stage_sizes takes 3 whole numbers above 0, one for each stream"),
      ({"stage_sizes": (1, 1, 0)}, "stage_sizes takes 3 whole numbers"),
      ({"widths": (4, 6, 8)}, "widths takes 4 whole numbers above 0: of three streams and"),
      ({"widths": (4, 6, 9, 10)}, r"third of widths is a multiple of 2, .* got \(4, 6, 9, 10\)"),
      ({"strides": 2}, "strides must be a list, each a whole number, got 2"),
      ({"strides": (2, 4)}, "strides takes 2 whole numbers, each 1 or 2"),
      ({"strides": (2, 2, 1)}, "strides takes 2 whole numbers above 0"),
      ({"strides": (1.0, 2.0)}, r"strides\[0\] must be a whole number, got 1.0"),
      ({"stem_blocks": -1}, "stem_blocks takes a whole number, 0 or more, got -1"),
      ({"stem_blocks": 1.0}, "stem_blocks must be a whole number, got 1.0"),
      ({"stem_blocks": True}, "stem_blocks must be a whole number, got True"),
      ({"last_block": "conv3x3"}, "unknown last_block of a ParNet 'conv3x3'; did you mean conv1x1"),
    ],
    ids=str,
  )
  def test_values_that_make_no_network(self, overrides, said):
    with pytest.raises(ValueError, match=said):
      tiny(**overrides)
