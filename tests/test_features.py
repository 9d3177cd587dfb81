"""Networks built on the features of ours: detectors and segmenters, converted in place."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

import repjax
from repjax.layers import RepConv
from tests import helpers
from tests.helpers import F64, halves, init_shapes, quick_jit, random_input, random_variables
from tests.models.families import backbone

pytestmark = pytest.mark.usefixtures("x64")

BACKBONES = ("repvgg_a0", "resnet18", "parnet_s")


class Pyramid(nn.Module):
  """A feature pyramid: maps of strides 8 to 32 at one width, each with the smaller maps added."""

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
  """A head shared by all levels: a convolution, a batch norm of Flax, then scores and boxes."""

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
  """A detector: features, pyramid and head."""

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

  def test_its_own_norm_is_not_forgotten_in_silence(self, name):
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
