"""Plans a fused program: visits the equations in order and decides what is merged.

An equation whose operands depend on parameters alone becomes an expression. An affine equation
becomes a sum of terms, and nothing is computed yet. Any other equation is an instruction, before
which its operands are computed. A value that is read more than once is computed once, so that no
kernel is copied.

A sum of terms is computed as late as possible, with all its terms in view. An average pool and the
1x1 convolution after it, for example, merge only if a 3x3 convolution stands beside them.
"""

import contextlib
import math
from collections.abc import Container, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from repjax.fusion import layouts, pixels, products
from repjax.fusion.arithmetic import Given
from repjax.fusion.bodies import FusedBodies, bodies_of, fused_body
from repjax.fusion.checks import draws
from repjax.fusion.choice import best_sum
from repjax.fusion.expressions import Expression, Expressions, Parameters, evaluate
from repjax.fusion.layouts import Layout
from repjax.fusion.merges import merge_of
from repjax.fusion.pixels import Several, with_operations
from repjax.fusion.plan import Input, Instruction, Plan, has_effects, live, named
from repjax.fusion.report import PRODUCTS, Report, counts_of, names_of, total
from repjax.fusion.values import Affine, Node, Refusal
from repjax.program import (
  Constant,
  Equation,
  Operand,
  Program,
  RuleCall,
  Variable,
  constant_array,
)

RULES = {**pixels.RULES, **layouts.RULES, **products.RULES}
_FREE = {"broadcast_in_dim", "convert_element_type", "copy", "name", "reshape", "squeeze"}
_FREE |= {"transpose"}
"""Affine equations that cost next to nothing, so that saving them is no reason to merge."""
_APART = "would need other folded parameters at some of the shapes, and one fold serves all"


