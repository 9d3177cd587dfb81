"""8 bits in JAX: the traced deploy form, with what its layers read and their weights rounded.

What ONNX Runtime will compute with whole numbers is computed here in float32 with rounded ones, and
can be differentiated: a rounding passes gradients on as they are (the straight-through estimator),
a cut at the end of a range passes none.

References:
  Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference, CVPR 2018, section 3. https://arxiv.org/abs/1712.05877
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.core
import jax.numpy as jnp

from repjax.deploy.onnx.program import called
from repjax.deploy.quantization.graph import title_of
from repjax.deploy.quantization.roundings import LIMITS, Rounding
from repjax.deploy.quantization.weights import rounded
from repjax.errors import InputError

Function = Callable[[Any, jax.Array], Any]
_PRODUCTS = {"conv_general_dilated", "dot_general"}


def simulated(
  function: Function,
  how: Sequence[Rounding],
  *,
  activations: str = "uint8",
  weight_bits: int = 7,
) -> Function:
  """The same function, with what goes into its layers rounded; it can be differentiated.

  Args:
    function: of a deploy tree and images, in float32, such as a deploy form's `apply`.
    how: from `roundings_of` for a graph of the same function.
    activations: as it was there.
    weight_bits: 7 or 8, see `repjax.deploy.quantize`.

  Returns:
    A pure function of the tree and images. It raises InputError where its layers are not those of
    `how`.
  """

  def rounding(tree: Any, images: jax.Array) -> Any:
    program, shapes = jax.make_jaxpr(function, return_shape=True)(tree, images)
    left = iter(how)
    inputs = [(leaf, False) for leaf in jax.tree.leaves(tree)] + [(images, True)]
    layer = _layer(left, LIMITS[activations], weight_bits)
    outputs = _run(program.jaxpr, program.consts, inputs, layer, "")
    if missing := [row.layer for row in left]:
      raise InputError(f"the network has no layers {', '.join(missing)}, which were calibrated")
    return jax.tree.unflatten(jax.tree.structure(shapes), [value for value, _ in outputs])

  return rounding


_Operand = tuple[Any, bool]
"""A value, and whether it depends on the images."""


def _layer(
  left: Iterator[Rounding], limits: tuple[int, int], bits: int
) -> Callable[[Any, list[_Operand], str], list[jax.Array]]:
  """What puts roundings into one product of images and weights after the other."""

  def rounded_operands(equation: Any, operands: list[_Operand], scope: str) -> list[jax.Array]:
    row, title = next(left, None), title_of(scope)
    if row is None or row.layer != title:
      raise InputError(
        f"the network has a layer {title} where {row.layer if row else 'nothing'} was calibrated; "
        "it is another network, or has changed since: calibrate this one"
      )
    sums = _axes_of_sums(equation)
    return [
      _in_range(value, row, limits)
      if from_images
      else _passing(rounded(value, tuple(range(value.ndim)) if row.together else axes, bits), value)
      for (value, from_images), axes in zip(operands, sums)
    ]

  return rounded_operands


def _in_range(x: jax.Array, row: Rounding, limits: tuple[int, int]) -> jax.Array:
  """Rounded to whole numbers of steps, and cut at the ends of the range."""
  steps = jnp.clip(x / row.scale, limits[0] - row.zero, limits[1] - row.zero)
  return _passing(jnp.round(steps), steps) * row.scale


def _passing(value: jax.Array, like: jax.Array) -> jax.Array:
  """The value, with gradients as if it were `like`."""
  return like + jax.lax.stop_gradient(value - like)


def _axes_of_sums(equation: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The axes of both operands that an output is a sum over."""
  numbers = equation.params["dimension_numbers"]
  if equation.primitive.name == "dot_general":
    contracted, others = numbers[0]
    return tuple(contracted), tuple(others)
  return (), tuple(numbers.rhs_spec[1:])


def _run(
  jaxpr: Any, consts: Sequence[Any], inputs: Sequence[_Operand], layer: Any, scope: str
) -> list[_Operand]:
  """What a traced program returns, its layers' operands rounded."""
  values: dict[Any, _Operand] = dict(zip(jaxpr.constvars, [(const, False) for const in consts]))
  values.update(zip(jaxpr.invars, inputs))

  def read(variable: Any) -> _Operand:
    return (variable.val, False) if hasattr(variable, "val") else values[variable]

  for equation in jaxpr.eqns:
    here = "/".join(filter(None, (scope, str(equation.source_info.name_stack))))
    operands = [read(variable) for variable in equation.invars]
    from_images = any(flag for _, flag in operands)
    inner = called(equation)
    if inner is not None and from_images and _has_products(inner[0]):
      results = _run(*inner, operands, layer, here)
    else:
      arrays = [value for value, _ in operands]
      if equation.primitive.name in _PRODUCTS and sum(flag for _, flag in operands) == 1:
        arrays = layer(equation, operands, here)
      results = [(value, from_images) for value in _alone(jaxpr, equation, arrays)]
    values.update(zip(equation.outvars, results))
  return [read(variable) for variable in jaxpr.outvars]


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


def _has_products(program: Any) -> bool:
  """Whether there is a layer in a program; another is run as it stands, with its own gradients."""
  return any(
    equation.primitive.name in _PRODUCTS or (inner is not None and _has_products(inner[0]))
    for equation in program.eqns
    for inner in [called(equation)]
  )
