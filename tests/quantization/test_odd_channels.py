"""Channels that are dead, constant, decayed or too small for floats cost nothing in 8 bits."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.quantization import equalization, runtime, weights
from repjax.quantization.graph import constants, layers_of, with_constants
from repjax.quantization.sensitivity import compared
from tests.helpers import spread
from tests.quantization.int8 import IMAGES, needs_onnx

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

# The factor of the channel's kernel, its bias, and the factor of the weights that read it.
ODD = {
  "decayed": (1e-10, 0.1, 1.0),
  "decayed, with a large bias": (1e-6, 3.0, 1.0),
  "dead": (0.0, 0.0, 1.0),
  "never active": (0.0, -0.1, 1.0),
  "never active, with a large bias": (1.0, -1e6, 1.0),
  "constant": (0.0, 0.1, 1.0),
  "subnormal": (1e-40, 1e-41, 1.0),
  "constant and subnormal": (1e-40, 0.3, 1.0),
  "unread": (1.0, 0.1, 0.0),
  "barely read": (1.0, 0.1, 1e-10),
  "read by subnormals": (1.0, 0.1, 1e-40),
  "large and barely read": (1e18, 1e18, 1e-20),
}
TOLD_APART = (
  "decayed",
  "never active, with a large bias",
  "subnormal",
  "unread",
  "large and barely read",
)


def with_odd_channels(proto, kernel, bias, reader):
  """Returns a model in which the first channel after three of its layers is odd."""
  arrays = {name: array.copy() for name, array in constants(proto).items()}
  layers = layers_of(proto)
  for layer, following in itertools.pairwise(layers[1:5]):
    arrays[layer.weight][0] *= np.float32(kernel)
    arrays[layer.bias][0] = bias
    arrays[following.weight][:, 0] *= np.float32(reader)
  return with_constants(proto, arrays)


@needs_onnx
@pytest.mark.parametrize("equalize", equalization.EQUALIZATIONS)
@pytest.mark.parametrize("odd", spread(ODD, TOLD_APART))
def test_a_network_with_odd_channels_is_quantized_as_well_as_any(small_proto, odd, equalize):
  odd = ODD[odd]
  proto = with_odd_channels(small_proto, *odd)
  many = np.resize(IMAGES, (256, *IMAGES.shape[1:]))  # ranges of few images are not trusted
  wanted = runtime.logits_of(proto, IMAGES)
  made = repjax.quantization.quantize(proto, many, equalize=equalize)
  error, changed = compared(runtime.logits_of(made, IMAGES), wanted)
  # One huge channel leaves the others few steps, unless channels are rescaled.
  largest = 1.5 if odd[0] > 1 and equalize == "none" else 0.05
  assert error < largest
  if largest < 1:
    assert changed < 0.1
  small = repjax.quantization.quantize_weights(proto, IMAGES)
  assert compared(runtime.logits_of(small, IMAGES, unpacked=True), wanted)[0] < 0.05


@pytest.mark.parametrize("bits", [7, 8])
@pytest.mark.parametrize("value", [0.0, 1e-44, 1e-38, 1e-30, 1e38])
def test_every_channel_has_a_scale(value, bits):
  kernel = np.full((3, 2), value, np.float32)
  for each in (kernel, jnp.asarray(kernel)):
    whole, scale = weights.quantized(each, (0,), bits)
    assert (np.asarray(scale) > 0).all()
    assert np.isfinite(np.asarray(scale)).all()
    moved = np.abs(np.asarray(whole, np.float64) * np.asarray(scale, np.float64) - kernel)
    assert moved.max() <= max(value / 100, 1e-36)


@needs_onnx
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("part", ["weight", "bias"])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_weights_that_are_not_finite_are_named(small_proto, part, value, correct_bias):
  layer = layers_of(small_proto)[2]
  array = constants(small_proto)[getattr(layer, part)].copy()
  array.flat[0] = value
  broken = with_constants(small_proto, {getattr(layer, part): array})
  with pytest.raises(InputError, match=f"{layer.title} holds weights that are NaN or infinite"):
    repjax.quantization.quantize(broken, IMAGES, equalize="weights", correct_bias=correct_bias)
  with pytest.raises(InputError, match=f"{layer.title} holds weights that are NaN or infinite"):
    repjax.quantization.quantize_weights(broken)


def test_the_error_of_large_logits_is_a_number():
  wanted = np.asarray([[1e30, 2e30]], np.float32)
  assert compared(wanted * np.float32(1.5), wanted) == (pytest.approx(0.5), 0.0)


@pytest.mark.parametrize(
  ("got", "wanted", "said"),
  [
    ([[1.0, np.nan]], [[1.0, 2.0]], "stem in 8 bits gives logits that are NaN"),
    ([[1.0, np.inf]], [[1.0, 2.0]], "stem in 8 bits gives logits that are NaN"),
    ([[1.0, 2.0]], [[1.0, np.inf]], "the network in float32 gives logits that are NaN"),
    ([[1.0, 2.0]], [[0.0, 0.0]], "only zeros"),
  ],
)
def test_an_error_that_is_no_number_is_said(got, wanted, said):
  with pytest.raises(InputError, match=said):
    compared(np.asarray(got), np.asarray(wanted), "stem in 8 bits")
