"""Counts of the products in a program: convolutions, multiplications and weights."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from repjax.program import Equation, inner_programs

PRODUCTS = ("conv_general_dilated", "dot_general")


class Counts(NamedTuple):
  """The cost of products at the sizes of the arguments.

  Attributes:
    products: number of convolutions and matrix products.
    multiplications: multiply-adds in them.
    parameters: elements of the parameters that are read.
  """

  products: int = 0
  multiplications: int = 0
  parameters: int = 0

  def times(self, steps: int) -> "Counts":
    """Returns what a loop of some steps costs. Its products and parameters are counted once."""
    return self._replace(multiplications=self.multiplications * steps)


def multiplications(equation: Equation) -> int:
  """Returns the multiply-adds of a convolution or matrix product, taps on padding included."""
  (result,) = equation.outputs
  size = math.prod(result.aval.shape)
  if equation.primitive == "dot_general":
    (contract, _), _ = equation.params["dimension_numbers"]
    return size * math.prod(equation.inputs[0].aval.shape[axis] for axis in contract)
  kernel = equation.inputs[1].aval.shape
  return size * math.prod(kernel) // kernel[equation.params["dimension_numbers"].rhs_spec[0]]


def counts_of(equation: Equation) -> Counts:
  """Returns what the products of an equation cost, those in programs that it holds included.

  The products of a loop's body are counted once, and their multiplications for each step. A loop of
  unknown length counts as one step, and a choice as all its branches.
  """
  if equation.primitive in PRODUCTS:
    return Counts(1, multiplications(equation))
  inner = total(counts_of(each) for held in inner_programs(equation) for each in held.equations)
  return inner.times(equation.params["length"] if equation.primitive == "scan" else 1)


def total(counts: Iterable[Counts]) -> Counts:
  """Returns a sum of counts."""
  rows = list(counts)
  return Counts(*(sum(column) for column in zip(*rows))) if rows else Counts()
