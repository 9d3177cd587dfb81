"""PSPNet and FCN: the forward pass in NumPy, both forms, every backbone, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.models.segmentation import build_backbone
from repjax.spec import Preprocessing
from tests import helpers
from tests.helpers import F64, assert_close, convolve, halves, init_shapes, quick_jit, random_input
from tests.layers.test_resampling import interpolated
from tests.models.families import FAMILIES, small

REPVGG = {"stage_sizes": (1, 1, 6, 1), "width_multipliers": (0.125, 0.125, 0.0625, 0.03125)}
# Dilation of each 3x3 convolution, from the stem on.
RATES = {
  "full": (1, 1, 1, *6 * [2], 4),
  "fast": (1, 1, 1, 1, 1, *4 * [2], 4),
  "last": (1, 1, 1, *6 * [1], 4),
}
STRIDES = (2, 2, 2, *7 * [1])
TILED = {
  "backbone": "repmlp_resnet50_bottleneck_g8",
  "dilation": "last",
  "backbone_overrides": {
    "stage_sizes": (1, 2, 2, 2),
    "widths": (16, 32, 64, 32),
    "stem_features": 4,
    "tile": 2,
    "local_kernels": (1,),
    "fc3_groups": 2,
    "reduction": (2, 4),
  },
}


def psp(backbone="repvgg_a0", overrides=REPVGG, **more):
  sizes = {"num_classes": 3, "head_features": 6, "aux_features": 4, "bins": (1, 2, 3)}
  return repjax.create_model(
    "pspnet", backbone=backbone, backbone_overrides=overrides, **sizes | more
  )


def plain(params, x, rates):
  """Computes the deploy form of a PSPNet over a RepVGG in NumPy."""

  def conv(scope, y, **how):
    held = scope["RepConv_0"]["conv"] if "RepConv_0" in scope else scope["conv"]
    return np.maximum(convolve(y, held["kernel"], held["bias"], **how), 0)

  body, y = params["backbone"], x
  stages = [("stage1", 1), ("stage2", 1), ("stage3", 6), ("stage4", 1)]
  blocks = [body["stem"], *(body[name][f"block{i}"] for name, size in stages for i in range(size))]
  for block, stride, rate in zip(blocks, STRIDES, rates):
    y = conv(block, y, strides=(stride,) * 2, padding=(rate,) * 2, dilation=(rate,) * 2)
  levels = [y]
  for bins in (1, 2, 3):
    edges = [[(i * n // bins, -(-(i + 1) * n // bins)) for i in range(bins)] for n in y.shape[1:3]]
    means = [[y[:, a:b, c:d].mean((1, 2)) for c, d in edges[1]] for a, b in edges[0]]
    pooled = np.stack([np.stack(row, 1) for row in means], 1)  # (N, bins, bins, C)
    level = conv(params["pyramid"][f"RepConv_bins{bins}"], pooled)
    levels.append(interpolated(level, y.shape[1:3]))
  head = params["head"]
  y = conv(head, np.concatenate(levels, -1), padding=(1, 1))
  y = y @ np.asarray(head["classifier"]["kernel"]) + np.asarray(head["classifier"]["bias"])
  return interpolated(y, x.shape[1:3])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("dilation", "size"),
  [
    ("full", (41, 33)),
    ("fast", (40, 34)),
    *(
      pytest.param(*case, marks=pytest.mark.proof)
      for case in [("full", (40, 34)), ("fast", (41, 33)), ("last", (35, 40))]
    ),
  ],
  ids=str,
)
def test_both_forms_are_the_plain_network(dilation, size):
  x, model = random_input(2, *size, 3), psp(dilation=dilation, **F64)
  variables = helpers.random_variables(model, x)

  @quick_jit
  def compute(variables):
    params = repjax.reparameterize(*halves(variables))
    return params, model.apply(variables, x), model.clone(deploy=True).apply({"params": params}, x)

  params, trained, deployed = compute(variables)
  assert trained.shape == (2, *size, 3)
  assert not any(set(path.split("/")) & {"bn", "AuxHead_stage3"} for path in helpers.leaves(params))
  expected = plain(jax.tree.map(np.asarray, params), x, RATES[dilation])
  assert_close(trained, expected, 1e-12)
  assert_close(deployed, expected, 1e-12)


def test_a_dilated_network_has_the_parameters_of_the_one_that_strides():
  shapes = [
    helpers.shapes(init_shapes(psp(dilation=kind), jnp.ones((1, 41, 41, 3))))
    for kind in ("full", "fast", "last", "none")
  ]
  assert all(each == shapes[0] for each in shapes)


def test_all_3x3_convolutions_of_the_last_two_stages_of_resnet50_dilate():
  network = build_backbone(repjax.create_model("pspnet", backbone="resnet50"))
  rates = [[tuple(place[3:]) for place in places] for _, places in network.stages()]
  assert rates == [3 * [(1, 1, 1)], [(2, 1, 1), *3 * [(1, 1, 1)]], 6 * [(1, 2, 2)], 3 * [(1, 4, 4)]]


def test_training_returns_the_auxiliary_logits_at_the_size_of_the_images():
  model, x = small("pspnet"), jnp.ones((2, 33, 40, 3))

  def step(variables):
    rngs = {"dropout": jax.random.key(0)}
    return model.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)[0]

  logits, auxiliary = jax.eval_shape(step, init_shapes(model, x))
  assert auxiliary.keys() == {"aux"}
  assert logits.shape == auxiliary["aux"].shape == (2, 33, 40, 3)


BACKBONES = {
  "mobileone_s0": (FAMILIES["mobileone_s4"].overrides, {}),
  "repvit_m0_9": (FAMILIES["repvit_m0_9"].overrides, {}),
  "fastvit_sa12": (FAMILIES["fastvit_sa12"].overrides, {}),
  "parnet_s": (FAMILIES["parnet_s"].overrides, {}),
  "repmlp_resnet50_light": (FAMILIES["repmlp_resnet50_light"].overrides, {}),
  TILED["backbone"]: (TILED["backbone_overrides"], {"dilation": "last"}),
}


@pytest.mark.parametrize("name", BACKBONES)
def test_every_family_is_a_backbone_and_converts_with_its_head(name):
  overrides, more = BACKBONES[name]
  model, x = psp(name, overrides, **{"dilation": "none", **more}), jnp.ones((2, 32, 48, 3))
  variables = init_shapes(model, x)
  folded, deploy = jax.eval_shape(repjax.reparameterize, *halves(variables)), {"deploy": True}
  assert helpers.shapes(folded) == helpers.shapes(init_shapes(model.clone(**deploy), x)["params"])
  assert "bn" not in {part for path in helpers.leaves(folded) for part in path.split("/")}
  assert jax.eval_shape(model.apply, variables, x).shape == (2, 32, 48, 3)


@pytest.mark.proof
@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", BACKBONES)
def test_every_backbone_computes_the_same_in_both_forms(name):
  overrides, more = BACKBONES[name]
  model = psp(name, overrides, **{"dilation": "none", **more, **F64})
  assert helpers.forms_differ_by(model, random_input(2, 32, 48, 3)) <= 1e-12


def test_the_variant_with_repmlp_has_tiles_on_maps_of_90_pixels():
  model = repjax.create_model("pspnet_repmlp", num_classes=19)
  backbone = build_backbone(model)
  blocks = {
    name: [backbone.block_at(place)[1].get("repmlp") for place in places]
    for name, places in backbone.stages()
  }
  held = {
    name: {(each["tile"], each["reduction"]) for each in row if each}
    for name, row in blocks.items()
  }
  assert held == {"stage1": set(), "stage2": {(10, 4)}, "stage3": {(10, 8)}, "stage4": set()}
  shapes = jax.eval_shape(backbone.init_with_output, jax.random.key(0), jnp.ones((1, 713, 713, 3)))
  assert {maps.shape[1] for maps in list(shapes[0].values())[1:]} == {90}
  assert model.canvas((700, 714)) == (713, 793)


@pytest.mark.parametrize("name", BACKBONES)
def test_maps_lie_exactly_under_the_logits_of_a_canvas(name):
  overrides, more = BACKBONES[name]
  model = psp(name, overrides, **{"dilation": "none", **more})
  size = model.canvas((40, 49))
  assert all(side >= least for side, least in zip(size, (40, 49)))
  model.check_images(jax.ShapeDtypeStruct((1, *size, 3), jnp.float32))
  stride = build_backbone(model).total_stride()
  # Tiles of 2 x 2 pixels do not divide the maps of 32 k + 1 pixels at stride 8.
  wanted = [8, 24] if name == "repmlp_resnet50_light" else [0, 0]
  assert [(side - 1) % stride for side in size] == wanted


def test_each_side_of_a_canvas_fits_alone():
  overrides = FAMILIES["repmlp_cifar"].overrides
  model = psp("repmlp_cifar", overrides | {"tile": (4, 6)}, dilation="none")
  assert model.canvas((9, 9)) == (16, 12)
  model = psp("repmlp_cifar", overrides | {"tile": (37, 41)}, dilation="none")
  with pytest.raises(InputError, match=r"takes no canvas for images of 9 x 8 pixels.*window"):
    model.canvas((8, 9))


def test_variables_start_as_the_backbone_starts_them():
  overrides = FAMILIES["repvgg_a0"].overrides | {"scaled": True}
  model = psp("repvgg_a0", overrides)
  scope = repjax.init(model, jax.random.key(0), 33)["params"]["backbone"]["stage3"]["block1"]
  np.testing.assert_allclose(scope["ScaledConv_0"]["conv3x3"]["scale"], 2**0.5, rtol=1e-6)


def test_pspnet_of_resnet50_costs_what_repmlps_paper_prints():
  model = repjax.create_model("pspnet", backbone="resnet50", num_classes=19)
  found = repjax.analysis.summary(model, 713)
  assert found.deploy is not None
  assert (round(found.deploy.params / 1e4), found.deploy.macs // 10**6) == (4656, 350_004)


def test_compiled_and_exported_programs_agree(tmp_path):
  model, x = small("pspnet"), random_input(2, 40, 48, 3).astype(np.float32)
  variables = helpers.random_variables(model, x)
  expected = quick_jit(model.apply)(variables, x)
  spec = repjax.ModelSpec("pspnet", 3, FAMILIES["pspnet"].overrides, Preprocessing(40, 40))
  facts = repjax.deploy.export(
    model, variables, spec, tmp_path / "exported", normalize=False, image_size=(40, 48)
  )
  assert facts["image_size"] == [40, 48]
  how = {"batch_sizes": (2,), "devices": jax.devices()[:1]}
  for program in (
    repjax.deploy.load_exported(tmp_path / "exported", **how),
    repjax.deploy.compile(model, variables, image_size=(40, 48), tune=False, **how),
  ):
    assert_close(program(x), expected, 1e-5)


class TestSpec:
  @pytest.mark.parametrize(
    ("name", "task"), [("pspnet", "segmentation"), ("repvgg_a0", "classification")]
  )
  def test_it_says_what_the_model_is_for(self, name, task):
    spec = repjax.ModelSpec(name, 3)
    assert spec.task == task
    assert "task" not in spec.to_json()

  def test_it_goes_through_json(self):
    overrides = {"backbone": "repvgg_a0", "backbone_overrides": REPVGG, "dilation": "fast"}
    spec = repjax.ModelSpec("pspnet", 3, overrides, Preprocessing(41, 47))
    read = repjax.ModelSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert (
      read.create_model()
      == spec.create_model()
      == psp(dilation="fast", head_features=512, aux_features=256, bins=(1, 2, 3, 6))
    )

  @pytest.mark.parametrize(
    ("overrides", "size"),
    [
      ({"backbone": "repvgg_b0"}, 713),
      ({"backbone": "repmlpnet_t224", "dilation": "none"}, 224),
      ({"backbone": "repmlp_cifar", "dilation": "none"}, 32),
    ],
    ids=str,
  )
  def test_the_usual_size_is_that_of_the_paper_if_the_backbone_takes_it(self, overrides, size):
    assert repjax.ModelSpec.usual("pspnet", 19, overrides).preprocessing.image_size == size


@pytest.mark.parametrize(
  ("overrides", "said"),
  [
    ({"backbone": "repvgg_a9"}, "unknown backbone 'repvgg_a9'.*repvgg_a0"),
    ({"backbone": "pspnet"}, "unknown backbone 'pspnet'"),
    ({"backbone_overrides": {"stage_sises": 1}}, "override of repvgg_b1g2 'stage_sises'"),
    ({"backbone_overrides": {"axis_name": "a"}}, "axis_name belongs to the whole network"),
    ({"backbone_overrides": {"stage_sizes": (1,)}}, "stage_sizes takes 4 numbers"),
    ({"dilation": "quick"}, "dilation is one of none, full, fast, last"),
    ({"backbone_overrides": {"output_stride": 16}}, "has output_stride too.*dilation=.none"),
    ({"backbone": "parnet_s"}, "families RepVGG and ResNet, and parnet_s is a ParNet"),
    ({"backbone": "mobileone_s1"}, 'dilation=.none.*"output_stride": 8'),
    ({"bins": ()}, "bins takes different whole numbers"),
    ({"bins": (1, 1)}, "bins takes different whole numbers"),
    ({"head_features": 0}, "head_features takes a whole number above 0"),
  ],
  ids=str,
)
def test_attributes_that_make_no_network(overrides, said):
  with pytest.raises(InputError, match=said):
    repjax.create_model("pspnet", **overrides)


def test_a_backbone_with_one_map_has_no_place_for_an_auxiliary_head():
  one = {"stage_sizes": (1,), "widths": (4,), "tile": 4, "local_kernels": (1,)}
  network = psp("repmlp_cifar", one, dilation="none")
  with pytest.raises(InputError, match=r"last map but one.*aux=False"):
    init_shapes(network, jnp.ones((1, 8, 8, 3)))


class TestDilatedBlocks:
  @pytest.mark.parametrize("name", ["repvgg_a0", "resnet18"])
  @pytest.mark.parametrize(("stride", "value"), [(8, 0), (8, True), (8, 100), (32, 1)])
  def test_a_number_that_no_network_has(self, name, stride, value):
    with pytest.raises(InputError, match="dilated_blocks"):
      repjax.create_model(name, output_stride=stride, dilated_blocks=value)

  def test_a_block_that_lost_its_stride_has_no_identity(self):
    # One width everywhere: only the stride tells the first block from the later ones.
    own = {"stage_sizes": (1, 1, 2, 1), "width_multipliers": (1 / 8, 1 / 16, 1 / 32, 1 / 64)}
    model = repjax.create_model("repvgg_a0", output_stride=8, dilated_blocks=3, **own)
    stage = init_shapes(model, jnp.ones((1, 32, 32, 3)))["params"]["stage3"]
    assert "identity" not in stage["block0"]["RepConv_0"]
    assert "identity" in stage["block1"]["RepConv_0"]
