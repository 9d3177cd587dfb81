"""Decides what the sum that computes a value is made of, and which terms become one product.

The source of a term may be a sum itself. Each such source is put into the sum if that takes fewer
products, and no more multiplications and weights than `growth` allows. All terms of the sum are in
view, since a term may only be worth its place beside a larger one.

Costs are counted for each pixel of the result, so that no decision depends on the size of the
input.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from repjax.fusion import kernels
from repjax.fusion.composition import substituted
from repjax.fusion.expressions import Expression
from repjax.fusion.kernels import plus
from repjax.fusion.report import PRODUCTS, Counts, Report, total
from repjax.fusion.values import Affine, Node, Refusal, Term
from repjax.fusion.windows import Window
from repjax.program import operation_name


@dataclasses.dataclass(frozen=True)
class Group:
  """Terms that become one product.

  Attributes:
    members: terms that read one source in the same layout.
    windows: for each axis of the source the window that holds the windows of all members.
    groups: number of groups of the product, 0 if no member has a kernel.
  """

  members: tuple[Term, ...]
  windows: tuple[Window, ...]
  groups: int

  @property
  def head(self) -> Term:
    """The first member with a kernel, or else the first member."""
    return next((term for term in self.members if term.kernel is not None), self.members[0])

  @property
  def settings(self) -> tuple[Any, ...]:
    """Precision and preferred dtype of the product. A pool that became a kernel has none."""
    return next((term.settings for term in self.members if term.settings), (None, None))

  @property
  def is_product(self) -> bool:
    """Tells if the group is a convolution or a matrix product."""
    return self.head.kernel is not None

  @property
  def cost(self) -> Counts:
    """The cost of the group for each pixel. A sum over neighbours counts its additions."""
    head = self.head
    taps = math.prod(self.windows[axis].taps for axis in head.others)
    if head.kernel is None:
      return Counts(0, taps * (head.features or 1) if taps > 1 else 0, 0)
    weights = taps * head.kernel.shape[-1] * head.kernel.shape[-2] * head.groups // self.groups
    spread = math.prod(window.spread for window in self.windows)
    return Counts(1, weights / spread, weights)

  @property
  def kernel(self) -> Expression:
    """The sum of the kernels of all terms of a product, each in its place."""
    total = None
    for term in self.members:
      windows = [(term.windows[axis], self.windows[axis]) for axis in term.others]
      total = plus(total, kernels.embedded(term.kernel_in(self.groups), windows))
    assert total is not None
    return total


def alone(term: Term) -> Group:
  """Returns the group of a single term."""
  return Group((term,), term.windows, term.groups if term.kernel is not None else 0)


def joined(group: Group, term: Term) -> Group | None:
  """Returns a group with one more term, None if the term cannot join."""
  head = group.head
  same = (term.source, term.view, term.start) == (head.source, head.view, head.start)
  if not same or (term.channel, term.features) != (head.channel, head.features):
    return None
  members = (*group.members, term)
  products = [member for member in members if member.kernel is not None]
  if not products:
    plain = term.windows == head.windows and not term.sums
    return Group(members, term.windows, 0) if plain else None
  if not _same_arithmetic(members, products):
    return None
  windows = [one.union(two) for one, two in zip(group.windows, term.windows)]
  if None in windows:
    return None
  own = term.groups if term.kernel is not None else 0
  return Group(members, tuple(filter(None, windows)), math.gcd(group.groups, own))


def _same_arithmetic(members: Iterable[Term], products: list[Term]) -> bool:
  """Checks that one product computes all members no less exactly than they are computed now."""
  dtypes = {product.dtype for product in products}
  settings = {product.settings for product in products if product.settings}
  widest = max(member.dtype.itemsize for member in members)
  # An identity in float32 beside a convolution in bfloat16 would be rounded.
  return len(dtypes) == 1 and len(settings) <= 1 and widest <= products[0].dtype.itemsize


def grouped(terms: Iterable[Term], growth: float) -> list[Group]:
  """Returns the terms as products: each term joins a group if that costs no more."""
  groups: list[Group] = []
  singles = [alone(term) for term in terms]
  for one in sorted(singles, key=lambda group: (-group.cost.products, -group.cost.multiplications)):
    for place, group in enumerate(groups):
      joint = joined(group, one.members[0])
      if joint and joint.cost.within(total([group.cost, one.cost]), growth):
        groups[place] = joint
        break
    else:
      groups.append(one)
  return groups


def _cost(affine: Affine, growth: float) -> Counts:
  """Returns what the products of a sum cost for each pixel."""
  return total(group.cost for group in grouped(affine.terms, growth))


def best_sum(
  node: Node,
  growth: float,
  report: Report,
  names_of: Callable[[Iterable[int]], tuple[str, ...]],
) -> tuple[Affine, list[Group]]:
  """Returns the sum that computes a node with the fewest products, and its products.

  Args:
    node: to be computed.
    growth: as in `fuse`.
    report: takes notes of what the sum leaves alone.
    names_of: gives the names of the parameters at some positions.
  """
  assert node.affine is not None
  scope = node.equation.scope
  affine = _seen_through(node.affine)
  changed = True
  while changed:
    changed = False
    for inner in dict.fromkeys(term.source for term in affine.terms):
      better = _composed(affine, inner, growth, report, scope) if inner.is_open else None
      if better is not None:
        affine, changed = better, True
        break
  groups = grouped(affine.terms, growth)
  for reason in _reasons_apart(groups):
    report.add_left(scope, " ".join(groups[0].head.names), reason)
  if _is_norm(affine):
    reason = _norm_reason(affine.terms[0].source)
    kept = [each for each in (affine.terms[0].scale, affine.bias) if each is not None]
    names = names_of(frozenset().union(*(each.leaves for each in kept)))
    report.add_left(scope, "scale and shift", reason, norm=True, names=names)
  return affine, groups


def _composed(
  affine: Affine, inner: Node, growth: float, report: Report, scope: str
) -> Affine | None:
  """Returns a sum with what an inner node is made of, None if that is no gain."""
  assert inner.affine is not None
  mine = [term for term in affine.terms if term.source is inner]
  try:
    result = _seen_through(substituted(affine, inner))
  except Refusal as refusal:
    report.add_left(scope, " ".join(mine[0].names), str(refusal))
    return None
  now, then, own = (_cost(each, growth) for each in (affine, result, inner.affine))
  # Pixels of the inner value for each pixel of the result.
  finer = max(math.prod(window.stride for window in term.windows) for term in mine)
  before = total([now, own.times(finer)])
  fewer = then.products < before.products or not own.products
  if not fewer or then.products > before.products:
    return None
  if not then.within(before, growth):
    more = then.multiplications / max(before.multiplications, 1)
    weights = then.parameters / max(before.parameters, 1)
    reason = f"{more:.2f} times the multiplications and {weights:.2f} times the parameters"
    report.add_left(scope, " ".join(mine[0].names), reason)
    return None
  return result


def _seen_through(affine: Affine) -> Affine:
  """Returns the same sum with the sources of views in place of the views."""
  for term in affine.terms:
    source = term.source
    if source.affine is not None and source.affine.is_view:
      try:
        return _seen_through(substituted(affine, source))
      except Refusal:
        continue
  return affine


def _reasons_apart(groups: list[Group]) -> list[str]:
  """Returns why terms of one source stay apart, if dtypes are the reason."""
  reasons = []
  for place, one in enumerate(groups):
    for two in groups[place + 1 :]:
      terms, kinds = (one.head, two.head), {term.dtype for term in (one.head, two.head)}
      same = terms[0].source is terms[1].source and terms[0].view == terms[1].view
      if same and len(kinds) > 1 and (one.is_product or two.is_product):
        reasons.append(f"branches in {' and '.join(sorted(map(str, kinds)))} would be rounded")
  return reasons


def _is_norm(affine: Affine) -> bool:
  """Checks if a sum is one source with a scale and a shift of each channel."""
  scale = affine.terms[0].scale if affine.linear else None
  vectors = scale is not None and scale.shape and affine.bias is not None and affine.bias.shape
  return bool(vectors and scale is not None and scale.leaves)


def _norm_reason(source: Node) -> str:
  """Returns why the scale and shift of a source stay."""
  if source.equation is None:
    return "follows an argument, and its result is read by more than products"
  if source.equation.primitive in PRODUCTS and source.reads > 1:
    return f"follows a product that is read {source.reads} times"
  return (
    f"follows {operation_name(source.equation)}, and no product that it could merge with follows"
  )
