"""Values whose logical axes and stored axes differ, against NumPy."""

import jax
import numpy as np
import pytest
from jax import export

from repjax.onnx import values
from repjax.onnx.graph import Graph

BATCH = export.symbolic_shape("batch")[0]
X = np.arange(2 * 3 * 4 * 6).reshape(2, 3, 4, 6)


def numbers(value):
  """Returns a constant's numbers in the order of its logical axes."""
  return Graph().arrange(value, value.axes).array.reshape(value.shape)


def stored_in(array, *order):
  """Builds a value of known numbers that is stored in a given order of axes."""
  value = values.known(array)
  return Graph().arrange(value, tuple(value.axes[axis] for axis in order))


VIEWS = {
  "shuffle": [("reshape", (2, 3, 4, 2, 3)), ("transpose", (0, 1, 2, 4, 3)), ("reshape", X.shape)],
  "tiles": [
    ("reshape", (2, 1, 3, 2, 2, 6)),
    ("transpose", (0, 1, 3, 2, 4, 5)),
    ("reshape", (4, 3, 2, 6)),
  ],
  "flatten": [("reshape", (2, 72)), ("transpose", (1, 0)), ("reshape", (3, 24, 2))],
  "units": [("reshape", (1, 6, 1, 24, 1)), ("transpose", (4, 3, 2, 1, 0)), ("reshape", (24, 6))],
}


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2), (3, 2, 1, 0)])
@pytest.mark.parametrize("steps", VIEWS.values(), ids=VIEWS)
def test_views_mean_what_they_mean_to_numpy_and_move_nothing(steps, order):
  value, expected = stored_in(X, *order), X
  before = value.array
  for name, argument in steps:
    value = getattr(values, name)(value, argument)
    expected = getattr(np, name)(expected, argument)
    assert value.array is before
    np.testing.assert_array_equal(numbers(value), expected)


def test_what_does_not_divide_is_no_view():
  assert values.reshape(values.known(np.zeros((4, 6))), (6, 4)) is None
  assert values.reshape(values.known(np.zeros((4, 6))), (8, 3)) is not None


def test_the_batch_divides_out_of_products():
  axes = values.new_axes((BATCH * 4, 6))
  value = values.Value("x", axes, axes)
  cut = values.reshape(value, (BATCH, 2, 2, 6))
  assert cut is not None
  assert cut.shape == (BATCH, 2, 2, 6)
  joined = values.reshape(cut, (BATCH * 2, 12))
  assert joined is not None
  assert joined.shape == (BATCH * 2, 12)
  assert values.reshape(value, (3, BATCH * 8)) is None


def test_axes_that_are_one_share_atoms_and_units_are_repeated():
  x = values.reshape(values.known(np.arange(12)), (2, 6))
  y = values.reshape(values.known(np.arange(6)), (1, 6))
  z = values.reshape(values.reshape(values.known(np.arange(12)), (2, 2, 3)), (2, 6))
  found = values.aligned([x, y, z], [(0, 0, 0), (1, 1, 1)])
  assert found is not None
  assert found[0].axes == found[1].axes == found[2].axes
  assert [len(axis) for axis in found[0].axes] == [1, 2]
  assert found[0].is_full
  assert not found[1].is_full
  np.testing.assert_array_equal(numbers(found[1]), np.tile(np.arange(6), (2, 1)))
  squared = values.aligned([x, x], [(0, 0), (1, 1)])
  assert squared is not None
  assert squared[0] == squared[1]


def test_lengths_that_do_not_divide_are_not_aligned():
  x = values.reshape(values.reshape(values.known(np.arange(24)), (4, 6)), (24,))
  y = values.reshape(values.reshape(values.known(np.arange(24)), (6, 4)), (24,))
  assert values.aligned([x, y], [(0, 0)]) is None
  graph = Graph()
  assert values.aligned([graph.plain(x), graph.plain(y)], [(0, 0)]) is not None


@pytest.mark.parametrize("dimensions", [(0, 3), (1, 2)])
def test_broadcasts_are_those_of_lax(dimensions):
  x = np.arange(6).reshape(1, 6)
  shape = (5, 1, 6, 2) if dimensions == (1, 2) else (5, 3, 2, 6)
  value = values.broadcast(values.known(x), shape, dimensions)
  expected = jax.lax.broadcast_in_dim(x, shape, dimensions)
  np.testing.assert_array_equal(numbers(value), expected)
