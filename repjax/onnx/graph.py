"""A graph of ONNX nodes under construction, and the ways to move numbers in its tensors.

An emitter that needs its operand in a certain order asks for it: `arrange` returns the same value
with its tensor stored in given axes. The cheapest node that does this is added:

  same order of atoms, other axes     Reshape or Flatten
  one axis permuted within            Gather along this axis (ParNet's channel shuffles)
  any other order                     Transpose, between as few axes as possible
  an atom that is not stored          Expand
  known numbers                       no node: the array itself is rearranged
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx.values import Atom, Axes, Axis, Size, Value, extent, flat, new_axes

_ROLES = {("Reshape", 1): "shape", ("Conv", 1): "weight", ("Conv", 2): "bias"}
_ROLES |= {
  (like, place): role
  for (op, place), role in _ROLES.items()
  for like in ("Gemm", "ConvTranspose")
  if op == "Conv"
}
_ROLES |= {("MatMul", 1): "weight"}
"""An operator and the place of an operand to the word that names the operand in the file."""


@dataclasses.dataclass(frozen=True)
class Node:
  """An operator that makes one tensor.

  Attributes:
    op: name of the operator.
    inputs: tensors that the operator reads, by the graph's names. The file has other names.
    attributes: parameters of the operator, such as strides.
    scope: name stack of the equation that the node was added for.
  """

  op: str
  inputs: tuple[str, ...]
  attributes: dict[str, Any]
  scope: str


@dataclasses.dataclass(frozen=True)
class Initializer:
  """Known numbers in the file, by ONNX's word for them.

  Attributes:
    array: the numbers.
    scope: name stack of the equation that the numbers were added for.
    role: weight, bias, shape or constant, for the name in the file.
  """

  array: np.ndarray
  scope: str
  role: str


class Graph:
  """Nodes in the order in which they compute.

  Attributes:
    nodes: every node, by the tensor that the node makes.
    constants: all known numbers, by tensor.
    means: for the tensor of a sum, the tensor of the mean of the same numbers, stored in the same
      way, and the count of these numbers.
    scope: name stack of the nodes that are added next.
  """

  def __init__(self):
    self.nodes: dict[str, Node] = {}
    self.constants: dict[str, Initializer] = {}
    self.means: dict[str, tuple[str, int]] = {}
    self.scope = ""
    self._same: dict[Any, str] = {}  # by content, so that equal nodes are added once

  def add(self, op: str, inputs: Iterable[str | np.ndarray], **attributes: Any) -> str:
    """Adds a node and returns its tensor. An equal node that is there already is used again."""
    names = tuple(
      self.constant(tensor, _ROLES.get((op, place), "constant"))
      if isinstance(tensor, np.ndarray)
      else tensor
      for place, tensor in enumerate(inputs)
    )
    key = (op, names, repr(sorted(attributes.items())))
    if key not in self._same:
      self._same[key] = tensor = f"t{len(self._same)}"
      self.nodes[tensor] = Node(op, names, attributes, self.scope)
    return self._same[key]

  def constant(self, array: np.ndarray, role: str = "constant") -> str:
    """Adds known numbers and returns their tensor. Equal numbers are added once, parameters apart.

    Parameters of two layers may be equal at first, as zeros are, and differ once they have learned.
    """
    array = np.ascontiguousarray(array).reshape(array.shape)  # a scalar would become a vector
    whose = self.scope if role in ("weight", "bias") else ""
    key = (array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest(), whose)
    if key not in self._same:
      self._same[key] = tensor = f"t{len(self._same)}"
      self.constants[tensor] = Initializer(array, self.scope, role)
    return self._same[key]

  def tensor(self, value: Value) -> str:
    """Returns the name of a value's tensor, and adds the numbers of a constant."""
    return self.constant(value.tensor) if isinstance(value.tensor, np.ndarray) else value.tensor

  def scalar(self, tensor: str | np.ndarray) -> float | None:
    """Returns the number in a tensor that holds one known number, else None."""
    if isinstance(tensor, str):
      tensor = self.constants[tensor].array if tensor in self.constants else np.empty(0)
    return tensor.item() if tensor.size == 1 else None

  def producer(self, tensor: str | np.ndarray, op: str) -> Node | None:
    """Returns the node that makes a tensor, if the node has this operator, else None."""
    node = self.nodes.get(tensor) if isinstance(tensor, str) else None
    return node if node and node.op == op else None

  def derived(self, op: str, value: Value, *more: str | np.ndarray, **attributes: Any) -> Value:
    """Adds an operator that maps a value's numbers one by one, and returns the result."""
    tensor = self.add(op, (value.tensor, *more), **attributes)
    return dataclasses.replace(value, tensor=tensor)

  def arrange(self, value: Value, stored: Axes) -> Value:
    """Returns the value with its tensor stored in these axes.

    Numbers move only if the order of atoms changes. Atoms that the tensor lacks are repeated.
    """
    missing = set(flat(stored)) - set(flat(value.stored))
    if value.is_constant:
      return _constant_arranged(value, stored, missing)
    if missing:
      value = self._expanded(value, stored, missing)
    if flat(value.stored) != flat(stored):
      value = self._gathered(value, stored) or self._transposed(value, flat(stored))
    return self._regrouped(value, stored)

  def isolated(self, value: Value, axes: Sequence[int]) -> tuple[Value, list[int]]:
    """Returns the value with each of some logical axes as one stored axis, and their places there.

    Operators such as Slice and Concat work along a stored axis, which must be the logical axis.
    """
    whose = {atom: axis for axis in axes for atom in value.axes[axis]}
    runs = split(value.stored, whose.get)
    wanted = [value.axes[axis] for axis in axes]
    if not all(axis and axis in runs for axis in wanted):
      # Some axis is scattered, so that the numbers move anyway: channels first, as in all maps.
      order = range(len(value.axes))
      runs = tuple(value.axes[a] for a in ((0, 3, 1, 2) if len(order) == 4 else order))
      places = [(0, 2, 3, 1)[axis] if len(order) == 4 else axis for axis in axes]
      return self.arrange(value, runs), places
    return self.arrange(value, runs), [runs.index(axis) for axis in wanted]

  def reshaped(self, value: Value, axes: Axes) -> Value:
    """Returns new axes over the numbers of a value that is stored in the order of its axes."""
    if value.is_constant:
      return Value(value.array.reshape([*map(extent, axes)]), axes, axes)
    return Value(self.add("Reshape", [value.tensor, _target(axes, value.stored)]), axes, axes)

  def plain(self, value: Value) -> Value:
    """Returns the value with one new atom for each axis, stored in the order of its axes."""
    tensor, axes = self.arrange(value, value.axes).tensor, new_axes(value.shape)
    return Value(tensor, axes, axes)

  def _regrouped(self, value: Value, stored: Axes) -> Value:
    """Returns the value under other stored axes with the same order of atoms."""
    if value.stored == stored:
      return value
    if len(stored) == 2 and (axis := _joint(value.stored, stored[0])) is not None:
      tensor = self.add("Flatten", [value.tensor], axis=axis)
    else:
      tensor = self.add("Reshape", [value.tensor, _target(stored, value.stored)])
    return dataclasses.replace(value, tensor=tensor, stored=stored)

  def _gathered(self, value: Value, stored: Axes) -> Value | None:
    """Permutes atoms within one stored axis by a Gather, if nothing else differs.

    The last axis is left to a Transpose: there, a Gather would pick single numbers, not rows.
    """
    different = [i for i, pair in enumerate(zip(value.stored, stored)) if pair[0] != pair[1]]
    if len(value.stored) != len(stored) or len(different) != 1:
      return None
    axis = different[0]
    old, new = value.stored[axis], stored[axis]
    if set(old) != set(new) or axis == len(stored) - 1 or not isinstance(extent(old), int):
      return None
    # The old place of each new index: count the old axis, and permute its digits.
    numbers = np.arange(extent(old)).reshape([atom.size for atom in old])
    indices = numbers.transpose([old.index(atom) for atom in new]).ravel()
    tensor = self.add("Gather", [value.tensor, indices], axis=axis)
    return dataclasses.replace(value, tensor=tensor, stored=stored)

  def _transposed(self, value: Value, order: Axis) -> Value:
    """Reorders atoms by a Transpose between as few axes as possible."""
    have = flat(value.stored)
    follows = dict(itertools.pairwise(order))
    # Neighbours that stay neighbours move together, as one axis.
    runs: list[list[Atom]] = []
    for atom in have:
      if runs and follows.get(runs[-1][-1]) is atom:
        runs[-1].append(atom)
      else:
        runs.append([atom])
    blocks = tuple(map(tuple, runs))
    permutation = sorted(range(len(blocks)), key=lambda block: order.index(blocks[block][0]))
    value = self._regrouped(value, blocks)
    tensor = self.add("Transpose", [value.tensor], perm=permutation)
    return dataclasses.replace(value, tensor=tensor, stored=tuple(blocks[i] for i in permutation))

  def _expanded(self, value: Value, stored: Axes, missing: set[Atom]) -> Value:
    """Repeats numbers along missing atoms: axes of length 1 at their places, then an Expand."""
    groups = split(stored, missing.__contains__)
    ones = tuple(() if set(group) & missing else group for group in groups)
    value = self.arrange(value, ones)
    sizes = [extent(group) if set(group) & missing else 1 for group in groups]
    tensor = self.add("Expand", [value.tensor, _whole(sizes)])
    return dataclasses.replace(value, tensor=tensor, stored=groups)


