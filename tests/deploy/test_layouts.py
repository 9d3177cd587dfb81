"""Tests of layouts that a program wants, and of what is done for XLA's compiler for GPUs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.deploy import gpu, layouts
from repjax.deploy.xla import CPU_OPTIONS
from repjax.inference import inference
from repjax.program import trace
from tests.helpers import random_variables

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

IMAGES = np.random.default_rng(0).standard_normal((6, 32, 32, 3)).astype(np.float32)
SMALL = {"stage_sizes": (1, 1, 1, 1), "width_multipliers": (0.25,) * 4, "num_classes": 5}


@pytest.fixture(scope="module")
def network():
  model = repjax.create_model("repvgg_a0", deploy=True, **SMALL)
  return model, random_variables(model, IMAGES)


def compiled(network, **options):
  return repjax.deploy.compile(*network, image_size=32, batch_sizes=(1, 6), **options)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_on_a_cpu_no_bit_changes(network, dtype):
  devices = jax.local_devices()[:1]
  found = compiled(network, dtype=dtype, tune=False, devices=devices)(IMAGES)
  function, tree, *_ = inference(
    *network, image_size=32, dtype=dtype, preprocessing=None, probabilities=False
  )
  program = jax.jit(function).lower(tree, IMAGES).compile(compiler_options=CPU_OPTIONS)
  np.testing.assert_array_equal(found, np.asarray(program(tree, IMAGES)))


@pytest.mark.parametrize("count", [1, 3])
def test_parameters_are_laid_out_once_as_the_program_wants_them(network, monkeypatch, count):
  devices = jax.local_devices()[:count]
  expected = compiled(network, tune=False, devices=devices)(IMAGES)
  laid = []
  lay_out = layouts.lay_out

  def noting(tree, executable):
    laid.append((tree, lay_out(tree, executable)))
    return laid[-1][1]

  monkeypatch.setattr("repjax.deploy.devices.lay_out", noting)
  # XLA for CPUs wants no other layout by itself, so that the head's is asked for here.
  monkeypatch.setattr(layouts, "wanted_axes", lambda *_: {"params/head/kernel": 0})
  found = compiled(network, tune=False, devices=devices)
  np.testing.assert_allclose(found(IMAGES), expected, rtol=1e-6, atol=1e-6)
  heads = [after["params"]["head"]["kernel"] for _, after in laid]
  assert {head.format.layout.major_to_minor for head in heads} == {(1, 0)}
  assert all(head is heads[0] for head in heads[1:])  # laid out once, for all batch sizes


def conv(x, kernel):
  return jax.lax.conv_general_dilated(
    x, kernel, (1, 1), [(1, 1), (1, 1)], dimension_numbers=("NHWC", "HWIO", "NHWC")
  )


def block(activation, tree, x):
  """A convolution with a bias, a gated shortcut, and an activation."""
  return activation(conv(x, tree["kernel"]) + tree["bias"][None, None, None] + x * tree["gate"])


TREE = {
  "kernel": np.random.default_rng(1).standard_normal((3, 3, 3, 3)).astype(np.float32),
  "bias": np.array([0.5, -1.0, 2.0], np.float32),
  "gate": np.float32(0.25),
}


def barriers(function, tree, x):
  names = [equation.primitive for equation in trace(function, tree, x).equations]
  return names.count("optimization_barrier")


@pytest.mark.parametrize(
  ("activation", "count"),
  [(jax.nn.silu, 1), (jnp.tanh, 1), (jax.nn.relu, 0), (lambda x: x, 0)],
  ids=["silu", "tanh", "relu", "none"],
)
def test_a_sum_is_kept_out_of_a_convolution_before_all_activations_but_relu(activation, count):
  def function(tree, x):
    return block(activation, tree, x)

  split = gpu.split_sums(function)
  assert (barriers(function, TREE, IMAGES), barriers(split, TREE, IMAGES)) == (0, count)
  expected = jax.jit(function)(TREE, IMAGES)
  np.testing.assert_allclose(jax.jit(split)(TREE, IMAGES), expected, rtol=1e-5, atol=1e-5)


def test_a_bias_stays_in_its_convolution():
  def function(tree, x):
    return jax.nn.silu(conv(x, tree["kernel"]) + tree["bias"][None, None, None])

  assert barriers(gpu.split_sums(function), TREE, IMAGES) == 0


def test_the_axis_that_a_product_sums_over():
  tree = {name: np.zeros((3, 3), np.float32) for name in ("rows", "columns", "twice", "added")}

  def function(tree, x):
    x = x.mean((1, 2))
    y = x @ tree["rows"] + x @ tree["columns"].T + x @ tree["twice"] @ tree["twice"]
    return y + jax.lax.dot_general(x, tree["added"], (((1,), (1,)), ((), ()))) + tree["added"].sum()

  found = gpu.summed_axes(function, tree, IMAGES)
  assert found == {"rows": 0}

  def torchs(tree, x):
    return jax.lax.dot_general(x.mean((1, 2)), tree["rows"], (((1,), (1,)), ((), ())))

  assert gpu.summed_axes(torchs, {"rows": tree["rows"]}, IMAGES) == {"rows": 1}


def test_the_head_and_gates_of_parnet_are_found():
  model = repjax.create_model("parnet_cifar_s", deploy=True)
  shapes = repjax.spec.shapes_of(model, 32)
  found = gpu.summed_axes(model.apply, shapes, jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32))
  assert found["params/head/kernel"] == 0
  assert found["params/stream1/block0/SkipSqueezeExcite_0/dense/kernel"] == 0


class Device:
  def __init__(self, capability):
    self.compute_capability, self.device_kind = capability, "Tesla T4"


def test_bfloat16_on_an_old_gpu_warns(recwarn):
  gpu.warn_of_dtype(Device("8.0"), np.dtype(jnp.bfloat16))
  gpu.warn_of_dtype(Device("7.5"), np.dtype(np.float16))
  gpu.warn_of_dtype(jax.devices()[0], np.dtype(jnp.bfloat16))
  assert not recwarn.list
  with pytest.warns(UserWarning, match=r"Tesla T4 .*7\.5.*float16"):
    gpu.warn_of_dtype(Device("7.5"), np.dtype(jnp.bfloat16))