class Planner:
  """The instructions of a fused program under construction.

  Attributes:
    program: the traced program.
    equations: those of the program that are computed.
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
    self.program, self.table, self.growth = program, table, growth
    self.equations = equations_of(program)
    steps = with_operations(self.equations, program.outputs)
    self._steps = live(steps, program.outputs, has_effects)
    self.parameters = Parameters(table)
    self.nodes: dict[Variable, Node] = {}
    self.instructions: list[Instruction] = []
    self.hints: dict[Expression, tuple[Expression, str]] = {}
    self.report = Report()
    for rule in program.rules:
      if _has_product(program, rule):
        reason = "holds products, and was opened: gradients of the call do not follow its rule"
        kind = rule.call.primitive.partition("_call")[0]
        self.report.add_left(rule.call.scope, kind, reason)
    self._moved: dict[Any, Node] = {}
    self._apart = {self.equations[place] for place in apart}
    self._sizes: dict[int, int] = {}
    self._paths: Mapping[int, str] = {}
    self._copied: set[Equation] = set()
    self._readers: dict[Variable, list[str]] = {}
    reads = [(each.primitive, each.inputs) for each in self._steps]
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
    self._paths = paths
    for place, variable in enumerate(self.program.inputs):
      if place in parameters:
        self.parameters.values[variable] = self.table.leaf(place, variable.aval)
        self._sizes[place] = math.prod(variable.aval.shape)
      else:
        self.nodes[variable] = self._node(variable, computed=True)
    for step in self._steps:
      if any(each in self.nodes for each in step.inputs) or self._stays(step):
        if not self._add_bodies(step):
          self._add(step)
      else:
        for each in _equations(step):
          self.parameters.add(each, [self._expression(given) for given in each.inputs])
    outputs = tuple(self._input(each) for each in self.program.outputs)
    return self._finished(outputs, paths)

  def _stays(self, step: Any) -> bool:
    """Tells if a step that depends on parameters alone is left to the call.

    Random numbers have the size of the batch, for which a fold has no place.
    """
    first = _equations(step)[0]
    random = draws(first) and any(self._expression(each).leaves for each in first.inputs)
    return random or has_effects(step)

  def _finished(self, outputs: tuple[Input, ...], paths: Mapping[int, str]) -> Plan:
    """Returns the plan without what nothing reads."""
    instructions = live(self.instructions, outputs, lambda each: each.effects)
    inputs = [each for instruction in instructions for each in instruction.inputs]
    read = [each for each in dict.fromkeys([*inputs, *outputs]) if isinstance(each, Expression)]
    stored = named([each for each in read if each.leaves], self.hints, paths, self._sizes)
    fixed = [each for each in read if not each.leaves]
    # A call may be traced, and constants are computed now, unless they follow from tracers.
    with contextlib.nullcontext() if self.table.traced else jax.ensure_compile_time_eval():
      constants = dict(zip(fixed, evaluate(fixed, ())))
    self.report.before = total(map(counts_of, self.equations))._replace(
      parameters=sum(self._sizes.values())
    )
    self.report.after = total(counts_of(each.step) for each in instructions)._replace(
      parameters=sum(each.size for each in stored.values())
    )
    arguments = tuple(each for each in self.program.inputs if each in self.nodes)
    return Plan(self.program, arguments, tuple(instructions), outputs, stored, constants)

  def _add_bodies(self, equation: Equation) -> bool:
    """Adds a loop or a choice with fused bodies. Returns False if nothing merges in them."""
    bodies = bodies_of(equation)
    if bodies and equation in self._apart:
      self.report.add_left(equation.scope, equation.primitive, _APART)
      bodies = []
    operands = [self._operand(each) for each in equation.inputs] if bodies else []
    fused, costs = [], []
    for number, body in enumerate(bodies):
      # The place of a loop is the same in the programs of most shapes, which then share a table.
      table = self.table.child((self.equations.index(equation), number))
      inner, fixed = Planner(body.program, table, self.growth), body.fixed(operands)
      plan = inner.planned(fixed, {place: str(place) for place in fixed})
      fused.append(fused_body(body, plan, operands))
      costs.append(inner.report.after.times(body.steps))
      names = {str(place): self._name(operands[body.places[place]]) for place in fixed}
      self.report.add_body(inner.report, body.steps, names)
      for inside, stored in zip(plan.stored.values(), fused[-1].stored.values()):
        self.hints.setdefault(stored, (stored, inner.hints.get(inside, (inside, "kernel"))[1]))
    if not any(each.merged for body in fused for each in body.plan.instructions):
      return False
    step = FusedBodies(equation, tuple(fused), total(costs))
    inputs = (*(self._input(equation.inputs[place]) for place in step.moving), *step.stored)
    made, scope = equation.outputs, equation.scope
    self.instructions.append(Instruction(step, inputs, made, scope, has_effects(equation)))
    for variable in equation.outputs:
      self.nodes[variable] = self._node(variable, equation, computed=True)
    return True

  def _node(self, variable: Variable, equation: Any = None, computed: bool = False) -> Node:
    reads = len(self._readers.get(variable, ()))
    return Node(variable, self.table, equation, reads=reads, computed=computed)

  def _operand(self, operand: Operand) -> Node | Expression:
    if isinstance(operand, Variable) and operand in self.nodes:
      return self.nodes[operand]
    return self._expression(operand)

  def _names(self, leaves: Iterable[int]) -> tuple[str, ...]:
    """Returns the names of the parameters at some positions, the largest first."""
    return names_of(leaves, self._sizes, self._paths)

  def _name(self, operand: Node | Expression) -> str:
    """Returns the name of the largest parameter that an operand follows from, "" if none."""
    leaves = operand.leaves if isinstance(operand, Expression) else ()
    largest = max(leaves, key=lambda leaf: (self._sizes[leaf], leaf), default=None)
    return "" if largest is None else self._paths[largest]

  def _expression(self, operand: Operand) -> Expression:
    if isinstance(operand, Constant):
      return self.table.constant(constant_array(operand))
    return self.parameters.values[operand]

  def _add(self, equation: Any) -> None:
    """Adds an equation that depends on the arguments."""
    made = self._made(equation)
    (last,) = _equations(equation)[-1:]
    inside = counts_of(last).products if last.primitive not in PRODUCTS else 0
    if inside:
      reason = f"holds {inside} products, and what it holds is not merged"
      self.report.add_left(equation.scope, equation.primitive, reason)
    for variable in equation.outputs:
      self.nodes[variable] = self._node(variable, equation)
    if made is None:
      self._emit(equation)
      return
    node = self.nodes[equation.outputs[0]]
    if isinstance(made, Affine):
      node.affine = made
    else:
      node.layout = made
    if node.reads > 1:
      self._compute_shared(node)

  def _made(self, equation: Any) -> Affine | Layout | None:
    """Returns what an equation makes by its rule, None if it is opaque."""
    rule = RULES.get(equation.primitive)
    if rule is None or len(equation.outputs) != 1:
      return None
    if not jnp.issubdtype(equation.outputs[0].aval.dtype, jnp.floating):
      return None
    if _equations(equation)[-1] in self._apart:
      self.report.add_left(equation.scope, equation.primitive, _APART)
      return None
    try:
      return rule(self._given(equation))
    except Refusal as refusal:
      self.report.add_left(equation.scope, equation.primitive, str(refusal))
      return None

  def _given(self, equation: Any) -> Given:
    operands = [self._operand(each) for each in equation.inputs]
    compact, precise = (
      [
        others.get(each, operand) if isinstance(each, Variable) else operand
        for each, operand in zip(equation.inputs, operands)
      ]
      for others in (self.parameters.compact, self.parameters.precise)
    )
    shape = tuple(equation.outputs[0].aval.shape)
    return Given(equation, shape, self.table, operands, compact, precise, self._moved)

  def _compute_shared(self, node: Node) -> None:
    """Computes a value that is read more than once, so that no kernel is copied.

    A view costs nothing, and stays open. What it views is read as often, and is computed instead.
    A norm stays open if products alone read it, since it may vanish in all of them.
    """
    readers, affine = {*self._readers[node.variable]}, node.affine
    while affine is not None and affine.is_view and affine.terms[0].source.is_open:
      node = affine.terms[0].source
      affine = node.affine
    if affine is None or not (affine.is_view or (affine.linear and readers <= {*PRODUCTS})):
      self.compute(node)

  def compute(self, node: Node) -> None:
    """Adds the instruction that computes a node, if there is none yet."""
    if node.computed:
      return
    node.computed = True
    if node.step is not None:
      self._rearrange(*node.step, node)
    elif node.layout is not None:
      source = node.layout.source
      if source.hidden and source.is_open and self._merge(source):
        self._rearrange(source, node.layout.step, node)
      else:
        self._emit(node.equation)
    elif not self._merge(node, always=node.hidden):
      self._emit(node.equation)
    if node.affine is not None and not node.affine.is_view:
      node.affine = None

  def _rearrange(self, source: Node, step: Any, node: Node) -> None:
    """Adds the instruction that moves the numbers of a node into another one."""
    self.compute(source)
    scope = "" if node.equation is None else node.equation.scope
    self.instructions.append(Instruction(step, (source.variable,), (node.variable,), scope))

  def _merge(self, node: Node, always: bool = False) -> bool:
    """Adds the instruction that computes a sum.

    Returns False if that is no gain over the program's own equations, unless the program has none.
    """
    affine, groups = best_sum(node, self.growth, self.report, self._names)
    step, scope = merge_of(affine, groups, node.dtype), node.equation.scope
    saved = sum(each.primitive not in _FREE for each in affine.equations)
    if step.operations >= saved and not always:
      return False
    node.computed = True
    for source in step.sources:
      self.compute(source)
    first = next(iter(step.stored), None)
    for stored, kind in step.stored.items():
      self.hints.setdefault(stored, (stored if kind == "kernel" else first or stored, kind))
    inputs = (*(source.variable for source in step.sources), *step.stored)
    self.instructions.append(Instruction(step, inputs, (node.variable,), scope))
    self.report.add_merge(scope, step, affine.equations, self._sizes, self._paths)
    return True

  def _emit(self, equation: Any) -> None:
    """Adds an equation, or the equations that it stands for, as in the program."""
    for each in _equations(equation):
      if each.outputs != equation.outputs and any(made in self.nodes for made in each.outputs):
        continue  # two chains of slices may begin alike
      inputs = tuple(self._input(given) for given in each.inputs)
      for variable in each.outputs:
        if variable not in self.parameters.values:
          self.nodes.setdefault(variable, self._node(variable, each)).computed = True
      made, scope, effects = each.outputs, each.scope, has_effects(each)
      self.instructions.append(Instruction(each, inputs, made, scope, effects))

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


def equations_of(program: Program) -> list[Equation]:
  """Returns the equations that are computed. A derivative rule around a product is opened."""
  kept = program.with_rules(lambda rule: not _has_product(program, rule))
  return live(list(kept), program.outputs, has_effects)


def _equations(step: Any) -> tuple[Equation, ...]:
  """Returns the equations of the program that a step stands for."""
  return step.equations if isinstance(step, Several) else (step,)


def _has_product(program: Program, rule: RuleCall) -> bool:
  return any(each.primitive in PRODUCTS for each in program.equations[rule.start : rule.stop])
