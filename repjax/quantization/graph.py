"""Layers with weights in an ONNX file: what they are called, read and write, and their numbers."""

from typing import Any, NamedTuple

import numpy as np

from repjax.errors import InputError
from repjax.onnx.proto import need_onnx

LAYERS = ("Conv", "Gemm", "MatMul")


class Layer(NamedTuple):
  """A node with weights.

  Attributes:
    name: of the node.
    op: Conv, Gemm or MatMul.
    source: the tensor that it reads.
    result: the tensor that it makes.
    weight: the name of its weights.
    bias: the name of its bias, or None.
  """

  name: str
  op: str
  source: str
  result: str
  weight: str
  bias: str | None

  @property
  def title(self) -> str:
    """The layer's Flax scope, without the model's class, methods and einsum's formulas."""
    first, *scopes = self.weight.rpartition("/")[0].removesuffix("/conv").split("/")
    return "/".join(s for s in scopes if "." not in s and "->" not in s) or first

  @property
  def axis(self) -> int:
    """The axis of its weights that is the output's."""
    return 0 if self.op == "Conv" else -1

  def inputs(self, rank: int) -> tuple[int, ...]:
    """The axes of its weights that share a scale: those that an output is a sum over.

    Matrices of a batch have one scale together, since ONNX Runtime multiplies them no other way.
    """
    if self.op == "Conv":
      return tuple(range(1, rank))
    return (0,) if rank == 2 else tuple(range(rank))


def layers_of(proto: Any) -> list[Layer]:
  """The layers of an `onnx.ModelProto` in the order in which they compute."""
  known = {tensor.name for tensor in proto.graph.initializer}
  return [
    Layer(node.name, node.op_type, node.input[0], node.output[0], node.input[1], bias)
    for node in proto.graph.node
    if node.op_type in LAYERS and node.input[1] in known and node.input[0] not in known
    for bias in [node.input[2] if len(node.input) > 2 and node.input[2] in known else None]
  ]


def copied(proto: Any) -> Any:
  """Another with the same content."""
  copy = type(proto)()
  copy.CopyFrom(proto)
  return copy


def constants(proto: Any) -> dict[str, np.ndarray]:
  """The known numbers of a model by name."""
  numpy_helper = need_onnx().numpy_helper
  return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def with_constants(proto: Any, arrays: dict[str, np.ndarray]) -> Any:
  """A copy of a model with other numbers, in the dtypes of those before."""
  numpy_helper = need_onnx().numpy_helper
  copy = copied(proto)
  for tensor in copy.graph.initializer:
    if tensor.name in arrays:
      dtype = numpy_helper.to_array(tensor).dtype
      new = numpy_helper.from_array(np.asarray(arrays[tensor.name], dtype), tensor.name)
      tensor.CopyFrom(new)
  return copy


def check_float(proto: Any) -> None:
  """Raises InputError for a model that is not in float32, or has no layer."""
  layers = layers_of(proto)
  arrays = constants(proto)
  dtypes = {arrays[layer.weight].dtype.name for layer in layers}
  if dtypes != {"float32"}:
    found = " and ".join(sorted(dtypes)) or "no Conv, Gemm or MatMul with known weights"
    raise InputError(
      f"8 bits are made of a graph with weights in float32, and this one has {found}; make one "
      'with repjax.onnx.to_onnx(..., dtype="float32")'
    )
