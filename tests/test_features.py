"""Features of every family, and networks built on them that are converted in place."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import repjax
from repjax.layers import RepConv
from tests import helpers
from tests.helpers import F64, halves, init_shapes, quick_jit, random_input, random_variables

pytestmark = pytest.mark.usefixtures("x64")

_REPVGG = {"stage_sizes": (1, 1, 2, 1), "width_multipliers": (0.125, 0.0625, 0.0625, 0.03125)}
_FOUR = {"stage1": (4, 8), "stage2": (8, 8), "stage3": (16, 16), "stage4": (32, 16)}
_RESNET = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "stem_features": 6}
_REPMLP = _RESNET | {"stage_sizes": (1, 2, 1, 1), "repmlp_stages": (2,), "tile": 4}
_REPMLPNET = {"stage_sizes": (1, 1), "widths": (8, 16), "tiles": (4, 2), "share_sets": (2, 2)}
_CIFAR = {"stage_sizes": (1, 1, 1), "widths": (4, 6, 8), "tile": 4, "local_kernels": (1, 3)}

FAMILIES: dict[str, tuple[dict[str, Any], dict[str, tuple[int, int]]]] = {
  "repvgg_a0": (_REPVGG, _FOUR),
  "repvggplus_l2pse": (_REPVGG | {"se_reduction": 2}, _FOUR),
  "resnet18": (_RESNET, _FOUR),
  "repmlp_resnet50_light": (_REPMLP | {"fc3_groups": 1, "local_kernels": (1, 3)}, _FOUR),
  "vgg16": (
    {"widths": (2, 4, 4, 6, 8)},
    {"stage2": (4, 4), "stage3": (8, 4), "stage4": (16, 6), "stage5": (32, 8)},
  ),
  "repmlpnet_t224": (_REPMLPNET, {"stage1": (4, 8), "stage2": (8, 16)}),
  "parnet_s": ({"stage_sizes": (1, 1, 1), "widths": (8, 8, 16, 16)}, _FOUR),
  "repmlp_cifar": (_CIFAR, {"stage1": (1, 4), "stage2": (2, 6), "stage3": (4, 8)}),
}
"""Model to overrides that make it small, and to the stride and channels of its features."""

BACKBONES = ("repvgg_a0", "resnet18", "parnet_s")


def backbone(name, deploy=False, **overrides):
  overrides = FAMILIES[name][0] | overrides
  return repjax.create_model(name, features_only=True, deploy=deploy, **overrides, **F64)


@pytest.mark.parametrize("name", FAMILIES)
def test_names_and_shapes_in_both_forms_also_from_a_classifiers_variables(name):
  overrides, stages = FAMILIES[name]
  classifier = repjax.create_model(name, num_classes=3, **overrides, **F64)
  model, deploy, x = backbone(name), backbone(name, deploy=True), jnp.ones((1, 64, 32, 3))
  variables, whole = init_shapes(model, x), init_shapes(classifier, x)
  assert helpers.shapes(without_head(whole, variables)) == helpers.shapes(variables)

  def convert(variables):
    return {"params": repjax.reparameterize(*halves(variables))}

  plain, with_head = (jax.eval_shape(convert, each) for each in (variables, whole))
  assert helpers.shapes(plain) == helpers.shapes(init_shapes(deploy, x))
  assert "head" in with_head["params"]  # which nobody reads
  assert helpers.shapes(without_head(with_head, plain)) == helpers.shapes(plain)
  expected = {
    stage: (1, 64 // stride, 32 // stride, channels) for stage, (stride, channels) in stages.items()
  }
  for form, held in ((model, variables), (model, whole), (deploy, plain), (deploy, with_head)):
    features = jax.eval_shape(form.apply, held, x)
    assert {stage: feature.shape for stage, feature in features.items()} == expected


def without_head(whole, like):
  """The scopes of a classifier's variables that another tree has."""
  return {half: {scope: whole[half][scope] for scope in like[half]} for half in like}


class Pyramid(nn.Module):
  """Maps of strides 8 to 32 at one width, each with what the smaller ones hold."""

  deploy: bool

  @nn.compact
  def __call__(self, maps, train):
    conv = functools.partial(RepConv, 8, deploy=self.deploy, **F64)
    merged, levels = jnp.zeros(()), []
    for stage in ("stage4", "stage3", "stage2"):
      lateral = conv(("conv1x1",), name=f"RepConv_{stage}")(maps[stage], train)
      shape = lateral.shape if levels else ()
      merged = lateral + jax.image.resize(merged, shape, "nearest")
      levels.append(nn.relu(conv()(merged, train)))
    return levels


