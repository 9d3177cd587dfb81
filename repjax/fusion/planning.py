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

import jax.numpy as jnp

from repjax.fusion import arithmetic, products, views
from repjax.fusion.arithmetic import Given
from repjax.fusion.choice import best_sum, is_norm, norm_reason
from repjax.fusion.cost import grouped, reasons_apart
from repjax.fusion.counts import PRODUCTS
from repjax.fusion.emission import Merge, merge_of
from repjax.fusion.expressions import Expression, Expressions
from repjax.fusion.parameters import Parameters
from repjax.fusion.plan import Input, Instruction, constant_array, has_effects, live
from repjax.fusion.report import Report
from repjax.fusion.values import (
  Affine,
  Node,
  Refusal,
)
from repjax.program import Constant, Equation, Operand, Variable

RULES = {**arithmetic.RULES, **products.RULES, **views.RULES}
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
    affine = self._affine(equation)
    for variable in equation.outputs:
      self.nodes[variable] = Node(variable, equation, affine, self._reads(variable))
    node = self.nodes[equation.outputs[0]]
    if affine is None:
      self._emit(equation)
      if equation.primitive == "reshape":
        node.reshaped = self.nodes[equation.inputs[0]]  # type: ignore[index]
      return
    if node.reads > 1 and not self._stays_open(node):
      self.compute(node)

  def _affine(self, equation: Equation) -> Affine | None:
    """Returns what an equation makes as a sum of terms, None if it is not affine."""
    rule = RULES.get(equation.primitive)
    if rule is None or len(equation.outputs) != 1 or equation in self.apart:
      return None
    if not jnp.issubdtype(equation.outputs[0].aval.dtype, jnp.floating):
      return None
    operands = [self._operand(each) for each in equation.inputs]
    compact, precise = (
      [
        others.get(each, operand) if isinstance(each, Variable) else operand
        for each, operand in zip(equation.inputs, operands)
      ]
      for others in (self.parameters.compact, self.parameters.precise)
    )
    try:
      affine = rule(Given(equation, self.table, operands, compact, precise))
    except Refusal as refusal:
      self.report.add_left(equation.scope, equation.primitive, str(refusal))
      return None
    return affine

  def _size(self, leaf: int) -> int:
    return self.sizes[leaf]

  def _stays_open(self, node: Node) -> bool:
    """Checks if a value that is read more than once need not be computed.

    A view costs nothing. A norm may vanish in all products that read it.
    """
    affine = node.affine
    if affine is None or affine.is_view:
      return True
    return affine.linear and set(self._readers[node.variable]) <= set(PRODUCTS)

  def compute(self, node: Node) -> None:
    """Adds the instruction that computes a node, if there is none yet."""
    if node.computed:
      return
    node.computed = True
    assert node.affine is not None
    assert node.equation is not None
    affine = best_sum(node, self.table, self.growth, self.report)
    groups = grouped(affine.terms, self.growth)
    for reason in reasons_apart(groups):
      self.report.add_left(node.equation.scope, " ".join(groups[0].head.names), reason)
    if is_norm(affine):
      reason = norm_reason(affine.terms[0].source)
      self.report.add_left(node.equation.scope, "scale and shift", reason, norm=True)
    merge = merge_of(affine, groups, node.dtype, self.table)
    counted = [each for each in affine.equations if each.primitive not in _FREE]
    if merge.operations < len(counted):
      self._emit_merge(node, merge, affine.equations)
    else:
      self._emit(node.equation)
    if not node.affine.is_view:
      node.affine = None

  def _emit_merge(self, node: Node, merge: Merge, equations: frozenset[Equation]) -> None:
    assert node.equation is not None
    for source in merge.sources:
      self.compute(source)
    kernel = next((piece.kernel for piece in merge.pieces if piece.kernel is not None), None)
    for piece in merge.pieces:
      if piece.kernel is not None:
        kind = "kernel" if piece.group.is_product else "scale"
        self.hints.setdefault(piece.kernel, (piece.kernel, kind))
    if merge.bias is not None:
      self.hints.setdefault(merge.bias, (kernel or merge.bias, "bias"))
    for border in merge.borders:
      self.hints.setdefault(border.kernel, (kernel or border.kernel, "border"))
    inputs = (*(source.variable for source in merge.sources), *merge.stored)
    scope = node.equation.scope
    self.instructions.append(Instruction(merge, inputs, (node.variable,), scope))
    self.report.add_merge(scope, merge, equations, self._size)

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
