"""Rules for equations that pad, cut, sum, repeat or average pixels, and leave channels alone.

Zero padding, slices and sums of neighbours are windows of a term. Two more operations are found in
several equations at once: `jnp.pad(mode="reflect")` picks pixels, by slices, flips and a
concatenation; a mean over whole axes is a sum and a division. Both may change places with a norm,
and with anything else that works on each pixel alone:

  reflect(norm(x))    becomes    norm(reflect(x))
  mean(norm(x))       becomes    norm(mean(x))

The norm then merges into what follows, without a border and at every size.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from repjax.algebra import wide_dtype
from repjax.fusion.arithmetic import Given, Rule, concatenate, cut_channels
from repjax.fusion.expressions import Expression
from repjax.fusion.layouts import Layout, sizes
from repjax.fusion.report import Counts
from repjax.fusion.values import Affine, Node, Refusal, Term, affine_of, hidden
from repjax.fusion.windows import Window
from repjax.program import Constant, Equation, Operand


def windowed(given: Given, windows: Sequence[Window], name: str = "identity") -> Affine | None:
  """Returns the sum whose only term reads the operand through windows."""
  node = given.node()
  if node is None:
    return None
  term = Term(node, tuple(range(len(windows))), tuple(windows), None, node.dtype, names=(name,))
  return Affine(given.shape, (term,)).replacing(given.equation)


def pad(given: Given) -> Affine | None:
  """Applies the rule of padding with zeros, without zeros between the inputs."""
  node, fill = given.operands
  config = given.params["padding_config"]
  zero = isinstance(fill, Expression) and fill.known and not np.any(np.asarray(fill.value))
  if not isinstance(node, Node) or not zero or any(between for *_, between in config):
    return None
  sides = zip(node.shape, config)
  return windowed(given, [Window(size + low + high, low=low) for size, (low, high, _) in sides])


def cut(given: Given) -> Affine | None:
  """Applies the rule of a slice: fewer channels of a convolution, or fewer pixels."""
  params = given.params
  strides = params["strides"] or (1,) * len(given.shape)
  sides = zip(given.shape, strides, params["start_indices"])
  windows = [Window(size, stride=stride, low=-start) for size, stride, start in sides]
  return cut_channels(given) or windowed(given, windows)


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
  return Affine(given.shape, (term,)).replacing(given.equation)


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


@dataclasses.dataclass(frozen=True)
class Pick:
  """An operation that picks places along axes, in any order.

  Attributes:
    places: for each axis the places that are picked, None for all of them in order.
  """

  places: tuple[tuple[int, ...] | None, ...]
  counts = Counts()
  dropped = ()

  @property
  def axes(self) -> tuple[int, ...]:
    """The axes along which places are picked."""
    return tuple(axis for axis, own in enumerate(self.places) if own is not None)

  def sized(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the result."""
    return tuple(size if own is None else len(own) for size, own in zip(shape, self.places))

  def seen(self, view: Sequence[int | None], rank: int) -> "Pick":
    """Returns the operation on a source, from the view of the source and its number of axes."""
    found = {view[axis]: self.places[axis] for axis in self.axes}
    return Pick(tuple(found.get(axis) for axis in range(rank)))

  def run(self, x: Any) -> list[Any]:
    """Returns the picked places, as slices and flips that are joined."""
    for axis in self.axes:
      runs = [_run(x, axis, *each) for each in _runs(self.places[axis] or ())]
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


