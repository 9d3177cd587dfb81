"""What each primitive of a traced program becomes: one table, `OPERATORS`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from repjax.deploy.onnx import products, reductions
from repjax.deploy.onnx.graph import Graph, split
from repjax.deploy.onnx.values import (
  Axes,
  Value,
  aligned,
  broadcast,
  flat,
  new_axes,
  reshape,
  transpose,
)
from repjax.errors import InputError

Emitter = Callable[..., Any]
"""Called as emitter(graph, equation, *values); returns a Value, or several where there are."""


def elementwise(graph: Graph, op: str, *values: Value) -> Value:
  """An operator on numbers at the same places; values are repeated along axes of length 1."""
  values = unified(graph, values)
  moving = [value for value in values if not value.is_constant]
  if not moving:
    raise InputError(
      "this model computes with numbers that repeat for each image of the batch, for which the "
      "ONNX graph here has no operator; make them without the batch, and add them by broadcasting"
    )
  stored = _common_layout(moving)
  # Known numbers may be repeated here, but not for a batch of unknown size.
  batched = {a for axis in stored if any(not isinstance(a.size, int) for a in axis) for a in axis}
  stored = split(
    stored,
    lambda atom: [
      atom in flat(v.stored) for v in values if not v.is_constant or (v.tensor.size > 1 and atom in batched)
    ],
  )
  tensors = [_fitted(graph, value, stored) for value in values]
  return Value(graph.add(op, tensors), moving[0].axes, stored)


def unified(graph: Graph, values: Sequence[Value]) -> list[Value]:
  """Values of one rank, or scalars, with the same atoms on their axes."""
  rank = max(len(value.axes) for value in values)
  full = [
    value if len(value.axes) == rank else dataclasses.replace(value, axes=((),) * rank)
    for value in values
  ]
  places = [(axis,) * len(values) for axis in range(rank)]
  found = aligned(full, places) or aligned([graph.plain(value) for value in full], places)
  assert found is not None  # axes of one atom each, of one length
  return found


def _common_layout(values: Sequence[Value]) -> Axes:
  """How the result of several values is stored: as the first full one, maps channels first."""
  full = [value for value in values if value.is_full]
  if not full:
    return values[0].axes
  first = (0, 3, 1, 2) if len(full[0].axes) == 4 else range(len(full[0].axes))
  wanted = flat(full[0].axes[axis] for axis in first)
  return next((v.stored for v in full if flat(v.stored) == wanted), full[0].stored)


def _fitted(graph: Graph, value: Value, stored: Axes) -> str | np.ndarray:
  """The tensor of a value that is repeated where it has no atom of a stored axis."""
  have = set(flat(value.stored))
  value = graph.arrange(value, tuple(axis if set(axis) & have else () for axis in stored))
  if value.is_constant and not have:
    return value.tensor.reshape(())
  return value.tensor


def _unary(op: str) -> Emitter:
  return lambda graph, equation, x: graph.derived(op, x)


def _binary(op: str) -> Emitter:
  return lambda graph, equation, *values: elementwise(graph, op, *values)


def _dtype(equation: Any) -> np.dtype:
  return np.dtype(equation.outvars[0].aval.dtype)


def _shape(equation: Any) -> tuple[Any, ...]:
  return equation.outvars[0].aval.shape


def _scaled(graph: Graph, op: str, x: Value, number: float, equation: Any) -> Value:
  return graph.derived(op, x, np.array(number, _dtype(equation)))


def _add(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
  """Add, or the bias of the convolution or the matrix product in front of it."""
  if x.is_constant:
    x, y = y, x
  op = next((op for op in ("Conv", "Gemm") if graph.producer(x.tensor, op)), None)
  if op and y.is_constant and len(graph.nodes[str(x.tensor)].inputs) == 2 and x.is_full:
    rows, bias = unified(graph, (x, y))
    if rows.is_full and set(flat(bias.stored)) <= set(rows.stored[1]):
      node = graph.nodes[str(x.tensor)]
      vector = graph.arrange(bias, (rows.stored[1],)).tensor
      # Without the bias it is computed no more, unless something else reads it.
      tensor = graph.add(op, [*node.inputs, vector], **node.attributes)
      return dataclasses.replace(rows, tensor=tensor)
  return elementwise(graph, "Add", x, y)


def _div(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
  """Div, or the mean whose sum is divided, or the softmax whose exponentials are."""
  mean = graph.means.get(str(x.tensor)) if not x.is_constant else None
  if mean and y.is_constant and graph.scalar(y.tensor) == mean[1]:
    return dataclasses.replace(x, tensor=mean[0])
  return _softmax(graph, x, y) or elementwise(graph, "Div", x, y)


def _softmax(graph: Graph, x: Value, y: Value) -> Value | None:
  """exp(x - max) / sum(exp(x - max)) over one stored axis."""
  exp, sum_ = graph.producer(x.tensor, "Exp"), graph.producer(y.tensor, "ReduceSum")
  if exp is None or sum_ is None or sum_.inputs[0] != x.tensor:
    return None
  difference, axes = graph.producer(exp.inputs[0], "Sub"), graph.constants[sum_.inputs[1]].array
  greatest = difference and graph.producer(difference.inputs[1], "ReduceMax")
  if not greatest or greatest.inputs != difference.inputs[:1] or axes.size != 1:
    return None
  if greatest.attributes["axes"] != axes.tolist():
    return None
  return dataclasses.replace(
    x, tensor=graph.add("Softmax", greatest.inputs, axis=int(axes[0]))
  )


def _max(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
  """Max, or Relu; what it is of the least number is itself."""
  x, y = (y, x) if x.is_constant else (x, y)
  least = graph.scalar(y.tensor)
  if least == 0:
    return graph.derived("Relu", x)
  return x if least == -math.inf else elementwise(graph, "Max", x, y)


def _erfc(graph: Graph, equation: Any, x: Value) -> Value:
  """1 - Erf(x), as 1 + Erf(y) where x is -y times a number: the form of GELU that is fused."""
  times = graph.producer(x.tensor, "Mul")
  minus = times and graph.producer(times.inputs[0], "Neg")
  one = np.array(1, _dtype(equation))
  if times and minus and graph.scalar(times.inputs[1]) is not None:
    x = dataclasses.replace(x, tensor=graph.add("Mul", [minus.inputs[0], times.inputs[1]]))
    return graph.derived("Add", graph.derived("Erf", x), one)
  tensor = graph.add("Sub", [one, graph.derived("Erf", x).tensor])
  return dataclasses.replace(x, tensor=tensor)


def _power(graph: Graph, equation: Any, x: Value) -> Value:
  exponent = equation.params.get("y", 2)  # a square has none
  if exponent == 2:
    return graph.derived("Mul", x, x.tensor)
  return _scaled(graph, "Pow", x, exponent, equation)


def _rsqrt(graph: Graph, equation: Any, x: Value) -> Value:
  return graph.derived("Reciprocal", graph.derived("Sqrt", x))


def _clamp(graph: Graph, equation: Any, low: Value, x: Value, high: Value) -> Value:
  return elementwise(graph, "Min", elementwise(graph, "Max", x, low), high)


def _select(graph: Graph, equation: Any, which: Value, *cases: Value) -> Value:
  if len(cases) != 2 or np.dtype(equation.invars[0].aval.dtype) != np.bool_:
    raise InputError("a select_n among more than two has no place in the ONNX graph here")
  return elementwise(graph, "Where", which, cases[1], cases[0])


def _not_equal(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
  return graph.derived("Not", elementwise(graph, "Equal", x, y))


def _cast(graph: Graph, equation: Any, x: Value) -> Value:
  """Cast to ONNX's number of a dtype; nothing where it is the same."""
  dtype = _dtype(equation)
  return x if dtype == equation.invars[0].aval.dtype else graph.derived("Cast", x, to=dtype.name)


