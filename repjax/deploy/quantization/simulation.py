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

from repjax.deploy.function import inference
from repjax.deploy.onnx import with_steps
from repjax.deploy.onnx.program import IMAGES, Step, called
from repjax.deploy.quantization.roundings import LIMITS, Roundings
from repjax.deploy.quantization.weights import rounded
from repjax.errors import InputError


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
    in float32 what the file computes that `quantize_by` makes of the tree: the same but for the
    order of sums, and for biases, which the file rounds too, finely.

  Raises:
    InputError: the roundings are of another network, or as in `repjax.deploy.to_onnx`.
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
  names = {tensor for node in proto.graph.node for tensor in (*node.input, *node.output)}
  for name in (*roundings.tensors, *roundings.weights):
    if name not in names:
      raise InputError(
        f"these roundings are of another network: {type(model).__name__} has no {name}; take those "
        "that repjax.deploy.roundings_of gives for its own graph"
      )

  def run(tree: Any, images: jax.Array) -> Any:
    program, shapes = jax.make_jaxpr(function, return_shape=True)(tree, images)
    images = _in_range(images, IMAGES, roundings)
    inputs = [*jax.tree.leaves(tree), images]
    outputs = _run(program.jaxpr, program.consts, inputs, steps, roundings)
    return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

  return run


def _run(
  program: Any,
  consts: Sequence[Any],
  inputs: Sequence[Any],
  steps: Sequence[Step],
  roundings: Roundings,
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
    if inner is not None and _rounds_inside(step, roundings):
      results = _run(*inner, operands, step.inner, roundings)
    else:
      if step.reads:
        operands = _rounded_operands(equation, operands, step, roundings)
      results = _alone(program, equation, operands)
      results = [_in_range(x, name, roundings) for x, name in zip(results, step.results)]
    values.update(zip(equation.outvars, results))
  return [read(variable) for variable in program.outvars]


def _rounds_inside(step: Step, roundings: Roundings) -> bool:
  """Whether anything is rounded in an inner program but its results.

  Another one is run as it stands, with its own derivatives.
  """
  return any(
    any(name in roundings.weights or name in roundings.tensors for name in inner.reads)
    or (set(inner.results) & roundings.tensors.keys()) - set(step.results)
    or _rounds_inside(inner, roundings)
    for inner in step.inner
  )


def _rounded_operands(
  equation: Any, operands: Sequence[jax.Array], step: Step, roundings: Roundings
) -> list[jax.Array]:
  """What a product or a sum reads, rounded: weights by the scales of their outputs."""
  made = []
  for place, (x, name) in enumerate(zip(operands, step.reads)):
    if place != step.kernel:
      made.append(_in_range(x, name, roundings))
    elif name in roundings.weights:
      axes = range(x.ndim) if roundings.weights[name] else _axes_of_sums(equation)[place]
      made.append(_passing(rounded(x, tuple(axes), roundings.weight_bits), x))
    else:
      made.append(x)
  return made


def _axes_of_sums(equation: Any) -> tuple[Sequence[int], Sequence[int]]:
  """The axes of both operands of a product that an output is a sum over."""
  numbers = equation.params["dimension_numbers"]
  return numbers[0] if equation.primitive.name == "dot_general" else ((), numbers.rhs_spec[1:])


def _in_range(x: jax.Array, tensor: str | None, roundings: Roundings) -> jax.Array:
  """A tensor rounded to whole numbers of steps and cut at the ends of its range, if it has one."""
  if tensor not in roundings.tensors:
    return x
  scale, zero = roundings.tensors[tensor]
  low, high = LIMITS[roundings.activations]
  steps = jnp.clip(x / scale, low - zero, high - zero)
  return _passing(jnp.round(steps), steps) * scale


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
