"""Functions that are fused or called while JAX traces, or that act on the host."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, PartitionSpec

import repjax
from repjax.errors import InputError
from repjax.fusion.merges import Merge
from tests.fusion.nets import convolved
from tests.helpers import relative_error


def random(*shape):
  """Returns random numbers."""
  return jnp.asarray(np.random.default_rng(3).normal(size=shape), jnp.float32)


def block(params, x):
  """Returns a convolution, a norm and an activation."""
  scale = params["scale"].reshape(1, 1, 1, 3)
  return jnp.sin(convolved(x, params["kernel"], "SAME") * scale + scale)


PARAMS = {"kernel": random(3, 3, 3, 3) / 3, "scale": random(1, 1, 1, 3)}
X = random(2, 6, 7, 3)


class TestTracers:
  @pytest.mark.parametrize("held", [(), ("kernel",), ("kernel", "scale")])
  def test_a_function_may_close_over_tracers(self, held):
    @jax.jit
    def call(params, x):
      inside = {name: params.pop(name) for name in held}
      fused = repjax.fuse(lambda params, x: block({**params, **inside}, x), params, x, check=False)
      return fused(fused.fold(params), x)

    assert relative_error(call(dict(PARAMS), X), block(PARAMS, X)) <= 1e-5

  def test_numbers_of_rules_may_be_tracers(self):
    def function(params, x, zero):
      y = lax.pad(x, zero, ((0, 0, 0), (1, 1, 0), (1, 1, 0), (0, 0, 0)))
      return jnp.sin(convolved(y, params["kernel"], "VALID")).sum((1, 2)) / (zero + 42)

    @jax.jit
    def call(params, x, zero):
      fused = repjax.fuse(lambda params, x: function(params, x, zero), params, x, check=False)
      return fused(fused.fold(params), x)

    zero = jnp.zeros(())
    assert relative_error(call(PARAMS, X, zero), function(PARAMS, X, zero)) <= 1e-5

  def test_all_sizes_may_be_symbols(self):
    fused = repjax.fuse(block, PARAMS, X).without_checks()
    symbols = jax.export.symbolic_shape("b, h, w, 3")
    exported = jax.export.export(jax.jit(fused))(
      fused.shapes, jax.ShapeDtypeStruct(symbols, jnp.float32)
    )
    assert relative_error(exported.call(fused.fold(PARAMS), X), block(PARAMS, X)) <= 1e-5

  def test_parameters_may_be_shared_by_the_devices_of_a_mesh(self):
    def function(params, x):
      y = lax.reduce_window(jnp.sin(x), np.float32(0), lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME")
      y = convolved(y * params["scale"] + params["scale"], params["kernel"], "SAME")
      step = lambda y, scale: (block({**params, "scale": scale}, y), None)  # noqa: E731
      return lax.scan(step, y, params["scale"])[0]

    def call(params, x):
      return fused(fused.fold(params), x)

    fused = repjax.fuse(function, PARAMS, X)
    mesh = Mesh(np.array(jax.devices()[:2]), ("images",))
    rows = PartitionSpec("images")
    mapped = jax.shard_map(call, mesh=mesh, in_specs=(PartitionSpec(), rows), out_specs=rows)
    assert relative_error(jax.jit(mapped)(PARAMS, X), function(PARAMS, X)) <= 1e-4


class TestHost:
  def test_a_check_does_nothing_on_the_host(self):
    seen = []

    def function(params, x):
      y = convolved(x, params["kernel"])
      jax.debug.callback(lambda mean: seen.append(mean), y.mean())

      def step(y, scale):
        jax.debug.callback(lambda mean: seen.append(mean), y.mean())
        return block({**params, "scale": scale}, y), None

      return lax.scan(step, y * params["scale"], params["scale"])[0]

    fused = repjax.fuse(function, PARAMS, X)
    jax.effects_barrier()
    assert not seen
    result = fused(fused.fold(PARAMS), X)
    jax.effects_barrier()
    assert len(seen) == 2
    assert relative_error(result, function(PARAMS, X)) <= 1e-4

  def test_a_loop_that_never_ends_on_random_numbers_is_no_obstacle(self, monkeypatch):
    def function(params, x):
      def wants_more(pair):
        return jnp.max(jnp.abs(pair[0] - pair[1])) >= 0

      return lax.while_loop(wants_more, lambda pair: (pair[1], block(params, pair[1])), (x, x))[1]

    assert repjax.fuse(function, PARAMS, X).report.merges
    run = Merge.run
    monkeypatch.setattr(Merge, "run", lambda self, *values: [1.1 * run(self, *values)[0]])
    with pytest.raises(InputError, match="mistake"):  # one step was compared
      repjax.fuse(function, PARAMS, X)

  def test_a_loop_may_carry_a_random_key(self):
    def function(params, x):
      def step(carry, scale):
        y, key = carry
        key, own = jax.random.split(key)
        return (block({**params, "scale": scale}, y) + jax.random.normal(own, (3,)), key), None

      with jax.numpy_rank_promotion("allow"):
        return lax.scan(step, (x, params["key"]), params["scale"])[0][0]

    params = {**PARAMS, "key": jax.random.key(1)}
    fused = repjax.fuse(function, params, X)
    assert fused.report.merges
    assert relative_error(fused(fused.fold(params), X), function(params, X)) <= 1e-5
