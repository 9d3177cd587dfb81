"""Plans a fused program: meets the equations in order and decides what is merged.

An equation whose operands depend on parameters alone becomes an expression. An affine equation
becomes a sum of terms, and nothing is computed yet. Any other equation is an instruction, before
which its operands are computed. A value that is read more than once is computed once, so that no
kernel is copied.

A sum of terms is computed as late as possible, with all its terms in view. An average pool and the
1x1 convolution after it, for example, merge only if a 3x3 convolution stands beside them.
"""

import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repjax.fusion import arithmetic, channels, contracting, products, views
from repjax.fusion.arithmetic import Given
from repjax.fusion.choice import best_product, best_sum, is_norm, norm_reason
from repjax.fusion.contracted import product_of
from repjax.fusion.contractions import Contraction
from repjax.fusion.cost import grouped, reasons_apart
from repjax.fusion.counts import PRODUCTS, counts_of, total
from repjax.fusion.emission import merge_of
from repjax.fusion.expressions import Expression, Expressions, evaluate
from repjax.fusion.layouts import Layout
from repjax.fusion.parameters import Parameters
from repjax.fusion.picks import Pick, picked, with_picks
from repjax.fusion.plan import Input, Instruction, Plan, constant_array, has_effects, live, named
from repjax.fusion.report import Report, counts_of_step
from repjax.fusion.scans import fixed_inputs, fused_scan
from repjax.fusion.values import (
  Affine,
  Node,
  Refusal,
  identity,
)
from repjax.program import Constant, Equation, Operand, Program, RuleCall, Variable, inner_programs

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
    self, program: Program, table: Expressions, growth: float, apart: Iterable[int] = ()
  ):
    """Makes a planner.

    Args:
      program: the traced program.
      table: the table of expressions, one for all plans of a function.
      growth: largest factor by which a merge may raise multiplications or weights.
      apart: places of equations across which nothing is merged.
    """
    self.program = program
    kept = program.with_rules(lambda rule: not _has_product(program, rule))
    self.equations = live(list(kept), program.outputs, has_effects)
    steps = live(with_picks(self.equations, program.outputs), program.outputs, has_effects)
    self._steps = steps
    self._picked: dict[Any, Node] = {}
    self.growth = growth
    self.table = table
    self.parameters = Parameters(table)
    self.nodes: dict[Variable, Node] = {}
    self.instructions: list[Instruction] = []
    self.hints: dict[Expression, tuple[Expression, str]] = {}
    self.report = Report()
    self._apart = {self.equations[place] for place in apart}
    self._sizes: dict[int, int] = {}
    self._copied: set[Equation] = set()
    self._readers: dict[Variable, list[str]] = {}
    reads = [(each.primitive, each.inputs) for each in steps]
    for reader, operands in [*reads, ("output", program.outputs)]:
      for operand in operands:
        if isinstance(operand, Variable):
          self._readers.setdefault(operand, []).append(reader)

  def planned(self, parameters: Container[int], paths: Mapping[int, str]) -> Plan:
    """Plans all equations, and returns the plan.

    Args:
      parameters: the places of the inputs of the program that are parameters.
      paths: names of the parameters.
    """
    for place, variable in enumerate(self.program.inputs):
      if place in parameters:
        self.parameters.values[variable] = self.table.leaf(place, variable.aval)
        self._sizes[place] = math.prod(variable.aval.shape)
      else:
        self.nodes[variable] = Node(variable, reads=self._reads(variable), computed=True)
    for step in self._steps:
      if isinstance(step, Pick):
        self._add_pick(step)
      else:
        self._add_any(step)
    outputs = tuple(self._input(each) for each in self.program.outputs)
    return self._finished(outputs, paths)

  def _add_any(self, equation: Equation) -> None:
    """Adds an equation, once."""
    if any(each in self.nodes or each in self.parameters.values for each in equation.outputs):
      return  # chains of pixels that are picked may begin alike
    if all(each not in self.nodes for each in equation.inputs) and not has_effects(equation):
      self.parameters.add(equation, [self._expression(each) for each in equation.inputs])
    elif not self._add_scan(equation):
      self._add(equation)

  def _add_pick(self, pick: Pick) -> None:
    """Adds picked pixels of a value: in front of a sum of pointwise terms, or as they are."""
    base, (variable,) = self.nodes.get(pick.inputs[0]), pick.outputs  # type: ignore[arg-type]
    affine = None if base is None else self._picked_affine(base, pick)
    if affine is None:
      if base is not None:
        self._read_by(base, pick.equations)
      for equation in pick.equations:
        self._add_any(equation)
      if base is not None:
        self._picked.setdefault((base, pick.places), self.nodes[variable])
      return
    *before, last = pick.equations
    node = Node(variable, last, affine, self._reads(variable), chain=tuple(before))
    self.nodes[variable] = node
    if node.reads > 1 and not self._stays_open(node):
      self.compute(node)

  def _read_by(self, node: Node, equations: Iterable[Equation]) -> None:
    """Notes that several equations read a value, after all, and computes it if it is no view."""
    reads = [
      each.primitive for each in equations for given in each.inputs if given is node.variable
    ]
    self._readers.setdefault(node.variable, []).extend(reads)
    node.reads = max(node.reads, len(reads))
    if node.reads > 1 and not node.computed and not self._stays_open(node):
      self.compute(node)

  def _picked_affine(self, base: Node, pick: Pick) -> Affine | None:
    """Returns picked pixels of a value as a sum, None if that is no gain."""
    if (base, pick.places) in self._picked:
      return identity(self._picked[base, pick.places])
    if base.affine is None or base.affine.is_view or base.computed:
      return None
    try:
      return picked(base.affine, pick, self._picked)
    except Refusal as refusal:
      self.report.add_left(pick.scope, "pad", str(refusal))
      return None

  def _finished(self, outputs: tuple[Input, ...], paths: Mapping[int, str]) -> Plan:
    """Returns the plan without what nothing reads."""
    instructions = live(self.instructions, outputs, lambda each: each.effects)
    inputs = [each for instruction in instructions for each in instruction.inputs]
    read = [each for each in dict.fromkeys([*inputs, *outputs]) if isinstance(each, Expression)]
    stored = named([each for each in read if each.leaves], self.hints, paths, self._sizes)
    fixed = [each for each in read if not each.leaves]
    with jax.ensure_compile_time_eval():
      constants = dict(zip(fixed, evaluate(fixed, ())))
    self.report.before = total(counts_of_step(each) for each in self.equations)._replace(
      parameters=sum(self._sizes.values())
    )
    self.report.after = total(counts_of_step(each.step) for each in instructions)._replace(
      parameters=sum(each.size for each in stored.values())
    )
    arguments = tuple(each for each in self.program.inputs if each in self.nodes)
    return Plan(self.program, arguments, tuple(instructions), outputs, stored, constants)

  def _add_scan(self, equation: Equation) -> bool:
    """Adds a scan with a fused body. Returns False if it is no scan or nothing merges in it."""
    if equation.primitive != "scan" or equation in self._apart:
      return False
    operands = [self._operand(each) for each in equation.inputs]
    fixed = fixed_inputs(equation, operands)
    (program,) = inner_programs(equation)
    # The place of a scan is the same in the programs of most shapes, which then share a table.
    inner = Planner(program, self.table.child(self.equations.index(equation)), self.growth)
    body = inner.planned(fixed, {place: str(place) for place in fixed})
    self.report.add_body(inner.report, equation.params["length"])
    if not any(each.merged for each in body.instructions):
      return False
    step = fused_scan(equation, operands, body, inner.report.after)
    for inside, stored in zip(body.stored.values(), step.stored):
      self.hints.setdefault(stored, (stored, inner.hints.get(inside, (inside, "kernel"))[1]))
    inputs = [self._input(equation.inputs[place]) for place in step.moving]
    self._emit_instruction(step, (*inputs, *step.stored), equation)
    return True

  def _emit_instruction(self, step: Any, inputs: tuple[Input, ...], equation: Equation) -> None:
    """Adds what takes the place of an equation with outputs that are opaque."""
    self.instructions.append(Instruction(step, inputs, equation.outputs, equation.scope))
    for variable in equation.outputs:
      self.nodes[variable] = Node(variable, equation, reads=self._reads(variable), computed=True)

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
    inside = counts_of(equation).products if equation.primitive not in PRODUCTS else 0
    if inside:
      reason = f"holds {inside} products, and what it holds is not merged"
      self.report.add_left(equation.scope, equation.primitive, reason)
    for variable in equation.outputs:
      self.nodes[variable] = Node(variable, equation, reads=self._reads(variable))
    if made is None:
      self._emit(equation)
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
    if len(equation.outputs) != 1 or equation in self._apart:
      return None
    if not jnp.issubdtype(equation.outputs[0].aval.dtype, jnp.floating):
      return None
    given, reason = self._given(equation), None
    several = any(isinstance(each, Node) and contracting.is_open(each) for each in given.operands)
    for rules in (contracting.RULES, RULES) if several else (RULES, contracting.RULES):
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
      return False
    readers = {*self._readers[node.variable]}
    return affine.is_view or (affine.linear and readers <= {*PRODUCTS})

  def compute(self, node: Node) -> None:
    """Adds the instruction that computes a node, if there is none yet."""
    if node.computed:
      return
    node.computed = True
    if node.pick is not None:
      source, step = node.pick
      self.compute(source)
      self.instructions.append(Instruction(step, (source.variable,), (node.variable,)))
      return
    assert node.equation is not None
    if node.layout is not None:
      self._emit(node.equation)
      return
    if node.product is not None:
      product = best_product(node.product)
      step, equations = product_of(product, node.shape, node.dtype), product.equations
    else:
      affine = self._best_sum(node)
      groups = grouped(affine.terms, self.growth)
      step = merge_of(affine, groups, node.dtype, self.table)
      equations = affine.equations
    if step.operations < sum(each.primitive not in _FREE for each in equations):
      self._emit_step(node, step, equations)
    else:
      for each in node.chain:
        self._add_any(each)
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
    self.report.add_merge(scope, step, equations, self._sizes)

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


def _has_product(program: Program, rule: RuleCall) -> bool:
  return any(each.primitive in PRODUCTS for each in program.equations[rule.start : rule.stop])
