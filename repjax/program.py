"""The walker of traced programs: a function as one flat list of equations.

JAX traces a function into a program, a jaxpr, whose equations read and make variables. In a jaxpr,
calls nest: `jax.jit`, `nn.remat` and functions with a derivative rule are single equations, each
with an inner program that has its own variables. `trace` inlines all such calls, so that a reader
sees operations only, in order, with one set of variables. Loops and branches (scan, while, cond)
stay equations, and `flat` or `inner_programs` opens what they hold. `interpret` runs a program on
values of any kind: arrays, nodes of a graph, or numbers that count something.

Example:
  >>> program = trace(lambda x: jax.nn.relu(jnp.sin(x)), jnp.ones(3))
  >>> [equation.primitive for equation in program.equations]
  ['sin', 'max']
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias, TypeVar

import jax
import numpy as np

from repjax.errors import InputError, printable, sentences

Jaxpr: TypeAlias = Any
"""A jaxpr of JAX, with its constants or without; newer versions have one class for both."""

T = TypeVar("T")

_RULES = ("custom_jvp_call", "custom_vjp_call")
_NOT_CALLS = ("scan", "reduce", "shard_map")
"""Primitives that hold a program but do not run it exactly once on their inputs."""


@dataclasses.dataclass(frozen=True, eq=False)
class Variable:
  """A value that a program takes or computes. Two variables are the same only if identical.

  JAX's own variables cannot serve: a function that is called twice is traced once, so both calls
  share the variables of its program.

  Attributes:
    aval: the shape and dtype, as JAX's abstract value.
  """

  aval: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Constant:
  """A value that was known when the function was traced: a literal, or an array closed over.

  Attributes:
    array: the number or array, as the traced program holds it.
    aval: the shape and dtype, as JAX's abstract value.
  """

  array: Any
  aval: Any


Operand: TypeAlias = Variable | Constant


def constant_array(constant: Constant) -> Any:
  """Returns the array of a constant in the dtype of the program."""
  array = constant.array
  if isinstance(array, jax.Array | np.ndarray) and array.dtype == constant.aval.dtype:
    return array
  return np.asarray(array, constant.aval.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class Equation:
  """One operation of a program.

  Attributes:
    source: JAX's equation, whose variables are those of the program that held it.
    inputs: what the operation reads.
    outputs: what the operation makes, results that nobody reads included.
    scope: the name stack, such as "RepVGG/stage1/block0", the scopes of inlined calls included.
  """

  source: Any
  inputs: tuple[Operand, ...]
  outputs: tuple[Variable, ...]
  scope: str

  @property
  def primitive(self) -> str:
    """The name of the operation."""
    return self.source.primitive.name

  @property
  def params(self) -> Mapping[str, Any]:
    """The parameters of the operation, such as strides or an inner program."""
    return self.source.params

  def run(self, *values: Any) -> Sequence[Any]:
    """Computes the outputs from one array for each input, with the operation's own derivatives."""
    primitive = self.source.primitive
    # A call with a derivative rule stores its functions in a form that `bind` does not take.
    params = primitive.get_bind_params(self.source.params)
    operands = _varying(values)
    with self.source.ctx.manager:
      results = primitive.bind(*operands, **params)
    return results if primitive.multiple_results else [results]


def _varying(values: Sequence[Any]) -> Sequence[Any]:
  """Returns values that all vary over the same axes of a mesh.

  In `jax.shard_map`, an array that all devices share must be cast before it meets one that they do
  not share. The functions of JAX do so, but a primitive does not.
  """
  axes = [_mesh_axes(value) for value in values]
  every = frozenset().union(*axes)
  if not every:
    return values
  return [
    jax.lax.pcast(value, tuple(every - own), to="varying") if every - own else value
    for value, own in zip(values, axes)
  ]


def _mesh_axes(value: Any) -> frozenset[Any]:
  """Returns the axes of a mesh over which an array varies inside `jax.shard_map`."""
  aval = jax.typeof(value)  # versions of JAX differ in where it says so
  kind = getattr(aval, "manual_axis_type", None)
  return getattr(aval, "vma", frozenset()) if kind is None else frozenset(kind.varying)


def operation_name(equation: Equation) -> str:
  """Returns the name of an operation for a message, such as "relu".

  A function with a derivative rule (custom_jvp, custom_vjp) has the name of the function in it.
  """
  if not equation.primitive.startswith(_RULES):
    return equation.primitive
  called = equation.params.get("call_jaxpr")
  inner = called.jaxpr.eqns if called is not None else []
  name = inner[0].params.get("name") if len(inner) == 1 else None
  return printable(name) if name else "a function with a derivative rule of its own"


def place_of(scope: str) -> str:
  """Returns where something stands in a program, for a message.

  Example:
    >>> place_of("RepVGG/stem"), place_of("")
    ('in the scope RepVGG/stem', 'outside all scopes')
  """
  return f"in the scope {printable(scope)}" if scope else "outside all scopes"