def _reshape(graph: Graph, equation: Any, x: Value) -> Value:
  """Nothing, where axes are only split and joined."""
  shape = _shape(equation)
  seen = reshape(x, shape)
  if seen is None:
    axes = new_axes(shape)
    seen = graph.reshaped(graph.arrange(x, x.axes), axes)
  return seen


def _transpose(graph: Graph, equation: Any, x: Value) -> Value:
  return transpose(x, equation.params["permutation"])


def _broadcast(graph: Graph, equation: Any, x: Value) -> Value:
  return broadcast(x, equation.params["shape"], equation.params["broadcast_dimensions"])


def _stack(graph: Graph, equation: Any, *values: Value) -> Value:
  axis = equation.params["axis"]
  axes = [(*v.axes[:axis], (), *v.axes[axis:]) for v in values]
  wider = [dataclasses.replace(v, axes=own) for v, own in zip(values, axes)]
  return _joined(graph, axis, _shape(equation), wider)


def _concatenate(graph: Graph, equation: Any, *values: Value) -> Value:
  return _joined(graph, equation.params["dimension"], _shape(equation), values)


def _joined(graph: Graph, axis: int, shape: Sequence[Any], values: Sequence[Value]) -> Value:
  """Values one behind the other along an axis."""
  rank = len(values[0].axes)
  places = [(place,) * len(values) for place in range(rank) if place != axis]
  parts = aligned(values, places) or aligned([graph.plain(v) for v in values], places)
  assert parts is not None
  first = next((v for v in parts if not v.is_constant and v.is_full), parts[0])
  first, (place,) = graph.isolated(first, [axis])
  stored = first.stored
  tensors = [
    graph.arrange(v, (*stored[:place], v.axes[axis], *stored[place + 1 :])).tensor for v in parts
  ]
  joined = new_axes([shape[axis]])[0]
  axes = (*first.axes[:axis], joined, *first.axes[axis + 1 :])
  tensor = graph.add("Concat", tensors, axis=place)
  return Value(tensor, axes, (*stored[:place], joined, *stored[place + 1 :]))


