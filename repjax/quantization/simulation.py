"""8 bits in JAX: the traced deploy form with all that rounded which a file in QDQ form rounds.

What ONNX Runtime will compute with whole numbers is computed here in float32 with rounded ones, and
can be differentiated: a rounding passes gradients on as they are (the straight-through estimator),
a cut at the end of a range passes none. The translation to ONNX says which result of the trace is
which tensor of the file.

References:
  Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, CVPR 2018, section 3. https://arxiv.org/abs/1712.05877
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from repjax.errors import InputError
from repjax.inference import inference
from repjax.onnx import with_steps
from repjax.onnx.translation import IMAGES, Step, called
from repjax.quantization.roundings import Roundings, missing_in
from repjax.quantization.weights import quantized

_LIMITS = {"uint8": (0, 255), "int8": (-128, 127)}  # the whole numbers of activations
# What hands numbers on as they are.
_MOVING = {"broadcast_in_dim", "concatenate", "copy", "reduce_window_max", "reshape", "slice"}
_MOVING |= {"squeeze", "transpose"}


def simulated(
  model: nn.Module,
  variables: Mapping[str, Any],
  roundings: Roundings,
  *,
  image_size: int | tuple[int, int],
) -> Callable[[Any, jax.Array], Any]:
  """A model's deploy form in 8 bits, as a function that can be differentiated.

  Args:
    model: in either form.
    variables: of the model; the function takes others of the same shapes.
    roundings: from `roundings_of` for the graph of this model.
    image_size: pixels, one number or (height, width).

  Returns:
    A pure function of a deploy tree {"params": ...} and normalized images (N, H, W, 3). It returns
    in float32 what the file computes that `quantize_by` makes of the tree, but for the order of
    sums: a mean that lies in the middle between two steps may be rounded to the other one.

  Raises:
    InputError: the roundings are of another network, or as in `repjax.onnx.to_onnx`.
  """
  function, tree, *_ = inference(
    model,
    variables,
    image_size=image_size,
    dtype="float32",
    preprocessing=None,
    probabilities=False,
  )
  proto, steps = with_steps(function, tree, image_size, np.dtype(np.float32), False)
  if missing := missing_in(proto, (*roundings.tensors, *roundings.weights)):
    raise InputError(
      f"these roundings are of another network: {type(model).__name__} has no {missing[0]}; take "
      "those that repjax.quantization.roundings_of gives for its own graph"
    )

  def run(tree: Any, images: jax.Array) -> Any:
    program, shapes = jax.make_jaxpr(function, return_shape=True)(tree, images)
    rounder = _Rounder(roundings)
    inputs = [*jax.tree.leaves(tree), rounder.tensor(IMAGES, images)]
    outputs = _run(program.jaxpr, program.consts, inputs, steps, rounder)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

  return run


def _run(
  program: Any,
  consts: Sequence[Any],
  inputs: Sequence[Any],
  steps: Sequence[Step],
  rounder: "_Rounder",
) -> list[Any]:
  """What a traced program returns, rounded step by step."""
  values: dict[Any, Any] = dict(zip(program.constvars, consts)) | dict(zip(program.invars, inputs))

  def read(variable: Any) -> Any:
    return variable.val if hasattr(variable, "val") else values[variable]

  if [e.primitive.name for e in program.eqns] != [step.primitive for step in steps]:
    raise InputError(
      "this model computes in another way for these images than for those of its ONNX file; let it "
      "ask for shapes only in ways that hold for all"
    )
  for equation, step in zip(program.eqns, steps):
    operands, inner = [read(variable) for variable in equation.invars], called(equation)
    if inner is not None and rounder.rounds_inside(step):
      results = _run(*inner, operands, step.inner, rounder)
    else:
      operands = rounder.operands(equation, operands, step)
      results = _alone(program, equation, operands)
      if step.primitive in _MOVING:
        rounder.moved(operands, results)
      results = [rounder.tensor(name, x) for name, x in zip(step.results, results)]
    values.update(zip(equation.outvars, results))
  return [read(variable) for variable in program.outvars]


class _Rounder:
  """What rounds values by the names of their tensors, in one run of a program."""

  def __init__(self, roundings: Roundings):
    self._how = roundings
    self._named = {*roundings.tensors, *roundings.weights, *roundings.biases}
    self._steps: dict[str, jax.Array] = {}  # of weights
    self._done: dict[int, tuple[Any, Any]] = {}  # by id: a value, and how it was rounded

  def rounds_inside(self, step: Step) -> bool:
    """Whether anything is rounded in an inner program but its results.

    Another one is run as it stands, with its own derivatives.
    """
    return any(
      self._named & {*inner.reads, *inner.results} - {*step.results} or self.rounds_inside(inner)
      for inner in step.inner
    )

  def operands(
    self, equation: Any, operands: Sequence[jax.Array], step: Step
  ) -> Sequence[jax.Array]:
    """What a product or a sum reads, rounded."""
    if not step.reads:
      return operands
    made = []
    for place, (name, x) in enumerate(zip(step.reads, operands)):
      if name in self._how.weights:
        made.append(self._weights(name, x, _axes_of_sums(equation)[place]))
      elif name in self._how.biases:
        made.append(self._bias(step.layer, x))
      else:
        made.append(self.tensor(name, x))
    return made

  def moved(self, operands: Sequence[Any], results: Sequence[Any]) -> None:
    """Notes that results hold the numbers of operands, which may be rounded already."""
    how = {self._done.get(id(x), (x, None))[1] for x in operands}
    if len(how) == 1:
      self._done.update((id(x), (x, *how)) for x in results)

  def tensor(self, name: Any, x: jax.Array) -> jax.Array:
    """In whole numbers of steps and cut at the ends of its range, where it is rounded.

    Once: behind a second cut there is no gradient at the ends, where a ReLU leaves many.
    """
    if name not in self._how.tensors:
      return x
    scale, zero = how = tuple(self._how.tensors[name])
    if self._done.get(id(x), (x, None))[1] == how:
      return x
    # Behind the barrier it is no constant, of whose inverse XLA would make a product: bytes lie on
    # a grid, many in the middle between two steps, where the last bit decides.
    scale = jax.lax.optimization_barrier(jnp.float32(scale))
    low, high = _LIMITS[self._how.activations]
    steps = jnp.clip(x / scale, low - zero, high - zero)
    made = _passing(jnp.round(steps), steps) * scale
    self._done[id(made)] = made, how
    return made

  def _weights(self, name: Any, kernel: jax.Array, sums: Sequence[int]) -> jax.Array:
    axes = tuple(range(kernel.ndim)) if self._how.weights[name] else tuple(sums)
    whole, scale = quantized(kernel, axes, self._how.weight_bits)
    self._steps[name] = scale
    return _passing(whole.astype(kernel.dtype) * scale, kernel)

  def _bias(self, layer: Sequence[Any], bias: jax.Array) -> jax.Array:
    """In steps of what the layer reads times those of its weights."""
    source, weight = layer
    if source not in self._how.tensors or weight not in self._steps:
      return bias
    scale = self._how.tensors[source][0] * self._steps[weight]  # of each output, in its order
    scale = scale.reshape(bias.shape if scale.size == bias.size else ())
    return _passing(jnp.round(bias / scale) * scale, bias)


def _axes_of_sums(equation: Any) -> tuple[Sequence[int], Sequence[int]]:
  """The axes of both operands of a product that an output is a sum over."""
  numbers = equation.params["dimension_numbers"]
  return numbers[0] if equation.primitive.name == "dot_general" else ((), numbers.rhs_spec[1:])


def _passing(value: jax.Array, like: jax.Array) -> jax.Array:
  """The value, with gradients as if it were `like`."""
  return like + jax.lax.stop_gradient(value - like)


def _alone(program: Any, equation: Any, arrays: Sequence[Any]) -> Sequence[Any]:
  """The results of one equation of a program, with the derivatives that are its own."""
  given = {
    variable: array
    for variable, array in zip(equation.invars, arrays)
    if not hasattr(variable, "val")
  }
  one = program.replace(
    constvars=[],
    invars=list(given),
    outvars=equation.outvars,
    eqns=[equation],
    debug_info=program.debug_info.with_unknown_names(),
  )
  return jax.core.eval_jaxpr(one, (), *given.values())
