"""Training with the covariance of the input against training with the outputs of all branches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.errors import InputError
from repjax.layers import RepConv, covariance
from repjax.layers.grammar import parse
from tests import helpers
from tests.helpers import F64, quick_jit, random_input, random_variables

WAYS = ("covariance", "outputs")


def step(layer, variables, x, weights):
  """Returns output, new statistics, and gradients of a loss by parameters and input."""

  def loss(params, x):
    own = {**variables, "params": params}
    y, updates = layer.apply(own, x, train=True, mutable=["batch_stats"])
    weighted = jnp.tanh(y.astype(weights.dtype)) * weights
    return weighted.sum(), (y, updates["batch_stats"])

  gradients, (y, stats) = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables["params"], x)
  return {"output": y, "statistics": stats, "parameters": gradients[0], "input": gradients[1]}


def both(attributes, x, run=step):
  """Returns the results of a training step in both ways, in float64."""
  layers = [RepConv(statistics=way, **attributes, **F64) for way in WAYS]
  variables = random_variables(layers[0], x)
  shape = jax.eval_shape(layers[0].apply, variables, x).shape
  weights = jnp.asarray(random_input(*shape, seed=3))
  return quick_jit(lambda v, x: [run(layer, v, x, weights) for layer in layers])(variables, x)


def assert_same(found, wanted, tolerance=1e-12):
  """Compares two trees; gradients that are zero but for rounding are compared with the largest."""
  for part in wanted:
    found_leaves, leaves = jax.tree.leaves(found[part]), jax.tree.leaves(wanted[part])
    largest = max(float(np.abs(leaf).max()) for leaf in leaves)
    for a, b in zip(found_leaves, leaves):
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance * largest)


def drawn(seed):
  """Draws attributes of a layer with branches that merge, and an input."""
  rng = np.random.default_rng(seed)
  channels, strides = int(rng.choice([4, 8])), [1, 2, (2, 1), (1, 3)][rng.integers(4)]
  repeats = ["conv1x1", "conv1x1_1", "conv1x1_2"][: rng.integers(1, 4)]
  largest = [["conv3x3"], ["conv1x5"], [], ["conv5x5", "conv3x3_d2"], ["conv1x1_conv3x3"]]
  branches = [*largest[rng.integers(5)], *repeats]
  features = channels if strides == 1 else 2 * channels
  if strides == 1:
    branches += [["identity"], [], ["identity", "skip"], ["identity", "identity_1"]][seed % 4]
  size = (int(rng.integers(7, 10)), int(rng.integers(7, 10)))
  attributes = {
    "features": features,
    "branches": tuple(rng.permutation(branches).tolist()),
    "strides": strides,
    "groups": int(rng.choice([1, 2, channels])),
    "dilation": int(rng.choice([1, 2])),
    "conv_bias": bool(rng.integers(2)),
    "padding_mode": str(rng.choice(["constant", "reflect"])),
  }
  if rng.integers(2):
    attributes["padding"] = int(rng.integers(0, 6))  # more and less than keeps the size
  return attributes, jnp.asarray(0.5 + random_input(2, *size, channels, seed=seed))


@pytest.mark.usefixtures("x64")
class TestLaws:
  @pytest.mark.parametrize("seed", helpers.spread(range(12), range(6)))
  def test_both_ways_compute_the_same_output_statistics_and_gradients(self, seed):
    attributes, x = drawn(seed)
    assert_same(*both(attributes, x))

  @pytest.mark.parametrize("running_variance", ["unbiased", "biased"])
  def test_devices_that_share_their_statistics_compute_the_same(self, running_variance):
    def run(layer, variables, x, weights):
      parts = [leaf.reshape(4, 1, *leaf.shape[1:]) for leaf in (x, weights)]
      results = jax.vmap(functools.partial(step, layer, variables), axis_name="devices")(*parts)
      # Each way gives a device a different part of the gradient. What counts is their sum.
      return results | {"parameters": jax.tree.map(lambda leaf: leaf.sum(0), results["parameters"])}

    attributes = {"features": 4, "axis_name": "devices", "running_variance": running_variance}
    x = jnp.asarray(random_input(4, 5, 5, 4))
    found, wanted = both(attributes, x, run)
    assert_same(found, wanted)
    whole, _ = both({**attributes, "axis_name": None}, x)
    first = jax.tree.map(lambda leaf: leaf[0], found["statistics"])
    assert_same({"statistics": first}, {"statistics": whole["statistics"]})

  def test_rematerialisation_and_forward_mode_compute_the_same(self):
    def run(layer, variables, x, weights):
      def output(x):
        return layer.apply(variables, x, train=True, mutable=["batch_stats"])[0]

      _, forward = jax.jvp(output, (x,), (weights,))
      (reverse,) = jax.vjp(jax.checkpoint(output), x)[1](weights)
      return {"forward": forward, "reverse": reverse}

    assert_same(*both({"features": 4}, jnp.asarray(random_input(2, 5, 5, 4)), run))


class TestPrecision:
  @pytest.mark.usefixtures("x64")
  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  @pytest.mark.parametrize("mean", [0, 64])
  def test_errors_are_not_larger_than_those_of_outputs(self, dtype, mean):
    """Against float64, also where the mean is 64 standard deviations away from zero."""
    # XLA on CPUs would else keep outputs in float32 that GPUs and memory hold in bfloat16.
    rounded = {"compiler_options": {"xla_allow_excess_precision": False}}
    signs = np.random.default_rng(0).choice([-1, 1], 16)
    x = jnp.asarray(random_input(4, 14, 14, 16) + mean * signs).astype(dtype)
    exact = RepConv(16, statistics="outputs", **F64)
    drawn = random_variables(exact, x.astype(jnp.float64))
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), drawn)
    weights = jnp.asarray(random_input(*x.shape, seed=3))
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
    wanted = jax.jit(functools.partial(step, exact))(wide, x.astype(jnp.float64), weights)
    errors = {}
    for way in WAYS:
      layer = RepConv(16, statistics=way, dtype=jnp.dtype(dtype))
      with jax.numpy_dtype_promotion("standard"):
        found = jax.jit(functools.partial(step, layer), **rounded)(variables, x, weights)
      errors[way] = {part: distance(found[part], wanted[part]) for part in wanted}
    for part, error in errors["covariance"].items():
      assert error <= 1.3 * errors["outputs"][part], (part, errors)


def distance(found, wanted):
  """Returns the root of the mean squared error of a tree, divided by that of the tree itself."""
  pairs = [
    (np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel())
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted))
  ]
  return np.sqrt(sum(((a - b) ** 2).sum() for a, b in pairs) / sum((b**2).sum() for _, b in pairs))


def products_of(layer, x):
  """Returns the number of convolutions and of matrix products in a forward pass in training."""
  variables = helpers.init_shapes(layer, x)
  train = functools.partial(layer.apply, train=True, mutable=["batch_stats"])
  names = helpers.primitives(train, variables, x)
  return names.count("conv_general_dilated"), names.count("dot_general") > 0


class TestRule:
  FEW, MANY = (1, 1, 31, 16), (2, 4, 4, 16)  # pixels, at 2 for each of 16 channels

  @pytest.mark.parametrize(
    ("attributes", "shape", "expected"),
    [
      ({}, MANY, (1, True)),
      ({}, FEW, (2, False)),
      ({"statistics": "covariance"}, FEW, (1, True)),
      ({"statistics": "outputs"}, MANY, (2, False)),
      ({"branches": ("conv3x3", "identity")}, MANY, (1, False)),
      ({"branches": ("conv3x3", "conv1x1_relu")}, MANY, (2, False)),
      ({"branches": ("conv3x3", "conv1x1"), "norm": "after_sum"}, MANY, (2, False)),
      ({"branches": ("conv3x3", "conv1x1"), "strides": 2}, MANY, (2, False)),
      ({"branches": ("conv1x1",)}, MANY, (1, False)),
      ({"branches": ("conv1x1",), "statistics": "covariance"}, MANY, (0, True)),
      ({"groups": 2}, MANY, (2, False)),
      ({"groups": 2, "statistics": "covariance"}, MANY, (2, True)),
    ],
    ids=str,
  )
  def test_branches_merge_where_they_can_and_pixels_are_many(self, attributes, shape, expected):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    assert products_of(RepConv(16, **attributes), x) == expected

  def test_other_devices_than_cpus_merge_with_more_pixels_only(self, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    layer = RepConv(16)
    branches = [parse(name) for name in layer.branches]
    assert not covariance.merges(layer, branches, (1, 89, 23, 16))
    assert covariance.merges(layer, branches, (2, 32, 32, 16))

  def test_evaluation_and_initialisation_compute_every_branch(self):
    x = jnp.zeros(self.MANY)
    layer = RepConv(16, statistics="covariance")
    variables = helpers.init_shapes(layer, x, train=True)
    assert "dot_general" not in helpers.primitives(layer.apply, variables, x)

  def test_unknown_ways_are_refused(self):
    with pytest.raises(InputError, match=r"statistics.*'inputs'.*outputs"):
      RepConv(16, statistics="inputs")