def split(stored: Axes, key: Callable[[Atom], Any]) -> Axes:
  """Cuts stored axes where a key of neighbouring atoms differs."""
  return tuple(
    tuple(run)
    for axis in stored
    for run in ([tuple(g) for _, g in itertools.groupby(axis, key)] or [()])
  )


def _joint(stored: Axes, first: Axis) -> int | None:
  """Returns the number of leading stored axes that make up an axis, or None.

  At least one axis must follow, as Flatten needs.
  """
  for count in range(len(stored) + 1):
    if flat(stored[:count]) == first and flat(stored[count:]):
      return count
  return None


def _constant_arranged(value: Value, stored: Axes, missing: set[Atom]) -> Value:
  """Rearranges known numbers as `Graph.arrange` does with nodes."""
  have, wanted = flat(value.stored), flat(stored)
  array = value.array.reshape([atom.size for atom in have])
  array = array.transpose([have.index(atom) for atom in wanted if atom not in missing])
  array = array.reshape([1 if atom in missing else atom.size for atom in wanted])
  array = np.broadcast_to(array, _whole([atom.size for atom in wanted]))
  return dataclasses.replace(value, tensor=array.reshape([*map(extent, stored)]), stored=stored)


def _whole(sizes: Sequence[Size]) -> np.ndarray:
  """Returns sizes as an array.

  Raises:
    InputError: a size depends on the batch, which is not known.
  """
  if not all(isinstance(size, int | np.integer) for size in sizes):
    raise InputError(
      "this model repeats numbers for each image of the batch and moves them, for which the ONNX "
      "graph has no operator. Add them where they are needed instead, by broadcasting"
    )
  return np.array(sizes, np.int64)


def _target(stored: Axes, before: Axes) -> np.ndarray:
  """Returns the shape for a Reshape: for the batch's axis 0 if the axis stays, else -1."""
  sizes: list[int] = []
  for place, axis in enumerate(stored):
    size, stays = extent(axis), before[place : place + 1] == (axis,)
    sizes.append(int(size) if isinstance(size, int | np.integer) else 0 if stays else -1)
  if sizes.count(-1) > 1:
    raise InputError(
      "this model has an array with two axes as long as the batch, such as products of all images "
      "with one another, which the ONNX graph cannot reshape. Export the model as StableHLO"
    )
  return np.array(sizes, np.int64)
