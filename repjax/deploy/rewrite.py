"""Rewrites a program so that some of its convolutions are computed by chosen algorithms.

The model's code stays as it is, and may come from any library. A function of a tree and of inputs
is traced into a program (`repjax.program`). A convolution of the program is known by its kernel, a
leaf of the tree. The kernels of replaced convolutions are prepared once, in the tree. Three steps:

  convolutions_in   finds the convolutions that can be replaced
  with_kernels      puts prepared kernels into the tree
  computed_by       runs the program with the convolutions replaced

  y = conv_general_dilated x kernel    becomes    y = winograd(x, prepared kernel)

On GPUs only depthwise convolutions are replaced, and kernels stay as they are: `depthwise_in` finds
them, and `with_depthwise_sums` replaces them.
"""

import collections
import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from repjax.deploy.convolutions import ALGORITHMS, Convolution, depthwise_sum, suits_shifts
from repjax.functions import Function
from repjax.program import Equation, Program, constant_array, interpret, trace
from repjax.trees import leaf_name


def convolutions_in(function: Function, tree: Any, inputs: Any) -> dict[str, Convolution]:
  """Finds the convolutions of a program that can be replaced, by the names of their kernels.

  The program is traced and not run. A convolution can be replaced if all of this holds:

  - It is a convolution over two axes, padded with zeros, in any order of axes.
  - Its kernel is a leaf of `tree`, unchanged and in the dtype of the computation. A normalized
    kernel, or a kernel in the body of a scan, is not.
  - Nothing else reads this leaf, since the leaf will hold a prepared kernel.

  Args:
    function: a function of a tree and of inputs.
    tree: arrays, or their shapes and dtypes.
    inputs: images or maps, or their shapes and dtypes.

  Returns:
    Name of the kernel to the convolution that reads it.
  """
  program, names = _traced(function, tree, inputs)
  # Counts the readers of each variable: equations that take it, and results that are the variable.
  readers = collections.Counter(
    operand for equation in program.equations for operand in equation.inputs
  )
  readers.update(program.outputs)
  found = {}
  for equation in _convolutions(program):
    kernel = equation.inputs[1]
    described = _described(equation)
    if kernel in names and readers[kernel] == 1 and described is not None:
      found[names[kernel]] = described
  return found


def prepare_kernel(kernel: jax.Array, name: str, conv: Convolution) -> np.ndarray:
  """Returns a kernel in the form that an algorithm takes, in the kernel's dtype."""
  return ALGORITHMS[name].prepare(np.asarray(kernel), conv).astype(kernel.dtype)


def with_kernels(tree: Any, kernels: Mapping[str, Any]) -> Any:
  """Returns the tree with new kernels in the place of the leaves of these names."""
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: kernels.get(leaf_name(path), leaf), tree
  )


def kernel_of(tree: Any, name: str) -> Any:
  """Returns the leaf of a name."""
  return dict(_named(tree))[name]


def scope_of(name: str) -> str:
  """Returns the scope of a kernel for people: its name without what all kernels have in common.

  Example:
    >>> scope_of("params/stage1/block0/conv/kernel")
    'stage1/block0/conv'
  """
  return name.removeprefix("params/").removesuffix("/kernel")


def computed_by(
  function: Function, tree: Any, choices: Mapping[str, str], found: Mapping[str, Convolution]
) -> Function:
  """Returns the same function with convolutions computed by the chosen algorithms.

  Args:
    function: a function of a tree and of inputs.
    tree: the arrays that the function takes, or their shapes and dtypes.
    choices: name of a kernel to name of an algorithm in ALGORITHMS.
    found: the result of `convolutions_in` for this function.

  Returns:
    A function of a tree with kernels of `prepare_kernel` in the chosen places, and of inputs.
  """

  def rewritten(prepared: Any, inputs: Any) -> Any:
    # Traced with the shapes of the plain kernels, and run on the prepared ones.
    program, names = _traced(function, tree, inputs)
    chosen = {kernel: name for kernel, name in names.items() if name in choices}

    def compute(equation: Equation, values: list[Any]) -> Sequence[Any]:
      name = chosen.get(equation.inputs[1]) if _is_convolution(equation) else None
      with jax.named_scope(equation.scope):
        if name is None:
          return equation.run(*values)
        x, kernel = values
        return [ALGORITHMS[choices[name]].compute(x, kernel, found[name])]

    values = [*jax.tree.leaves(prepared), *jax.tree.leaves(inputs)]
    outputs = interpret(program, values, compute, constant_array)
    return jax.tree.unflatten(jax.tree.structure(program.results), outputs)

  return rewritten


