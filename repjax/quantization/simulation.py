"""Simulates an int8 file in JAX, in float32 and with gradients, so that a network can train in it.

An int8 file is an ONNX file of the deploy form that computes in 8 bits. The file stores a value x
as a whole number q = round(x / scale) + zero. The numbers that can be stored this way,
(q - zero) * scale, are the grid of this scale and zero. To round a value is to replace the value by
the nearest number of its grid. The simulation stays in float32, and rounds every value that the
file rounds.

- Activations are cut off at q = 0 and 255 for uint8, or at -128 and 127 for int8.
- Weights have zero 0. Their q spans -64 to 64 with 7 bits, or -127 to 127 with 8 bits.
- Biases have zero 0, and their q has 32 bits.

An example for activations in uint8:

  scale 0.5, zero 0:   0.7 -> q = 1 -> 0.5, gradient 1;   200.0 -> q = 255 -> 127.5, gradient 0

Gradients. A rounding passes gradients on unchanged (the straight-through estimator). Beyond the
ends of an activation's grid, no gradient passes.

What is rounded. A tensor is a value in the file, and has a name. `Roundings` gives a grid to some
names. JAX has no tensors with names: it traces the deploy form into a program, a list of equations
(`repjax.program`). The translation to ONNX makes the file from the same list, and notes for each
equation the names of the tensors that the equation makes (`EquationTensors`). For some products and
sums, the translation also notes the tensors that the equation reads. The simulation runs the
equations in order, and looks up the grids of their operands and results by these names. A call with
a derivative rule runs whole if the file rounds no value inside the call.

References:
  Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, CVPR 2018, section 3. https://arxiv.org/abs/1712.05877
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax.errors import InputError
from repjax.functions import name_of
from repjax.inference import inference
from repjax.onnx import with_tensors
from repjax.onnx.translation import IMAGES, EquationTensors
from repjax.program import Equation, Program, RuleCall, interpret, trace
from repjax.quantization.roundings import Roundings, missing_in
from repjax.quantization.weights import quantized

_LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}
"""The smallest and the largest whole number that an activation can be stored as."""

_MOVING = {"broadcast_in_dim", "concatenate", "copy", "reduce_window_max", "reshape", "slice"}
_MOVING |= {"squeeze", "transpose"}
"""Primitives that only move or select numbers.

Results lie on the grid of the operands, if all operands lie on one grid.
"""


def simulated(
  model: Any,
  variables: Any,
  roundings: Roundings,
  *,
  image_size: int | tuple[int, int],
) -> Callable[[Any, jax.Array], Any]:
  """Returns a function that computes what a model's int8 file computes, and has gradients.

  Args:
    model: in either form; or a function or a fused function, as in `repjax.onnx.to_onnx`.
    variables: variables of the model. Only their shapes matter.
    roundings: from `roundings_of` for the graph of this model.
    image_size: pixels, one number or (height, width).

  Returns:
    A pure function of a deploy tree {"params": ...}, or of the parameters of the function, and of
    normalized images (N, H, W, 3). It returns
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
  # The file itself is not needed, only the names of its tensors.
  proto, tensors = with_tensors(function, tree, image_size, np.dtype(np.float32), False)
  if missing := missing_in(proto, (*roundings.tensors, *roundings.weights)):
    raise InputError(
      f"these roundings are of another network: {name_of(model)} has no {missing[0]}. Take "
      "those that repjax.quantization.roundings_of gives for its graph"
    )

  def simulate(tree: Any, images: jax.Array) -> Any:
    program = trace(function, tree, images)
    rounder = _Rounder(roundings, program, tensors)
    # Parameters are rounded where an equation reads them: only there do they have names.
    inputs = [*jax.tree.leaves(tree), rounder.round_tensor(IMAGES, images)]
    outputs = interpret(
      program,
      inputs,
      rounder.compute,
      constant=lambda constant: constant.array,
      keep=rounder.runs_whole,
    )
    return jax.tree.unflatten(jax.tree.structure(program.results), outputs)

  return simulate


