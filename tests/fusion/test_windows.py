"""Windows against the places that their definition reads."""

import itertools

import pytest

from repjax.fusion.windows import Window

WINDOWS = [
  Window(size, taps, stride, dilation, low)
  for size, taps, stride, dilation, low in itertools.product(
    (3, 4), (1, 2, 3), (1, 2), (1, 2), (-1, 0, 2)
  )
]


def reads(window):
  """Returns for each output the set of places that it reads."""
  taps = [tap * window.dilation for tap in range(window.taps)]
  return [
    {output * window.stride - window.low + tap for tap in taps} for output in range(window.size)
  ]


@pytest.mark.parametrize("second", WINDOWS[::5], ids=str)
def test_a_chain_reads_what_the_second_reads_through_the_first(second):
  for first in WINDOWS:
    if second.padding(first.size)[0] > 0 or second.padding(first.size)[1] > 0:
      continue
    through = reads(first)
    wanted = [set().union(*(through[place] for place in each)) for each in reads(second)]
    joint = first.then(second)
    assert all(each <= mine for each, mine in zip(wanted, reads(joint), strict=True))
    assert min(map(min, wanted)) == min(map(min, reads(joint)))
    assert max(map(max, wanted)) == max(map(max, reads(joint)))


@pytest.mark.parametrize("one", WINDOWS[::5], ids=str)
def test_a_union_is_the_smallest_window_that_reads_what_both_read(one):
  for two in WINDOWS:
    union = one.union(two)
    if (one.size, one.stride) != (two.size, two.stride):
      assert union is None
      continue
    both = [mine | others for mine, others in zip(reads(one), reads(two))]
    assert all(each <= whole for each, whole in zip(both, reads(union), strict=True))
    assert min(both[0]) == min(reads(union)[0])
    assert max(both[0]) == max(reads(union)[0])


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_a_window_in_a_union_keeps_its_taps(window):
  union = window.union(Window(window.size, 3, window.stride, 1, 1))
  before, after, between = window.place_in(union)
  assert before + after + (window.taps - 1) * (between + 1) + 1 == union.taps
  first = min(reads(union)[0]) + before * union.dilation
  assert first == min(reads(window)[0])


def test_padding_counts_zeros_on_both_sides():
  assert Window(5, 3, low=1).padding(5) == (1, 1)
  assert Window(3, 3, 2, low=0).padding(6) == (0, 1)
  assert Window(3, low=-1).padding(5) == (-1, -1)
  assert Window(9, 3, low=1, spread=2).padding(5) == (1, 1)


def test_zero_outside_holds_if_outer_outputs_read_no_input():
  assert Window(5).zero_outside(5, 5)
  assert not Window(5, 3, low=1).zero_outside(5, 5)
  assert not Window(3, low=-1).zero_outside(5, 3)
