"""Simulates an int8 file in JAX, in float32 and with gradients, so that a network can train in it.

An int8 file stores a value x as a whole number q = round(x / scale) + zero, cut off at 0 and 255.
The simulation computes (q - zero) * scale instead: a float32 number on the same grid. It runs the
traced deploy form equation by equation, and rounds each value at the place where the file does. The
translation to ONNX says which equation makes which tensor of the file. A rounding passes gradients
on unchanged (the straight-through estimator). Beyond the ends of a range, no gradient passes.

  scale 0.5, zero 0:   0.7 -> q = 1 -> 0.5, gradient 1;   200.0 -> q = 255 -> 127.5, gradient 0

References:
  Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, CVPR 2018, section 3. https://arxiv.org/abs/1712.05877
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax.errors import InputError
from repjax.inference import inference
from repjax.onnx import with_tensors
from repjax.onnx.translation import IMAGES, EquationTensors
from repjax.program import Equation, Program, Rule, interpret, trace
from repjax.quantization.roundings import Roundings, missing_in
from repjax.quantization.weights import quantized

_LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}
"""The smallest and the largest whole number that an activation can be stored as."""

_MOVING = {"broadcast_in_dim", "concatenate", "copy", "reduce_window_max", "reshape", "slice"}
_MOVING |= {"squeeze", "transpose"}
"""Primitives whose results are numbers of their operands: rounded before, rounded after."""


def simulated(
  model: nn.Module,
  variables: Mapping[str, Any],
  roundings: Roundings,
  *,
  image_size: int | tuple[int, int],
) -> Callable[[Any, jax.Array], Any]:
  """Returns a function that computes what a model's int8 file computes, and has gradients.

  Args:
    model: in either form.
    variables: variables of the model. The returned function takes variables of the same shapes.
    roundings: from `roundings_of` for the graph of this model.
    image_size: pixels, one number or (height, width).

  Returns:
    A pure function of a deploy tree {"params": ...} and normalized images (N, H, W, 3). It returns
    in float32 what the file of `quantize_by` computes with this tree. Only the order of sums
    differs: a sum that lies in the middle between two steps may be rounded to the other step.

  Raises:
    InputError: the roundings belong to a different network, or as in `repjax.onnx.to_onnx`.
  """
  function, tree, *_ = inference(
    model,
    variables,
    image_size=image_size,
    dtype="float32",
    preprocessing=None,
    probabilities=False,
  )
  proto, tensors = with_tensors(function, tree, image_size, np.dtype(np.float32), False)
  if missing := missing_in(proto, (*roundings.tensors, *roundings.weights)):
    raise InputError(
      f"these roundings are of another network: {type(model).__name__} has no {missing[0]}. Take "
      "those that repjax.quantization.roundings_of gives for its graph"
    )

  def run(tree: Any, images: jax.Array) -> Any:
    program = trace(function, tree, images)
    rounder = _Rounder(roundings, program, tensors)
    inputs = [*jax.tree.leaves(tree), rounder.round_tensor(IMAGES, images)]
    outputs = interpret(
      program,
      inputs,
      rounder.compute,
      constant=lambda constant: constant.array,
      keep=rounder.leaves_alone,
    )
    return jax.tree.unflatten(jax.tree.structure(program.results), outputs)

  return run


class _Rounder:
  """The rounding of values by the names of their tensors, in one run of a program.

  Args:
    roundings: which tensors are rounded, and how.
    program: the traced function.
    tensors: from the translation of the same function, one entry for each equation.

  Raises:
    InputError: the program has different equations than the translated function.
  """

  def __init__(self, roundings: Roundings, program: Program, tensors: Sequence[EquationTensors]):
    # The translation traced a symbolic batch, and this program was traced for images of one shape.
    if [e.primitive for e in program.equations] != [each.primitive for each in tensors]:
      raise InputError(
        "this model computes in another way for these images than for those of its ONNX file. Let "
        "it ask for shapes only in ways that hold for all"
      )
    self._how = roundings
    self._program = program
    self._tensors = dict(zip(program.equations, tensors))
    self._names = {
      output: name
      for equation, own in self._tensors.items()
      for output, name in zip(equation.outputs, own.results)
    }
    self._weight_scales: dict[str, jax.Array] = {}
    # By id of an array: the array, which keeps its id from being used again, and its rounding.
    self._rounded: dict[int, tuple[Any, Any]] = {}

  def leaves_alone(self, rule: Rule) -> bool:
    """Checks that nothing is rounded inside a call with a derivative rule.

    Such a call, a ReLU for example, runs as one equation and keeps its derivative. Its results may
    be rounded, since they are rounded after the call.
    """
    inside = self._program.equations[rule.start : rule.stop]
    tensors = [self._tensors[equation] for equation in inside]
    touched = {name for own in tensors for name in (*own.reads, *own.results)}
    touched -= {self._names[output] for output in rule.call.outputs}
    return not touched & {*self._how.tensors, *self._how.weights, *self._how.biases}

  def compute(self, equation: Equation, operands: Sequence[Any]) -> Sequence[Any]:
    """Computes the results of an equation, with operands and results rounded as the file does."""
    tensors = self._tensors.get(equation)
    if tensors is not None:
      operands = self._round_operands(equation, operands, tensors)
    results = equation.run(*operands)
    if equation.primitive in _MOVING:
      self._note_moved(operands, results)
    # A call that keeps its rule is no equation of the translation. Its results have names.
    names = [self._names[output] for output in equation.outputs]
    return [self.round_tensor(name, x) for name, x in zip(names, results)]

  def _round_operands(
    self, equation: Equation, operands: Sequence[jax.Array], tensors: EquationTensors
  ) -> Sequence[jax.Array]:
    """Rounds what a product or a sum reads. Other equations read values as they are."""
    if not tensors.reads:
      return operands
    made = []
    for place, (name, x) in enumerate(zip(tensors.reads, operands)):
      if name in self._how.weights:
        made.append(self._round_weights(name, x, _summed_axes(equation)[place]))
      elif name in self._how.biases:
        made.append(self._round_bias(tensors.layer, x))
      else:
        made.append(self.round_tensor(name, x))
    return made

  def _note_moved(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
    """Notes that results hold the numbers of operands, and so may be rounded already."""
    how = {self._rounded.get(id(x), (x, None))[1] for x in operands}
    # Only if all operands lie on one grid do the results lie on that grid.
    if len(how) == 1:
      self._rounded.update((id(x), (x, *how)) for x in results)

  def round_tensor(self, name: Any, x: jax.Array) -> jax.Array:
    """Rounds an activation to its grid and cuts it off at the ends, if its tensor is rounded.

    A value is rounded once. A second cut would change no number, but would pass no gradient at the
    ends of the range, where a ReLU leaves many values.
    """
    if name not in self._how.tensors:
      return x
    scale, zero = how = tuple(self._how.tensors[name])
    if self._rounded.get(id(x), (x, None))[1] == how:
      return x
    # XLA turns a division by a constant into a product with its inverse, which rounds differently.
    # Bytes of images lie on a grid, many in the middle between two steps, where the last bit
    # decides. The barrier hides that the scale is a constant.
    scale = jax.lax.optimization_barrier(jnp.float32(scale))
    low, high = _LIMITS[self._how.activations]
    # q - zero lies between low - zero and high - zero. The cut comes first: it stops gradients.
    steps = jnp.clip(x / scale, low - zero, high - zero)
    made = _straight_through(jnp.round(steps), steps) * scale
    self._rounded[id(made)] = made, how
    return made

  def _round_weights(self, name: Any, kernel: jax.Array, summed: Sequence[int]) -> jax.Array:
    """Rounds weights, with one scale for each output or one for all, and notes the scales."""
    axes = tuple(range(kernel.ndim)) if self._how.weights[name] else tuple(summed)
    whole, scale = quantized(kernel, axes, self._how.weight_bits)
    self._weight_scales[name] = scale
    return _straight_through(whole.astype(kernel.dtype) * scale, kernel)

  def _round_bias(self, layer: Sequence[Any], bias: jax.Array) -> jax.Array:
    """Rounds a bias to the grid of the sums that it is added to.

    A product of whole numbers counts in steps of the input's scale times the weights' scale.
    """
    source, weight = layer
    if source not in self._how.tensors or weight not in self._weight_scales:
      return bias
    scale = self._how.tensors[source][0] * self._weight_scales[weight]  # for each output, in order
    scale = scale.reshape(bias.shape if scale.size == bias.size else ())
    return _straight_through(jnp.round(bias / scale) * scale, bias)


def _summed_axes(equation: Equation) -> tuple[Sequence[int], Sequence[int]]:
  """Returns the axes of both operands of a product that an output is a sum over.

  Weights may be either operand of a matrix product, and are the second of a convolution.
  """
  numbers = equation.params["dimension_numbers"]
  return numbers[0] if equation.primitive == "dot_general" else ((), numbers.rhs_spec[1:])


def _straight_through(value: jax.Array, exact: jax.Array) -> jax.Array:
  """Returns the value, with gradients as if it were `exact`."""
  return exact + jax.lax.stop_gradient(value - exact)
