"""Layers with weights in an ONNX file: their names, the tensors around them, and their numbers."""

from typing import Any, NamedTuple

import numpy as np

from repjax.errors import InputError
from repjax.onnx.proto import need_onnx
from repjax.schema import shown

LAYERS = ("Conv", "Gemm", "MatMul")


class GraphLayer(NamedTuple):
  """A node with weights.

  Attributes:
    name: name of the node.
    op: Conv, Gemm or MatMul.
    source: tensor that the node reads.
    result: tensor that the node makes.
    weight: name of the weights.
    bias: name of the bias, or None.
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
    """The axis of the weights that counts outputs."""
    return 0 if self.op == "Conv" else -1

  def inputs(self, rank: int) -> tuple[int, ...]:
    """Returns the axes of the weights that share a scale: an output is a sum over these axes.

    Matrices of a batch have one scale together, since ONNX Runtime multiplies them in no other way.
    """
    if self.op == "Conv":
      return tuple(range(1, rank))
    return (0,) if rank == 2 else tuple(range(rank))


def layers_of(proto: Any) -> list[GraphLayer]:
  """Returns the layers of an `onnx.ModelProto` in the order in which they compute."""
  known = {tensor.name for tensor in proto.graph.initializer}
  return [
    GraphLayer(node.name, node.op_type, node.input[0], node.output[0], node.input[1], bias)
    for node in proto.graph.node
    if node.op_type in LAYERS and node.input[1] in known and node.input[0] not in known
    for bias in [node.input[2] if len(node.input) > 2 and node.input[2] in known else None]
  ]


def copied(proto: Any) -> Any:
  """Returns a deep copy of a model."""
  copy = type(proto)()
  copy.CopyFrom(proto)
  return copy


def constants(proto: Any) -> dict[str, np.ndarray]:
  """Returns the known numbers of a model, its weights among them, by name."""
  numpy_helper = need_onnx().numpy_helper
  return {tensor.name: numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def with_constants(proto: Any, arrays: dict[str, np.ndarray]) -> Any:
  """Returns a copy of a model with new numbers, in the dtypes that they had."""
  numpy_helper = need_onnx().numpy_helper
  copy = copied(proto)
  for tensor in copy.graph.initializer:
    if tensor.name in arrays:
      dtype = numpy_helper.to_array(tensor).dtype
      new = numpy_helper.from_array(np.asarray(arrays[tensor.name], dtype), tensor.name)
      tensor.CopyFrom(new)
  return copy


def check_float(proto: Any) -> None:
  """Raises InputError for a model with weights that are not float32 or not finite, or no layer."""
  if not hasattr(proto, "graph"):
    raise InputError(
      "8 bits are made of an onnx.ModelProto, as repjax.onnx.to_onnx returns and onnx.load reads, "
      f"got {shown(proto)}"
    )
  layers = layers_of(proto)
  arrays = constants(proto)
  dtypes = {arrays[layer.weight].dtype.name for layer in layers}
  if dtypes != {"float32"}:
    found = " and ".join(sorted(dtypes)) or "no Conv, Gemm or MatMul with known weights"
    raise InputError(
      f"8 bits are made of a graph with weights in float32, and this one has {found}. Make one "
      'with repjax.onnx.to_onnx(..., dtype="float32")'
    )
  for layer in layers:
    held = [arrays[name] for name in (layer.weight, layer.bias) if name]
    if not all(np.isfinite(array).all() for array in held):
      raise InputError(
        f"the layer {layer.title} holds weights that are NaN or infinite, for which 8 bits have no "
        "scale. Has the network diverged?"
      )
