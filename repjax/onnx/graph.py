"""A graph of ONNX nodes under construction, which knows how every tensor's numbers lie."""

import dataclasses
import hashlib
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.onnx.values import Atom, Axes, Axis, Size, Value, extent, flat, new_axes

_ROLES = {("Reshape", 1): "shape", ("Conv", 1): "weight", ("Conv", 2): "bias"}
_ROLES |= {("Gemm", place): role for (op, place), role in _ROLES.items() if op == "Conv"}
_ROLES |= {("MatMul", 1): "weight"}


@dataclasses.dataclass(frozen=True)
class Node:
  """An operator; its tensors are named when the file is made."""

  op: str
  inputs: tuple[str, ...]
  attributes: dict[str, Any]
  scope: str


@dataclasses.dataclass(frozen=True)
class Constant:
  """Known numbers, and whose they are."""

  array: np.ndarray
  scope: str
  role: str


class Graph:
  """Nodes in the order in which they compute.

  Attributes:
    nodes: by the tensor that each makes.
    constants: by tensor.
    means: a sum's tensor to its mean's, which lies as it does, and of how many numbers it is.
    scope: of what is added next.
  """

  def __init__(self):
    self.nodes: dict[str, Node] = {}
    self.constants: dict[str, Constant] = {}
    self.means: dict[str, tuple[str, int]] = {}
    self.scope = ""
    self._same: dict[Any, str] = {}

  def add(self, op: str, inputs: Iterable[str | np.ndarray], **attributes: Any) -> str:
    """A node's tensor; that of the same node where there is one."""
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
    """The tensor of known numbers; the same for the same numbers, but not for parameters.

    Those of two layers may be equal once, zeros at first, and differ when they have learned.
    """
    array = np.ascontiguousarray(array).reshape(array.shape)  # which would make one axis of none
    whose = self.scope if role in ("weight", "bias") else ""
    key = (array.dtype, array.shape, hashlib.sha256(array.tobytes()).digest(), whose)
    if key not in self._same:
      self._same[key] = tensor = f"t{len(self._same)}"
      self.constants[tensor] = Constant(array, self.scope, role)
    return self._same[key]

  def tensor(self, value: Value) -> str:
    """The name of a value's tensor."""
    return self.constant(value.tensor) if isinstance(value.tensor, np.ndarray) else value.tensor

  def scalar(self, tensor: str | np.ndarray) -> float | None:
    """The one number that a tensor holds, if it is known and one."""
    if isinstance(tensor, str):
      tensor = self.constants[tensor].array if tensor in self.constants else np.empty(0)
    return tensor.item() if tensor.size == 1 else None

  def producer(self, tensor: str | np.ndarray, op: str) -> Node | None:
    """The node that makes a tensor, if it is of that kind."""
    node = self.nodes.get(tensor) if isinstance(tensor, str) else None
    return node if node and node.op == op else None

  def derived(self, op: str, value: Value, *more: str | np.ndarray, **attributes: Any) -> Value:
    """What an operator makes of a value's numbers one by one."""
    tensor = self.add(op, (value.tensor, *more), **attributes)
    return dataclasses.replace(value, tensor=tensor)

  def arrange(self, value: Value, stored: Axes) -> Value:
    """The value stored so; atoms that it lacks are repeated.

    Numbers move only where their order changes: a Transpose, or a Gather where it is that within
    one axis, such as channels.
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
    """The value with each of some logical axes as one stored axis, and their places."""
    whose = {atom: axis for axis in axes for atom in value.axes[axis]}
    runs = split(value.stored, whose.get)
    wanted = [value.axes[axis] for axis in axes]
    if not all(axis and axis in runs for axis in wanted):
      # Channels lie first in maps, as everywhere else.
      order = range(len(value.axes))
      runs = tuple(value.axes[a] for a in ((0, 3, 1, 2) if len(order) == 4 else order))
      places = [(0, 2, 3, 1)[axis] if len(order) == 4 else axis for axis in axes]
      return self.arrange(value, runs), places
    return self.arrange(value, runs), [runs.index(axis) for axis in wanted]

  def reshaped(self, value: Value, axes: Axes) -> Value:
    """A value stored in the order of its axes, with other axes for the same numbers."""
    if value.is_constant:
      return Value(value.array.reshape([*map(extent, axes)]), axes, axes)
    return Value(self.add("Reshape", [value.tensor, _target(axes, value.stored)]), axes, axes)

  def plain(self, value: Value) -> Value:
    """The value with one atom an axis, stored in the order of its axes."""
    tensor, axes = self.arrange(value, value.axes).tensor, new_axes(value.shape)
    return Value(tensor, axes, axes)

  def _regrouped(self, value: Value, stored: Axes) -> Value:
    """The same order of atoms under other stored axes."""
    if value.stored == stored:
      return value
    if len(stored) == 2 and (axis := _joint(value.stored, stored[0])) is not None:
      tensor = self.add("Flatten", [value.tensor], axis=axis)
    else:
      tensor = self.add("Reshape", [value.tensor, _target(stored, value.stored)])
    return dataclasses.replace(value, tensor=tensor, stored=stored)

  def _gathered(self, value: Value, stored: Axes) -> Value | None:
    """One stored axis in another order, if nothing else differs and it is not the last."""
    different = [i for i, pair in enumerate(zip(value.stored, stored)) if pair[0] != pair[1]]
    if len(value.stored) != len(stored) or len(different) != 1:
      return None
    axis = different[0]
    old, new = value.stored[axis], stored[axis]
    if set(old) != set(new) or axis == len(stored) - 1 or not isinstance(extent(old), int):
      return None
    numbers = np.arange(extent(old)).reshape([atom.size for atom in old])
    indices = numbers.transpose([old.index(atom) for atom in new]).ravel()
    tensor = self.add("Gather", [value.tensor, indices], axis=axis)
    return dataclasses.replace(value, tensor=tensor, stored=stored)

  def _transposed(self, value: Value, order: Axis) -> Value:
    """Atoms in another order, in as few axes as it takes."""
    have = flat(value.stored)
    follows = dict(itertools.pairwise(order))
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
    """The value with its numbers repeated along missing atoms."""
    groups = split(stored, missing.__contains__)
    ones = tuple(() if set(group) & missing else group for group in groups)
    value = self.arrange(value, ones)
    sizes = [extent(group) if set(group) & missing else 1 for group in groups]
    tensor = self.add("Expand", [value.tensor, _whole(sizes)])
    return dataclasses.replace(value, tensor=tensor, stored=groups)


def split(stored: Axes, key: Callable[[Atom], Any]) -> Axes:
  """Stored axes cut where neighbouring atoms differ in something."""
  return tuple(
    tuple(run)
    for axis in stored
    for run in ([tuple(g) for _, g in itertools.groupby(axis, key)] or [()])
  )


def _joint(stored: Axes, first: Axis) -> int | None:
  """How many stored axes make up an axis, if they do and it is not the last alone."""
  for count in range(len(stored) + 1):
    if flat(stored[:count]) == first and flat(stored[count:]):
      return count
  return None


def _constant_arranged(value: Value, stored: Axes, missing: set[Atom]) -> Value:
  have, wanted = flat(value.stored), flat(stored)
  array = value.array.reshape([atom.size for atom in have])
  array = array.transpose([have.index(atom) for atom in wanted if atom not in missing])
  array = array.reshape([1 if atom in missing else atom.size for atom in wanted])
  array = np.broadcast_to(array, _whole([atom.size for atom in wanted]))
  return dataclasses.replace(value, tensor=array.reshape([*map(extent, stored)]), stored=stored)


def _whole(sizes: Sequence[Size]) -> np.ndarray:
  """Sizes as numbers, none of which is the batch's."""
  if not all(isinstance(size, int | np.integer) for size in sizes):
    raise InputError(
      "this model repeats numbers for each image of the batch and moves them, for which the ONNX "
      "graph here has no operator; add them where they are needed instead, by broadcasting"
    )
  return np.array(sizes, np.int64)


def _target(stored: Axes, before: Axes) -> np.ndarray:
  """What Reshape takes: for the axis that holds the batch 0 where it stays, or else -1."""
  sizes: list[int] = []
  for place, axis in enumerate(stored):
    size, stays = extent(axis), before[place : place + 1] == (axis,)
    sizes.append(int(size) if isinstance(size, int | np.integer) else 0 if stays else -1)
  if sizes.count(-1) > 1:
    raise InputError(
      "this model has an array with two axes as long as the batch, such as products of all images "
      "with one another, which the ONNX graph here cannot reshape; export it as StableHLO"
    )
  return np.array(sizes, np.int64)
