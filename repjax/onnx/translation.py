"""Translates a traced function into a graph of ONNX nodes.

The function is traced with a symbol for the batch size, and its calls are inlined
(`repjax.program`). The equations are then met in order. An equation whose inputs are all known is
computed at once. Any other equation is handed to its emitter in `OPERATORS`, which adds nodes to
the graph. The tensors of each equation are noted as `EquationTensors`, so that a simulation of 8
bits can find the equation that belongs to a tensor of the file.

  a = mul x 2.0    becomes  t1 = Mul(images, constant)  and  EquationTensors("mul", ("t1",))
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax.errors import InputError
from repjax.functions import INFERENCE_MODE, reason_of_training
from repjax.onnx.graph import Graph
from repjax.onnx.operators import OPERATORS, VIEWS
from repjax.onnx.values import Value, known, new_axes
from repjax.program import Constant, Equation, Program, constant_array, interpret, place_of, trace
from repjax.trees import generator_of, is_key

BATCH, IMAGES = "batch", "images"
_PRODUCTS = {"conv_general_dilated", "dot_general"}
_LAYERS = {"Conv", "Gemm", "MatMul"}  # a product may become a Resize too, which has no weights
_SUMS = {"add": "Add", "add_any": "Add", "concatenate": "Concat"}
_BATCH_ERRORS = (TypeError, jax.errors.InconclusiveDimensionOperation)


class EquationTensors(NamedTuple):
  """The tensors of a graph that an equation of a traced program reads and makes.

  Attributes:
    primitive: name of the equation's operation.
    results: name of the tensor of each result, None for a result that has no tensor.
    reads: for products and sums, the tensor of each operand, as the node reads it.
    kernel: for a product, the place of the weights among its operands. None if none are known.
    layer: where a layer's bias is added, the layer's input and its weights.
  """

  primitive: str
  results: tuple[str | None, ...]
  reads: tuple[str | None, ...] = ()
  kernel: int | None = None
  layer: tuple[str | None, ...] = ()

  def named(self, names: Mapping[str, str]) -> "EquationTensors":
    """Returns the same tensors with new names, None where `names` has none."""
    results, reads, layer = (
      tuple(names.get(tensor or "") for tensor in tensors)
      for tensors in (self.results, self.reads, self.layer)
    )
    return EquationTensors(self.primitive, results, reads, self.kernel, layer)


class Translation(NamedTuple):
  """A function as a graph.

  Attributes:
    graph: the nodes, those that no output needs included.
    outputs: the function's results by path. The path is joined by "/", and empty for a lone array.
    shapes: shape and dtype of each result, in the same order.
    tensors: one entry for each equation of the function's flat program.
  """

  graph: Graph
  outputs: dict[str, Value]
  shapes: list[Any]
  tensors: tuple[EquationTensors, ...]


def translated(
  function: Callable[[Any, jax.Array], Any], tree: Any, size: tuple[int, int], dtype: np.dtype
) -> Translation:
  """Translates a function into a graph.

  Args:
    function: takes the tree and images (N, H, W, 3).
    tree: known arrays, which become constants of the graph.
    size: H and W.
    dtype: dtype of the images.

  Raises:
    InputError: a primitive of the function is not in `OPERATORS`, or the batch size is asked for.
  """
  from jax import export

  shape = export.symbolic_shape(f"{BATCH}, {size[0]}, {size[1]}, 3")
  program = _traced(function, tree, jax.ShapeDtypeStruct(shape, dtype))
  if reason := reason_of_training(program):
    raise InputError(
      f"this model {reason}. An ONNX file holds no random numbers, and computes each image by "
      f"itself. Pass {INFERENCE_MODE}"
    )
  graph, tensors = Graph(), []
  axes = new_axes(shape)
  # ONNX's images are channels first. The function still sees (N, H, W, 3).
  stored = tuple(axes[axis] for axis in (0, 3, 1, 2))
  inputs = [*map(_parameter, jax.tree.leaves(tree)), Value(IMAGES, axes, stored)]

  def translate(equation: Equation, operands: list[Value]) -> Sequence[Value]:
    graph.scope = equation.scope
    results = _results(graph, equation, operands)
    tensors.append(_tensors_of(graph, equation, operands, results))
    return results

  outputs = interpret(program, inputs, translate, _constant)
  paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(program.results)]
  names = ["/".join(map(_key, path)) for path in paths]
  shapes = jax.tree.leaves(program.results)
  return Translation(graph, dict(zip(names, outputs)), shapes, tuple(tensors))


def _traced(function: Callable[[Any, jax.Array], Any], tree: Any, images: Any) -> Program:
  """Traces a function on a symbolic batch, and explains what the batch may not be used for."""
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  try:
    return trace(function, shapes, images)
  except _BATCH_ERRORS as error:
    # A TypeError may be the model's own mistake, which is not to be hidden.
    if isinstance(error, TypeError) and "_DimExpr" not in str(error):
      raise
    first = str(error).partition("\n")[0]
    raise InputError(
      f"this model cannot be traced for batches of any size: {first} Let it ask for shapes only in "
      "ways that hold for all, such as x.reshape(x.shape[0], -1)"
    ) from error


def _constant(constant: Constant) -> Value:
  return _parameter(constant_array(constant))


def _parameter(leaf: Any) -> Value:
  """Returns a known array. Random keys, which models hold for their training, become numbers."""
  return known(_without_key(leaf))


def _without_key(leaf: Any) -> Any:
  """Returns an array, or the numbers of a random key."""
  return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _key(entry: Any) -> str:
  return str(getattr(entry, "key", getattr(entry, "idx", entry)))


def _tensors_of(
  graph: Graph, equation: Equation, operands: Sequence[Value], results: Sequence[Value]
) -> EquationTensors:
  """Returns the tensors of an equation's results, and for layers and sums what their node reads."""
  made = tuple(value.tensor if isinstance(value.tensor, str) else None for value in results)
  tensors = EquationTensors(equation.primitive, made)
  node = graph.nodes.get(made[0] or "") if len(made) == 1 else None
  fixed = [place for place, value in enumerate(operands) if value.is_constant]
  if node and node.op in _LAYERS and tensors.primitive in _PRODUCTS and len(fixed) == 1:
    # The node reads the weights second, wherever the equation has them.
    source, weight = node.inputs[:2]
    reads = (weight, source) if fixed[0] == 0 else (source, weight)
    return tensors._replace(reads=reads, kernel=fixed[0])
  if node and _SUMS.get(tensors.primitive) == node.op and len(node.inputs) == len(operands):
    return tensors._replace(reads=node.inputs)
  if node and node.op in ("Conv", "Gemm") and len(node.inputs) == 3 and len(fixed) == 1:
    # An addition that became the bias of the layer before it.
    *layer, bias = node.inputs
    reads = (bias, None) if fixed[0] == 0 else (None, bias)
    return tensors._replace(reads=reads, layer=tuple(layer))
  return tensors


