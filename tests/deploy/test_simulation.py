"""8 bits in JAX: against ONNX Runtime's, gradients by hand, and networks that do not fit."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax.deploy import Rounding, roundings_of, simulated
from repjax.deploy.quantization import runtime
from repjax.deploy.quantization.sensitivity import compared
from repjax.errors import InputError
from repjax.layers import RepConv, RepDense, SkipSqueezeExcite
from repjax.layers.gates import GlobalGate
from tests.helpers import random_variables, relative_error
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

needs_onnx = pytest.mark.skipif(
  any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime")),
  reason="compares with ONNX Runtime: pip install onnx onnxruntime",
)
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((24, 16, 16, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def small(quickly):
  """A small RepVGG, its variables, its graph, and how it is rounded."""
  del quickly
  model = repjax.create_model("repvgg_a0", num_classes=10, deploy=True, **tiny.OVERRIDES)
  variables = random_variables(model, IMAGES[:1])
  proto = repjax.deploy.to_onnx(model, variables, image_size=16)
  return model, variables, proto, roundings_of(proto, IMAGES)


@needs_onnx
@pytest.mark.parametrize(("activations", "bits"), [("uint8", 7), ("int8", 8)])
def test_the_simulation_is_what_onnx_runtime_computes(small, activations, bits):
  model, variables, proto, _ = small
  how = roundings_of(proto, IMAGES, activations)
  halved = [row._replace(scale=row.scale / 2) for row in how]  # much is cut off
  plain = runtime.logits_of(proto, IMAGES)
  # With a zero point, what the mean over pixels reads and gives is rounded as well.
  error = 0.005 if activations == "uint8" else 1e-6
  for rows, off in ((how, 0.01), (halved, 0.1)):
    settings = {"activations": activations, "weight_bits": bits}
    file = repjax.deploy.quantize(proto, IMAGES, **settings, roundings=rows)
    got = runtime.logits_of(file, IMAGES, unpacked=True)
    here = jax.jit(simulated(model.apply, rows, **settings))(variables, IMAGES)
    assert compared(plain, got)[0] > off
    assert compared(here, got)[0] < error


class Mixed(nn.Module):
  """Every kind of product that deploy forms have."""

  @nn.compact
  def __call__(self, x):
    x = SkipSqueezeExcite(deploy=True)(nn.relu(RepConv(8, ("conv3x3",), deploy=True)(x)))
    x = x * GlobalGate(8, groups=2)(x)
    x = nn.relu(RepDense(8, tile=4, groups=2, local_kernels=(), deploy=True)(x))
    return nn.Dense(3)(x.mean((1, 2)))


@needs_onnx
def test_every_kind_of_layer_is_met_and_learns(quickly):
  del quickly
  model = Mixed()
  images = IMAGES[:4, :8, :8]
  variables = random_variables(model, images)
  proto = repjax.deploy.to_onnx(model, variables, image_size=8)
  how = roundings_of(proto, images, "int8")
  assert [row.together for row in how] == [False, False, False, True, False]
  file = repjax.deploy.quantize(proto, images, activations="int8", roundings=how)

  def loss(variables):
    logits = simulated(model.apply, how, activations="int8")(variables, images)
    return jnp.square(logits).sum(), logits

  gradients, here = jax.jit(jax.grad(loss, has_aux=True))(variables)
  assert compared(here, runtime.logits_of(file, images, unpacked=True))[0] < 1e-6
  assert compared(here, runtime.logits_of(proto, images))[0] > 1e-3
  assert min(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients)) > 0


class Two(nn.Module):
  """Two layers, the second in a program of its own and behind a ReLU."""

  @nn.compact
  def __call__(self, x):
    x = nn.relu(nn.Dense(4, name="first")(x))
    return nn.remat(nn.Dense)(3, name="second")(x)


HOW = [Rounding("first", 0.25, 3, False), Rounding("second", 0.5, 0, False)]


def by_hand(x, kernel, row):
  """Rounded inputs and weights, and which inputs lie in their range."""
  whole = np.round(x / row.scale) + row.zero
  scale = np.abs(kernel).max(0) / 64
  weights = np.round(kernel / scale) * scale
  inside = (x / row.scale >= -row.zero) & (x / row.scale <= 255 - row.zero)
  return (np.clip(whole, 0, 255) - row.zero) * row.scale, weights, inside


def test_gradients_pass_roundings_and_stop_at_the_ends_of_ranges():
  x = RNG.uniform(-1.5, 1.5, (5, 6)).astype(np.float32)  # some lie below -3 steps
  variables = Two().init(jax.random.key(0), x)
  (k1, b1), (k2, b2) = (
    (np.asarray(layer["kernel"]), np.asarray(layer["bias"]))
    for layer in (variables["params"]["first"], variables["params"]["second"])
  )
  x1, w1, inside1 = by_hand(x, k1, HOW[0])
  before = x1 @ w1 + b1
  x2, w2, inside2 = by_hand(np.maximum(before, 0), k2, HOW[1])
  assert 0 < inside1.mean() < 1
  y = x2 @ w2 + b2
  above = 2 * y
  below = (above @ w2.T) * inside2 * (before > 0)
  wanted = {
    "second": {"kernel": x2.T @ above, "bias": above.sum(0)},
    "first": {"kernel": x1.T @ below, "bias": below.sum(0)},
    "x": (below @ w1.T) * inside1,
  }

  def loss(variables, x):
    return jnp.square(simulated(Two().apply, HOW)(variables, x)).sum()

  own, of_x = jax.jit(jax.grad(loss, argnums=(0, 1)))(variables, x)
  got = {**own["params"], "x": of_x}
  assert jax.tree.structure(got) == jax.tree.structure(wanted)
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
    assert relative_error(ours, theirs) < 1e-5


def test_one_scale_for_all_weights_or_one_for_each_output():
  kernel = np.array([[0.01, 1.0], [0.014, -0.5]], np.float32)
  model = nn.Dense(2, use_bias=False, parent=None)
  x = np.eye(2, dtype=np.float32)
  for together, scale in ((False, np.array([0.014, 1.0]) / 64), (True, 1 / 64)):
    how = [Rounding("Dense", 1.0, 0, together)]
    got = simulated(model.apply, how)({"params": {"kernel": kernel}}, x)
    assert relative_error(got, np.round(kernel / scale) * scale) < 1e-6


@needs_onnx
def test_roundings_of_another_network_are_refused(small):
  model, variables, proto, how = small
  for rows, text in (
    (how[:-1], "a layer head where nothing was calibrated"),
    ([*how, how[0]], "no layers stem/RepConv_0, which were calibrated"),
    ([how[1], *how[1:]], "a layer stem/RepConv_0 where stage1/block0/RepConv_0 was calibrated"),
  ):
    with pytest.raises(InputError, match=text):
      simulated(model.apply, rows)(variables, IMAGES)
    with pytest.raises(InputError, match="not of this graph"):
      repjax.deploy.quantize(proto, IMAGES, roundings=rows)
  with pytest.raises(InputError, match="unknown kind of activations 'int4'"):
    roundings_of(proto, IMAGES, "int4")
