"""Rules for concatenating and cutting channels.

Where a convolution is among the parts, a concatenation stays a sum: each term says at which channel
of the value it starts. A norm after the concatenation then merges into all convolutions, and a
convolution after it may merge with each of them.
"""

import dataclasses
from typing import Any

from repjax.fusion.arithmetic import Given, Rule
from repjax.fusion.expressions import Expression, derived
from repjax.fusion.values import Affine, Node, Refusal, affine_of, segments, with_channel
from repjax.fusion.vectors import at_channels, plus
from repjax.fusion.views import cut as cut_pixels


def concatenate(given: Given) -> Affine | None:
  """Applies the rule of a concatenation."""
  axis = given.params["dimension"]
  nodes = [operand for operand in given.operands if isinstance(operand, Node)]
  parts = [affine_of(node) for node in nodes]
  if len(parts) < len(given.operands) or not any(_has_kernel(part) for part in parts):
    return None
  total, start = Affine(given.shape, (), channel=axis), 0
  for part in parts:
    part = with_channel(part, axis)
    total = _appended(total, part, start)
    start += part.shape[axis]
  return dataclasses.replace(total, equations=total.equations | {given.equation})


def _has_kernel(affine: Affine) -> bool:
  return any(term.kernel is not None for term in affine.terms)


def _appended(total: Affine, part: Affine, start: int) -> Affine:
  """Returns a sum with the terms of a part that starts at a channel of the sum."""
  assert total.channel is not None
  features, length = part.shape[total.channel], total.shape[total.channel]
  terms = tuple(dataclasses.replace(term, start=term.start + start) for term in part.terms)
  bias = total.bias
  if part.bias is not None:
    bias = plus(bias, at_channels(part.bias, start, features, length))
  borders = tuple(
    dataclasses.replace(border, kernel=at_channels(border.kernel, start, features, length))
    for border in part.borders
  )
  return dataclasses.replace(
    total,
    terms=total.terms + terms,
    bias=bias,
    borders=total.borders + borders,
    equations=total.equations | part.equations,
  )


def cut(given: Given) -> Affine | None:
  """Applies the rule of a slice: fewer channels of a convolution, or fewer pixels."""
  node, params = given.node(), given.params
  if node is None or node.affine is None or not _has_kernel(node.affine):
    return cut_pixels(given)
  changed = [axis for axis, size in enumerate(given.shape) if size != node.shape[axis]]
  if changed != [node.affine.channel] or params["strides"] not in (None, (1,) * len(given.shape)):
    return cut_pixels(given)
  (axis,) = changed
  return _cut_channels(node.affine, params["start_indices"][axis], given)


def _cut_channels(affine: Affine, start: int, given: Given) -> Affine:
  """Returns a sum with a range of its channels."""
  assert affine.channel is not None
  stop = start + given.shape[affine.channel]
  if len(segments(affine)) > 1 or any(
    term.kernel is None or term.groups > 1 for term in affine.terms
  ):
    raise Refusal("a cut through channels of groups, of a source or of a concatenation")

  def part(value: Expression) -> Expression:
    return derived(_columns, value, start=start, stop=stop) if value.shape else value

  return dataclasses.replace(
    affine,
    shape=given.shape,
    terms=tuple(
      dataclasses.replace(term, kernel=part(term.kernel)) for term in affine.terms if term.kernel
    ),
    bias=affine.bias and part(affine.bias),
    borders=tuple(
      dataclasses.replace(border, kernel=part(border.kernel)) for border in affine.borders
    ),
    equations=affine.equations | {given.equation},
  )


def _columns(value: Any, start: int, stop: int) -> Any:
  return value[..., start:stop]


RULES: dict[str, Rule] = {"concatenate": concatenate, "slice": cut}
