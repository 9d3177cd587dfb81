"""Decides what the sum that computes a value is made of.

The source of a term may be a sum itself. Each such source is put into the sum if that takes fewer
products, and no more multiplications and weights than `growth` allows. All terms of the sum are in
view, since a term may only be worth its place beside a larger one.
"""

import dataclasses
import math

from repjax.fusion.composition import composed
from repjax.fusion.contractions import Contraction
from repjax.fusion.cost import Cost, cost_of, grouped
from repjax.fusion.counts import PRODUCTS
from repjax.fusion.expressions import Expressions
from repjax.fusion.layouts import Layout
from repjax.fusion.report import Report
from repjax.fusion.values import Affine, Node, Refusal, Term, with_channel
from repjax.fusion.vectors import at_channels, plus
from repjax.fusion.windows import Window


def best_sum(node: Node, table: Expressions, growth: float, report: Report) -> Affine:
  """Returns the sum that computes a node with the fewest products."""
  assert node.affine is not None
  affine = _seen_through(node.affine, table)
  changed = True
  while changed:
    changed = False
    for inner in dict.fromkeys(term.source for term in affine.terms):
      if inner.affine is not None and not inner.computed:
        better = _composed(node, affine, inner, table, growth, report)
        if better is not None:
          affine, changed = better, True
          break
  return affine


def _composed(
  node: Node, affine: Affine, inner: Node, table: Expressions, growth: float, report: Report
) -> Affine | None:
  """Returns a sum with what an inner node is made of, None if that is no gain."""
  assert inner.affine is not None
  assert node.equation is not None
  mine = [term for term in affine.terms if term.source is inner]
  scope = node.equation.scope
  try:
    result = _seen_through(substituted(affine, inner, table), table)
  except Refusal as refusal:
    report.add_left(scope, " ".join(mine[0].names), str(refusal))
    return None
  now, then, own = (cost_of(grouped(each.terms, growth)) for each in (affine, result, inner.affine))
  # Pixels of the inner value for each pixel of the result.
  finer = max(math.prod(window.stride for window in term.windows) for term in mine)
  before = now.plus(own._replace(multiplications=own.multiplications * finer))
  fewer = then.products < before.products or not own.products
  if not fewer or then.products > before.products:
    return None
  if not then.within(before, growth):
    report.add_left(scope, " ".join(mine[0].names), _growth_reason(before, then))
    return None
  return result


def _seen_through(affine: Affine, table: Expressions) -> Affine:
  """Returns the same sum with the sources of views in place of the views."""
  for term in affine.terms:
    source = term.source
    if source.affine is not None and source.affine.is_view:
      try:
        return _seen_through(substituted(affine, source, table), table)
      except Refusal:
        continue
  return affine


def norm_reason(source: Node) -> str:
  """Returns why the scale and shift of a source stay."""
  if source.equation is None:
    return "follows an argument, and its result is read by more than products"
  made = source.equation.primitive
  if made in PRODUCTS and source.reads > 1:
    return f"follows a product that is read {source.reads} times"
  return f"follows {made}, and no product that it could merge with follows"


def substituted(affine: Affine, inner: Node, table: Expressions) -> Affine:
  """Returns a sum with what a node is made of in place of the node.

  Raises:
    Refusal: that is not exact at every size.
  """
  assert inner.affine is not None
  terms: list[Term] = []
  total = affine
  for term in affine.terms:
    if term.source is not inner:
      terms.append(term)
      continue
    part = _placed(composed(term, inner.affine, affine.shape, table), term, affine)
    terms += part.terms
    total = _joined(total, part)
  return _with_terms(total, tuple(terms))


def _placed(part: Affine, term: Term, affine: Affine) -> Affine:
  """Returns what a term became, with its shift and borders at the term's channels of a sum."""
  features = term.features
  if affine.channel is None or features is None:
    return part
  where = (term.start, features, affine.shape[affine.channel])
  borders = tuple(
    dataclasses.replace(border, kernel=at_channels(border.kernel, *where))
    for border in part.borders
  )
  return dataclasses.replace(
    part, bias=part.bias and at_channels(part.bias, *where), borders=borders
  )


def _joined(total: Affine, part: Affine) -> Affine:
  """Returns a sum with the shift, the borders and the equations of a part of it."""
  bias = total.bias if part.bias is None else plus(total.bias, part.bias)
  return Affine(
    total.shape,
    total.terms,
    bias,
    total.borders + part.borders,
    part.channel if total.channel is None else total.channel,
    total.equations | part.equations,
  )


def _with_terms(total: Affine, terms: tuple[Term, ...]) -> Affine:
  """Returns a sum with new terms, whose channels all lie along one axis of the value."""
  total = dataclasses.replace(total, terms=terms)
  channel = total.channel
  return (
    total if channel is None else with_channel(dataclasses.replace(total, channel=None), channel)
  )


def best_product(product: Contraction) -> Contraction:
  """Returns a product over several axes with the norm before it merged, if there is one."""
  source = product.layout.source
  inner = source.affine
  if inner is None or source.computed or not inner.linear or inner.channel is None:
    return product
  (term,) = inner.terms
  plain = all(map(Window.plain, term.windows, term.source.shape))
  moved = sorted(term.view, key=str) == sorted(range(len(term.windows)), key=str)
  # A shift in a wider dtype than the product's would be rounded differently.
  narrow = inner.bias is not None and product.dtype.itemsize < term.source.dtype.itemsize
  if not plain or not moved or inner.borders or narrow:
    return product
  merged = product.after(term.scale, inner.bias, inner.channel)
  if merged is None:
    return product
  origin = tuple(merged.layout.origin[term.view.index(axis)] for axis in range(len(term.view)))
  layout = Layout(term.source, origin, merged.layout.axes)
  return dataclasses.replace(merged, layout=layout).replacing(*inner.equations)


def is_norm(affine: Affine) -> bool:
  """Checks if a sum is one source with a scale and a shift of each channel."""
  scale = affine.terms[0].scale if affine.linear else None
  vectors = scale is not None and scale.shape and affine.bias is not None and affine.bias.shape
  return bool(vectors and scale is not None and scale.leaves)


def _growth_reason(before: Cost, then: Cost) -> str:
  more = then.multiplications / max(before.multiplications, 1)
  weights = then.parameters / max(before.parameters, 1)
  return f"{more:.2f} times the multiplications and {weights:.2f} times the parameters"
