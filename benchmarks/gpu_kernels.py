"""Reads from a program that XLA compiled for a GPU which kernels run, and what they move.

A kernel here is an instruction of the program that the GPU runs: a fusion, a call of cuDNN or
cuBLAS, a copy. The bytes of a kernel are those of its operands and results. A fusion that reads a
part of an operand counts the whole operand, and caches are not considered.
"""

import math
import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

_FREE = {
  *("parameter", "constant", "bitcast", "get-tuple-element", "tuple", "after-all", "partition-id"),
  *("replica-id", "opt-barrier", "domain", "add-dependency"),
}
"""Operations that run nothing."""
_ENDS = re.compile(r"-(done|update)$")  # The start of an asynchronous operation is its kernel.
_COLLECTIVES = ("all-reduce", "all-gather", "all-to-all", "reduce-scatter", "collective-", "send")
_MOVES = {"copy", "transpose", "reshape", "slice", "concatenate", "pad", "reverse", "copy-start"}
"""Operations that write numbers to new places and compute nothing."""
_BITS = {"bf16": 16, "c64": 64, "c128": 128, "pred": 8, "token": 0, "opaque": 0}
"""Bits of the types whose names do not end in their number of bits."""


class Instruction(NamedTuple):
  """An instruction of a compiled program.

  Attributes:
    name: name of the result.
    shape: shape and layout of the result, as XLA prints it; a tuple in parentheses.
    operation: name of the operation.
    operands: names of the operands.
    attributes: the text after the operands.
  """

  name: str
  shape: str
  operation: str
  operands: tuple[str, ...]
  attributes: str


class Kernel(NamedTuple):
  """Something that the GPU runs.

  Attributes:
    name: name of the result in the program.
    kind: one of KINDS.
    detail: what distinguishes kernels of a kind: activation and layout of a convolution, the
      library of a product, or the kind of a fusion.
    bytes: bytes of operands and results, over all `times`.
    times: how often the kernel runs; more than 1 in a loop.
    source: the operation of the model that the kernel comes from.
  """

  name: str
  kind: str
  detail: str
  bytes: int
  times: int
  source: str


KINDS = (
  *("convolution", "product", "reduction", "elementwise", "parameter copy", "copy"),
  *("collective", "other"),
)
"""Kinds of kernels. A "parameter copy" copies, transposes or slices arguments of the program."""


