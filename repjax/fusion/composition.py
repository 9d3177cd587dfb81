"""Puts what the source of a term is made of into the term: two steps become one.

  Term(inner, k2)  with  inner = Term(x, k1) + b1      becomes      Term(x, k1 then k2) + k2(b1)

Exact at every size, or refused with a reason. The two places where care is needed are borders: a
padded convolution reads zeros where the inner sum would not be zero, and a shift does not reach
these zeros.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from repjax.fusion import kernels
from repjax.fusion.expressions import Expression
from repjax.fusion.kernels import times
from repjax.fusion.values import NEW, Affine, Border, Node, Refusal, Term, part_of, scaled_term
from repjax.fusion.windows import Window


def substituted(affine: Affine, inner: Node) -> Affine:
  """Returns a sum with what a node is made of in place of the node.

  Raises:
    Refusal: that is not exact at every size.
  """
  assert inner.affine is not None
  terms: list[Term] = []
  total = dataclasses.replace(affine, terms=())
  for term in affine.terms:
    if term.source is not inner:
      terms.append(term)
      continue
    part = composed(term, inner.affine, affine.shape)
    terms += part.terms
    part = dataclasses.replace(part, terms=())
    if affine.channel is not None and term.features is not None:
      start, length = term.start, affine.shape[affine.channel]
      part = _shrunk(part, affine.channel, term.features).at_channels(start, length)
    total = total.joined(part)
  # The channels of all terms lie along one axis of the value.
  channel = total.channel
  return dataclasses.replace(total, terms=tuple(terms), channel=None).with_channel(channel)


def _shrunk(part: Affine, channel: int, features: int) -> Affine:
  """Returns a sum without terms as one of fewer channels, those that its shift and borders have."""
  shape = (*part.shape[:channel], features, *part.shape[channel + 1 :])
  return dataclasses.replace(part, shape=shape, channel=channel)


def composed(term: Term, inner: Affine, shape: tuple[int, ...]) -> Affine:
  """Returns a term as a sum over the sources of its source.

  Args:
    term: to be replaced.
    inner: what the source of the term is, a sum of terms.
    shape: shape of the value that the term adds to.

  Raises:
    Refusal: the two do not merge into one step, or not at every size or without loss.
  """
  term = _with_known_channel(term, inner)
  terms = tuple(_composed_term(term, each, inner) for each in inner.terms)
  channel = None if term.channel is None else term.view.index(term.channel)
  borders = tuple(_moved_border(border, term, inner) for border in inner.borders)
  result = Affine(shape, terms, None, borders, channel, inner.equations)
  return _with_shift(result, term, inner)


def _with_known_channel(term: Term, inner: Affine) -> Term:
  """Returns a term with the channels of the inner sum.

  A sum over neighbours of a product, or of such a sum, gets a kernel.
  """
  if None not in (term.channel, inner.channel) and term.channel != inner.channel:
    raise Refusal("the channels of its input lie along a different axis")
  channel = inner.channel if term.channel is None else term.channel
  if channel is not None and not term.windows[channel].plain(inner.shape[channel]):
    raise Refusal("channels that are padded or cut")
  if channel is not None and channel not in term.view:
    raise Refusal("channels that are summed away")
  if channel is None and len(inner.segments()) > 1:
    raise Refusal("channels that are concatenated")
  term = dataclasses.replace(term, channel=channel)
  if term.sums and any(each.kernel is not None or each.sums for each in inner.terms):
    if channel is None:
      raise Refusal("a sum over neighbours after a sum over neighbours")
    return term.with_kernel()
  return term


def _composed_term(term: Term, each: Term, inner: Affine) -> Term:
  """Returns the term over one of the inner terms."""
  _check_dtypes(term, each, inner)
  each = dataclasses.replace(each, channel=_joint_channel(term, each))
  joint = dataclasses.replace(
    each,
    view=tuple(None if axis is None else each.view[axis] for axis in term.view),
    windows=_joint_windows(term, each, inner),
    batch=_joint_batch(term, each),
    settings=term.settings or each.settings,
    names=tuple(name for name in each.names + term.names if name != "identity") or ("identity",),
    dtype=_joint_dtype(term, each),
    start=term.start + (each.start if term.kernel is None else 0),
  )
  if term.kernel is not None:
    return _with_joint_kernel(joint, term, each, inner)
  return joint if term.scale is None else scaled_term(joint, part_of(term.scale, each))


def _check_dtypes(term: Term, each: Term, inner: Affine) -> None:
  """Refuses what would round numbers in a different dtype than the program does."""
  if each.settings and term.settings and each.dtype != term.dtype:
    raise Refusal(f"convolutions in {each.dtype} and {term.dtype}")
  if each.settings and term.settings and each.settings[0] != term.settings[0]:
    raise Refusal("convolutions of different precision")
  # The dtype before any cast counts: a sum in float32 may nearly cancel.
  origin = each.source.dtype if each.kernel is None else each.dtype
  narrower = term.kernel is not None and term.dtype.itemsize < origin.itemsize
  if narrower and each.scale is not None and term.dtype == np.float16:
    raise Refusal(f"a scale in {origin} before a product in float16, whose range is small")
  if inner.bias is not None and narrower:
    raise Refusal(f"a shift in {origin} before a product in {term.dtype} would be rounded")


def _joint_channel(term: Term, each: Term) -> int | None:
  """Returns the axis of the inner term's source that holds the term's channels."""
  if term.channel is None:
    return None
  channel = each.view[term.channel]
  if (
    channel is None
    or each.channel not in (None, channel)
    or not each.windows[channel].plain(each.source.shape[channel])
  ):
    raise Refusal("the channels of its input are padded, cut or of length 1")
  return channel


def _joint_windows(term: Term, each: Term, inner: Affine) -> tuple[Window, ...]:
  """Returns how the term reads the source of the inner term, along each axis of that source."""
  windows = list(each.windows)
  for axis, place in enumerate(each.view):
    second = term.windows[axis]
    if axis == term.channel:
      continue
    if place is None:
      if not second.plain(1):
        raise Refusal("taps along an axis of length 1")
      continue
    first, inputs = each.windows[place], each.source.shape[place]
    padded = max(second.padding(inner.shape[axis])) > 0
    if padded and second.spread == 1 and not first.zero_outside(inputs, inner.shape[axis]):
      raise Refusal("padding between two steps, the first of which reads beyond the border")
    joint = first.then(second)
    if joint is None or (second.spread != 1 and not first.plain(inputs)):
      raise Refusal("a transposed convolution after a step that is not pointwise")
    windows[place] = joint
  return tuple(windows)


def _joint_batch(term: Term, each: Term) -> int | None:
  """Returns the batch axis of the term as an axis of the inner term's source."""
  if each.batch not in (None, NEW) or term.batch is None:
    return each.batch
  place = None if term.batch == NEW else each.view[term.batch]
  return NEW if place is None else place


