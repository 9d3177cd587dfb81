"""Layouts: reshapes and transpositions in a row are one rearrangement of the source."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.fusion import layouts
from repjax.fusion.expressions import Expressions, evaluate
from repjax.fusion.values import Node
from repjax.program import Variable

SHAPE = (4, 6, 1, 5)
CHAINS = [
  [("reshape", (2, 2, 6, 5)), ("transpose", (2, 0, 3, 1)), ("reshape", (12, 10))],
  [("transpose", (3, 0, 2, 1)), ("reshape", (20, 6)), ("reshape", (5, 2, 2, 1, 3, 2))],
  [("reshape", (24, 5)), ("transpose", (1, 0)), ("reshape", (5, 4, 6))],
]


def source():
  """Returns a value that depends on the arguments."""
  return Node(Variable(jax.ShapeDtypeStruct(SHAPE, jnp.float32)), Expressions(), computed=True)


def layout_after(chain):
  """Returns the layout after reshapes and transpositions."""
  layout = layouts.layout_of(source())
  for kind, given in chain:
    layout = layout.reshaped(given) if kind == "reshape" else layout.permuted(given)
    assert layout is not None
  return layout


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_chain_of_moves_is_one_step(chain):
  x = wanted = np.arange(np.prod(SHAPE)).reshape(SHAPE)
  for kind, given in chain:
    wanted = getattr(wanted, kind)(given)
  layout = layout_after(chain)
  assert layout.shape == wanted.shape
  np.testing.assert_array_equal(layout.step.run(x)[0], wanted)


@pytest.mark.parametrize("chain", CHAINS, ids=str)
def test_a_spread_vector_moves_as_the_value_does(chain):
  layout, table = layout_after(chain), Expressions()
  vector = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1)
  spread = layouts.spread(table.constant(vector), layout.origin, layout.axes)
  assert spread is not None
  (moved,) = evaluate([spread], ())
  (wanted,) = layout.step.run(np.broadcast_to(vector, SHAPE))
  np.testing.assert_array_equal(np.broadcast_to(moved, wanted.shape), wanted)


def test_an_axis_that_cannot_be_split_evenly_has_no_layout():
  assert layouts.layout_of(source()).reshaped((10, 12)) is None
