"""Expressions: equal ones are one object, and each is computed once."""

import jax
import jax.numpy as jnp
import numpy as np

from repjax.fusion.expressions import Expressions, evaluate
from repjax.program import trace

VECTOR = jax.ShapeDtypeStruct((3,), jnp.float32)


def test_equal_expressions_are_one_object():
  table = Expressions()
  leaf = table.leaf(0, VECTOR)
  assert table.leaf(0, VECTOR) is leaf
  assert table.constant(np.float32(2)) is table.constant(np.float32(2))
  double = table.derived(jnp.multiply, leaf, table.constant(np.float32(2)))
  assert table.derived(jnp.multiply, leaf, table.constant(np.float32(2))) is double
  assert table.derived(jnp.multiply, leaf, table.constant(np.float32(3))) is not double


def test_equations_of_two_traces_are_one_object():
  table, found = Expressions(), []
  for _ in range(2):
    (equation,) = trace(jnp.sin, VECTOR).equations
    found += table.equation(equation, [table.leaf(0, VECTOR)])
  assert found[0] is found[1]


def test_small_constants_are_computed_at_once():
  table = Expressions()
  (equation,) = trace(jnp.sin, jax.ShapeDtypeStruct((), jnp.float32)).equations
  (known,) = table.equation(equation, [table.constant(np.float32(0))])
  assert known.value == 0


def test_a_common_part_is_computed_once():
  calls = []

  def noted(x):
    calls.append(x)
    return x + 1

  table = Expressions()
  part = table.derived(noted, table.leaf(0, VECTOR))
  calls.clear()
  first, second = evaluate(
    [table.derived(jnp.sin, part), table.derived(jnp.cos, part)], [jnp.zeros(3)]
  )
  assert len(calls) == 1
  np.testing.assert_allclose(first, np.sin(np.ones(3)), rtol=1e-6)
  np.testing.assert_allclose(second, np.cos(np.ones(3)), rtol=1e-6)


def test_leaves_are_the_parameters_that_a_value_depends_on():
  table = Expressions()
  total = table.derived(jnp.add, table.leaf(4, VECTOR), table.leaf(1, VECTOR))
  assert total.leaves == {1, 4}
  assert table.constant(np.ones(3)).leaves == frozenset()