def depthwise_in(function: Function, tree: Any, inputs: Any) -> dict[str, int]:
  """Finds the depthwise convolutions that `with_depthwise_sums` can replace.

  Args:
    function: a function of a tree and of inputs.
    tree: arrays, or their shapes and dtypes.
    inputs: images or maps, or their shapes and dtypes.

  Returns:
    Scope of the kernel, or of the convolution if the kernel is computed, to the number of taps. If
    several convolutions with computed kernels share a scope, all but the first have a number.
  """
  program, names = _traced(function, tree, inputs)
  found = {}
  for equation in _convolutions(program):
    conv = _depthwise(equation)
    if conv is not None:
      name = names.get(equation.inputs[1])
      found[scope_of(name) if name else _unused(equation.scope, found)] = _taps(conv)
  return found


def _unused(scope: str, taken: Container[str]) -> str:
  """Returns the scope, with a number if it is taken.

  NNX modules and plain functions have no scopes, so that all their convolutions share one.
  """
  numbered = (f"{scope} ({number})".strip() for number in itertools.count(2))
  return next(each for each in itertools.chain([scope], numbered) if each not in taken)


def with_depthwise_sums(function: Function, most_taps: int) -> Function:
  """Returns the same function with depthwise convolutions computed as sums over their taps.

  cuDNN computes a depthwise convolution alone, and a second kernel adds the bias and the
  activation. XLA computes the sum, the bias and the activation in one kernel, which moves the maps
  once.

  Args:
    function: a function of a tree and of inputs.
    most_taps: convolutions whose kernels have more taps stay.
  """

  def rewritten(tree: Any, inputs: Any) -> Any:
    program, _ = _traced(function, tree, inputs)

    def compute(equation: Equation, values: list[Any]) -> Sequence[Any]:
      conv = _depthwise(equation) if _is_convolution(equation) else None
      with jax.named_scope(equation.scope):
        if conv is None or _taps(conv) > most_taps:
          return equation.run(*values)
        x, kernel = values
        return [depthwise_sum(x, kernel, conv)]

    values = [*jax.tree.leaves(tree), *jax.tree.leaves(inputs)]
    outputs = interpret(program, values, compute, constant_array)
    return jax.tree.unflatten(jax.tree.structure(program.results), outputs)

  return rewritten


def _depthwise(equation: Equation) -> Convolution | None:
  """Returns a depthwise convolution of maps (N, H, W, C), or None for any other convolution."""
  conv = _described(equation)
  if conv is None or conv.groups == 1 or conv.image_axes != (0, 1, 2, 3):
    return None
  return conv if suits_shifts(conv) else None


def _taps(conv: Convolution) -> int:
  """Returns the number of taps of a convolution's kernel."""
  return conv.kernel[0] * conv.kernel[1]


def _traced(function: Function, tree: Any, inputs: Any) -> tuple[Program, dict[Any, str]]:
  """Returns a function's program, and its variables that are leaves of the tree, by name."""
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (tree, inputs))
  program = trace(function, *shapes)
  # A program's first inputs are the leaves of the tree, in the order of flattening.
  names = {variable: name for variable, (name, _) in zip(program.inputs, _named(tree))}
  count = collections.Counter(names.values())
  return program, {variable: name for variable, name in names.items() if count[name] == 1}


def _named(tree: Any) -> Iterator[tuple[str, Any]]:
  """Yields the name of each leaf, and the leaf."""
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    yield leaf_name(path), leaf


def _convolutions(program: Program) -> Iterator[Equation]:
  return filter(_is_convolution, program.equations)


def _is_convolution(equation: Equation) -> bool:
  return equation.primitive == "conv_general_dilated"


def _described(equation: Equation) -> Convolution | None:
  """Describes the convolution that an equation computes.

  Returns:
    None if the equation does more than a `Convolution` can say: it has one or three axes, dilates
    its input, crops it, groups the batch, converts numbers, or returns its axes in a new order.
  """
  x, kernel = (operand.aval for operand in equation.inputs)
  result, params = equation.outputs[0].aval, equation.params
  numbers, strides = params["dimension_numbers"], params["window_strides"]
  special = (
    x.ndim != 4
    or not x.dtype == kernel.dtype == result.dtype
    or set(params["lhs_dilation"]) != {1}
    or params["batch_group_count"] != 1
    or numbers.lhs_spec != numbers.out_spec
    or min(min(pair) for pair in params["padding"]) < 0
  )
  if special:
    return None
  batch, channel, *spatial = numbers.lhs_spec
  features, inputs, *window = numbers.rhs_spec
  image_axes, kernel_axes = (batch, *spatial, channel), (*window, inputs, features)
  return Convolution(
    tuple(x.shape[axis] for axis in image_axes),
    tuple(kernel.shape[axis] for axis in kernel_axes),
    tuple(strides),
    (tuple(params["padding"][0]), tuple(params["padding"][1])),
    tuple(params["rhs_dilation"]),
    params["feature_group_count"],
    x.dtype.name,
    image_axes,
    kernel_axes,
  )
