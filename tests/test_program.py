"""A flat program computes what the function computes, in float64, whatever calls it is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax import program
from repjax.program import Constant, flat, inner_programs, interpret, trace
from tests.helpers import random_input

pytestmark = pytest.mark.usefixtures("x64")

X = random_input(3, 4)
CONTROL = {"scan", "while", "cond"}


def run(traced, *arrays, keep=lambda rule: False):
  """Computes the outputs of a program from arrays."""
  return interpret(
    traced, arrays, lambda equation, values: equation.run(*values), lambda c: c.array, keep
  )


def names(function, *args):
  return [equation.primitive for equation in trace(function, *args).equations]


@jax.custom_jvp
def doubled_gradient(x):
  return x


doubled_gradient.defjvp(lambda primals, tangents: (primals[0], 2 * tangents[0]))


@jax.custom_vjp
def product(x, y):
  return jnp.tanh(x) * y, y


def _backward(saved, gradients):
  return gradients[0] * saved[0] * 3, gradients[1]


product.defvjp(lambda x, y: (product(x, y), (x, y)), _backward)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def scaled(x, by):
  return jax.jit(lambda x: doubled_gradient(x) * by)(x)


scaled.defjvp(lambda by, primals, tangents: (scaled(primals[0], by), 5 * tangents[0]))


def twice(x):
  double = jax.jit(lambda x: jax.jit(jnp.sin)(x) * 2)
  return double(double(x)) - double(x + 1)


FUNCTIONS = {
  "jit in jit, called twice": twice,
  "remat": jax.checkpoint(lambda x: jnp.sin(jax.jit(jnp.cos)(x))),
  "named call": lambda x: jax.named_call(jnp.cos, name="wave")(x) + 1,
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "gelu": jax.nn.gelu,
  "custom_jvp": lambda x: scaled(x, 3.0) + doubled_gradient(x),
  "custom_vjp": lambda x: product(x, x + 1),
  "where": lambda x: jnp.where(x > 0, x, 0.0),
  "scan": lambda x: jax.lax.scan(lambda c, row: (jax.nn.relu(c + row), c), x[0], x),
  "scan over nothing": lambda x: jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=3)[0],
  "cond": lambda x: jax.lax.cond(x.sum() > 0, jnp.sin, jax.nn.relu, x),
  "while": lambda x: jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c + 1, x),
  "literals": lambda x: 2.0 * x - 1,
  "constants": lambda x: x + np.arange(4.0).reshape(1, 4) + jnp.asarray(random_input(3, 4, seed=2)),
  "unused": lambda x: (jnp.sin(x), jax.jit(lambda x: (x * 2, x * 3))(x)[0])[1],
  "an input returned": lambda x: {"same": x, "twice": jax.jit(lambda x: (x, x))(x)},
  "a number returned": lambda x: (jax.jit(lambda x: 3.0)(x), x.sum()),
  "dropout": lambda x: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, x.shape), x, 0.0),
  "products": lambda x: jax.jit(jnp.einsum, static_argnums=0)("ij,kj->ik", x, x),
}


@pytest.mark.parametrize("title", FUNCTIONS)
def test_a_flat_program_computes_what_the_function_computes(title):
  function = FUNCTIONS[title]
  traced = trace(function, X)
  wanted = function(X)
  got = jax.tree.unflatten(jax.tree.structure(traced.results), run(traced, X))
  for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(ours, theirs, rtol=1e-14)
  assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(lambda leaf: leaf.shape, traced.results)
  # Nothing but operations is left: every equation that holds a program is a loop or a branch.
  assert {e.primitive for e in traced.equations if inner_programs(e)} <= CONTROL


@pytest.mark.parametrize("title", FUNCTIONS)
def test_every_variable_is_made_once_and_before_it_is_read(title):
  traced = trace(FUNCTIONS[title], X)
  made = set(traced.inputs)
  for equation in traced.equations:
    assert all(isinstance(x, Constant) or x in made for x in equation.inputs)
    assert not made & set(equation.outputs)
    made.update(equation.outputs)
  assert all(isinstance(x, Constant) or x in made for x in traced.outputs)


def test_calls_are_inlined_in_order_and_loops_stay():
  assert names(twice, X) == ["sin", "mul", "sin", "mul", "add", "sin", "mul", "sub"]
  assert names(FUNCTIONS["scan over nothing"], X) == ["scan"]
  assert names(FUNCTIONS["cond"], X)[-1] == "cond"


def test_scopes_are_those_of_all_calls_around_an_equation():
  @jax.jit
  def inner(x):
    with jax.named_scope("inner"):
      return jnp.sin(x)

  def outer(x):
    with jax.named_scope("outer"):
      return jax.checkpoint(inner)(x), jax.lax.scan(lambda c, _: (inner(c), None), x, None, 2)

  sine, loop = trace(outer, X).equations
  assert sine.scope.split("/")[0] == "outer"
  assert sine.scope.split("/")[-1] == "inner"
  (body,) = inner_programs(loop)
  assert body.equations[0].scope.startswith("outer/")
  assert body.equations[0].scope.endswith("/inner")


def test_what_loops_and_branches_hold_opens_as_flat_programs():
  (*_, cond) = trace(FUNCTIONS["cond"], X).equations
  second, first = inner_programs(cond)
  np.testing.assert_array_equal(run(first, X)[0], jnp.sin(X))
  np.testing.assert_array_equal(run(second, X)[0], jax.nn.relu(X))
  assert [e.primitive for e in second.equations] == ["max"]
  (loop,) = trace(FUNCTIONS["while"], X).equations
  assert len(inner_programs(loop)) == 2
  np.testing.assert_array_equal(run(flat(loop.params["body_jaxpr"]), X)[0], X + 1)


@pytest.mark.parametrize("title", ["relu", "custom_jvp", "custom_vjp", "silu"])
def test_kept_rules_give_the_functions_own_derivatives(title):
  function = FUNCTIONS[title]
  x = jnp.asarray(X).at[0, 0].set(0)  # where the derivative of relu is a matter of its rule

  def total(function):
    return lambda x: sum(jnp.sum(leaf) for leaf in jax.tree.leaves(function(x)))

  def kept(x):
    return run(trace(function, x), x, keep=lambda rule: True)

  wanted = jax.grad(total(function))(x)
  np.testing.assert_allclose(jax.grad(total(kept))(x), wanted, rtol=1e-14)
  inlined = jax.grad(total(lambda x: run(trace(function, x), x)))(x)
  assert bool(jnp.allclose(inlined, wanted)) == (title == "silu")  # which has no rule


def test_rules_stand_from_the_outermost_to_the_innermost():
  traced = trace(FUNCTIONS["custom_jvp"], X)
  assert [(rule.start, rule.stop) for rule in traced.rules] == [(0, 2), (0, 1), (2, 3)]
  inner = [e.primitive for e in traced.with_rules(lambda rule: rule.stop - rule.start == 1)]
  assert inner == ["custom_jvp_call", "mul", "custom_jvp_call", "add"]
  outer = [e.primitive for e in traced.with_rules(lambda rule: True)]
  assert outer == ["custom_jvp_call", "custom_jvp_call", "add"]


def test_shapes_are_enough_and_symbols_are_shapes():
  from jax import export

  shape = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 4"), jnp.float64)
  traced = trace(jax.jit(lambda x: jax.nn.relu(x) + 1), shape)
  assert [e.primitive for e in traced.equations] == ["max", "add"]
  assert str(traced.results.shape[0]) == "batch"


def test_a_loop_whose_body_fits_its_inputs_is_no_call():
  def doubled(x):
    return jax.lax.scan(lambda c, _: (c * 2, None), x, None, length=3)[0]

  np.testing.assert_array_equal(run(trace(jax.jit(doubled), X), X)[0], X * 8)
  assert program._called(jax.make_jaxpr(doubled)(X).jaxpr.eqns[0]) is None
