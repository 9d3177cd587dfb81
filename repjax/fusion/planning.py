"""Plans a fused program: meets the equations in order and decides what is merged.

An equation whose operands depend on parameters alone becomes an expression. An affine equation
becomes a sum of terms, and nothing is computed yet. Any other equation is an instruction, before
which its operands are computed. A value that is read more than once is computed once, so that no
kernel is copied.

A sum of terms is computed as late as possible, with all its terms in view: an average pool and the
1x1 convolution after it merge only if a 3x3 convolution stands beside them.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax.numpy as jnp

from repjax.fusion import arithmetic, channels, contracting, products, views
from repjax.fusion.arithmetic import Given
from repjax.fusion.choice import best_product, best_sum, is_norm, norm_reason
from repjax.fusion.contractions import Contraction
from repjax.fusion.cost import grouped, reasons_apart
from repjax.fusion.counts import PRODUCTS
from repjax.fusion.emission import merge_of
from repjax.fusion.expressions import Expression, Expressions
from repjax.fusion.layouts import Layout
from repjax.fusion.parameters import Parameters
from repjax.fusion.plan import Input, Instruction, constant_array, has_effects, live
from repjax.fusion.report import Report
from repjax.fusion.values import (
  Affine,
  Node,
  Refusal,
)
from repjax.program import Constant, Equation, Operand, Variable

RULES = {**arithmetic.RULES, **products.RULES, **views.RULES, **channels.RULES}
_FREE = {"broadcast_in_dim", "convert_element_type", "copy", "name", "reshape", "squeeze"}
_FREE |= {"transpose"}
"""Affine equations that cost next to nothing, so that saving them is no reason to merge."""


class Planner:
  """The instructions of a fused program under construction.

  Attributes:
    parameters: expressions of what depends on parameters alone.
    nodes: the value of each variable that depends on the arguments.
    instructions: what has been decided so far.
    hints: for each stored expression the kernel of its merge, and what it is.
    report: what was merged, and what was not for which reason.
  """

  def __init__(
    self,
    equations: Sequence[Equation],
    outputs: Sequence[Operand],
    table: Expressions,
    growth: float,
    apart: Iterable[int] = (),
  ):
    self.equations = live(equations, outputs, has_effects)
    self.apart = {self.equations[place] for place in apart}
    self.sizes: dict[int, int] = {}
    self.outputs = outputs
    self.growth = growth
    self.table = table
    self.parameters = Parameters(table)
    self.nodes: dict[Variable, Node] = {}
    self.instructions: list[Instruction] = []
    self.hints: dict[Expression, tuple[Expression, str]] = {}
    self.report = Report()
    self._copied: set[Equation] = set()
    self._readers: dict[Variable, list[str]] = {}
    for equation in self.equations:
      for each in equation.inputs:
        if isinstance(each, Variable):
          self._readers.setdefault(each, []).append(equation.primitive)
    for each in outputs:
      if isinstance(each, Variable):
        self._readers.setdefault(each, []).append("output")

  def add_parameter(self, variable: Variable, index: int) -> None:
    """Notes that an input of the program is a parameter."""
    self.parameters.values[variable] = self.table.leaf(index, variable.aval)
    self.sizes[index] = math.prod(variable.aval.shape)

  def add_argument(self, variable: Variable) -> None:
    """Notes that an input of the program is an argument."""
    self.nodes[variable] = Node(variable, reads=self._reads(variable), computed=True)

  def run(self) -> list[Input]:
    """Plans all equations, and returns the outputs."""
    for equation in self.equations:
      if all(each not in self.nodes for each in equation.inputs) and not has_effects(equation):
        self.parameters.add(equation, [self._expression(each) for each in equation.inputs])
      else:
        self._add(equation)
    return [self._input(each) for each in self.outputs]

  def _reads(self, variable: Variable) -> int:
    return len(self._readers.get(variable, ()))

  def _operand(self, operand: Operand) -> Node | Expression:
    if isinstance(operand, Variable) and operand in self.nodes:
      return self.nodes[operand]
    return self._expression(operand)

  def _expression(self, operand: Operand) -> Expression:
    if isinstance(operand, Constant):
      return self.table.constant(constant_array(operand))
    return self.parameters.values[operand]

  def _add(self, equation: Equation) -> None:
    """Adds an equation that depends on the arguments."""
    made = self._made(equation)
    for variable in equation.outputs:
      self.nodes[variable] = Node(variable, equation, reads=self._reads(variable))
    if made is None or isinstance(made, Layout):
      self._emit(equation)
    if made is None:
      return
    node = self.nodes[equation.outputs[0]]
    if isinstance(made, Affine):
      node.affine = made
    elif isinstance(made, Contraction):
      node.product = made
    else:
      node.layout = made
    if node.reads > 1 and not self._stays_open(node):
      self.compute(node)

  def _made(self, equation: Equation) -> Affine | Contraction | Layout | None:
    """Returns what an equation makes by the first rule that fits, None if it is opaque."""
    if len(equation.outputs) != 1 or equation in self.apart:
      return None
    if not jnp.issubdtype(equation.outputs[0].aval.dtype, jnp.floating):
      return None
    given, reason = self._given(equation), None
    open_product = any(isinstance(each, Node) and each.product for each in given.operands)
    for rules in (contracting.RULES, RULES) if open_product else (RULES, contracting.RULES):
      rule = rules.get(equation.primitive)
      try:
        made = rule(given) if rule else None
      except Refusal as refusal:
        made, reason = None, str(refusal)
      if made is not None:
        return made
    if reason:
      self.report.add_left(equation.scope, equation.primitive, reason)
    return None

  def _given(self, equation: Equation) -> Given:
    operands = [self._operand(each) for each in equation.inputs]
    compact, precise = (
      [
        others.get(each, operand) if isinstance(each, Variable) else operand
        for each, operand in zip(equation.inputs, operands)
      ]
      for others in (self.parameters.compact, self.parameters.precise)
    )
    return Given(equation, self.table, operands, compact, precise)

  def _stays_open(self, node: Node) -> bool:
    """Checks if a value that is read more than once need not be computed.

    A view costs nothing. A norm may vanish in all products that read it.
    """
    affine = node.affine
    if affine is None:
      return node.product is None
    readers = {*self._readers[node.variable]}
    return affine.is_view or (affine.linear and readers <= {*PRODUCTS})

  def compute(self, node: Node) -> None:
    """Adds the instruction that computes a node, if there is none yet."""
    if node.computed:
      return
    node.computed = True
    assert node.equation is not None
    if node.product is not None:
      product = best_product(node.product)
      step, equations = product.step(node.shape, node.dtype), product.equations
    else:
      affine = self._best_sum(node)
      groups = grouped(affine.terms, self.growth)
      step = merge_of(affine, groups, node.dtype, self.table)
      equations = affine.equations
    if step.operations < sum(each.primitive not in _FREE for each in equations):
      self._emit_step(node, step, equations)
    else:
      self._emit(node.equation)
    node.product = None
    if node.affine is not None and not node.affine.is_view:
      node.affine = None

  def _best_sum(self, node: Node) -> Affine:
    """Returns the sum that computes a node, and reports what it leaves alone."""
    assert node.equation is not None
    affine, scope = best_sum(node, self.table, self.growth, self.report), node.equation.scope
    groups = grouped(affine.terms, self.growth)
    for reason in reasons_apart(groups):
      self.report.add_left(scope, " ".join(groups[0].head.names), reason)
    if is_norm(affine):
      reason = norm_reason(affine.terms[0].source)
      self.report.add_left(scope, "scale and shift", reason, norm=True)
    return affine

  def _emit_step(self, node: Node, step: Any, equations: frozenset[Equation]) -> None:
    """Adds what takes the place of equations."""
    assert node.equation is not None
    for source in step.sources:
      self.compute(source)
    first = next(iter(step.stored), None)
    for stored, kind in zip(step.stored, step.kinds):
      self.hints.setdefault(stored, (stored if kind == "kernel" else first or stored, kind))
    inputs = (*(source.variable for source in step.sources), *step.stored)
    scope = node.equation.scope
    self.instructions.append(Instruction(step, inputs, (node.variable,), scope))
    self.report.add_merge(scope, step, equations, self.sizes)

  def _emit(self, equation: Equation) -> None:
    """Adds an equation as it is."""
    inputs = tuple(self._input(each) for each in equation.inputs)
    for variable in equation.outputs:
      if variable in self.nodes:
        self.nodes[variable].computed = True
    self.instructions.append(Instruction(equation, inputs, equation.outputs, equation.scope))

  def _input(self, operand: Operand) -> Input:
    """Returns an operand as the input of an instruction, once it is computed or stored."""
    if isinstance(operand, Constant):
      return operand
    if operand in self.nodes:
      self.compute(self.nodes[operand])
      return operand
    expression = self.parameters.values[operand]
    maker = self.parameters.makers.get(operand)
    # Constants stay in the program as they are, and nothing is stored that a broadcast makes.
    copies = maker is not None and maker.primitive in ("broadcast_in_dim", "reshape")
    if maker is None or (expression.leaves and not copies):
      return expression
    if maker not in self._copied:
      self._copied.add(maker)
      self._emit(maker)
    return operand
