"""Between paths of our trees and names of PyTorch state dicts.

A naming is a table of rows, each a pattern of path segments, the name that stands for it in a state
dict, and, where it is not the usual one, the layout of the kernels below it. A path is read from
the left, row by row, so one table serves every depth, width and form, in both directions.
"""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np


class Layout(NamedTuple):
  """How a tensor's axes lie on both sides; both functions return views where strides allow it."""

  to_torch: Callable[[np.ndarray], np.ndarray]
  from_torch: Callable[[np.ndarray], np.ndarray]


SAME = Layout(lambda x: x, lambda x: x)
CONV = Layout(lambda x: x.transpose(3, 2, 0, 1), lambda x: x.transpose(2, 3, 1, 0))
"""HWIO and OIHW."""
DENSE = Layout(lambda x: x.T, lambda x: x.T)
"""(in, out) and (out, in)."""
DENSE_AS_CONV = Layout(lambda x: x.T[:, :, None, None], lambda x: x[:, :, 0, 0].T)
"""(in, out) and the 1x1 convolution (out, in, 1, 1)."""


def tile_kernel(shape: tuple[int, ...]) -> Layout:
  """(g, h, w, C/g, h, w, O/g) and the grouped 1x1 convolution (O*h*w, C*h*w/g, 1, 1).

  PyTorch flattens tiles channel by channel, on both sides; groups follow one another in O.
  """
  groups, height, width, inputs, _, _, outputs = shape
  theirs = (groups, outputs, height, width, inputs, height, width)
  return Layout(
    lambda x: x.transpose(0, 6, 4, 5, 3, 1, 2).reshape(-1, inputs * height * width, 1, 1),
    lambda x: x.reshape(theirs).transpose(0, 5, 6, 4, 2, 3, 1),
  )


def tile_vector(shape: tuple[int, ...]) -> Layout:
  """(g, h, w, O/g) and (O*h*w,), for the bias or the norm behind such a kernel."""
  groups, height, width, outputs = shape
  return Layout(
    lambda x: x.transpose(0, 3, 1, 2).reshape(-1),
    lambda x: x.reshape(groups, outputs, height, width).transpose(0, 2, 3, 1),
  )


ByShape = Callable[[tuple[int, ...]], Layout]
"""A layout that depends on our shape."""


class Row(NamedTuple):
  """One line of a naming.

  Attributes:
    path: regular expression of one or more whole path segments.
    name: what stands for them in a state dict, with the groups of `path` as \\1, \\2, ...
    kernel: layout of the kernels below; None: `CONV` for four axes, `DENSE` for two, `tile_kernel`
      for seven.
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


class Entry(NamedTuple):
  """The counterpart of one tensor of a state dict.

  Attributes:
    path: in the variables, "params" or "batch_stats" first.
    layout: of the tensor.
    shape: of the tensor, in PyTorch's layout.
  """

  path: tuple[str, ...]
  layout: Layout
  shape: tuple[int, ...]

  @property
  def in_head(self) -> bool:
    """Whether its shape depends on the number of classes."""
    # The norm in front of a classifier has as many numbers whatever that has.
    return "head" in self.path[:-1] and "bn" not in self.path


class NoNameError(ValueError):
  """A naming has no name for a path."""


def plain_name(name: str) -> str:
  """A tensor's name without the prefixes of DistributedDataParallel and torch.compile."""
  while name.startswith(("module.", "_orig_mod.")):
    name = name.partition(".")[2]
  return name


def entries(naming: Naming, variables: Mapping[str, Any]) -> dict[str, Entry]:
  """The state dict's name of every leaf of a tree of arrays or shapes.

  Raises:
    NoNameError: the naming has none for a leaf.
  """
  found = {}
  for key_path, leaf in jax.tree_util.tree_flatten_with_path(variables)[0]:
    path = tuple(entry.key for entry in key_path)
    name, layout = tensor_name(naming, path[1:], len(leaf.shape))
    if not isinstance(layout, Layout):
      layout = layout(leaf.shape)
    shape = layout.to_torch(np.broadcast_to(np.zeros((), bool), leaf.shape)).shape
    found[name] = Entry(path, layout, shape)
  return found


def tensor_name(naming: Naming, path: tuple[str, ...], axes: int) -> tuple[str, Layout | ByShape]:
  """The state dict's name of a leaf, and the layout of its tensor.

  Args:
    naming: the table.
    path: of the leaf below its collection.
    axes: how many it has.

  Raises:
    NoNameError: the naming has none for it.
  """
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
  """The name of a scope, and the layout of the kernels in it."""
  text, names, kernel = "/".join(scope), [], None
  while text:
    for row in naming:
      match = re.match(rf"{row.path}(?:/|$)", text)
      if match:
        names.append(match.expand(row.name))
        kernel = row.kernel or kernel
        text = text[match.end() :]
        break
    else:
      raise NoNameError(f"{'/'.join(scope)} (from {text!r} on)")
  return ".".join(names), kernel