def _joint_dtype(term: Term, each: Term) -> Any:
  """Returns the dtype of the product of the two, or else the narrower dtype."""
  if term.kernel is not None and term.settings:
    return term.dtype
  if each.kernel is not None:
    return each.dtype
  return min(term.dtype, each.dtype, key=lambda dtype: dtype.itemsize)


def _with_joint_kernel(joint: Term, term: Term, each: Term, inner: Affine) -> Term:
  """Returns the joint term with the kernel of the inner term and then the term's kernel."""
  assert term.kernel is not None
  assert term.channel is not None
  assert each.features is not None
  axes = each.others
  place = {source: axis for axis, source in enumerate(each.view) if source is not None}
  second = [term.windows[place[axis]] if axis in place else Window(1) for axis in axes]
  kernel, groups = _taps_along(term.kernel, term, [place.get(axis) for axis in axes]), term.groups
  if each.features != inner.shape[term.channel]:
    if groups != 1:
      raise Refusal("a grouped convolution of channels that are concatenated")
    kernel = kernels.input_rows(kernel, start=each.start, stop=each.start + each.features)
  if each.kernel is None and not each.sums:
    if each.scale is not None:
      kernel = kernels.input_scaled(kernel, each.scale, groups=groups)
    return dataclasses.replace(joint, kernel=kernel, scale=None, groups=groups)
  each = each.with_kernel()
  fewer = math.gcd(each.groups, groups)
  windows = [
    (each.windows[axis], window, joint.windows[axis]) for axis, window in zip(axes, second)
  ]
  last = kernels.regrouped(kernels.widened(kernel), groups, fewer)
  kernel = kernels.chained(each.kernel_in(fewer), last, fewer, windows)
  return dataclasses.replace(joint, kernel=kernel, scale=None, groups=fewer)


def _taps_along(kernel: Expression, term: Term, axes: Sequence[int | None]) -> Expression:
  """Returns a kernel or a map of taps with its taps along axes of the term's source, 1 for None."""
  order = {axis: place for place, axis in enumerate(term.others)}
  first = [order[axis] for axis in axes if axis is not None]
  rest = [place for place in range(len(order)) if place not in first]
  taps = [1 if axis is None else term.windows[axis].taps for axis in axes]
  return kernels.rearranged(kernel, [*first, *rest], taps)


def _with_shift(result: Affine, term: Term, inner: Affine) -> Affine:
  """Adds what the term makes of the inner sum's shift."""
  if inner.bias is None:
    return result
  uniform = all(map(Window.uniform, term.windows, inner.shape))
  if term.kernel is None:
    if not uniform:
      raise Refusal("a shift before padding")
    count = math.prod(window.taps for window in term.windows)
    bias = inner.bias if term.scale is None else times(inner.bias, term.scale)
    bias = bias if count == 1 else times(bias, bias.table.constant(np.asarray(count, bias.dtype)))
    return result.shifted(bias)
  by_tap = kernels.shift_by_tap(kernels.input_scaled(term.kernel, inner.bias, groups=term.groups))
  if uniform:
    return result.shifted(kernels.summed_taps(by_tap))
  return dataclasses.replace(result, borders=(_border(by_tap, term, inner), *result.borders))


def _border(by_tap: Expression, term: Term, inner: Affine) -> Border:
  """Returns the border that a shift makes after a padded convolution.

  Raises:
    Refusal: the term reads padding along an axis that its value does not have.
  """
  gone = [place for place, axis in enumerate(term.others) if axis not in term.view]
  for place in gone:
    axis = term.others[place]
    if not term.windows[axis].uniform(inner.shape[axis]):
      raise Refusal("a shift before padding along an axis that is summed away")
  by_tap = kernels.summed_along(by_tap, axes=tuple(gone)) if gone else by_tap
  windows = tuple(
    None
    if axis is None or term.windows[axis].plain(inner.shape[axis])
    else (term.windows[axis], inner.shape[axis])
    for axis in term.view
  )
  others = [axis for axis in term.view if axis is None or axis != term.channel]
  return Border(_taps_along(by_tap, term, others), windows)


def _moved_border(border: Border, term: Term, inner: Affine) -> Border:
  """Returns a border of the inner sum after the term, which must be pointwise."""
  if not term.plain or term.view != tuple(range(len(inner.shape))):
    raise Refusal("a second step after a shift before padding")
  kernel = border.kernel
  if term.kernel is not None:
    kernel = kernels.pointwise_map(kernel, term.kernel_in(1))
  elif term.scale is not None:
    kernel = times(kernel, term.scale)
  return Border(kernel, border.windows)