def _resized(x: Value, tensor: str, axes: Sequence[int], places: Sequence[int], shape: Any) -> Value:
  """A value of which some axes, which are stored alone, have other lengths now."""
  fresh = new_axes(shape[axis] for axis in axes)
  logical, stored = list(x.axes), list(x.stored)
  for axis, place, new in zip(axes, places, fresh):
    logical[axis] = stored[place] = new
  return Value(tensor, tuple(logical), tuple(stored))


def _cut(
  graph: Graph, x: Value, starts: Any, ends: Any, steps: Any, shape: tuple[Any, ...]
) -> Value:
  axes = [axis for axis, size in enumerate(shape) if size != x.shape[axis]]
  if not axes:
    return x
  x, places = graph.isolated(x, axes)
  rows = ([row[axis] for axis in axes] for row in (starts, ends))
  numbers = [*rows, places, [steps[axis] for axis in axes]]
  tensor = graph.add("Slice", [x.tensor, *(np.array(row, np.int64) for row in numbers)])
  return _resized(x, tensor, axes, places, shape)


def _slice(graph: Graph, equation: Any, x: Value) -> Value:
  params = equation.params
  steps = params["strides"] or (1,) * len(x.axes)
  return _cut(graph, x, params["start_indices"], params["limit_indices"], steps, _shape(equation))


def _split(graph: Graph, equation: Any, x: Value) -> list[Value]:
  axis, start, parts = equation.params["axis"], 0, []
  for size, variable in zip(equation.params["sizes"], equation.outvars):
    starts, ends = {axis: start}, {axis: start + size}
    shape = variable.aval.shape
    parts.append(_cut(graph, x, starts, ends, {axis: 1}, shape) if size != x.shape[axis] else x)
    start += size
  return parts


def _pad(graph: Graph, equation: Any, x: Value, value: Value) -> Value:
  sides = equation.params["padding_config"]
  if any(between for _, _, between in sides) or not value.is_constant:
    raise InputError("padding between numbers has no place in the ONNX graph here")
  axes = [axis for axis, side in enumerate(sides) if side != (0, 0, 0)]
  if not axes:
    return x
  x, places = graph.isolated(x, axes)
  pads = np.zeros((2, len(x.stored)), np.int64)
  for axis, place in zip(axes, places):
    pads[:, place] = sides[axis][:2]
  tensor = graph.add("Pad", [x.tensor, pads.ravel(), value.tensor.reshape(())])
  return _resized(x, tensor, axes, places, _shape(equation))


OPERATORS: dict[str, Emitter] = {
  "add": _add,
  "broadcast_in_dim": _broadcast,
  "clamp": _clamp,
  "concatenate": _concatenate,
  "conv_general_dilated": lambda graph, equation, x, kernel: products.convolution(
    graph, x, kernel, equation.params, _shape(equation)
  ),
  "convert_element_type": _cast,
  "copy": lambda graph, equation, x: x,
  "copy_p": lambda graph, equation, x: x,
  "div": _div,
  "dot_general": lambda graph, equation, x, y: products.product(
    graph, x, y, equation.params["dimension_numbers"]
  ),
  "erfc": _erfc,
  "expand_dims": _reshape,
  "integer_pow": _power,
  "max": _max,
  "ne": _not_equal,
  "pad": _pad,
  "reduce_sum": lambda graph, equation, x: reductions.total(
    graph, x, equation.params["axes"], _dtype(equation)
  ),
  "reduce_window_max": lambda graph, equation, x: reductions.window(
    graph, x, equation.params, _shape(equation)
  ),
  "reduce_window_sum": lambda graph, equation, x: reductions.window(
    graph, x, equation.params, _shape(equation), _dtype(equation)
  ),
  "reshape": _reshape,
  "rsqrt": _rsqrt,
  "select_n": _select,
  "slice": _slice,
  "split": _split,
  "square": _power,
  "squeeze": _reshape,
  "stack": _stack,
  "stop_gradient": lambda graph, equation, x: x,
  "transpose": _transpose,
}
"""Primitive to emitter."""

OPERATORS |= {
  name: _unary(op)
  for name, op in {
    "abs": "Abs",
    "ceil": "Ceil",
    "cos": "Cos",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "log": "Log",
    "logistic": "Sigmoid",
    "neg": "Neg",
    "not": "Not",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "tan": "Tan",
    "tanh": "Tanh",
  }.items()
}
OPERATORS |= {
  name: _binary(op)
  for name, op in {
    "and": "And",
    "eq": "Equal",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "lt": "Less",
    "min": "Min",
    "mul": "Mul",
    "or": "Or",
    "pow": "Pow",
    "sub": "Sub",
  }.items()
}
OPERATORS |= {
  name: functools.partial(
    lambda op, graph, equation, x: reductions.extreme(graph, op, x, equation.params["axes"]), op
  )
  for name, op in {
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
  }.items()
}

VIEWS = ("broadcast_in_dim", "copy", "expand_dims", "reshape", "squeeze", "transpose")
"""Primitives that move no numbers here, known ones neither."""