class Head(nn.Module):
  """What all levels share: a convolution with a batch norm of Flax's own, then scores and boxes."""

  @nn.compact
  def __call__(self, levels, train):
    conv = nn.Conv(8, (3, 3), use_bias=False, **F64)
    norm = nn.BatchNorm(not train, force_float32_reductions=False, **F64)
    scores, boxes = (nn.Conv(count, (1, 1), name=name, **F64) for name, count in self.outputs())
    maps = [nn.relu(norm(conv(level))) for level in levels]
    return [(scores(level), boxes(level)) for level in maps]

  def outputs(self):
    return ("scores", 3), ("boxes", 4)


class Detector(nn.Module):
  """Features, pyramid, head."""

  backbone: nn.Module
  deploy: bool = False

  @nn.compact
  def __call__(self, images, train=False):
    levels = Pyramid(self.deploy, name="pyramid")(self.backbone(images, train), train)
    return Head(name="head")(levels, train)


@pytest.mark.parametrize("name", BACKBONES)
class TestDetector:
  x = random_input(1, 64, 64, 3)

  def forms(self, name):
    return (Detector(backbone(name, form), form) for form in (False, True))

  def test_it_is_converted_in_place_and_keeps_its_own_norm(self, name):
    model, deploy = self.forms(name)
    variables = random_variables(model, self.x)
    kept = {"head": variables["batch_stats"]["head"]}

    @quick_jit
    def outputs(variables):
      params = repjax.reparameterize(*halves(variables), keep="head/BatchNorm_0")
      converted = {"params": params, "batch_stats": kept}
      return converted, deploy.apply(converted, self.x), model.apply(variables, self.x)

    converted, plain, trained = outputs(variables)
    assert helpers.shapes(converted) == helpers.shapes(init_shapes(deploy, self.x))
    assert [scores.shape for scores, _ in trained] == [(1, n, n, 3) for n in (2, 4, 8)]
    jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-12), plain, trained)

  def test_its_own_norm_is_not_forgotten_without_a_word(self, name):
    model, _ = self.forms(name)
    said = r"head/BatchNorm_0/(mean|var), which no fold has used.*keep=\('head/BatchNorm_0',\)"
    with pytest.raises(ValueError, match=said):
      jax.eval_shape(repjax.reparameterize, *halves(init_shapes(model, self.x)))

  def test_it_trains_in_training_form_alone(self, name):
    model, deploy = self.forms(name)

    def step(model, variables):
      return model.apply(variables, self.x, train=True, mutable=["batch_stats"])[1]

    variables, plain = (init_shapes(form, self.x) for form in (model, deploy))
    updates = jax.eval_shape(functools.partial(step, model), variables)
    assert helpers.shapes(updates["batch_stats"]) == helpers.shapes(variables["batch_stats"])
    with pytest.raises(ValueError, match="the deploy form cannot train"):
      jax.eval_shape(functools.partial(step, deploy), plain)


class Segmenter(nn.Module):
  """A dilated encoder, and a decoder that goes back to a quarter of the image's size."""

  backbone: nn.Module
  deploy: bool = False

  @nn.compact
  def __call__(self, images, train=False):
    conv = functools.partial(RepConv, 8, deploy=self.deploy, **F64)
    maps = self.backbone(images, train)
    x = maps["stage4"]
    for stage in ("stage3", "stage1"):
      finer = maps[stage]
      x = jax.image.resize(x, (*finer.shape[:3], x.shape[-1]), "bilinear")
      x = nn.relu(conv(("conv3x3", "conv1x1"))(jnp.concatenate([x, finer], -1), train))
      x = nn.relu(conv(("conv3x3", "conv1x1", "identity"), dilation=2)(x, train))
    classes = nn.Conv(3, (1, 1), name="classes", **F64)(x)
    return jax.image.resize(classes, (*images.shape[:3], 3), "bilinear")


def test_a_dilated_encoder_and_its_decoder_are_converted_in_place():
  x = random_input(1, 72, 64, 3)
  model, deploy = (
    Segmenter(backbone("repvgg_a0", form, output_stride=8), form) for form in (False, True)
  )
  variables = random_variables(model, x)
  undilated = init_shapes(Segmenter(backbone("repvgg_a0")), x)
  assert helpers.shapes(variables) == helpers.shapes(undilated)  # so its weights can be taken

  @quick_jit
  def outputs(variables):
    params = repjax.reparameterize(*halves(variables))
    trained, captured = model.apply(variables, x, capture_intermediates=True)
    return params, deploy.apply({"params": params}, x), trained, captured["intermediates"]

  params, plain, trained, captured = outputs(variables)
  encoded = captured["backbone"]["stage4"]["__call__"][0]
  assert encoded.shape[1:3] == (9, 8)
  assert helpers.shapes({"params": params}) == helpers.shapes(init_shapes(deploy, x))
  assert trained.shape == (1, 72, 64, 3)
  helpers.assert_close(plain, trained, 1e-12)
