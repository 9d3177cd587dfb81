"""8 bits in JAX: against the file in ONNX Runtime, gradients by hand, networks that do not fit."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax.errors import InputError
from repjax.layers import RepConv, RepDense, SkipSqueezeExcite
from repjax.layers.gates import GlobalGate
from repjax.quantization import Roundings, quantize_by, roundings_of, runtime, simulated
from repjax.quantization.sensitivity import compared
from repjax.spec import Preprocessing
from tests.helpers import random_variables, relative_error
from tests.quantization.int8 import needs_onnx

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 8, 8, 3), np.uint8)
PREPROCESSING = Preprocessing(8, 8, "bilinear", (0.3, 0.4, 0.5), (0.2, 0.3, 0.4))


class Mixed(nn.Module):
  """All kinds of products, shortcuts that others read too, a layer met twice, one for nothing."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(RepConv(8, ("conv3x3",), deploy=True)(x))
    x = nn.relu(x + RepConv(8, ("conv1x1",), deploy=True)(x))
    x = x + SkipSqueezeExcite(deploy=True)(x) * GlobalGate(8, groups=2)(x)
    nn.Dense(3, name="unused")(x)
    twice = RepConv(8, ("conv3x3",), groups=4, deploy=True, name="RepConv_twice")
    x = jnp.concatenate([twice(x), nn.max_pool(twice(twice(x)), (3, 3), padding="SAME")], -1)
    x = RepDense(8, tile=4, groups=2, local_kernels=(), deploy=True)(x)
    return nn.remat(nn.Dense)(3, name="head")(x.mean((1, 2)))


def as_it_says(file, images):
  """Returns what a file computes, each node by itself."""
  ort = importlib.import_module("onnxruntime")
  options = ort.SessionOptions()
  options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
  session = ort.InferenceSession(file.SerializeToString(), options)
  return session.run(None, runtime.fed(images))[0]


@pytest.fixture(scope="module")
def mixed(quickly):
  """Builds the network `Mixed`, its variables, and its graph."""
  del quickly
  variables = random_variables(Mixed(), np.zeros((1, 8, 8, 3), np.float32))
  return Mixed(), variables, repjax.onnx.to_onnx(Mixed(), variables, image_size=8)


@needs_onnx
@pytest.mark.parametrize(("activations", "bits"), [("uint8", 7), ("int8", 8)])
def test_the_simulation_is_what_the_file_computes(mixed, activations, bits):
  model, variables, proto = mixed
  x = np.asarray(PREPROCESSING.normalize(IMAGES))
  how = roundings_of(proto, x, activations=activations, weight_bits=bits)
  assert (how.activations, how.weight_bits) == (activations, bits)
  tensors = {name: (scale / 2, zero) for name, (scale, zero) in how.tensors.items()}
  for roundings in (how, how._replace(tensors=tensors)):  # of the second much is cut off
    file = quantize_by(proto, roundings)
    simulation = jax.jit(simulated(model, variables, roundings, image_size=8))
    here = simulation(variables, x)
    there = as_it_says(file, x)
    off = compared(as_it_says(proto, x), there)[0]
    assert off > 0.01
    assert compared(here, there)[0] < 1e-5
  takes_bytes = repjax.onnx.to_onnx(model, variables, image_size=8, preprocessing=PREPROCESSING)
  assert compared(as_it_says(quantize_by(takes_bytes, roundings), IMAGES), there)[0] < 1e-2


@needs_onnx
def test_all_that_has_a_part_in_it_learns(mixed):
  model, variables, proto = mixed
  x = np.asarray(PREPROCESSING.normalize(IMAGES))
  roundings = roundings_of(proto, x)
  assert set(roundings.weights.values()) == {False, True}
  simulation = simulated(model, variables, roundings, image_size=8)
  gradients = jax.jit(jax.grad(lambda tree: jnp.square(simulation(tree, x)).sum()))(variables)
  unused = gradients["params"].pop("unused")
  assert max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(unused)) == 0
  assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 0