@dataclasses.dataclass(frozen=True)
class Mean:
  """An operation that takes the mean over axes, which keep length 1.

  Attributes:
    axes: the axes.
    dropped: those of them that the program drops.
  """

  axes: tuple[int, ...]
  dropped: tuple[int, ...] = ()
  counts = Counts()

  def sized(self, shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the result."""
    return tuple(1 if axis in self.axes else size for axis, size in enumerate(shape))

  def seen(self, view: Sequence[int | None], rank: int) -> "Mean":
    """Returns the operation on a source, from the view of the source and its number of axes."""
    return Mean(tuple(sorted(axis for axis in range(rank) if axis in [view[a] for a in self.axes])))

  def run(self, x: Any) -> list[Any]:
    """Returns the means, in float32 or wider."""
    return [x.astype(wide_dtype(x.dtype)).mean(self.axes, keepdims=True)]


@dataclasses.dataclass(frozen=True, eq=False)
class Several:
  """Several equations of the program that do one thing to the pixels of one value.

  Stands in the program in place of the last of them.

  Attributes:
    operation: what they do.
    inputs: the value.
    equations: the equations in order.
  """

  operation: Pick | Mean
  inputs: tuple[Operand, ...]
  equations: tuple[Equation, ...]

  def __getattr__(self, name: str) -> Any:
    """Returns outputs, scope and the like of the last equation."""
    return getattr(self.equations[-1], name)

  @property
  def primitive(self) -> str:
    """The name of the operation."""
    return "mean" if isinstance(self.operation, Mean) else "pick"


def with_operations(equations: Sequence[Equation], outputs: Sequence[Operand]) -> list[Any]:
  """Returns the equations, with one in place of the last equation of each pick and each mean.

  The other equations of a pick or mean stay in the list, where nothing may read them any more.
  """
  made = {each: equation for equation in equations for each in equation.outputs}
  reads = Counter([*(each for equation in equations for each in equation.inputs), *outputs])
  kinds = {"concatenate": _pick, "div": _mean, "mul": _mean}
  return [
    kinds[each.primitive](each, made, reads) or each if each.primitive in kinds else each
    for each in equations
  ]


def _mean(equation: Equation, made: Mapping[Any, Equation], reads: Counter) -> Several | None:
  """Returns a mean over whole axes that ends with an equation, None if there is none."""
  value, number = equation.inputs
  if isinstance(value, Constant) and equation.primitive == "mul":
    value, number = number, value
  chain = [equation]
  while value in made and reads[value] == 1:
    chain.insert(0, made[value])
    (value, *_) = chain[0].inputs
    mean = _whole_sum(chain[0])
    if mean is not None:
      break
    if chain[0].primitive not in ("broadcast_in_dim", "convert_element_type", "reshape"):
      return None
  else:
    return None
  shape, result = mean.sized(value.aval.shape), tuple(equation.outputs[0].aval.shape)
  mean = dataclasses.replace(mean, dropped=() if result == shape else mean.axes)
  kept = tuple(size for axis, size in enumerate(shape) if axis not in mean.dropped)
  floating = jnp.issubdtype(equation.outputs[0].aval.dtype, jnp.floating)
  if kept != result or not floating or not isinstance(number, Constant) or np.ndim(number.array):
    return None
  if isinstance(number.array, Tracer):
    return None  # the function closes over the number of something that JAX traces
  count = math.prod(value.aval.shape[axis] for axis in mean.axes)
  factor = float(number.array)
  rounding = 4 * float(jnp.finfo(equation.outputs[0].aval.dtype).eps)
  divides = equation.primitive == "div" and factor == count
  same = divides or (equation.primitive == "mul" and abs(factor * count - 1) <= rounding)
  return Several(mean, (value,), tuple(chain)) if same else None


def _whole_sum(equation: Equation) -> Mean | None:
  """Returns the mean over the axes that an equation sums as a whole, None if there are none."""
  params = equation.params
  if equation.primitive == "reduce_sum":
    return Mean(tuple(params["axes"]))
  if equation.primitive != "reduce_window_sum":
    return None
  sizes_of = params["window_dimensions"]
  axes = tuple(axis for axis, size in enumerate(sizes_of) if size > 1)
  whole = all(sizes_of[axis] == equation.inputs[0].aval.shape[axis] for axis in axes)
  return Mean(axes) if axes and whole and not any(map(any, params["padding"])) else None


def _pick(equation: Equation, made: Mapping[Any, Equation], reads: Counter) -> Several | None:
  """Returns a concatenation of parts of one value along an axis, None if it is none."""
  axis = equation.params["dimension"]
  lines = [list(_line(each, axis, made)) for each in equation.inputs]
  common = [each for each in lines[0] if all(each in line for line in lines)]
  if not common or isinstance(common[0], Constant):
    return None
  base = common[0]
  places: list[int] = []
  chain: dict[Equation, None] = {}
  for line in lines:
    part = list(range(base.aval.shape[axis]))
    for each in reversed(line[: line.index(base)]):
      part = _picked_places(made[each], axis, part)
      chain[made[each]] = None
    places += part
  kept = [None] * len(base.aval.shape)
  pick = Pick((*kept[:axis], tuple(places), *kept[axis + 1 :]))
  return Several(pick, (base,), (*chain, equation))


def _line(operand: Operand, axis: int, made: Mapping[Any, Equation]) -> Iterator[Operand]:
  """Yields an operand and all values that it is a part of, along one axis."""
  while True:
    yield operand
    equation = made.get(operand)  # type: ignore[arg-type]
    if equation is None or equation.primitive not in ("slice", "rev"):
      return
    (source,), result = equation.inputs, equation.outputs[0]
    sides = enumerate(zip(source.aval.shape, result.aval.shape))
    other = any(old != new for place, (old, new) in sides if place != axis)
    if other or (equation.primitive == "rev" and equation.params["dimensions"] != (axis,)):
      return
    operand = source


def _picked_places(equation: Equation, axis: int, places: list[int]) -> list[int]:
  params = equation.params
  if equation.primitive == "rev":
    return places[::-1]
  stride = params["strides"][axis] if params["strides"] else 1
  return places[params["start_indices"][axis] : params["limit_indices"][axis] : stride]


def commute(given: Given) -> Affine | None:
  """Applies the rule of a pick or a mean of a sum of pointwise terms: the same of its sources."""
  node, operation = given.node(), given.equation.operation
  if node is None:
    return None
  if isinstance(operation, Mean) and (pool := _pool(given)) is not None:
    return pool
  affine = affine_of(node)
  if isinstance(operation, Mean) and (affine.is_view or affine.has_kernel):
    return None  # there is no norm, or the norm merges into the product before the mean
  if affine.channel in operation.axes or affine.borders:
    raise Refusal(f"a {given.equation.primitive} over channels, or after a shift before padding")
  terms = tuple(_commuted(term, given, operation) for term in affine.terms)
  kept = [axis for axis in range(len(node.shape)) if axis not in operation.dropped]
  channel = None if affine.channel is None else kept.index(affine.channel)
  return dataclasses.replace(affine, shape=given.shape, terms=terms, channel=channel)


def _pool(given: Given) -> Affine | None:
  """Returns a mean over blocks of neighbours as an average pool, None if it is none.

  The number of pixels must not depend on the size of the input, as that of a whole axis does.
  """
  total, *_, last = given.equation.equations
  if total.primitive != "reduce_sum" or not given.equation.operation.dropped:
    return None
  sums = sum_blocks(dataclasses.replace(given, equation=total))
  if sums is None:
    return None
  (term,) = sums.terms
  blocks = [window.taps for window in term.windows if window.taps > 1]
  if any(map(lambda window, size: 1 < window.taps >= size, term.windows, term.source.shape)):
    return None
  count = np.asarray(1 / math.prod(blocks), wide_dtype(term.dtype))
  return sums.scaled(given.table.constant(count)).replacing(last)


def _commuted(term: Term, given: Given, operation: Pick | Mean) -> Term:
  """Returns a pointwise term over picked or averaged pixels of its source."""
  source, windows = term.source, list(term.windows)
  for axis in operation.axes:
    place = term.view[axis]
    if place is None or not windows[place].plain(source.shape[place]):
      raise Refusal(f"a {given.equation.primitive} after a step that is not pointwise")
  step = operation.seen(term.view, len(windows))
  if (source, step) not in given.moved:
    dtype = wide_dtype(source.dtype) if isinstance(step, Mean) else source.dtype
    moved = hidden(source, step.sized(source.shape), dtype, step=(source, step))
    given.moved[source, step] = moved
  moved = given.moved[source, step]
  for axis in step.axes:
    windows[axis] = Window(moved.shape[axis])
  view = tuple(each for axis, each in enumerate(term.view) if axis not in operation.dropped)
  return dataclasses.replace(term, source=moved, windows=tuple(windows), view=view)


RULES: dict[str, Rule] = {
  "concatenate": concatenate,
  "mean": commute,
  "pad": pad,
  "pick": commute,
  "reduce_window_sum": sum_windows,
  "reduce_sum": sum_blocks,
  "slice": cut,
}