class RuleCall(NamedTuple):
  """A call of a function with a derivative rule (custom_jvp, custom_vjp), which was inlined.

  Attributes:
    call: the call as one equation, which `Equation.run` computes with the rule.
    start: the place of the first equation that the call became.
    stop: the place after the last of these equations.
  """

  call: Equation
  start: int
  stop: int


class Program(NamedTuple):
  """A flat program.

  Attributes:
    inputs: one variable for each array that the function takes.
    equations: operations in an order in which they can be computed.
    outputs: what the function returns; an input or a constant may be among them.
    rules: the inlined calls with derivative rules, an outer call before those inside it.
    results: the shapes and dtypes of the outputs, as the tree that the function returns.
  """

  inputs: tuple[Variable, ...]
  equations: tuple[Equation, ...]
  outputs: tuple[Operand, ...]
  rules: tuple[RuleCall, ...]
  results: Any

  def with_rules(self, keep: Callable[[RuleCall], bool]) -> Iterator[Equation]:
    """Yields the equations, with each call whose rule is to be kept as one equation."""
    kept: dict[int, RuleCall] = {}
    for rule in self.rules:
      if keep(rule):
        kept.setdefault(rule.start, rule)  # the outermost comes first
    place = 0
    while place < len(self.equations):
      rule = kept.get(place)
      yield rule.call if rule else self.equations[place]
      place = rule.stop if rule else place + 1


def trace(function: Callable[..., Any], *args: Any) -> Program:
  """Traces a function and returns its flat program.

  Args:
    function: any function that JAX can trace.
    *args: trees of arrays, or of shapes and dtypes. Nothing is computed.

  Returns:
    A program whose inputs are the leaves of all arguments, in order.
  """
  jaxpr, results = jax.make_jaxpr(function, return_shape=True)(*args)
  return flat(jaxpr)._replace(results=results)


_UNTRACED = (
  jax.errors.ConcretizationTypeError,
  jax.errors.NonConcreteBooleanIndexError,
  jax.errors.TracerArrayConversionError,
  jax.errors.TracerIntegerConversionError,
  TypeError,
)


@contextlib.contextmanager
def traceable(what: str) -> Iterator[None]:
  """Explains in its block what JAX cannot trace: a program that depends on values of arguments.

  Args:
    what: who traces, for the message.

  Raises:
    InputError: instead of JAX's own error.
  """
  try:
    yield
  except _UNTRACED as error:
    # Most errors of type are mistakes of the function's own, which are not to be hidden. Shapes
    # that depend on values have no class of error, but these words.
    if type(error) is TypeError and "concrete values" not in str(error):
      raise
    raise InputError(
      sentences(
        f"{what} cannot trace this function: its program depends on the values of its arguments",
        printable(str(error).partition(chr(10))[0]),
        "Bind settings such as train=False with functools.partial, and write choices by value with "
        "jnp.where or lax.cond. Where values decide a shape, keep the shape fixed: jnp.where with "
        "a mask for x[x > 0], and size= for jnp.unique or jnp.nonzero",
      )
    ) from error


def flat(jaxpr: Jaxpr, scope: str = "") -> Program:
  """Inlines the calls of a jaxpr, such as the body of a loop.

  Args:
    jaxpr: with its constants, if it has any.
    scope: the name stack around the jaxpr.
  """
  body = getattr(jaxpr, "jaxpr", jaxpr)
  inputs = tuple(Variable(variable.aval) for variable in body.invars)
  inlining = _Inlining()
  outputs = tuple(inlining.add(jaxpr, inputs, scope))
  results = tuple(output.aval for output in outputs)
  return Program(inputs, tuple(inlining.equations), outputs, tuple(inlining.rules), results)


def inner_programs(equation: Equation) -> list[Program]:
  """Opens every program that an equation holds, such as all branches of a cond."""
  return [flat(jaxpr, equation.scope) for jaxpr in _jaxprs(equation.params)]


def interpret(
  program: Program,
  inputs: Sequence[T],
  apply: Callable[[Equation, list[T]], Sequence[T]],
  constant: Callable[[Constant], T],
  keep: Callable[[RuleCall], bool] = lambda rule: False,
) -> list[T]:
  """Runs a program on values of any kind.

  Args:
    program: to be run.
    inputs: one value for each input of the program.
    apply: computes the values of an equation's outputs from the values of its inputs.
    constant: makes a value of a constant.
    keep: selects calls with derivative rules that `apply` takes as one equation.

  Returns:
    One value for each output of the program.

  Example:
    >>> program = trace(jnp.sin, 0.0)
    >>> interpret(program, [0.0], lambda equation, x: equation.run(*x), lambda c: c.array)
    [Array(0., dtype=float32, weak_type=True)]
  """
  values = dict(zip(program.inputs, inputs))

  def read(operand: Operand) -> T:
    return constant(operand) if isinstance(operand, Constant) else values[operand]

  for equation in program.with_rules(keep):
    results = apply(equation, [read(operand) for operand in equation.inputs])
    values.update(zip(equation.outputs, results))
  return [read(operand) for operand in program.outputs]