class Two(nn.Module):
  """Two layers, the second in a program of its own, after a ReLU."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Conv(4, (1, 1), name="first")(x))
    return nn.remat(nn.Conv)(3, (1, 1), name="second")(x)


TWO = Roundings(
  "uint8",
  7,
  {"images": (0.25, 3), "Two/Relu": (0.5, 0)},
  {"Two/first/weight": False, "Two/second/weight": True},
)


def by_hand(x, kernel, scale, zero, together):
  """Returns rounded inputs and weights, and which inputs lie in their range."""
  steps = np.abs(kernel).max(None if together else 0) / 64
  inside = (x / scale >= -zero) & (x / scale <= 255 - zero)
  whole = np.clip(np.round(x / scale) + zero, 0, 255) - zero
  return whole * scale, np.round(kernel / steps) * steps, inside


@needs_onnx
def test_gradients_pass_roundings_and_stop_at_the_ends_of_ranges():
  images = RNG.uniform(-1.5, 1.5, (5, 1, 1, 3)).astype(np.float32)  # some lie below -3 steps
  variables = random_variables(Two(), images)
  (k1, b1), (k2, b2) = (
    (np.asarray(leaf["kernel"])[0, 0], np.asarray(leaf["bias"]))
    for leaf in (variables["params"]["first"], variables["params"]["second"])
  )
  x1, w1, inside1 = by_hand(images[:, 0, 0], k1, *TWO.tensors["images"], False)
  before = x1 @ w1 + b1
  x2, w2, inside2 = by_hand(np.maximum(before, 0), k2, *TWO.tensors["Two/Relu"], True)
  assert 0 < inside1.mean() < 1
  above = 2 * (x2 @ w2 + b2)
  below = (above @ w2.T) * inside2 * (before > 0)
  wanted = {
    "second": {"kernel": x2.T @ above, "bias": above.sum(0)},
    "first": {"kernel": x1.T @ below, "bias": below.sum(0)},
    "x": (below @ w1.T) * inside1,
  }
  simulation = simulated(Two(), variables, TWO, image_size=1)

  def loss(variables, images):
    return jnp.square(simulation(variables, images)).sum()

  own, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, images)
  got = {**own["params"], "x": of_x}
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
    assert relative_error(ours.reshape(np.shape(theirs)), theirs) < 1e-5


@needs_onnx
def test_equal_parameters_of_two_layers_stay_two():
  model = Two()
  variables = jax.tree.map(jnp.zeros_like, random_variables(model, IMAGES[:1].astype(np.float32)))
  proto = repjax.onnx.to_onnx(model, variables, image_size=8)
  roundings = roundings_of(proto, IMAGES.astype(np.float32))
  learned = random_variables(model, IMAGES[:1].astype(np.float32))
  proto = repjax.onnx.to_onnx(model, learned, image_size=8)
  assert len(quantize_by(proto, roundings).graph.node) > len(proto.graph.node)
  simulated(model, learned, roundings, image_size=8)


@needs_onnx
def test_what_does_not_fit_is_refused(mixed):
  model, variables, proto = mixed
  with pytest.raises(InputError, match="not of this graph, which has no Two/Relu"):
    quantize_by(proto, TWO)
  with pytest.raises(InputError, match="of another network: Mixed has no Two/Relu"):
    simulated(model, variables, TWO, image_size=8)
  x = np.zeros((1, 8, 8, 3), np.float32)
  with pytest.raises(InputError, match="unknown kind of activations 'int4'"):
    roundings_of(proto, x, activations="int4")
  with pytest.raises(InputError, match="weights have 8 or 7 bits, got 4"):
    roundings_of(proto, x, weight_bits=4)
  with pytest.raises(InputError, match="images to calibrate with are not finite"):
    roundings_of(proto, np.full_like(x, np.nan))
