"""What each primitive of a traced program becomes: one table, `OPERATORS`."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx import products, reductions, shapes
from repjax.onnx.elementwise import elementwise, unified
from repjax.onnx.graph import Graph
from repjax.onnx.values import Value, flat

Emitter = Callable[..., Any]
"""Called as emitter(graph, equation, *values); returns a Value, or several where there are."""


def _unary(op: str) -> Emitter:
  return lambda graph, equation, x: graph.derived(op, x)


def _binary(op: str) -> Emitter:
  return lambda graph, equation, *values: elementwise(graph, op, *values)


def _dtype(equation: Any) -> np.dtype:
  return np.dtype(equation.outputs[0].aval.dtype)


def _number(graph: Graph, equation: Any, x: Value, y: Value) -> float | None:
  """The one number that y holds, where the result is of x's shape."""
  return graph.scalar(y.tensor) if x.shape == shapes.shape_of(equation) else None


def _scaled(graph: Graph, op: str, x: Value, number: float, equation: Any) -> Value:
  return graph.derived(op, x, np.array(number, _dtype(equation)))


def _add(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
  """Add, or the bias of the convolution or the matrix product in front of it."""
  if x.is_constant:
    x, y = y, x
  node = graph.producer(x.tensor, "Conv") or graph.producer(x.tensor, "Gemm")
  if node and y.is_constant and len(node.inputs) == 2:
    rows, bias = unified(graph, (x, y))
    if rows.is_full and set(flat(bias.stored)) <= set(rows.stored[1]):
      vector = graph.arrange(bias, (rows.stored[1],)).tensor
      # The node without the bias is computed no more, unless something else reads it.
      tensor = graph.add(node.op, [*node.inputs, vector], **node.attributes)
      return dataclasses.replace(rows, tensor=tensor)
  return elementwise(graph, "Add", x, y)


def _div(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
  """Div, or the mean whose sum is divided, or the softmax whose exponentials are."""
  mean = graph.means.get(x.tensor) if isinstance(x.tensor, str) else None
  divisor = _number(graph, equation, x, y)
  if divisor == 1:
    return x
  if mean and divisor == mean[1]:
    return dataclasses.replace(x, tensor=mean[0])
  return _softmax(graph, x, y) or elementwise(graph, "Div", x, y)


def _softmax(graph: Graph, x: Value, y: Value) -> Value | None:
  """exp(x - max) / sum(exp(x - max)) over one stored axis."""
  exp, sum_ = graph.producer(x.tensor, "Exp"), graph.producer(y.tensor, "ReduceSum")
  difference = graph.producer(exp.inputs[0], "Sub") if exp else None
  greatest = graph.producer(difference.inputs[1], "ReduceMax") if difference else None
  if difference is None or greatest is None or sum_ is None or sum_.inputs[0] != x.tensor:
    return None
  axes = graph.constants[sum_.inputs[1]].array.tolist()
  same = greatest.inputs == difference.inputs[:1] and greatest.attributes["axes"] == axes
  if not same or len(axes) > 1:
    return None
  return dataclasses.replace(x, tensor=graph.add("Softmax", greatest.inputs, axis=axes[0]))


def _max(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
  """Max, or Relu; what it is of the least number is itself."""
  x, y = (y, x) if x.is_constant else (x, y)
  least = _number(graph, equation, x, y)
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
  if len(cases) != 2 or np.dtype(equation.inputs[0].aval.dtype) != np.bool_:
    raise InputError("a select_n among more than two has no place in the ONNX graph here")
  return elementwise(graph, "Where", which, cases[1], cases[0])


def _not_equal(graph: Graph, equation: Any, x: Value, y: Value) -> Value:
  return graph.derived("Not", elementwise(graph, "Equal", x, y))


def _cast(graph: Graph, equation: Any, x: Value) -> Value:
  """Cast to ONNX's number of a dtype; nothing where it is the same."""
  dtype = _dtype(equation)
  return x if dtype == equation.inputs[0].aval.dtype else graph.derived("Cast", x, to=dtype.name)


OPERATORS: dict[str, Emitter] = {
  "add": _add,
  "broadcast_in_dim": shapes.broadcast,
  "clamp": _clamp,
  "concatenate": shapes.concatenate,
  "conv_general_dilated": lambda graph, equation, x, kernel: products.convolution(
    graph, x, kernel, equation.params, shapes.shape_of(equation)
  ),
  "convert_element_type": _cast,
  "copy": lambda graph, equation, x: x,
  "copy_p": lambda graph, equation, x: x,
  "div": _div,
  "dot_general": lambda graph, equation, x, y: products.product(
    graph, x, y, equation.params["dimension_numbers"]
  ),
  "erfc": _erfc,
  "expand_dims": shapes.reshape,
  "gather": shapes.gather,
  "integer_pow": _power,
  "max": _max,
  "ne": _not_equal,
  "pad": shapes.pad,
  "reduce_sum": lambda graph, equation, x: reductions.total(
    graph, x, equation.params["axes"], _dtype(equation)
  ),
  "reduce_window_max": lambda graph, equation, x: reductions.window(
    graph, x, equation.params, shapes.shape_of(equation)
  ),
  "reduce_window_sum": lambda graph, equation, x: reductions.window(
    graph, x, equation.params, shapes.shape_of(equation), _dtype(equation)
  ),
  "reshape": shapes.reshape,
  "rev": shapes.reverse,
  "rsqrt": _rsqrt,
  "select_n": _select,
  "slice": shapes.cut_out,
  "split": shapes.split,
  "square": _power,
  "squeeze": shapes.reshape,
  "stack": shapes.stack,
  "stop_gradient": lambda graph, equation, x: x,
  "transpose": shapes.transpose,
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