class _Inlining:
  """A flat program under construction."""

  def __init__(self):
    self.equations: list[Equation] = []
    self.rules: list[RuleCall] = []

  def add(self, jaxpr: Jaxpr, inputs: Sequence[Operand], scope: str) -> list[Operand]:
    """Appends the equations of a jaxpr that reads these inputs, and returns its outputs."""
    body, constants = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
    # Fresh variables for each call, since JAX shares a program among calls of one function.
    here: dict[Any, Operand] = {
      variable: Constant(array, variable.aval) for variable, array in zip(body.constvars, constants)
    }
    here.update(zip(body.invars, inputs))

    def read(atom: Any) -> Operand:
      # A literal holds its number, and cannot be the key of a dict.
      return Constant(atom.val, atom.aval) if hasattr(atom, "val") else here[atom]

    for source in body.eqns:
      inner = "/".join(filter(None, (scope, str(source.source_info.name_stack))))
      operands = tuple(read(atom) for atom in source.invars)
      outputs = self._add(source, operands, inner)
      here.update(zip(source.outvars, outputs))
    return [read(atom) for atom in body.outvars]

  def _add(self, source: Any, operands: tuple[Operand, ...], scope: str) -> Sequence[Operand]:
    """Appends an equation, or what its call becomes, and returns the outputs."""
    called = _called(source)
    if called is None:
      outputs = tuple(Variable(variable.aval) for variable in source.outvars)
      self.equations.append(Equation(source, operands, outputs, scope))
      return outputs
    if not source.primitive.name.startswith(_RULES):
      return self.add(called, operands, scope)
    start, place = len(self.equations), len(self.rules)
    outputs = self._named(self.add(called, operands, scope), start, scope)
    call = Equation(source, operands, outputs, scope)
    # Inner rules were appended meanwhile, and the outer rule stands before them.
    self.rules.insert(place, RuleCall(call, start, len(self.equations)))
    return outputs

  def _named(self, outputs: Sequence[Operand], start: int, scope: str) -> tuple[Variable, ...]:
    """Copies each output that the call did not compute itself, or returns twice.

    A call may be the identity with a derivative rule. Its output needs a new variable, apart from
    the variable that was passed in, since only the output has the rule's derivative.
    """
    made = {variable for equation in self.equations[start:] for variable in equation.outputs}
    named = []
    for output in outputs:
      if isinstance(output, Constant) or output not in made:
        shape = jax.ShapeDtypeStruct(output.aval.shape, output.aval.dtype)
        (source,) = jax.make_jaxpr(jax.lax.copy_p.bind)(shape).jaxpr.eqns
        named.append(Variable(output.aval))
        self.equations.append(Equation(source, (output,), (named[-1],), scope))
      else:
        named.append(output)
        made.remove(output)  # a second result that is the same value is copied
    return tuple(named)


def _called(source: Any) -> Jaxpr | None:
  """Returns the program that an equation runs once on its inputs, or None if there is none.

  Names of calls differ between versions of JAX, so that a call is recognised by what it holds. It
  holds exactly one program, whose inputs and outputs have the shapes and dtypes of the equation's.
  """
  jaxprs = list(_jaxprs(source.params))
  if len(jaxprs) != 1 or source.primitive.name in _NOT_CALLS:
    return None
  body = getattr(jaxprs[0], "jaxpr", jaxprs[0])
  fits = _forms(body.invars) == _forms(source.invars)
  return jaxprs[0] if fits and _forms(body.outvars) == _forms(source.outvars) else None


def _forms(atoms: Sequence[Any]) -> list[tuple[Any, Any]]:
  """Returns shapes and dtypes; tokens and the like have neither."""
  avals = [atom.aval for atom in atoms]
  return [(getattr(aval, "shape", None), getattr(aval, "dtype", None)) for aval in avals]


def _jaxprs(params: Mapping[str, Any]) -> Iterator[Jaxpr]:
  """Yields the programs in the parameters of an equation."""
  for value in jax.tree.leaves(list(params.values()), is_leaf=_is_jaxpr):
    if _is_jaxpr(value):
      yield value


def _is_jaxpr(value: Any) -> bool:
  return hasattr(value, "eqns") or hasattr(getattr(value, "jaxpr", None), "eqns")


def constants_and_carries(scan: Equation) -> tuple[int, int]:
  """Returns how many inputs of a scan are constants, and how many are carried from step to step.

  The inputs of a scan are its constants, its carries and its sequences, in this order. Versions of
  JAX store the numbers in different ways. Shapes tell them too: the body reads rows of sequences,
  and makes rows of the stacked outputs, which have an axis less.
  """
  body = flat(scan.params["jaxpr"])
  carries = len(scan.outputs) - _count_rows(scan.outputs, body.outputs)
  return len(scan.inputs) - _count_rows(scan.inputs, body.inputs) - carries, carries


def _count_rows(stacked: Sequence[Operand], inner: Sequence[Operand]) -> int:
  """Counts the values of a scan that have an axis more than those of its body."""
  return sum(len(one.aval.shape) > len(row.aval.shape) for one, row in zip(stacked, inner))
