"""Channels rescaled and biases moved: the same function, with ranges and means that suit 8 bits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.algebra import ConvParams
from repjax.errors import InputError
from repjax.quantization import correction, equalization, runtime
from repjax.quantization.graph import constants, layers_of, with_constants
from repjax.quantization.sensitivity import compared
from tests.helpers import convolve, random_input, relative_error
from tests.quantization.int8 import IMAGES, SCOPES, made, needs_onnx

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

RNG = np.random.default_rng(0)


@needs_onnx
def test_pairs_are_layers_with_nothing_but_relu_and_means_between(small_proto):
  pairs = [(pair.first.title, pair.second.title) for pair in equalization.pairs_of(small_proto)]
  titles = [layer.title for layer in layers_of(small_proto)]
  assert [title.split("/RepConv")[0] for title in titles] == SCOPES
  assert pairs == list(itertools.pairwise(titles))


@pytest.fixture(scope="module")
def resnet(quickly):
  """A small ResNet that takes floats, which no test may change."""
  del quickly
  overrides = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "stem_features": 8}
  return made("resnet18", overrides, size=64)  # at 32 px no mean would follow the last sum


@needs_onnx
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_additions_end_a_pair(resnet, by):
  # Rescaling one operand of an addition would change the sum.
  images = RNG.standard_normal((4, 64, 64, 3)).astype(np.float32)
  new = equalization.equalized_by(by, resnet, images)
  assert relative_error(runtime.logits_of(new, images), runtime.logits_of(resnet, images)) <= 1e-5
  pairs = [(pair.first.title, pair.second.title) for pair in equalization.pairs_of(resnet)]
  blocks = [f"stage{stage}/block0/RepConv_conv" for stage in (1, 2, 3, 4)]
  assert pairs == [(f"{block}1", f"{block}2") for block in blocks]
  before, after = constants(resnet), constants(new)
  moved = {
    layer.title
    for layer in layers_of(resnet)
    if (before[layer.weight] != after[layer.weight]).any()
  }
  assert moved == set(itertools.chain(*pairs))


@needs_onnx
@pytest.mark.parametrize("images", [None, IMAGES])
def test_an_equalized_file_computes_the_same(small_proto, small_logits, images):
  new = equalization.equalized(small_proto, images)
  assert relative_error(runtime.logits_of(new, IMAGES), small_logits) <= 1e-5
  before, after = constants(small_proto), constants(new)
  assert all(
    relative_error(after[layer.weight], before[layer.weight]) > 1e-2
    for layer in layers_of(small_proto)
  )


@needs_onnx
def test_corrected_biases_give_every_layer_its_mean_back(small_proto):
  layers = layers_of(small_proto)
  new = correction.corrected(small_proto, IMAGES)
  wanted = correction._means(small_proto, layers, IMAGES)

  def off(proto):
    means = correction._means(correction.with_rounded_weights(proto), layers, IMAGES)
    return [relative_error(means[layer.result], wanted[layer.result]) for layer in layers]

  assert max(off(new)) <= 1e-5
  assert min(off(small_proto)) > 1e-4
  before, after = constants(small_proto), constants(new)
  for layer in layers:
    assert (before[layer.weight] == after[layer.weight]).all()


@needs_onnx
@pytest.mark.usefixtures("quickly")
def test_a_layer_over_pixels_is_corrected_by_the_mean_of_all_of_them():
  # In the graph, the last layer of attention has a row for each pixel, and not for each image.
  overrides = {"stage_sizes": (1,), "widths": (8,), "expansion": 1, "head_features": 4}
  proto = made("fastvit_sa12", overrides, size=16)
  images = RNG.standard_normal((4, 16, 16, 3)).astype(np.float32)
  new = correction.corrected(proto, images)
  wanted = correction._means(proto, layers_of(proto), images)
  means = correction._means(correction.with_rounded_weights(new), layers_of(proto), images)
  assert max(relative_error(means[name], wanted[name]) for name in wanted) <= 1e-3


@needs_onnx
def test_layers_in_float_are_neither_rounded_nor_corrected(small_proto):
  first, *others = layers_of(small_proto)
  new = correction.corrected(small_proto, IMAGES, but=[layer.name for layer in others])
  before, after = constants(small_proto), constants(new)
  changed = {name for name in before if (before[name] != after[name]).any()}
  assert changed == {first.bias}
  coarse = constants(correction.with_rounded_weights(small_proto, but=[first.name]))
  changed = {name for name in before if (before[name] != coarse[name]).any()}
  assert changed == {layer.weight for layer in others}


@needs_onnx
@pytest.mark.parametrize("ranges", ["weights", "activations"])
def test_equalizing_mends_what_uneven_channels_spoil(uneven, small_logits, ranges):
  many = np.resize(IMAGES, (256, *IMAGES.shape[1:]))  # ranges of few are not trusted
  errors = [
    compared(
      runtime.logits_of(
        repjax.quantization.quantize(uneven, many, per_channel=False, equalize=equalize), IMAGES
      ),
      small_logits,
    )[0]
    for equalize in ("none", ranges)
  ]
  assert errors[1] < 0.5 * errors[0]


@needs_onnx
def test_ranges_of_few_images_are_not_trusted(small_proto):
  tensors = [pair.between for pair in equalization.pairs_of(small_proto)]
  for count, floor in ((2, 1.0), (2 * equalization.ENOUGH, 0.5)):
    images = np.resize(IMAGES, (count, *IMAGES.shape[1:]))
    for ranges in equalization._largest(small_proto, tensors, images).values():
      assert ranges.min() == pytest.approx(floor * ranges.max())


@needs_onnx
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("scope", ["stem", "stage2/block0"])
def test_the_first_layer_that_is_not_finite_is_named(small_proto, scope, value):
  layer = next(layer for layer in layers_of(small_proto) if layer.title.startswith(scope))
  bias = constants(small_proto)[layer.bias].copy()
  bias[0] = value
  broken = with_constants(small_proto, {layer.bias: bias})
  for call in (correction.corrected, equalization.equalized):
    with pytest.raises(InputError, match=f"the layer {layer.title} gives NaN or infinite values"):
      call(broken, IMAGES)


def random_conv(height, width, inputs, outputs, seed=0):
  return ConvParams(
    jnp.asarray(random_input(height, width, inputs, outputs, seed=seed)),
    jnp.asarray(random_input(outputs, seed=seed + 100)),
  )


class TestRescaleBetween:
  """Two convolutions with a ReLU in between, rescaled by any scale or by `equalizing_scale`."""

  pytestmark = pytest.mark.usefixtures("x64")

  @pytest.mark.parametrize(("groups", "size"), [(1, 3), (2, 3), (6, 1)])
  def test_what_two_layers_compute_is_unchanged(self, groups, size):
    first = random_conv(3, 3, 4, 6)
    second = random_conv(size, size, 6 // groups, 12, seed=1)
    scale = jnp.exp(jnp.asarray(random_input(6)))
    rescaled = equalization.rescale_between(first, second, scale)
    x = random_input(2, 5, 5, 4)

    def run(first, second):
      y = np.maximum(convolve(x, *first, padding=(1, 1)), 0)
      return convolve(y, *second, padding=(size // 2,) * 2, groups=groups)

    assert relative_error(run(*rescaled), run(first, second)) <= 1e-12
    assert relative_error(rescaled[0].bias, first.bias) > 0.1

  @pytest.mark.parametrize("groups", [1, 2])
  def test_weights_of_a_channel_get_one_range_on_both_sides(self, groups):
    first, second = random_conv(3, 3, 4, 6), random_conv(1, 1, 6 // groups, 8, seed=1)
    ranges = jnp.abs(first.kernel).max((0, 1, 2))
    scale = equalization.equalizing_scale(ranges, second.kernel)
    first, second = equalization.rescale_between(first, second, scale)
    outputs = np.abs(np.asarray(first.kernel)).max((0, 1, 2))
    inputs = np.abs(np.asarray(second.kernel)).reshape(6 // groups, groups, -1).max(2).T.ravel()
    assert relative_error(outputs, inputs) <= 1e-12
    again = equalization.equalizing_scale(jnp.asarray(outputs), second.kernel)
    assert relative_error(again, np.ones(6)) <= 1e-12

  def test_dead_channels_stay_as_they_are(self):
    first, second = random_conv(1, 1, 2, 4), random_conv(1, 1, 4, 3, seed=1)
    ranges = jnp.abs(first.kernel).max((0, 1, 2)).at[1].set(0)
    scale = equalization.equalizing_scale(ranges, second.kernel.at[:, :, 2].set(0))
    assert scale[1] == scale[2] == 1
    assert np.isfinite(scale).all()

  @pytest.mark.parametrize("outputs", [5, 9])
  def test_channels_that_do_not_match_are_refused(self, outputs):
    second = random_conv(3, 3, 4, 6)
    with pytest.raises(ValueError, match=f"cannot follow {outputs} channels"):
      equalization.equalizing_scale(jnp.ones(outputs), second.kernel)
    first = random_conv(3, 3, 2, outputs)
    with pytest.raises(ValueError, match=f"cannot follow {outputs} channels"):
      equalization.rescale_between(first, second, jnp.ones(outputs))
