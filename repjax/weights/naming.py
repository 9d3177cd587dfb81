r"""Maps paths in repjax's trees to names and layouts of tensors in PyTorch state dicts.

A naming is a table of rows. A row has a pattern of path segments, the name for them in a state
dict, and the layout of the kernels below if it is unusual. The first row that matches the beginning
of a path gives a part of the name. The rest of the path is then named in the same way. Thus one
table serves every depth, width and form of a family. For example:

  path   stage1/block0/RepConv_0/conv3x3/conv/kernel
  rows   "(stage\w+)/block(\d+)" to "\1.\2", "RepConv_0/conv3x3" to "rbr_dense", "conv" to "conv"
  name   stage1.0.rbr_dense.conv.weight
"""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax.recognition import is_mark


class Layout(NamedTuple):
  """A pair of functions that reorder a tensor's axes; they return views if strides allow it.

  Attributes:
    to_torch: maps repjax's array to PyTorch's.
    from_torch: maps PyTorch's array to repjax's.
  """

  to_torch: Callable[[np.ndarray], np.ndarray]
  from_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
CONV = Layout(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))
"""HWIO here, OIHW in PyTorch."""
DENSE = Layout(lambda x: x.T, lambda x: x.T)
"""(in, out) here, (out, in) in PyTorch."""
FACTORS = Layout(lambda x: x[:, None, None], lambda x: x[:, 0, 0])
"""(C,) here, (C, 1, 1) in PyTorch, which broadcasts over maps with channels first."""
DENSE_AS_CONV = Layout(lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T)
"""(in, out) here, a 1x1 convolution (out, in, 1, 1) in PyTorch."""


def tile_kernel(shape: tuple[int, ...]) -> Layout:
  """Returns the layout of a kernel that maps tiles of h x w pixels to such tiles.

  Here the kernel is (g, h, w, C/g, h, w, O/g). In PyTorch it is a grouped 1x1 convolution
  (O*h*w, C*h*w/g, 1, 1). Its inputs and outputs are flattened channel by channel, and the outputs
  of a group follow the outputs of the group before.
  """
  groups, height, width, inputs, _, _, outputs = shape
  unflattened = (groups, outputs, height, width, inputs, height, width)
  return Layout(
    lambda x: x.transpose(0, 6, 4, 5, 3, 1, 2).reshape(-1, inputs * height * width, 1, 1),
    lambda x: x.reshape(unflattened).transpose(0, 5, 6, 4, 2, 3, 1),
  )


def tile_vector(shape: tuple[int, ...]) -> Layout:
  """Returns the layout of the bias, or of the norm, after a kernel of tiles.

  Here the vector is (g, h, w, O/g), in PyTorch (O*h*w,).
  """
  groups, height, width, outputs = shape
  return Layout(
    lambda x: x.transpose(0, 3, 1, 2).reshape(-1),
    lambda x: x.reshape(groups, outputs, height, width).transpose(0, 2, 3, 1),
  )


ByShape = Callable[[tuple[int, ...]], Layout]
"""A layout that depends on the shape of repjax's array."""


class Row(NamedTuple):
  """One line of a naming.

  Attributes:
    path: regular expression for one or more whole path segments. The leaf is a part of the path
      for factors, `gamma`, alone.
    name: the name of these segments in a state dict, with the groups of `path` as \\1, \\2, ...
    kernel: layout of the kernels below. None takes the usual one: `CONV` for four axes, `DENSE` for
      two, `tile_kernel` for seven.
  """

  path: str
  name: str
  kernel: Layout | None = None


Naming = Sequence[Row]

_LEAVES = {
  "kernel": "weight",
  "scale": "weight",
  "bias": "bias",
  "mean": "running_mean",
  "var": "running_var",
}
"""Name of a leaf to the last part of its tensor's name."""


class Entry(NamedTuple):
  """The counterpart of one tensor of a state dict in a model's variables.

  Attributes:
    path: path of the leaf in the variables; "params" or "batch_stats" comes first.
    layout: layout of the tensor.
    shape: shape of the tensor, in PyTorch's layout.
  """

  path: tuple[str, ...]
  layout: Layout
  shape: tuple[int, ...]

  @property
  def in_head(self) -> bool:
    """True if the tensor's shape depends on the number of classes."""
    # A norm before the classifier is in the head too, but its size is the number of channels.
    return "head" in self.path[:-1] and "bn" not in self.path