def _results(graph: Graph, equation: Equation, operands: list[Value]) -> Sequence[Value]:
  """Returns the values of an equation's outputs, and adds the nodes that compute them."""
  name = equation.primitive
  if all(0 in output.aval.shape for output in equation.outputs):
    return [_empty(output.aval.shape) for output in equation.outputs]
  foldable = name not in (*VIEWS, "dim_as_value") and _is_static(equation)
  if foldable and all(value.is_constant for value in operands):
    return list(map(known, _folded(graph, equation, operands)))
  where = place_of(graph.scope)
  if name == "dim_as_value":
    raise InputError(
      f"this model computes with the number of images ({where}), which a graph for batches of any "
      'size does not know. Leave it out, or export the model with format="stablehlo"'
    )
  if name not in OPERATORS:
    raise InputError(
      f"the ONNX graph has no operator for JAX's primitive {name!r} {where}; it has: "
      f"{', '.join(sorted(OPERATORS))}. Write that part with these, or export the model with "
      'format="stablehlo"'
    )
  try:
    result = OPERATORS[name](graph, equation, *operands)
  except InputError as error:
    raise InputError(f"{error} (the primitive {name!r} {where})") from None
  return result if isinstance(result, list) else [result]


def _empty(shape: Sequence[Any]) -> Value:
  """Returns an array with an axis of length 0, such as the padding of an axis by nothing."""
  axes = new_axes(shape)
  return Value(np.zeros(0), axes, tuple(axis for axis in axes if axis and axis[0].size == 0)[:1])


def _is_static(equation: Equation) -> bool:
  """Checks that no output's shape depends on the batch size."""
  sizes = (size for output in equation.outputs for size in output.aval.shape)
  return all(isinstance(size, int) for size in sizes)


def _folded(graph: Graph, equation: Equation, operands: list[Value]) -> list[np.ndarray]:
  """Computes the outputs of an equation whose inputs are known."""
  arrays = [graph.arrange(value, value.axes).tensor for value in operands]
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    results = equation.run(*map(_as_read, equation.inputs, arrays))
  return [np.asarray(_without_key(result)) for result in results]


def _as_read(operand: Any, array: Any) -> jax.Array:
  """Returns a known array as an equation reads it: the numbers of a random key as the key."""
  if is_key(operand.aval):
    return jax.random.wrap_key_data(array, impl=generator_of(operand.aval))
  return jax.numpy.asarray(array)
