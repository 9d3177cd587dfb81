"""The report of a plan: what was merged, what was left alone and why, and what products cost.

Products are convolutions and matrix products.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from repjax.errors import listed
from repjax.program import Equation, inner_programs

PRODUCTS = ("conv_general_dilated", "dot_general")


class Counts(NamedTuple):
  """The cost of products.

  Attributes:
    products: number of convolutions and matrix products.
    multiplications: multiply-adds in them, at the sizes of the arguments or for each pixel.
    parameters: elements of the parameters that are read.
  """

  products: int = 0
  multiplications: float = 0
  parameters: int = 0

  def within(self, bound: "Counts", growth: float) -> bool:
    """Checks that neither multiplications nor parameters are more than `growth` times a bound."""
    small = self.multiplications <= growth * bound.multiplications
    return small and self.parameters <= growth * bound.parameters

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
  outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
  return size * math.prod(kernel) // outputs if outputs else 0


def counts_of(equation: Any) -> Counts:
  """Returns what an equation, or the instruction in its place, costs.

  The products of programs that an equation holds are included. The products of a loop's body are
  counted once, and their multiplications for each step. A loop of unknown length counts as one
  step, and a choice as all its branches.
  """
  if not isinstance(equation, Equation):
    return equation.counts
  if equation.primitive in PRODUCTS:
    return Counts(1, multiplications(equation))
  inner = total(counts_of(each) for held in inner_programs(equation) for each in held.equations)
  return inner.times(equation.params["length"] if equation.primitive == "scan" else 1)


def total(counts: Iterable[Counts]) -> Counts:
  """Returns a sum of counts."""
  rows = list(counts)
  return Counts(*(sum(column) for column in zip(*rows))) if rows else Counts()


@dataclasses.dataclass(frozen=True)
class Merged:
  """Equations that became one instruction.

  Attributes:
    scope: the name stack of the last equation.
    parts: the branches, such as "conv1x1 > conv3x3" for a chain.
    operations: the number of equations.
    before, after: what the products cost.
    names: of the parameters that went in, the largest first.
  """

  scope: str
  parts: tuple[str, ...]
  operations: int
  before: Counts
  after: Counts
  names: tuple[str, ...] = ()

  @property
  def place(self) -> str:
    """The scope, or the first parameters where the library of the function names no scopes."""
    return _place(self.scope, self.names) or "constants"


@dataclasses.dataclass(frozen=True)
class Left:
  """Something that was not merged.

  Attributes:
    scope: the name stack.
    what: the operation, or the branch.
    reason: why, in words.
    norm: if a scale and a shift of each channel stay in the program.
    names: of the parameters of such a norm, the largest first.
  """

  scope: str
  what: str
  reason: str
  norm: bool = False
  names: tuple[str, ...] = ()

  @property
  def place(self) -> str:
    """The scope, or the first parameters of a norm where there are no scopes, or nothing."""
    return _place(self.scope, self.names)


@dataclasses.dataclass
class Report:
  """A record of all merges of a plan, and of what it leaves alone. `print` shows a table.

  Attributes:
    merges: one entry for each merge, in the order of the program.
    left: one entry for each thing that was left alone.
    before, after: what all products of the program cost, and all parameters.
    training: how the program shows that it is in training mode, None if it does not.
  """

  merges: list[Merged] = dataclasses.field(default_factory=list)
  left: list[Left] = dataclasses.field(default_factory=list)
  before: Counts = dataclasses.field(default_factory=Counts)
  after: Counts = dataclasses.field(default_factory=Counts)
  training: str | None = None

  def add_merge(
    self,
    scope: str,
    step: Any,
    equations: Iterable[Equation],
    sizes: Mapping[int, int],
    paths: Mapping[int, str],
  ) -> None:
    """Notes a merge.

    Args:
      scope: the name stack of its last equation.
      step: what computes the merge.
      equations: what the step replaces.
      sizes, paths: the number of elements and the name of each parameter.
    """
    leaves = frozenset().union(*(stored.leaves for stored in step.stored))
    equations = list(equations)
    read = sum(sizes[leaf] for leaf in leaves)
    before = total(map(counts_of, equations))._replace(parameters=read)
    names = names_of(leaves, sizes, paths)
    self.merges.append(Merged(scope, tuple(step.parts), len(equations), before, step.counts, names))

  def add_body(self, report: "Report", steps: int, names: Mapping[str, str]) -> None:
    """Notes what was merged and left alone in the body of a loop.

    Args:
      report: of the body.
      steps: of the loop.
      names: for the name of each parameter of the body that of the parameter it follows from.
    """
    for merge in report.merges:
      before, after = merge.before.times(steps), merge.after.times(steps)
      own = tuple(dict.fromkeys(names[name] for name in merge.names if names[name]))
      self.merges.append(dataclasses.replace(merge, before=before, after=after, names=own))
    for entry in report.left:
      own = tuple(dict.fromkeys(names[name] for name in entry.names if names[name]))
      self.add_left(entry.scope, entry.what, entry.reason, entry.norm, own)

  def add_left(
    self, scope: str, what: str, reason: str, norm: bool = False, names: tuple[str, ...] = ()
  ) -> None:
    """Notes something that is left alone. Attempts at one merge are noted once."""
    entry = Left(scope, what, reason, norm, names)
    if norm or entry not in self.left:
      self.left.append(entry)

  @property
  def norms(self) -> list[Left]:
    """The scales and shifts of channels that stay in the program."""
    return [entry for entry in self.left if entry.norm]

  def to_json(self) -> dict[str, Any]:
    """Returns the report as a tree of plain values that `json.dumps` takes."""
    return {
      "merges": [_as_dict(merge) for merge in self.merges],
      "left": [{**dataclasses.asdict(each), "names": list(each.names)} for each in self.left],
      "before": self.before._asdict(),
      "after": self.after._asdict(),
      "training": self.training,
    }

  def __str__(self) -> str:
    rows = [["scope or parameters", "merged", "products", "multiplications", "parameters"]]
    rows += [
      _row(each.place, " + ".join(each.parts), each.before, each.after) for each in self.merges
    ]
    rows.append(_row("the whole program", "", self.before, self.after))
    text = _table(rows)
    if self.left:
      kept = [["scope or parameters", "left alone", "reason"]]
      kept += [[each.place or "-", each.what, each.reason] for each in self.left]
      text += "\n\n" + _table(kept)
    return text


def names_of(
  leaves: Iterable[int], sizes: Mapping[int, int], paths: Mapping[int, str]
) -> tuple[str, ...]:
  """Returns the names of parameters, the largest first.

  Args:
    leaves: positions of the parameters.
    sizes, paths: the number of elements and the name of each parameter.
  """
  return tuple(paths[leaf] for leaf in sorted(leaves, key=lambda leaf: (-sizes[leaf], leaf)))


def _place(scope: str, names: Iterable[str]) -> str:
  return scope or listed(names, 2, longest=None)


def _as_dict(merge: Merged) -> dict[str, Any]:
  counts = {"before": merge.before._asdict(), "after": merge.after._asdict()}
  lists = {"parts": list(merge.parts), "names": list(merge.names)}
  return {**dataclasses.asdict(merge), **lists, **counts}


def _row(scope: str, parts: str, before: Counts, after: Counts) -> list[str]:
  cells = [f"{old:,} -> {new:,}" if old != new else f"{old:,}" for old, new in zip(before, after)]
  return [scope or "-", parts, *cells]


def _table(rows: list[list[str]]) -> str:
  """Returns rows with columns of equal widths, the first row underlined."""
  widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows
  ]
  return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
