"""Programs in which some convolutions are computed in other ways than XLA's own.

The model stays as it is: calls of its `flax.linen.Conv`s are met by their scopes' paths, and the
kernels of those that are computed otherwise are transformed once, in the tree.
"""

import collections
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from repjax.deploy.convolutions import ALGORITHMS, Convolution
from repjax.program import trace

Function = Callable[[Any, Any], Any]
Path = tuple[str, ...]


def convolutions_in(function: Function, tree: Any, inputs: Any) -> dict[Path, Convolution]:
  """The convolutions of a program by their scopes' paths; it is traced, not run.

  Only those that can be replaced: a `flax.linen.Conv` over two axes, padded with zeros, that reads
  a leaf of `tree` as its kernel, unchanged and in the dtype of the computation, where nothing else
  reads it. So a normalized kernel, or one in the body of a scan, is left alone.

  Args:
    function: of a tree {"params": ...} and inputs.
    tree: arrays, or their shapes.
    inputs: images or maps, or their shapes and dtypes.
  """
  found: dict[Path, Convolution | None] = {}

  def noting(tree: Any, inputs: Any) -> Any:
    leaves: Any = traverse_util.flatten_dict(tree)

    def note(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
      module = context.module
      if _is_conv(context):
        kernel: Any = module.variables.get("params", {}).get("kernel")
        own = kernel is leaves.get(_place(module.path), ())
        found[module.path] = _described(module, _input(args, kwargs), kernel) if own else None
      return next_call(*args, **kwargs)

    with nn.intercept_methods(note):
      return function(tree, inputs)

  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  program = trace(noting, shapes, inputs)
  readers = collections.Counter(
    operand for equation in program.equations for operand in equation.inputs
  )
  readers.update(program.outputs)
  places = [
    tuple(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
  ]
  read = {place: readers[variable] for place, variable in zip(places, program.inputs)}
  return {path: one for path, one in found.items() if one and read[_place(path)] == 1}


def prepared(kernel: jax.Array, name: str, wanted: Convolution) -> np.ndarray:
  """A kernel as an algorithm takes it, in its own dtype."""
  return ALGORITHMS[name].prepare(np.asarray(kernel), wanted).astype(kernel.dtype)


def with_kernels(tree: Any, kernels: Mapping[Path, Any]) -> Any:
  """The tree with other kernels in the scopes with these paths."""
  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict(
    flat | {_place(path): kernel for path, kernel in kernels.items()}
  )


def kernel_of(tree: Any, path: Path) -> Any:
  """The kernel in the scope with this path."""
  return traverse_util.flatten_dict(tree)[_place(path)]


def computed_by(
  function: Function, choices: Mapping[Path, str], found: Mapping[Path, Convolution]
) -> Function:
  """The same function, with convolutions computed by the algorithms of these names.

  Args:
    function: of a tree and images.
    choices: path to name, among ALGORITHMS; the tree holds `prepared` kernels at these paths.
    found: what `convolutions_in` found.
  """

  def compute(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    path = context.module.path
    if not _is_conv(context) or path not in choices:
      return next_call(*args, **kwargs)
    params, wanted = context.module.variables["params"], found[path]
    x = _input(args, kwargs).astype(wanted.dtype)
    y = ALGORITHMS[choices[path]].compute(x, params["kernel"], wanted)
    if "bias" in params:
      y = y + params["bias"].astype(wanted.dtype).reshape(1, 1, 1, -1)
    return y

  def rewritten(tree: Any, images: jax.Array) -> Any:
    with nn.intercept_methods(compute):
      return function(tree, images)

  return rewritten


def _place(path: Path) -> tuple[str, ...]:
  return ("params", *path, "kernel")


def _is_conv(context: Any) -> bool:
  return type(context.module) is nn.Conv and context.method_name == "__call__"


def _input(args: Any, kwargs: Any) -> Any:
  """What a convolution is called with, by place or by name."""
  return args[0] if args else kwargs["inputs"]


def _described(module: nn.Conv, x: jax.Array, kernel: jax.Array) -> Convolution | None:
  """What a module computes, or None where it is more than a convolution over two axes."""
  special = (module.mask, module.conv_general_dilated, module.conv_general_dilated_cls)
  if x.ndim != 4 or len(_tuple(module.kernel_size)) != 2 or any(s is not None for s in special):
    return None
  dtype = jnp.dtype(module.dtype or x.dtype)
  if kernel.dtype != dtype or module.promote_dtype is not nn.Conv.promote_dtype:
    return None
  size, strides = _pair(module.kernel_size), _pair(module.strides)
  dilation = _pair(module.kernel_dilation)
  padding: Any = module.padding
  if isinstance(padding, str):
    if padding not in ("SAME", "VALID"):
      return None
    reach = [d * (taps - 1) + 1 for d, taps in zip(dilation, size)]
    padding = jax.lax.padtype_to_pads(x.shape[1:3], reach, strides, padding)
  elif isinstance(padding, int):
    padding = (padding, padding)
  above, left = (_pair(pads) for pads in padding)
  if _pair(module.input_dilation) != (1, 1) or min(*above, *left) < 0:
    return None
  groups = module.feature_group_count
  return Convolution(
    tuple(x.shape),
    (*size, x.shape[-1] // groups, module.features),
    strides,
    (above, left),
    dilation,
    groups,
    dtype.name,
  )


def _tuple(value: Any) -> tuple[int, ...]:
  return (value,) if isinstance(value, int) else tuple(value)


def _pair(value: Any) -> tuple[int, int]:
  """(vertical, horizontal) of one number for both, of two, or of None, which is 1."""
  first, second = (1, 1) if value is None else (value, value) if isinstance(value, int) else value
  return int(first), int(second)