class _Rounder:
  """The rounding of all values in one run of a program.

  Args:
    roundings: which tensors are rounded, and how.
    program: the traced function.
    tensors: from the translation of the same function, one entry for each equation.

  Raises:
    InputError: the program has different equations than the translated function.
  """

  def __init__(self, roundings: Roundings, program: Program, tensors: Sequence[EquationTensors]):
    # The translation traced a symbolic batch, and this program was traced for images of one shape.
    # Their equations can therefore differ.
    if [e.primitive for e in program.equations] != [each.primitive for each in tensors]:
      raise InputError(
        "this model computes in another way for these images than for those of its ONNX file. Let "
        "it ask for shapes only in ways that hold for all"
      )
    self._roundings = roundings
    self._program = program
    self._tensors = dict(zip(program.equations, tensors))
    self._names = {
      output: name
      for equation, own in self._tensors.items()
      for output, name in zip(equation.outputs, own.results)
    }
    # Tensor name of rounded weights to their scales, which the grid of a bias needs.
    self._weight_scales: dict[str, jax.Array] = {}
    # Id of an array to the array and the grid on which it lies, a tuple (scale, zero). The array is
    # held so that Python gives its id to no other array.
    self._grids: dict[int, tuple[Any, tuple[float, int] | None]] = {}

  def runs_whole(self, rule: RuleCall) -> bool:
    """Checks whether a call with a derivative rule can stay one equation.

    A whole call keeps its derivative rule. ReLU needs it: its rule gives the gradient 0 at 0, where
    the `max` inside gives 0.5. A call cannot run whole if the file rounds a value inside. Results
    of the call may be rounded, because they are rounded after the call.
    """
    inside = self._program.equations[rule.start : rule.stop]
    tensors = [self._tensors[equation] for equation in inside]
    touched = {name for own in tensors for name in (*own.reads, *own.results)}
    touched -= {self._names[output] for output in rule.call.outputs}
    rounded = self._roundings
    return not touched & {*rounded.tensors, *rounded.weights, *rounded.biases}

  def compute(self, equation: Equation, operands: Sequence[Any]) -> Sequence[Any]:
    """Computes the results of an equation, with operands and results rounded as the file does."""
    # A kept call has no `EquationTensors`. Its results keep the names of the inner results.
    tensors = self._tensors.get(equation)
    if tensors is not None:
      operands = self._round_operands(equation, operands, tensors)
    results = equation.run(*operands)
    if equation.primitive in _MOVING:
      self._pass_grid_on(operands, results)
    names = [self._names[output] for output in equation.outputs]
    return [self.round_tensor(name, x) for name, x in zip(names, results)]

  def _round_operands(
    self, equation: Equation, operands: Sequence[jax.Array], tensors: EquationTensors
  ) -> Sequence[jax.Array]:
    """Rounds the operands for which the translation noted tensor names.

    Products with weights have names in `reads`, and so have most additions and concatenations.
    Other equations, such as products of two computed operands, take their operands as they are.
    """
    if not tensors.reads:
      return operands
    rounded = []
    for place, (name, x) in enumerate(zip(tensors.reads, operands)):
      if name in self._roundings.weights:
        rounded.append(self._round_weights(name, x, _summed_axes(equation)[place]))
      elif name in self._roundings.biases:
        rounded.append(self._round_bias(tensors.layer, x))
      else:
        rounded.append(self.round_tensor(name, x))
    return rounded

  def _grid_of(self, x: Any) -> tuple[float, int] | None:
    """Returns the grid on which an array is known to lie, or None."""
    _, grid = self._grids.get(id(x), (x, None))
    return grid

  def _pass_grid_on(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
    """Notes the grid of results that hold only numbers of the operands."""
    grids = {self._grid_of(x) for x in operands}
    # Operands on different grids, as in a concatenation, leave the results on no single grid.
    if len(grids) == 1:
      (grid,) = grids
      self._grids.update((id(x), (x, grid)) for x in results)

  def round_tensor(self, name: Any, x: jax.Array) -> jax.Array:
    """Rounds an activation to the grid of its tensor, and cuts it off at the ends of the grid.

    An activation that lies on this grid already is returned as it is. A second cut would change no
    number, but would weaken gradients. At exactly an end of its range, `clip` passes only half of a
    gradient, and a ReLU leaves many values there.

    Args:
      name: name of the tensor. The values of a tensor without roundings stay as they are.
      x: the activation, of any shape.
    """
    if name not in self._roundings.tensors:
      return x
    scale, zero = self._roundings.tensors[name]
    grid = scale, zero
    if self._grid_of(x) == grid:
      return x
    # XLA turns a division by a constant into a product with its inverse, which rounds differently.
    # Bytes of images lie on a grid, many in the middle between two steps, where the last bit
    # decides. The barrier hides that the scale is a constant.
    scale = jax.lax.optimization_barrier(jnp.float32(scale))
    low, high = _LIMITS[self._roundings.activations]
    # `steps` is q - zero before the rounding, so it is cut at low - zero and high - zero. The cut
    # stays outside of the straight-through estimator, and so stops gradients beyond the ends.
    steps = jnp.clip(x / scale, low - zero, high - zero)
    rounded = _straight_through(jnp.round(steps), steps) * scale
    self._grids[id(rounded)] = rounded, grid
    return rounded

  def _round_weights(self, name: Any, kernel: jax.Array, summed: Sequence[int]) -> jax.Array:
    """Rounds weights, and notes their scales for the bias.

    Args:
      name: name of the weights' tensor, which decides between one scale for each output and one
        scale for all.
      kernel: weights, of any rank.
      summed: axes of the kernel that an output is a sum over.
    """
    one_scale = self._roundings.weights[name]
    axes = tuple(range(kernel.ndim)) if one_scale else tuple(summed)
    whole, scale = quantized(kernel, axes, self._roundings.weight_bits)
    self._weight_scales[name] = scale
    return _straight_through(whole.astype(kernel.dtype) * scale, kernel)

  def _round_bias(self, layer: Sequence[Any], bias: jax.Array) -> jax.Array:
    """Rounds a bias to the grid of the sums that it is added to.

    The sums are sums of products of whole numbers. They count in steps of the input's scale times
    the weights' scale, and the file stores the bias in the same steps.

    Args:
      layer: names of the tensors of the layer's input and weights.
      bias: the bias, with as many numbers as the layer has outputs.
    """
    source, weight = layer
    # Unless both input and weights are rounded, the layer runs in float32, and so does its bias.
    if source not in self._roundings.tensors or weight not in self._weight_scales:
      return bias
    input_scale, _ = self._roundings.tensors[source]
    scale = input_scale * self._weight_scales[weight]
    # The scales lie along the output axis of the kernel, and have the order of the bias. A single
    # scale for all outputs becomes a scalar.
    scale = scale.reshape(bias.shape if scale.size == bias.size else ())
    return _straight_through(jnp.round(bias / scale) * scale, bias)


def _summed_axes(equation: Equation) -> tuple[Sequence[int], Sequence[int]]:
  """Returns the summed axes of each possible weight operand.

  A convolution's first entry stays empty, because weights are always its second operand. Weights of
  a matrix product may be either operand.
  """
  numbers = equation.params["dimension_numbers"]
  if equation.primitive == "dot_general":
    summed, _ = numbers  # the second item lists batch axes
    return summed
  # `rhs_spec` lists the axes of the kernel: outputs, inputs, and one for each spatial axis.
  return (), numbers.rhs_spec[1:]


def _straight_through(value: jax.Array, exact: jax.Array) -> jax.Array:
  """Returns the value, with gradients as if it were `exact`."""
  return exact + jax.lax.stop_gradient(value - exact)
