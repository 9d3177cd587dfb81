"""What the products of a program cost: convolutions, multiplications and weights."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from repjax.program import Equation

PRODUCTS = ("conv_general_dilated", "dot_general")


class Counts(NamedTuple):
  """What products cost at the sizes of the arguments.

  Attributes:
    products: number of convolutions and matrix products.
    multiplications: multiply-adds in them.
    parameters: elements of the parameters that are read.
  """

  products: int = 0
  multiplications: int = 0
  parameters: int = 0


def multiplications(equation: Equation) -> int:
  """Returns the multiply-adds of a convolution or matrix product, taps on padding included."""
  (result,) = equation.outputs
  size = math.prod(result.aval.shape)
  if equation.primitive == "dot_general":
    (contract, _), _ = equation.params["dimension_numbers"]
    return size * math.prod(equation.inputs[0].aval.shape[axis] for axis in contract)
  kernel = equation.inputs[1].aval.shape
  return size * math.prod(kernel) // kernel[equation.params["dimension_numbers"].rhs_spec[0]]


def counted(equations: Iterable[Equation], parameters: int) -> Counts:
  """Returns what the products among equations cost."""
  products = [each for each in equations if each.primitive in PRODUCTS]
  return Counts(len(products), sum(map(multiplications, products)), parameters)
