"""Padding by reflection, and whatever else repeats and reorders pixels.

`jnp.pad(mode="reflect")` is a chain of slices, flips and concatenations. The chain only picks
pixels. A norm or a 1x1 convolution in front of the chain may as well come after the chain:

  reflect(norm(x))    becomes    norm(reflect(x))

The norm then merges into the next convolution, without a border. `with_picks` finds such chains
in a program, and `picked` moves them in front of what they follow.
"""

import dataclasses
import itertools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from repjax.fusion.counts import Counts
from repjax.fusion.expressions import Expression
from repjax.fusion.values import Affine, Node, Refusal, Term
from repjax.fusion.windows import Window
from repjax.program import Constant, Equation, Operand, Variable

Places = tuple[tuple[int, ...] | None, ...]
"""For each axis the places that are picked, None for all of them in order."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pick:
  """A chain of equations that picks pixels of one value, in place of its last equation.

  Attributes:
    places: which pixels are picked.
    inputs: the value.
    outputs: the result.
    equations: the chain.
    scope: the name stack.
  """

  places: Places
  inputs: tuple[Operand, ...]
  outputs: tuple[Variable, ...]
  equations: tuple[Equation, ...]
  scope: str
  primitive: str = "pick"
  source: Any = dataclasses.field(default_factory=lambda: types.SimpleNamespace(effects=()))


@dataclasses.dataclass(frozen=True)
class PickStep:
  """The instruction that picks pixels, as slices and flips that are joined."""

  places: Places
  stored: tuple[Expression, ...] = ()
  counts: Counts = dataclasses.field(default_factory=Counts)

  def run(self, x: Any) -> list[Any]:
    """Returns the picked pixels."""
    for axis, picked in enumerate(self.places):
      if picked is not None:
        runs = [_run(x, axis, *each) for each in _runs(picked)]
        x = runs[0] if len(runs) == 1 else jnp.concatenate(runs, axis)
    return [x]


def _runs(places: Sequence[int]) -> Iterator[tuple[int, int, int]]:
  """Yields first place, step and length of runs of neighbours, in either direction."""
  start = 0
  while start < len(places):
    steps = np.diff(places[start:])
    step = int(steps[0]) if len(steps) and abs(steps[0]) == 1 else 1
    length = 1 + sum(1 for _ in itertools.takewhile(lambda each, step=step: each == step, steps))
    yield places[start], step, length
    start += length


def _run(x: Any, axis: int, first: int, step: int, length: int) -> Any:
  if step > 0:
    return lax.slice_in_dim(x, first, first + length, axis=axis)
  return lax.rev(lax.slice_in_dim(x, first - length + 1, first + 1, axis=axis), (axis,))


def with_picks(equations: Sequence[Equation], outputs: Sequence[Operand]) -> list[Any]:
  """Returns equations with each chain that picks pixels as one `Pick`, in its last place."""
  found: dict[Variable, tuple[Operand, Places, tuple[Equation, ...]]] = {}
  for equation in equations:
    chain = _chain(equation, found)
    if chain is not None:
      found[equation.outputs[0]] = chain
  # A chain ends where something reads the result that picks no pixels itself.
  read = set(outputs)
  for equation in equations:
    if not equation.outputs or equation.outputs[0] not in found:
      read.update(equation.inputs)
  result: list[Any] = []
  for equation in equations:
    (output, *_) = equation.outputs or (None,)
    if equation.primitive == "concatenate" and output in found and output in read:
      base, places, chain = found[output]
      result.append(Pick(places, (base,), equation.outputs, chain, equation.scope))
    else:
      result.append(equation)
  return result


def _chain(equation: Equation, found: dict) -> tuple[Operand, Places, tuple[Equation, ...]] | None:
  """Returns the value that an equation picks pixels of, which ones, and the chain so far."""
  if equation.primitive not in ("slice", "rev", "concatenate") or not equation.inputs:
    return None
  whole = [(each, (None,) * len(each.aval.shape), ()) for each in equation.inputs]
  given = [
    found.get(each, own) if isinstance(each, Variable) else own
    for each, own in zip(equation.inputs, whole)
  ]
  base = given[0][0]
  if isinstance(base, Constant) or any(other is not base for other, *_ in given):
    return None
  shape = base.aval.shape
  places = [
    [range(size) if own is None else own for own, size in zip(each, shape)] for _, each, _ in given
  ]
  result = _places(equation, places)
  if result is None:
    return None
  steps = dict.fromkeys(step for *_, chain in given for step in chain)
  kept = tuple(None if own == tuple(range(size)) else own for own, size in zip(result, shape))
  return base, kept, (*steps, equation)


def _places(equation: Equation, given: list[list]) -> list[tuple[int, ...]] | None:
  """Returns the places that an equation picks, from those that its operands picked."""
  params, first = equation.params, given[0]
  if equation.primitive == "rev":
    gone = params["dimensions"]
    return [tuple(own)[:: -1 if axis in gone else 1] for axis, own in enumerate(first)]
  if equation.primitive == "slice":
    strides = params["strides"] or (1,) * len(first)
    limits = zip(params["start_indices"], params["limit_indices"], strides)
    return [tuple(own)[slice(*each)] for own, each in zip(first, limits)]
  axis = params["dimension"]
  same = all(
    tuple(own) == tuple(other)
    for each in given
    for place, (own, other) in enumerate(zip(first, each))
    if place != axis
  )
  if not same:
    return None
  joined = tuple(place for each in given for place in each[axis])
  return [joined if place == axis else tuple(own) for place, own in enumerate(first)]


def picked(affine: Affine, pick: Pick, sources: dict[Any, Node]) -> Affine:
  """Returns picked pixels of a sum as a sum over picked pixels of its sources.

  Args:
    affine: the sum.
    pick: which pixels of it.
    sources: the nodes of picked sources so far, which is added to.

  Raises:
    Refusal: a term is not pointwise, or the channels are picked.
  """
  moved = [axis for axis, own in enumerate(pick.places) if own is not None]
  if affine.channel in moved or affine.borders:
    raise Refusal("channels that are repeated, or a shift before padding")
  terms = tuple(_picked_term(term, pick, moved, sources) for term in affine.terms)
  shape = tuple(pick.outputs[0].aval.shape)
  return dataclasses.replace(affine, shape=shape, terms=terms)


def _picked_term(term: Term, pick: Pick, moved: list[int], sources: dict[Any, Node]) -> Term:
  places: list[tuple[int, ...] | None] = [None] * len(term.windows)
  windows = list(term.windows)
  for axis in moved:
    place, own = term.view[axis], pick.places[axis]
    assert own is not None
    if place is None or not windows[place].plain(term.source.shape[place]):
      raise Refusal("padding by reflection after a step that is not pointwise")
    places[place], windows[place] = own, Window(len(own))
  key = (term.source, tuple(places))
  if key not in sources:
    shape = tuple(size if own is None else len(own) for size, own in zip(term.source.shape, places))
    variable = Variable(jax.ShapeDtypeStruct(shape, term.source.dtype))
    sources[key] = Node(variable, pick=(term.source, PickStep(tuple(places))))
  return dataclasses.replace(term, source=sources[key], windows=tuple(windows))