def heads_among(wanted: Mapping[str, Entry], state: Mapping[str, Any]) -> set[str]:
  """Returns the names of tensors that a new classifier replaces.

  These are the tensors whose shapes depend on the number of classes. Where a state dict holds
  nothing of a head, they include the norm in front of its classifier.

  Args:
    wanted: the tensors of a model, by name.
    state: the state dict.
  """
  scope = {name for name, entry in wanted.items() if "head" in entry.path[:-1]}
  return scope if scope.isdisjoint(state) else {n for n in scope if wanted[n].in_head}


class NoNameError(ValueError):
  """An error for a path that a naming has no name for."""


def entries(naming: Naming, variables: Mapping[str, Any]) -> dict[str, Entry]:
  """Returns the counterpart of every tensor of a state dict, by the tensor's name.

  Notes that only name something have no tensors. `marks_in` returns them.

  Args:
    naming: the table.
    variables: a tree of arrays or shapes.

  Raises:
    NoNameError: the naming has no name for a leaf.
  """
  found = {}
  for key_path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
    path = tuple(entry.key for entry in key_path)
    if _is_mark(path):
      continue
    name, layout = tensor_name(naming, path[1:], len(leaf.shape))
    if not isinstance(layout, Layout):
      layout = layout(leaf.shape)
    # The shape after the layout, from an array that needs no memory: all strides are 0.
    shape = layout.to_torch(np.broadcast_to(np.zeros((), bool), leaf.shape)).shape
    found[name] = Entry(path, layout, shape)
  return found


def marks_in(variables: Mapping[str, Any]) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns path and shape of every note that only names something, such as a skip."""
  leaves = jax.tree_util.tree_flatten_with_path(variables)[0]
  paths = ((tuple(entry.key for entry in key_path), leaf.shape) for key_path, leaf in leaves)
  return {path: shape for path, shape in paths if _is_mark(path)}


def _is_mark(path: tuple[str, ...]) -> bool:
  return path[0] == "batch_stats" and is_mark(path[-1])


def tensor_name(naming: Naming, path: tuple[str, ...], axes: int) -> tuple[str, Layout | ByShape]:
  """Returns the name of a leaf's tensor in a state dict, and the layout of this tensor.

  Args:
    naming: the table.
    path: path of the leaf below its collection.
    axes: number of axes of the leaf.

  Raises:
    NoNameError: the naming has no name for the leaf.
  """
  if path[-1] == "gamma":  # a module in one project, a parameter of its own in a different one
    return _scope_name(tuple(naming), path)[0], FACTORS
  scope, kernel = _scope_name(tuple(naming), path[:-1])
  if path[-1] not in _LEAVES:
    raise NoNameError(f"{'/'.join(path)}: {path[-1]} is none of {', '.join(_LEAVES)}")
  if path[-1] == "kernel":
    layout = kernel or {7: tile_kernel, 4: CONV, 2: DENSE}[axes]
  else:
    layout = tile_vector if axes == 4 else SAME
  return f"{scope}.{_LEAVES[path[-1]]}", layout


@functools.cache
def _scope_name(naming: tuple[Row, ...], scope: tuple[str, ...]) -> tuple[str, Layout | None]:
  """Returns the name of a scope in a state dict, and the layout of the kernels in the scope."""
  text, names, kernel = "/".join(scope), [], None
  while text:
    for row in naming:
      # The pattern must end where a segment ends.
      match = re.match(rf"{row.path}(?:/|$)", text)
      if match:
        names.append(match.expand(row.name))
        kernel = row.kernel or kernel
        text = text[match.end() :]
        break
    else:
      raise NoNameError(f"{'/'.join(scope)} (from {text!r} on)")
  return ".".join(names), kernel


def may_name(naming: Naming, names: Iterable[str]) -> bool:
  """Tells if any of the names can be one that a table makes, after any prefix.

  False is certain. True says only that a row makes the end of a name. No model is traced.
  """
  pattern = _ends(tuple(naming))
  return any(pattern.search(name) for name in names)


@functools.cache
def _ends(naming: tuple[Row, ...]) -> re.Pattern[str]:
  """Returns a pattern that finds what a row makes at the end of a name, before the leaf."""
  parts = set()
  for row in naming:
    groups = re.findall(r"\((?!\?)([^()]*)\)", row.path)
    texts = enumerate(re.split(r"\\(\d)", row.name))  # text and number of a group take turns
    parts.add("".join(groups[int(t) - 1] if odd % 2 else re.escape(t) for odd, t in texts))
  leaves = "|".join(_LEAVES.values())
  return re.compile(rf"(?:^|\.)(?:{'|'.join(sorted(parts))})(?:\.(?:{leaves}))?$")
