"""The longest chain of pieces of a network in streams, and what it is made of."""

import jax
import numpy as np
import pytest

import repjax
from repjax.deploy.critical_path import PieceCost, longest_chain
from repjax.deploy.streams import cut_into_pieces
from repjax.errors import InputError
from repjax.models.parnet import ParNet
from tests.deploy.test_streams import SIZE, TwoStreams, noise
from tests.helpers import random_variables

FIRST, LAST = "downsample0+downsample1", "fusion3+downsample4+head"
pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

PIECES = cut_into_pieces(ParNet().stream_scopes, ["head"])
TO_HOST = 0.5


def random_costs(seed):
  rng = np.random.default_rng(seed)
  return [
    PieceCost(piece, rng.uniform(), {name: rng.uniform() for name in piece.moves})
    for piece in PIECES
  ]


def chains(costs, last):
  """Yields the seconds and names of every chain of pieces that ends in `last`."""
  maker = {scope: cost for cost in costs for scope in cost.piece.makes}
  for name in last.piece.reads:
    own = last.seconds + last.moves.get(name, 0)
    if name == "images":
      yield own, [last.piece.name]
    else:
      for seconds, names in chains(costs, maker[name]):
        yield seconds + own, [*names, last.piece.name]


@pytest.mark.parametrize("seed", range(20))
def test_no_chain_is_longer_and_the_shares_add_up(seed):
  costs = random_costs(seed)
  found = longest_chain(costs, TO_HOST, 8, 3)
  seconds, names = max(chains(costs, costs[-1]))
  assert list(found.path) == names
  np.testing.assert_allclose(found.seconds, seconds + TO_HOST)
  np.testing.assert_allclose(sum(found.shares.values()), found.seconds)
  by_name = {cost.piece.name: cost.seconds for cost in costs}
  np.testing.assert_allclose(found.shares["serial"], by_name[FIRST] + by_name[LAST])
  np.testing.assert_allclose(found.shares["host"], costs[0].moves["images"] + TO_HOST)
  np.testing.assert_allclose(
    found.one_by_one, found.shares["host"] + sum(cost.seconds for cost in costs)
  )


def test_what_costs_most_is_named():
  def found(changes):
    """Returns the longest chain if pieces take the given seconds, and all else takes little."""
    costs = [
      PieceCost(
        piece,
        changes.get(piece.name, 0.001),
        dict.fromkeys(piece.moves, changes.get("moves", 0.0001)),
      )
      for piece in PIECES
    ]
    return longest_chain(costs, 0.0001, 1, 3)

  assert found({"stream2": 1}).bound == "stream 2"
  assert found({"stream2": 1}).path == (FIRST, "downsample2", "stream2", "fusion2", LAST)
  assert found({"stream1+fusion1": 1}).path == (FIRST, "stream1+fusion1", "fusion2", LAST)
  third = found({"downsample3+stream3": 1, FIRST: 0.5, "stream2": 0.75})
  assert (third.bound, third.path[2]) == ("stream 3", "downsample3+stream3")
  assert third.streams == pytest.approx({1: 0.501, 2: 0.752, 3: 1.001})
  assert found({FIRST: 1}).bound == "serial"
  moves = found({"moves": 1})
  assert (moves.bound, moves.shares["moves"]) == ("moves", 2)
  text = str(third)
  assert "stream 1 501.000 ms, stream 2 752.000 ms, stream 3 1001.000 ms" in text
  assert f"critical path (*): {FIRST} > downsample2 > downsample3+stream3 > {LAST}" in text
  assert "most of it: stream 3" in text
  assert "at most 1.50 times as fast in streams" in text


@pytest.fixture(scope="module")
def compiled(quickly):
  model, images = TwoStreams(), noise(4)
  return repjax.deploy.compile(
    model,
    random_variables(model, images),
    image_size=SIZE,
    batch_sizes=(1, 4),
    devices=jax.devices()[:2],
    parallel="streams",
    tune=False,
  )


def test_pieces_are_measured(compiled):
  found = repjax.deploy.critical_path(compiled, rounds=2)
  assert (found.batch_size, found.devices) == (1, 2)
  assert repjax.deploy.critical_path(compiled, 4, rounds=1).batch_size == 4
  assert [cost.piece.name for cost in found.costs] == ["first", "second", "head"]
  assert [tuple(cost.moves) for cost in found.costs] == [("images",), ("images",), ("second",)]
  assert all(min(cost.seconds, *cost.moves.values()) > 0 for cost in found.costs)
  assert found.path[-1] == "head"
  assert found.shares["host"] > 0
  assert 0 < found.shares["serial"] == found.costs[-1].seconds


def test_what_has_no_pieces_and_numbers_that_cannot_be_are_refused(compiled):
  model, images = TwoStreams(), noise(1)
  plain = repjax.deploy.compile(
    model.clone(), random_variables(model, images), image_size=SIZE, batch_sizes=1, tune=False
  )
  with pytest.raises(InputError, match='parallel="streams"'):
    repjax.deploy.critical_path(plain)
  with pytest.raises(InputError, match=r"batch sizes \(1, 4\), got 2"):
    repjax.deploy.critical_path(compiled, 2)
  with pytest.raises(InputError, match="rounds must be 1 or more, got 0"):
    repjax.deploy.critical_path(compiled, rounds=0)
