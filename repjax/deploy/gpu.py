"""Suits programs to XLA's compiler for GPUs.

`python benchmarks/inspect_gpu.py` shows what the compiler makes of a program, without a GPU.

- `split_sums`: cuDNN adds a map to the result of a convolution and applies a ReLU, all in one call.
  Before any other activation the addition saves nothing: the activation reads the sum again. XLA
  merges it into the convolution all the same. A barrier keeps the addition out, and XLA then
  computes it together with the activation and with what made the other map. On an H100, ParNet-S
  in bfloat16 then has 90 kernels instead of 102 at batch 1, which the host launches by 85 calls
  instead of 97; at batch 128, 17 % fewer bytes are moved.
- `summed_axes`: a product of one row and a matrix is a sum along an axis of the matrix. If numbers
  that are added up lie side by side, XLA multiplies and adds in one kernel. Otherwise one kernel
  writes all products, and a second kernel adds them up.
- `GRAPHS`: XLA launches kernels as CUDA graphs, but calls of cuDNN one by one. Fewer than five
  kernels between two of these calls are no graph, either: merging kernels can make more launches.
  With these options a whole network is one launch.
- `warn_of_dtype`: GPUs before compute capability 8.0 have no bfloat16, and XLA computes in float32.
"""

import collections
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from repjax.errors import InputError
from repjax.functions import Function
from repjax.program import (
  Constant,
  Equation,
  Operand,
  Program,
  Variable,
  constant_array,
  interpret,
  trace,
)
from repjax.trees import leaf_name

GRAPHS = {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONVOLUTION"}
"""Options that put convolutions, too, into CUDA graphs."""

_BENDS = {"mul", "logistic", "tanh", "erf", "exp", "integer_pow"}
"""Operations that an activation other than ReLU begins with."""


def split_sums(function: Function) -> Function:
  """Returns the same function, in which XLA keeps some sums out of convolutions.

  These are sums of a convolution and a map that an activation other than ReLU reads.
  """

  def rewritten(tree: Any, inputs: Any) -> Any:
    program = trace(function, *_shapes((tree, inputs)))
    places = _sums(program)

    def compute(equation: Equation, values: list[Any]) -> Sequence[Any]:
      if equation in places:
        place = places[equation]
        values[place] = jax.lax.optimization_barrier(values[place])
      with jax.named_scope(equation.scope):
        return equation.run(*values)

    values = [*jax.tree.leaves(tree), *jax.tree.leaves(inputs)]
    outputs = interpret(program, values, compute, constant_array)
    return jax.tree.unflatten(jax.tree.structure(program.results), outputs)

  return rewritten


def _sums(program: Program) -> dict[Equation, int]:
  """Returns the sums to split: the equation, and the place of the operand that is a convolution."""
  makers = {output: equation for equation in program.equations for output in equation.outputs}
  readers = _readers(program)

  def is_convolution(operand: Operand) -> bool:
    """Tells if an operand is a convolution, perhaps with its bias and in a different dtype."""
    maker = makers.get(operand) if isinstance(operand, Variable) else None
    if maker is None:
      return False
    if maker.primitive == "add":
      return any(
        is_bias(bias) and is_convolution(other)
        for bias, other in (maker.inputs, maker.inputs[::-1])
      )
    if maker.primitive == "convert_element_type":
      return is_convolution(maker.inputs[0])
    return maker.primitive == "conv_general_dilated"

  def is_bias(operand: Operand) -> bool:
    """Tells if an operand is made of a vector, or of one number."""
    maker = makers.get(operand) if isinstance(operand, Variable) else None
    if maker is None or maker.primitive not in ("reshape", "broadcast_in_dim"):
      return (
        isinstance(operand, Constant) or max(operand.aval.shape, default=1) == operand.aval.size
      )
    return is_bias(maker.inputs[0])

  def bends(variable: Variable) -> bool:
    """Tells if an activation other than ReLU reads a variable."""
    return any(
      bends(reader.outputs[0])
      if reader.primitive == "convert_element_type"
      else reader.primitive in _BENDS
      for reader in readers[variable]
    )

  found = {}
  for equation in program.equations:
    if equation.primitive != "add" or any(map(is_bias, equation.inputs)):
      continue
    places = [place for place in (0, 1) if is_convolution(equation.inputs[place])]
    if places and bends(equation.outputs[0]):
      found[equation] = places[0]
  return found


def summed_axes(function: Function, tree: Any, inputs: Any) -> dict[str, int]:
  """Finds the matrices of a tree that rows are multiplied with, and the axis that is summed over.

  Args:
    function: a function of the tree and of inputs.
    tree: arrays, or their shapes and dtypes.
    inputs: images or maps, or their shapes and dtypes.

  Returns:
    Name of the matrix to the axis. A matrix that is read twice is left out.
  """
  shapes = _shapes(tree)
  program = trace(function, shapes, _shapes(inputs))
  readers, found = _readers(program), {}
  for variable, (path, _) in zip(program.inputs, jax.tree_util.tree_leaves_with_path(shapes)):
    axis = _summed_axis(variable, readers) if len(variable.aval.shape) == 2 else None
    if axis is not None:
      found[leaf_name(path)] = axis
  return found


def _summed_axis(matrix: Variable, readers: Mapping[Operand, list[Equation]]) -> int | None:
  """Returns the axis of a matrix that its only product sums over, or None.

  The first axis of a matrix stays the first when the matrix is cut into groups, or converted.
  """
  held = matrix
  while len(readers[held]) == 1:
    (reader,) = readers[held]
    if reader.primitive == "dot_general":
      side = reader.inputs.index(held)
      contracted = reader.params["dimension_numbers"][0][side]
      rest = len(held.aval.shape) - 1
      return {(0,): 0, (rest,): 1}.get(tuple(contracted)) if held.aval.ndim > 1 else None
    same_start = reader.outputs[0].aval.shape[:1] == held.aval.shape[:1]
    if reader.primitive not in ("reshape", "convert_element_type") or not same_start:
      return None
    held = reader.outputs[0]
  return None


def check_graphs(device: Any) -> None:
  """Raises InputError if a device has no CUDA graphs."""
  if device.platform != "gpu":
    raise InputError(
      "cuda_graphs=True puts a network into CUDA graphs of an NVIDIA GPU, and the device here is a "
      f"{device.platform}. Leave cuda_graphs (--cuda-graphs) out, or pass a GPU as devices"
    )


def warn_of_dtype(device: Any, dtype: Any) -> None:
  """Warns if a GPU cannot compute in bfloat16, as before compute capability 8.0 (T4, V100)."""
  capability = str(getattr(device, "compute_capability", ""))
  major = capability.partition(".")[0]
  if str(dtype) == "bfloat16" and major.isdigit() and int(major) < 8:
    warnings.warn(
      f"{device.device_kind} has compute capability {capability}, and bfloat16 needs 8.0: XLA "
      'computes in float32 and converts every map. Compile with dtype="float16", which this GPU '
      "computes in its tensor cores",
      stacklevel=3,
    )


def _readers(program: Program) -> Mapping[Operand, list[Equation]]:
  """Returns the equations that read each variable."""
  readers = collections.defaultdict(list)
  for equation in program.equations:
    for operand in dict.fromkeys(equation.inputs):
      readers[operand].append(equation)
  return readers


def _shapes(tree: Any) -> Any:
  return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
