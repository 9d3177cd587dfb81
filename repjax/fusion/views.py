"""Rules for equations that move, pad, cut or sum pixels, and leave channels as they are."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from repjax.fusion.arithmetic import Given, Rule
from repjax.fusion.expressions import Expression
from repjax.fusion.kernels import rearranged
from repjax.fusion.layouts import Layout, sizes
from repjax.fusion.values import Affine, Border, Node, Term, affine_of
from repjax.fusion.windows import Window


def transpose(given: Given) -> Affine | None:
  """Applies the rule of a transposition."""
  node = given.node()
  return None if node is None else moved(node, given.shape, given.params["permutation"])


def reshape(given: Given) -> Affine | None:
  """Applies the rule of a reshape that only adds or drops axes of length 1."""
  node = given.node()
  if node is None:
    return None
  old, new = node.shape, given.shape
  if [size for size in old if size != 1] != [size for size in new if size != 1]:
    return None
  return affine_of(node) if old == new else moved(node, new, _places(old, new))


def _places(old: Sequence[int], new: Sequence[int]) -> list[int | None]:
  """Returns for each new axis the old one; axes of length 1 are matched from left to right."""
  places: list[int | None] = []
  at = 0
  for size in new:
    while size != 1 and old[at] == 1:
      at += 1  # an old axis of length 1 that is dropped
    same = at < len(old) and old[at] == size
    places.append(at if same else None)
    at += same
  return places


def broadcast(given: Given) -> Affine | None:
  """Applies the rule of a broadcast that only adds axes of length 1."""
  node = given.node()
  if node is None or math.prod(given.shape) != math.prod(node.shape):
    return None
  places: list[int | None] = [None] * len(given.shape)
  for axis, place in enumerate(given.params["broadcast_dimensions"]):
    places[place] = axis
  return moved(node, given.shape, places)


def moved(node: Node, shape: tuple[int, ...], places: Sequence[int | None]) -> Affine | None:
  """Returns a node with its axes in new places.

  Args:
    node: the value.
    shape: shape of the result.
    places: for each axis of the result the axis of the node, None for a new one of length 1.

  Returns:
    None where the channels are dropped, or where a border would lose an axis.
  """
  affine = affine_of(node)
  lost = affine.channel is not None and affine.channel not in places
  permuted = None not in places and len(places) == len(node.shape)
  if lost or (affine.borders and not permuted):
    return None
  terms = tuple(
    dataclasses.replace(
      term, view=tuple(None if place is None else term.view[place] for place in places)
    )
    for term in affine.terms
  )
  channel = None if affine.channel is None else list(places).index(affine.channel)
  borders = tuple(_moved_border(border, affine.channel, places) for border in affine.borders)
  return dataclasses.replace(affine, shape=shape, terms=terms, channel=channel, borders=borders)


def _moved_border(border: Border, channel: int | None, places: Sequence[int | None]) -> Border:
  order = [axis for axis in range(len(border.windows)) if axis != channel]
  old = [place for place in places if place is not None]
  kept = [order.index(place) for place in old if place != channel]
  taps = [border.kernel.shape[place] for place in kept]
  return Border(
    rearranged(border.kernel, kept, taps), tuple(border.windows[place] for place in old)
  )


def windowed(given: Given, windows: Sequence[Window], name: str) -> Affine | None:
  """Returns the sum whose only term reads the operand through windows."""
  node = given.node()
  if node is None:
    return None
  term = Term(node, tuple(range(len(windows))), tuple(windows), None, node.dtype, names=(name,))
  return Affine(given.shape, (term,), equations=frozenset([given.equation]))


def pad(given: Given) -> Affine | None:
  """Applies the rule of padding with zeros, without zeros between the inputs."""
  node, fill = given.operands
  config = given.params["padding_config"]
  zero = isinstance(fill, Expression) and not fill.leaves and _is_zero(fill)
  if not isinstance(node, Node) or not zero or any(between for *_, between in config):
    return None
  windows = [Window(size + low + high, low=low) for size, (low, high, _) in zip(node.shape, config)]
  return windowed(given, windows, "identity")


def _is_zero(fill: Expression) -> bool:
  return fill.value is not None and not np.any(np.asarray(fill.value))


def cut(given: Given) -> Affine | None:
  """Applies the rule of a slice."""
  params, node = given.params, given.node()
  if node is None:
    return None
  strides = params["strides"] or (1,) * len(given.shape)
  windows = [
    Window(size, stride=stride, low=-start)
    for size, stride, start in zip(given.shape, strides, params["start_indices"])
  ]
  return windowed(given, windows, "identity")


def sum_windows(given: Given) -> Affine | None:
  """Applies the rule of a sum over windows, as in an average pool."""
  params = given.params
  if set(params["base_dilation"]) != {1}:
    return None
  windows = [
    Window(*each)
    for each in zip(
      given.shape,
      params["window_dimensions"],
      params["window_strides"],
      params["window_dilation"],
      (low for low, _ in params["padding"]),
    )
  ]
  return windowed(given, windows, _pool_name(windows))


def _pool_name(windows: Sequence[Window]) -> str:
  return "sum" + "x".join(str(window.taps) for window in windows if window.taps > 1)


def sum_blocks(given: Given) -> Affine | None:
  """Applies the rule of a sum over blocks, (.., H/k, k, ..) summed over k: an average pool."""
  node = given.node()
  if node is None:
    return None
  affine = affine_of(node)
  split = affine.terms[0].source if affine.is_view else node  # sums are often in a wider dtype
  if split.layout is None or split.shape != node.shape:
    return None
  found = _block_windows(split.layout, given.params["axes"])
  if found is None:
    return None
  view, windows = found
  source, name = split.layout.source, _pool_name(windows)
  term = Term(source, view, windows, None, split.dtype, names=(name,))
  return Affine(given.shape, (term,), equations=frozenset([given.equation]))


def _block_windows(
  layout: Layout, summed: Sequence[int]
) -> tuple[tuple[int, ...], tuple[Window, ...]] | None:
  """Returns the view and the windows of a sum over parts that a reshape split off.

  Returns None if what is summed is no block of neighbours.
  """
  gone = {atom for axis in summed for atom in layout.axes[axis]}
  rest = [axis for place, axis in enumerate(layout.axes) if place not in summed]
  kept = [tuple(atom for atom in axis if atom not in gone) for axis in layout.origin]
  if sorted(map(hash, rest)) != sorted(map(hash, kept)):
    return None
  windows = []
  for own, axis in zip(kept, layout.origin):
    if axis[: len(own)] != own:
      return None  # neighbours are the last parts of an axis
    count, block = math.prod(sizes(own)), math.prod(sizes(axis[len(own) :]))
    windows.append(Window(count, block, block) if block > 1 else Window(count))
  places = list(range(len(kept)))
  view = []
  for axis in rest:  # several axes may have length 1, and then no atoms
    view.append(next(place for place in places if kept[place] == axis))
    places.remove(view[-1])
  return tuple(view), tuple(windows)


RULES: dict[str, Rule] = {
  "broadcast_in_dim": broadcast,
  "pad": pad,
  "reduce_window_sum": sum_windows,
  "reduce_sum": sum_blocks,
  "reshape": reshape,
  "squeeze": reshape,
  "transpose": transpose,
}
