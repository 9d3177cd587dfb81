"""The table from primitives of JAX to emitters, `OPERATORS`.

An emitter gets the graph, an equation and the values of its inputs. It adds nodes and returns the
values of the outputs. Most primitives are one ONNX operator. Some look back at the nodes that made
their inputs, to find the operators that runtimes are fast on:

  add after Conv or Gemm      the layer's bias         max with 0           Relu
  div of a sum by its count   GlobalAveragePool        exp / sum of exp     Softmax
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx import products, reductions, resizing, shapes
from repjax.onnx.elementwise import elementwise, unified
from repjax.onnx.graph import Graph
from repjax.onnx.values import Value, flat
from repjax.program import Equation

Emitter = Callable[..., Any]
"""A function emitter(graph, equation, *values) that returns a Value, or a list of several."""


def _unary(op: str) -> Emitter:
  """Returns an emitter of an operator on one value."""
  return lambda graph, equation, x: graph.derived(op, x)


def _binary(op: str) -> Emitter:
  """Returns an emitter of an elementwise operator on several values."""
  return lambda graph, equation, *values: elementwise(graph, op, *values)


def _dtype(equation: Equation) -> np.dtype:
  return np.dtype(equation.outputs[0].aval.dtype)


def _number(graph: Graph, equation: Equation, x: Value, y: Value) -> float | None:
  """Returns the number in y if y holds one number and the result has x's shape."""
  return graph.scalar(y.tensor) if x.shape == shapes.shape_of(equation) else None


def _scaled(graph: Graph, op: str, x: Value, number: float, equation: Equation) -> Value:
  """Emits an operator on a value and one number."""
  return graph.derived(op, x, np.array(number, _dtype(equation)))


def _add(graph: Graph, equation: Equation, x: Value, y: Value) -> Value:
  """Emits Add, or a bias of the convolution or matrix product that made an operand."""
  if x.is_constant:
    x, y = y, x
  layers = ("Conv", "ConvTranspose", "Gemm")
  node = next(filter(None, (graph.producer(x.tensor, op) for op in layers)), None)
  if node and y.is_constant and len(node.inputs) == 2:
    rows, bias = unified(graph, (x, y))
    if rows.is_full and set(flat(bias.stored)) <= set(rows.stored[1]):
      vector = graph.arrange(bias, (rows.stored[1],)).tensor
      # The node without bias stays in the graph, and is left out of the file if nothing reads it.
      tensor = graph.add(node.op, [*node.inputs, vector], **node.attributes)
      return dataclasses.replace(rows, tensor=tensor)
  return elementwise(graph, "Add", x, y)


def _div(graph: Graph, equation: Equation, x: Value, y: Value) -> Value:
  """Emits Div, or uses the mean of a divided sum, or emits Softmax for divided exponentials."""
  mean = graph.means.get(x.tensor) if isinstance(x.tensor, str) else None
  divisor = _number(graph, equation, x, y)
  if divisor == 1:
    return x
  if mean and divisor == mean[1]:
    return dataclasses.replace(x, tensor=mean[0])
  return _softmax(graph, x, y) or elementwise(graph, "Div", x, y)


def _softmax(graph: Graph, x: Value, y: Value) -> Value | None:
  """Emits Softmax for exp(x - max(x)) / sum(exp(x - max(x))) over one stored axis, else None.

  The four nodes are traced back from the quotient: Exp over Sub over ReduceMax, and ReduceSum.
  """
  exp, sum_ = graph.producer(x.tensor, "Exp"), graph.producer(y.tensor, "ReduceSum")
  difference = graph.producer(exp.inputs[0], "Sub") if exp else None
  greatest = graph.producer(difference.inputs[1], "ReduceMax") if difference else None
  if difference is None or greatest is None or sum_ is None or sum_.inputs[0] != x.tensor:
    return None
  axes = graph.constants[sum_.inputs[1]].array.tolist()
  # The maximum must be over the same numbers and the same axes as the sum.
  same = greatest.inputs == difference.inputs[:1] and greatest.attributes["axes"] == axes
  if not same or len(axes) > 1:
    return None
  return dataclasses.replace(x, tensor=graph.add("Softmax", greatest.inputs, axis=axes[0]))


def _max(graph: Graph, equation: Equation, x: Value, y: Value) -> Value:
  """Emits Max, or Relu for the maximum with 0. The maximum with -inf is the operand itself."""
  x, y = (y, x) if x.is_constant else (x, y)
  least = _number(graph, equation, x, y)
  if least == 0:
    return graph.derived("Relu", x)
  return x if least == -math.inf else elementwise(graph, "Max", x, y)


def _erfc(graph: Graph, equation: Equation, x: Value) -> Value:
  """Emits 1 - Erf(x), or 1 + Erf(y / d) where x is -y times 1 / d.

  JAX writes GELU with erfc(-y * sqrt(1/2)). Runtimes merge the form with 1 + Erf(y / sqrt(2)), and
  ONNX Runtime asks for Div.
  """
  times = graph.producer(x.tensor, "Mul")
  minus = times and graph.producer(times.inputs[0], "Neg")
  one = np.array(1, _dtype(equation))
  factor = graph.scalar(times.inputs[1]) if times else None
  if minus and factor:
    divisor = np.array(1 / factor, one.dtype)
    x = dataclasses.replace(x, tensor=graph.add("Div", [minus.inputs[0], divisor]))
    return graph.derived("Add", graph.derived("Erf", x), one)
  tensor = graph.add("Sub", [one, graph.derived("Erf", x).tensor])
  return dataclasses.replace(x, tensor=tensor)


def _power(graph: Graph, equation: Equation, x: Value) -> Value:
  exponent = equation.params.get("y", 2)  # a square has none
  if exponent == 2:
    return graph.derived("Mul", x, x.tensor)
  return _scaled(graph, "Pow", x, exponent, equation)


def _rsqrt(graph: Graph, equation: Equation, x: Value) -> Value:
  return graph.derived("Reciprocal", graph.derived("Sqrt", x))


def _clamp(graph: Graph, equation: Equation, low: Value, x: Value, high: Value) -> Value:
  return elementwise(graph, "Min", elementwise(graph, "Max", x, low), high)


def _select(graph: Graph, equation: Equation, which: Value, *cases: Value) -> Value:
  if len(cases) != 2 or np.dtype(equation.inputs[0].aval.dtype) != np.bool_:
    raise InputError("a select_n among more than two cases has no operator in the ONNX graph")
  return elementwise(graph, "Where", which, cases[1], cases[0])


def _not_equal(graph: Graph, equation: Equation, x: Value, y: Value) -> Value:
  return graph.derived("Not", elementwise(graph, "Equal", x, y))


def _dot(graph: Graph, equation: Equation, x: Value, y: Value) -> Value:
  numbers = equation.params["dimension_numbers"]
  found = resizing.resized(graph, x, y, numbers)
  return products.product(graph, x, y, numbers) if found is None else found


def _cast(graph: Graph, equation: Equation, x: Value) -> Value:
  """Emits Cast, or nothing if the dtype is the same."""
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
  "dot_general": _dot,
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
"""Name of a primitive to its emitter."""

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
"""Primitives that only change axes. They are not computed even if their input is known."""