def kernels(text: str) -> list[Kernel]:
  """Returns the kernels of a compiled program in the order of the program."""
  computations, entry = parse(text)
  return _kernels_in(entry, computations, 1)


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
  """Reads XLA's text of a program.

  Returns:
    The instructions of each computation by its name, and the name of the first to run.
  """
  computations: dict[str, list[Instruction]] = {}
  entry, current = "", None
  for line in text.splitlines():
    start = re.match(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
    if start:
      current = computations.setdefault(start[2], [])
      entry = start[2] if start[1] else entry
    elif current is not None and (found := _instruction(line)):
      current.append(found)
  if not entry:
    raise ValueError("the text has no ENTRY computation, so it is no compiled program of XLA")
  return computations, entry


def _instruction(line: str) -> Instruction | None:
  match = re.match(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\(", line)
  if not match:
    return None
  # Operands are names without parentheses. The number of a parameter is in parentheses too.
  inside, _, attributes = line[match.end() :].partition(")")
  name, shape, operation = match.groups()
  operands = tuple(re.findall(r"%([\w.\-]+)", inside))
  return Instruction(name, shape, operation, operands, attributes)


def _kernels_in(
  name: str, computations: Mapping[str, list[Instruction]], times: int
) -> list[Kernel]:
  """Returns the kernels of a computation that runs a number of times, called ones included."""
  found, instructions = [], {each.name: each for each in computations[name]}
  for each in instructions.values():
    if each.operation in _FREE or _ENDS.search(each.operation):
      continue
    if each.operation == "while":
      trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', each.attributes)
      inner = times * int(trips[1]) if trips else times
      found += _kernels_in(_called(each, "body"), computations, inner)
    elif each.operation in ("call", "async-start"):
      found += _kernels_in(_called(each, "to_apply|calls"), computations, times)
    elif each.operation == "conditional":
      # One branch runs; the one with the most kernels counts.
      lists = re.findall(r"computations?=\{?([^}=]*)", each.attributes)
      branches = re.findall(r"%([\w.\-]+)", " ".join(lists))
      found += max((_kernels_in(one, computations, times) for one in branches), key=len)
    else:
      found.append(_kernel(each, instructions, computations, times))
  return found


def _called(instruction: Instruction, attribute: str) -> str:
  match = re.search(rf"(?:{attribute})=%?([\w.\-]+)", instruction.attributes)
  assert match, instruction
  return match[1]


def _kernel(
  each: Instruction,
  instructions: Mapping[str, Instruction],
  computations: Mapping[str, list[Instruction]],
  times: int,
) -> Kernel:
  """Describes an instruction that runs on the GPU.

  Args:
    each: the instruction.
    instructions: the instructions of the same computation by name.
    computations: all computations by name.
    times: how often it runs.
  """
  moved = size_of(each.shape) + sum(size_of(instructions[name].shape) for name in each.operands)
  kind, detail = _kind(each, instructions, computations)
  source = re.search(r'op_name="(.*?)"', each.attributes)
  return Kernel(each.name, kind, detail, times * moved, times, source[1] if source else "")


def _kind(
  each: Instruction,
  instructions: Mapping[str, Instruction],
  computations: Mapping[str, list[Instruction]],
) -> tuple[str, str]:
  """Returns the kind of an instruction and what distinguishes it; arguments as in `_kernel`."""
  if each.operation == "custom-call":
    return _kind_of_call(each)
  if each.operation.startswith(_COLLECTIVES):
    return "collective", each.operation
  if each.operation == "fusion":
    operations = _operations(_called(each, "calls"), computations)
    shape = re.search(r"kind=k(\w+)", each.attributes)
    detail = f"{shape[1].lower()} fusion" if shape else "fusion"
    backend = re.search(r'"fusion_backend_config":\{"kind":"(\w+)"', each.attributes)
    if backend and backend[1]:
      detail = backend[1].strip("_")
  else:
    operations, detail = {each.operation}, each.operation
  if operations & {"dot", "scaled-dot"}:
    return "product", detail
  if "convolution" in operations:
    return "convolution", detail
  if operations & {"reduce", "reduce-window", "select-and-scatter"}:
    return "reduction", detail
  if operations & _MOVES and not operations - _MOVES - _FREE - {"convert", "broadcast"}:
    return ("parameter copy" if _reads_parameters(each, instructions) else "copy"), detail
  if each.operation in ("fusion", "broadcast", "iota", "convert", "select", "add", "multiply"):
    return "elementwise", detail
  return "other", detail


def _kind_of_call(each: Instruction) -> tuple[str, str]:
  """Returns the kind of a call of a library, and what distinguishes it."""
  match = re.search(r'custom_call_target="([^"]+)"', each.attributes)
  target = match[1] if match else ""
  if target.startswith("__cudnn$conv"):
    labels = re.search(r"dim_labels=([\w?]+)_([\w?]+)->([\w?]+)", each.attributes)
    layout = memory_order(labels[3], each.shape) if labels else ""
    activation = re.search(r'"activation_mode":"k?(\w+)"', each.attributes)
    direction = {"BackwardInput": "input gradient", "BackwardFilter": "kernel gradient"}
    what = next((direction[name] for name in direction if name in target), "")
    if not what:
      what = activation[1].lower() if activation and "Activation" in target else "alone"
      what = {"none": "bias"}.get(what, what)
    return "convolution", f"{what} {layout}".strip()
  if "gemm" in target or "matmul" in target:
    return "product", target.strip("_$")
  if "cudnn$norm" in target:
    return "reduction", target.strip("_$")
  return "other", target.strip("_$")


def _operations(name: str, computations: Mapping[str, list[Instruction]]) -> set[str]:
  """Returns the operations of a computation and of the fusions in it."""
  found = set()
  for each in computations[name]:
    found.add(each.operation)
    if each.operation in ("fusion", "call"):
      found |= _operations(_called(each, "calls|to_apply"), computations)
  return found - {"fusion", "call"}


def _reads_parameters(each: Instruction, instructions: Mapping[str, Instruction]) -> bool:
  """Tells if all operands of an instruction are arguments of the program, perhaps by a bitcast."""

  def from_parameter(name: str) -> bool:
    origin = instructions[name]
    if origin.operation == "bitcast":
      return from_parameter(origin.operands[0])
    return origin.operation in ("parameter", "constant")

  return bool(each.operands) and all(map(from_parameter, each.operands))


def memory_order(labels: str, shape: str) -> str:
  """Returns how a map lies in memory, the slowest axis first, such as "NHWC".

  Args:
    labels: XLA's letters for the axes, in the order of the shape, such as "b01f".
    shape: shape and layout as XLA prints them; of a tuple, the first counts.
  """
  letters = {"b": "N", "f": "C", "0": "H", "1": "W", "o": "O", "i": "I"}
  layout = re.search(r"\]\{([\d,]+)", shape)
  if not layout:
    return ""
  fastest_first = [int(axis) for axis in layout[1].split(",")]
  return "".join(letters.get(labels[axis], "?") for axis in reversed(fastest_first))


def size_of(shape: str) -> int:
  """Returns the bytes of an array or of a tuple of arrays, from XLA's text of the shape."""
  total = 0
  for kind, axes in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", shape):
    count = math.prod(int(axis) for axis in axes.split(",") if axis)
    total += count * _bits(kind) // 8
  return total


def _bits(kind: str) -> int:
  """Returns the bits of a number of a type, such as "f32" or "f8e4m3fn"."""
  match = re.match(r"[a-z]+(\d+)", kind)
  return _BITS[kind] if kind in _BITS else int(match[1]) if match else 0


def by_kind(found: Iterable[Kernel]) -> dict[str, dict[str, dict[str, int]]]:
  """Returns {kind: {detail: {"kernels", "bytes"}}}, in the order of KINDS."""
  table: dict[str, dict[str, dict[str, int]]] = {kind: {} for kind in KINDS}
  for kernel in found:
    row = table[kernel.kind].setdefault(kernel.detail, {"kernels": 0, "bytes": 0})
    row["kernels"] += kernel.times
    row["bytes"] += kernel.bytes
  return {kind: details for kind, details in table.items() if details}
