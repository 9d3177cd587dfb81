"""Weights in 8 bits: half a step at most, and the same in JAX and in a file."""

import importlib
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.quantization import runtime, weights
from tests.helpers import quick_jit, random_variables, relative_error
from tests.quantization.int8 import SCOPES, int8_weights, needs_onnx
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize(
  ("shape", "inputs"),
  [((3, 3, 4, 6), (0, 1, 2)), ((5, 7), (0,)), ((2, 2, 2, 3, 2, 2, 3), (1, 2, 3))],
)
def test_a_weight_moves_by_half_a_step_at_most(shape, inputs, bits):
  kernel = RNG.standard_normal(shape).astype(np.float32)
  kernel[..., 0] *= 1e-3  # outputs of other sizes have steps of their own
  kernel[..., 1] = 0
  whole, scale = weights.quantized(kernel, inputs, bits)
  assert whole.dtype == jnp.int8
  assert scale.shape == tuple(1 if axis in inputs else size for axis, size in enumerate(shape))
  moved = np.abs(np.asarray(weights.rounded(kernel, inputs, bits)) - kernel)
  assert (moved <= np.asarray(scale) * 0.50001).all()
  largest = np.abs(np.asarray(whole, np.int32)).max(inputs)
  assert set(np.unique(largest)) == {0, 127 if bits == 8 else 64}


def test_a_tree_keeps_its_form_and_only_kernels_are_rounded():
  params = {
    "a": {"conv": {"kernel": jnp.ones((3, 3, 2, 4)) * 0.3, "bias": jnp.full(4, 0.123)}},
    "head": {"kernel": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)},
    "scale": {"kernel": jnp.full(3, 0.777)},
  }
  new = quick_jit(repjax.quantization.round_weights)(params)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  assert relative_error(new["a"]["conv"]["kernel"], params["a"]["conv"]["kernel"]) < 1e-6
  assert 1e-4 < relative_error(new["head"]["kernel"], params["head"]["kernel"]) < 1 / 254
  for kept in (("a", "conv", "bias"), ("scale", "kernel")):
    before, after = params, new
    for key in kept:
      before, after = before[key], after[key]
    assert (before == after).all()


@needs_onnx
def test_weights_alone_give_what_rounded_weights_give_in_jax():
  model = repjax.create_model("repvgg_a0", num_classes=10, deploy=True, **tiny.OVERRIDES)
  images = RNG.standard_normal((3, 16, 16, 3)).astype(np.float32)
  params = random_variables(model, images)["params"]
  apply = quick_jit(lambda params: model.apply({"params": params}, images))
  proto = repjax.onnx.to_onnx(model, {"params": params}, image_size=16)
  small = repjax.quantization.quantize_weights(proto)
  importlib.import_module("onnx").checker.check_model(small, full_check=True)
  expected = apply(quick_jit(repjax.quantization.round_weights)(params))
  got = runtime.logits_of(small, images, unpacked=True)
  assert relative_error(got, expected) <= 1e-5
  assert relative_error(got, apply(params)) > 1e-4
  assert int8_weights(small) == set(SCOPES)
  assert small.ByteSize() < 0.5 * proto.ByteSize()
