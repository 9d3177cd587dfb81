"""Rewrites a program so that some of its convolutions are computed by chosen algorithms.

The model's code stays as it is. Flax can intercept every call of a module: while a program is
traced, calls of `flax.linen.Conv` are recognized by their scope's path and replaced. The kernels of
replaced convolutions are prepared once, in the tree of parameters. Three steps:

  convolutions_in   finds the convolutions that can be replaced
  with_kernels      puts prepared kernels into the tree
  computed_by       replaces the calls
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

Function = Callable[[Any, Any], Any]
"""A pure function of a tree of parameters and of inputs."""

ScopePath = tuple[str, ...]
"""The names of the scopes from the network down to a module."""


def convolutions_in(function: Function, tree: Any, inputs: Any) -> dict[ScopePath, Convolution]:
  """Finds the convolutions of a program that can be replaced, by path of their scope.

  The program is traced and not run. A convolution can be replaced if all of this holds:

  - It is a `flax.linen.Conv` over two axes, padded with zeros.
  - Its kernel is a leaf of `tree`, unchanged and in the dtype of the computation. A normalized
    kernel, or a kernel in the body of a scan, is not.
  - Nothing else reads this leaf, since the leaf will hold a prepared kernel.

  Args:
    function: a function of a tree {"params": ...} and of inputs.
    tree: arrays, or their shapes and dtypes.
    inputs: images or maps, or their shapes and dtypes.

  Returns:
    Path of the scope to the convolution that its module computes.
  """
  # A path with None is a convolution that was seen and cannot be replaced.
  found: dict[ScopePath, Convolution | None] = {}

  def noting(tree: Any, inputs: Any) -> Any:
    leaves: Any = traverse_util.flatten_dict(tree)

    def note(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
      module = context.module
      if _is_conv(context):
        kernel: Any = module.variables.get("params", {}).get("kernel")
        # During tracing, leaves are tracers. If the module holds the tree's own tracer, nothing has
        # changed the kernel on the way. A module that is called twice is refused below, since its
        # kernel then has two readers.
        unchanged = kernel is leaves.get(_kernel_path(module.path), ())
        described = _described(module, _input(args, kwargs), kernel) if unchanged else None
        found[module.path] = described
      return next_call(*args, **kwargs)

    with nn.intercept_methods(note):
      return function(tree, inputs)

  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  program = jax.make_jaxpr(noting)(shapes, inputs).jaxpr
  # Counts the readers of each variable: equations that take it, and results that are the variable.
  # A jaxpr's first input variables are the leaves of the tree, in the order of flattening.
  readers = collections.Counter(
    id(variable) for equation in program.eqns for variable in equation.invars
  )
  readers.update(id(variable) for variable in program.outvars)
  places = [
    tuple(entry.key for entry in path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)
  ]
  read = {place: readers[id(variable)] for place, variable in zip(places, program.invars)}
  return {path: conv for path, conv in found.items() if conv and read[_kernel_path(path)] == 1}


def prepare_kernel(kernel: jax.Array, name: str, conv: Convolution) -> np.ndarray:
  """Returns a kernel in the form that an algorithm takes, in the kernel's dtype."""
  return ALGORITHMS[name].prepare(np.asarray(kernel), conv).astype(kernel.dtype)


def with_kernels(tree: Any, kernels: Mapping[ScopePath, Any]) -> Any:
  """Returns the tree with new kernels in the scopes at the given paths."""
  flat = traverse_util.flatten_dict(tree)
  return traverse_util.unflatten_dict(
    flat | {_kernel_path(path): kernel for path, kernel in kernels.items()}
  )


def kernel_of(tree: Any, path: ScopePath) -> Any:
  """Returns the kernel in the scope at a path."""
  return traverse_util.flatten_dict(tree)[_kernel_path(path)]


def computed_by(
  function: Function, choices: Mapping[ScopePath, str], found: Mapping[ScopePath, Convolution]
) -> Function:
  """Returns the same function with convolutions computed by the chosen algorithms.

  Args:
    function: a function of a tree and of inputs.
    choices: path of a scope to name of an algorithm in ALGORITHMS. The tree must hold kernels of
      `prepare_kernel` at these paths.
    found: the result of `convolutions_in` for this function.
  """

  def compute(next_call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
    path = context.module.path
    if not _is_conv(context) or path not in choices:
      return next_call(*args, **kwargs)
    # `next_call` is left out: Flax would compare the prepared kernel's shape with the declared one.
    params, conv = context.module.variables["params"], found[path]
    x = _input(args, kwargs).astype(conv.dtype)
    y = ALGORITHMS[choices[path]].compute(x, params["kernel"], conv)
    if "bias" in params:
      y = y + params["bias"].astype(conv.dtype).reshape(1, 1, 1, -1)
    return y

  def rewritten(tree: Any, images: jax.Array) -> Any:
    with nn.intercept_methods(compute):
      return function(tree, images)

  return rewritten


def _kernel_path(path: ScopePath) -> tuple[str, ...]:
  return ("params", *path, "kernel")


def _is_conv(context: Any) -> bool:
  """Returns True for a call of exactly `nn.Conv`; a subclass may compute something else."""
  return type(context.module) is nn.Conv and context.method_name == "__call__"


def _input(args: Any, kwargs: Any) -> Any:
  """Returns the input of a convolution's call, which may be positional or named."""
  return args[0] if args else kwargs["inputs"]


def _described(module: nn.Conv, x: jax.Array, kernel: jax.Array) -> Convolution | None:
  """Describes the convolution that a module computes on x, or returns None.

  None means that the module does more than a `Convolution` can say. It has a mask or a different
  convolution function, converts its kernel, does not pad with zeros, or dilates x.
  """
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
    if padding not in ("SAME", "VALID"):  # "CIRCULAR", "REFLECT" and "CAUSAL" are not zeros around
      return None
    reach = [d * (taps - 1) + 1 for d, taps in zip(dilation, size)]  # size of the dilated kernel
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
  """Returns (vertical, horizontal) of two numbers, of one number for both, or of None for 1."""
  first, second = (1, 1) if value is None else (value, value) if isinstance(value, int) else value
  return int(first), int(second)
