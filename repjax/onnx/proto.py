"""Writes a graph as protocol buffers: takes the nodes that outputs need, and names their tensors.

A tensor is named by the scope of its layer and its operator, "RepVGG/stem/RepConv_0/conv/Conv". Its
weights are ".../conv/weight" and ".../conv/bias". An output has the name that the caller gives.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from repjax import extras
from repjax.errors import InputError
from repjax.onnx.graph import Graph, Node
from repjax.onnx.translation import BATCH, IMAGES

OPSET, IR_VERSION = 17, 8
"""Versions of 2022, first read by ONNX Runtime 1.12, OpenVINO 2022.3 and TensorRT 8.5."""

LIMIT = 2**31 - 1
"""The most bytes that a protocol buffer holds."""


def need_onnx() -> Any:
  """Returns the package onnx.

  Raises:
    InputError: the package is not installed.
  """
  return extras.need("onnx", "ONNX files")


def model_proto(
  graph: Graph,
  images: tuple[tuple[int, ...], np.dtype],
  outputs: Mapping[str, tuple[str, Sequence[Any], np.dtype]],
) -> tuple[Any, dict[str, str]]:
  """Returns the `onnx.ModelProto` of a graph, and the names of its tensors.

  Args:
    graph: nodes that no output needs are left out.
    images: shape (3, H, W) and dtype of the input.
    outputs: name of an output to its tensor, shape and dtype.

  Returns:
    The model, and for each tensor of the graph its name in the model.

  Raises:
    InputError: the package onnx is not installed, or the model does not fit into a file.
  """
  onnx = need_onnx()
  nodes = _needed(graph, [tensor for tensor, _, _ in outputs.values()])
  names, extra = _names(graph, nodes, {name: row[0] for name, row in outputs.items()})
  read = {tensor for node in nodes.values() for tensor in node.inputs} | set(extra.values())
  constants = {tensor: row for tensor, row in graph.constants.items() if tensor in read}
  size = sum(constant.array.nbytes for constant in constants.values())
  if size > LIMIT:
    raise InputError(
      f"this model has {size / 1e9:.1f} GB of parameters, and an ONNX file holds 2 GB. Export it "
      'with dtype="float16", or as StableHLO'
    )
  made = [
    onnx.helper.make_node(
      node.op,
      [names[tensor] for tensor in node.inputs],
      [names[tensor]],
      name=names[tensor],
      **{key: _attribute(onnx, key, value) for key, value in node.attributes.items()},
    )
    for tensor, node in nodes.items()
  ]
  # A tensor has one name. Further outputs of the same tensor are copies.
  made += [onnx.helper.make_node("Identity", [names[t]], [name]) for name, t in extra.items()]
  shape, dtype = images
  body = onnx.helper.make_graph(
    made,
    "deploy",
    [_info(onnx, IMAGES, (BATCH, *shape), dtype)],
    [_info(onnx, name, shape, dtype) for name, (_, shape, dtype) in outputs.items()],
    [onnx.numpy_helper.from_array(row.array, names[t]) for t, row in constants.items()],
  )
  proto = onnx.helper.make_model(
    body,
    opset_imports=[onnx.helper.make_opsetid("", OPSET)],
    ir_version=IR_VERSION,
    producer_name="repjax",
  )
  return proto, names


def _needed(graph: Graph, tensors: Sequence[str]) -> dict[str, Node]:
  """Returns the nodes that some tensors are computed from, in order."""
  waiting, found = list(tensors), set()
  while waiting:
    tensor = waiting.pop()
    if tensor not in found:
      found.add(tensor)
      waiting.extend(graph.nodes[tensor].inputs if tensor in graph.nodes else ())
  return {tensor: node for tensor, node in graph.nodes.items() if tensor in found}


def _names(
  graph: Graph, nodes: Mapping[str, Node], outputs: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
  """Chooses a name for each tensor.

  Returns:
    The names by tensor, and the outputs that cannot name their tensor, with that tensor: the input
    as it is, a constant, or a tensor that an earlier output has named.
  """
  names, taken, extra = {IMAGES: IMAGES}, Counter([IMAGES, *outputs]), {}
  for name, tensor in outputs.items():
    if tensor in nodes and tensor not in names:
      names[tensor] = name
    else:
      extra[name] = tensor

  def unique(*parts: str) -> str:
    name = "/".join(filter(None, parts))
    taken[name] += 1
    return name if taken[name] == 1 else f"{name}_{taken[name] - 1}"

  for tensor, node in nodes.items():
    if tensor not in names:
      names[tensor] = unique(node.scope, node.op)
  for tensor, constant in graph.constants.items():
    names[tensor] = unique(constant.scope, constant.role)
  return names, extra


def _attribute(onnx: Any, key: str, value: Any) -> Any:
  """Returns an attribute as ONNX has it: the dtype of a Cast as a number."""
  return _type(onnx, np.dtype(value)) if key == "to" else value


def _type(onnx: Any, dtype: np.dtype) -> int:
  return onnx.helper.np_dtype_to_tensor_dtype(dtype)


def _info(onnx: Any, name: str, shape: Sequence[Any], dtype: np.dtype) -> Any:
  """Describes an input or an output: name, dtype and shape."""
  sizes = [size if isinstance(size, int) else str(size) for size in shape]
  return onnx.helper.make_tensor_value_info(name, _type(onnx, dtype), sizes)
