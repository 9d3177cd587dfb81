"""From a function that JAX traces to a graph of ONNX nodes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax.errors import InputError
from repjax.onnx.graph import Graph
from repjax.onnx.operators import OPERATORS, VIEWS
from repjax.onnx.values import Value, known, new_axes

BATCH, IMAGES = "batch", "images"
PRODUCTS = {"conv_general_dilated", "dot_general"}
_SUMS = {"add": "Add", "add_any": "Add", "concatenate": "Concat"}
_BATCH_ERRORS = (TypeError, jax.errors.InconclusiveDimensionOperation)
_CALLS = {
  "checkpoint",
  "closed_call",
  "core_call",
  "custom_jvp_call",
  "custom_vjp_call",
  "custom_vjp_call_jaxpr",
  "jit",
  "pjit",
  "remat",
  "remat2",
}


class Step(NamedTuple):
  """What became of an equation of a traced program.

  Attributes:
    primitive: its name.
    results: the tensor of each result, None where there is none.
    inner: the steps of the program that it runs.
    reads: of products and sums the tensor of each operand, as their operator reads it.
    kernel: of a product the place of the weights among its operands, None where there are none.
    layer: where a layer's bias is added, what that layer reads and its weights.
  """

  primitive: str
  results: tuple[str | None, ...]
  inner: tuple["Step", ...] = ()
  reads: tuple[str | None, ...] = ()
  kernel: int | None = None
  layer: tuple[str | None, ...] = ()

  def named(self, names: Mapping[str, str]) -> "Step":
    """With other names for the tensors, None for those that have none."""
    results, reads, layer = (
      tuple(names.get(tensor or "") for tensor in tensors)
      for tensors in (self.results, self.reads, self.layer)
    )
    inner = tuple(step.named(names) for step in self.inner)
    return Step(self.primitive, results, inner, reads, self.kernel, layer)


def translated(
  function: Callable[[Any, jax.Array], Any], tree: Any, size: tuple[int, int], dtype: np.dtype
) -> tuple[Graph, dict[str, Value], Any, tuple[Step, ...]]:
  """A function as a graph.

  Args:
    function: of the tree and images (N, H, W, 3).
    tree: of known numbers.
    size: H and W.
    dtype: of the images.

  Returns:
    The graph, the values of the function's result by their path, joined by "/" and empty for an
    array alone, their shapes and dtypes in the same order, and what became of each equation.

  Raises:
    InputError: the function contains what is not in `OPERATORS`, or asks for the batch size.
  """
  from jax import export

  shape = export.symbolic_shape(f"{BATCH}, {size[0]}, {size[1]}, 3")
  images = jax.ShapeDtypeStruct(shape, dtype)
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  try:
    program, results = jax.make_jaxpr(function, return_shape=True)(shapes, images)
  except _BATCH_ERRORS as error:
    if isinstance(error, TypeError) and "_DimExpr" not in str(error):
      raise
    first = str(error).partition("\n")[0]
    raise InputError(
      f"this model cannot be traced for batches of any size: {first} Let it ask for shapes only in "
      "ways that hold for all, such as x.reshape(x.shape[0], -1)"
    ) from error
  graph = Graph()
  axes = new_axes(shape)
  stored = tuple(axes[axis] for axis in (0, 3, 1, 2))
  inputs = [*map(known, jax.tree.leaves(tree)), Value(IMAGES, axes, stored)]
  outputs, steps = _run(graph, program.jaxpr, program.consts, inputs, "")
  names = ["/".join(map(_key, path)) for path, _ in jax.tree_util.tree_leaves_with_path(results)]
  return graph, dict(zip(names, outputs)), jax.tree.leaves(results), steps


def called(equation: Any) -> tuple[Any, Sequence[Any]] | None:
  """The program that an equation runs once, as it is, and its constants; None: it runs none."""
  if equation.primitive.name not in _CALLS:
    return None
  for value in equation.params.values():
    program = getattr(value, "jaxpr", value)
    if hasattr(program, "eqns"):
      return program, getattr(value, "consts", ())
  return None


def _key(entry: Any) -> str:
  return str(getattr(entry, "key", getattr(entry, "idx", entry)))


def _run(
  graph: Graph, jaxpr: Any, consts: Sequence[Any], inputs: Sequence[Value], scope: str
) -> tuple[list[Value], tuple[Step, ...]]:
  """The values that a traced program returns, and what became of its equations."""
  known_by_name = dict(zip(jaxpr.constvars, map(known, consts)))
  values: dict[Any, Value] = known_by_name | dict(zip(jaxpr.invars, inputs))

  def read(variable: Any) -> Value:
    if hasattr(variable, "val"):
      return known(np.asarray(variable.val, variable.aval.dtype))
    return values[variable]

  steps = []
  for equation in jaxpr.eqns:
    stack = str(equation.source_info.name_stack)
    graph.scope = "/".join(filter(None, (scope, stack)))
    inputs, inner = [read(variable) for variable in equation.invars], called(equation)
    if inner is None:
      results, own = _results(graph, equation, inputs), ()
    else:
      results, own = _run(graph, *inner, inputs, graph.scope)
    steps.append(_step(graph, equation, inputs, results, own))
    values.update(zip(equation.outvars, results))
  return [read(variable) for variable in jaxpr.outvars], tuple(steps)


def _step(
  graph: Graph,
  equation: Any,
  inputs: Sequence[Value],
  results: Sequence[Value],
  inner: tuple[Step, ...],
) -> Step:
  """What became of an equation."""
  tensors = tuple(value.tensor if isinstance(value.tensor, str) else None for value in results)
  step = Step(equation.primitive.name, tensors, inner)
  node = graph.nodes.get(tensors[0] or "") if len(tensors) == 1 else None
  fixed = [place for place, value in enumerate(inputs) if value.is_constant]
  if node and step.primitive in PRODUCTS and len(fixed) == 1:
    source, weight = node.inputs[:2]
    reads = (weight, source) if fixed[0] == 0 else (source, weight)
    return step._replace(reads=reads, kernel=fixed[0])
  if node and _SUMS.get(step.primitive) == node.op and len(node.inputs) == len(inputs):
    return step._replace(reads=node.inputs)
  if node and node.op in ("Conv", "Gemm") and len(node.inputs) == 3 and len(fixed) == 1:
    *layer, bias = node.inputs
    reads = (bias, None) if fixed[0] == 0 else (None, bias)
    return step._replace(reads=reads, layer=tuple(layer))
  return step


def _results(graph: Graph, equation: Any, inputs: list[Value]) -> Sequence[Value]:
  """What one equation makes of its values."""
  name = equation.primitive.name
  if all(0 in variable.aval.shape for variable in equation.outvars):
    return [_empty(variable.aval.shape) for variable in equation.outvars]
  foldable = name not in (*VIEWS, "dim_as_value") and _is_static(equation)
  if foldable and all(value.is_constant for value in inputs):
    return list(map(known, _folded(graph, equation, inputs)))
  if name == "dim_as_value":
    raise InputError(
      "this model computes with the number of images, which an ONNX graph for batches of any size "
      f"does not know{f' (in the scope {graph.scope})' if graph.scope else ''}; leave it out, or "
      'export the model as StableHLO (format="stablehlo")'
    )
  if name not in OPERATORS:
    where = f"in the scope {graph.scope}" if graph.scope else "outside all scopes"
    raise InputError(
      f"the ONNX graph here has no operator for JAX's primitive {name!r}, which this model uses "
      f"{where}; it has: {', '.join(sorted(OPERATORS))}. Write that part with these, or export the "
      'model as StableHLO (format="stablehlo"), which takes all of them'
    )
  try:
    result = OPERATORS[name](graph, equation, *inputs)
  except InputError as error:
    raise InputError(f"{error} (the primitive {name!r} in the scope {graph.scope!r})") from None
  return result if isinstance(result, list) else [result]


def _empty(shape: Sequence[Any]) -> Value:
  """What has an axis of no length, such as what padding adds to an axis that is not padded."""
  axes = new_axes(shape)
  return Value(np.zeros(0), axes, tuple(axis for axis in axes if axis and axis[0].size == 0)[:1])


def _is_static(equation: Any) -> bool:
  sizes = (size for variable in equation.outvars for size in variable.aval.shape)
  return all(isinstance(size, int) for size in sizes)


def _folded(graph: Graph, equation: Any, inputs: list[Value]) -> list[np.ndarray]:
  """The results of an equation whose inputs are known."""
  arrays = [graph.arrange(value, value.axes).tensor for value in inputs]
  with jax.default_device(jax.local_devices(backend="cpu")[0]):
    results = equation.primitive.bind(*map(jax.numpy.asarray, arrays), **equation.params)
  results = results if equation.primitive.multiple_results else [results]
  return [np.asarray(result) for result in results]
