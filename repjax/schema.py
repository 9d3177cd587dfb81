"""Checks values that people can edit: JSON files, configs, and attributes of models.

A `Rule` says which values a field takes. The functions below make rules, from the smallest
(`whole`, `text`) to the largest (`record`). Every mistake is one paragraph, which names the field,
its value, and the values that it takes.

A rule trusts no value, which may be of any type. This module imports no other package, so that
every process can read a file quickly.
"""

import difflib
import math
import numbers
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from repjax.errors import InputError, unknown


class MisfitError(Exception):
  """A value that its rule refuses.

  Attributes:
    path: path of the field, such as "preprocessing.mean[1]".
    problem: what is wrong, as the rest of a sentence that begins with the path.
    value: the value, if the sentence should end with it.
  """

  def __init__(self, path: str, problem: str, *value: Any):
    super().__init__(path, problem)
    self.path, self.problem, self.value = path, problem, value

  def words(self, show: Callable[[Any], str]) -> str:
    """Returns the sentence, with the value as `show` writes it."""
    path = self.path or ("it" if self.value else "")
    got = [f", got {show(value)}" for value in self.value]
    return "".join([f"{path} {self.problem}".lstrip(), *got])


class Rule(NamedTuple):
  """The values that a field takes.

  Attributes:
    wanted: the values in words, which continue "must be".
    check: function of a value and its path that raises `MisfitError` for every other value.
  """

  wanted: str
  check: Callable[[Any, str], None]


def _rule(wanted: str, test: Callable[[Any], bool]) -> Rule:
  """Returns the rule of all values that pass a test."""

  def check(value: Any, path: str) -> None:
    if not test(value):
      raise MisfitError(path, f"must be {wanted}", value)

  return Rule(wanted, check)


def whole(least: int | None = None, most: int | None = None) -> Rule:
  """Returns the rule of whole numbers in a range. A boolean is not a number."""

  def test(value: Any) -> bool:
    if not _is_number(value, numbers.Integral):
      return False
    return (least is None or value >= least) and (most is None or value <= most)

  return _rule(f"a whole number{_range(least, most)}", test)


def number(
  least: float | None = None,
  most: float | None = None,
  *,
  above: float | None = None,
  below: float | None = None,
  finite: bool = True,
) -> Rule:
  """Returns the rule of numbers in a range.

  Args:
    least, most: ends of the range that belong to it.
    above, below: ends of the range that do not belong to it.
    finite: refuse infinities and NaN.
  """

  def test(value: Any) -> bool:
    if not _is_number(value, numbers.Real) or (finite and not _is_finite(value)):
      return False
    # Written so that NaN fails every end.
    return not (
      (least is not None and not value >= least)
      or (most is not None and not value <= most)
      or (above is not None and not value > above)
      or (below is not None and not value < below)
    )

  plain = "a finite number" if finite and (least, most, above, below) == (None,) * 4 else "a number"
  return _rule(plain + _range(least, most, above, below), test)


def _is_number(value: Any, kind: type) -> bool:
  """Tells if a value is a number of a kind; a boolean is none."""
  return isinstance(value, kind) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
  """Tells if a number is finite, and small enough for a float."""
  try:
    return math.isfinite(value)
  except OverflowError:
    return False


def _range(
  least: float | None, most: float | None, above: float | None = None, below: float | None = None
) -> str:
  """Returns a range in words: " from 1 to 8", " above 0", or nothing."""
  if least is not None and most is not None:
    return f" from {least} to {most}"
  ends = ((" of at least", least), (" of at most", most), (" above", above), (" below", below))
  return " and".join(f"{word} {end}" for word, end in ends if end is not None)


boolean = _rule("true or false", lambda value: isinstance(value, bool))
null = _rule("null", lambda value: value is None)


def text(*among: str) -> Rule:
  """Returns the rule of strings, or of a few strings. No string may hold a zero byte."""
  if not among:
    return _rule("a string", _is_text)
  choices = f"one of {', '.join(among)}"

  def check(value: Any, path: str) -> None:
    if not isinstance(value, str) or value not in among:
      close = difflib.get_close_matches(value, among, cutoff=0.5) if _is_text(value) else []
      hint = f" (did you mean {' or '.join(close)}?)" if close else ""
      raise MisfitError(path, f"must be {choices}{hint}", value)

  return Rule(choices, check)


# The operating system takes no zero byte in a path, and no encoding takes a lone surrogate. The
# surrogates that stand for bytes in the name of a file are allowed.
_NO_TEXT = re.compile("[\0\ud800-\udc7f\udd00-\udfff]")


def _is_text(value: Any) -> bool:
  """Tells if a value is a string that a path or a terminal can hold."""
  return isinstance(value, str) and not _NO_TEXT.search(value)


def items(each: Rule, *, length: int | None = None, most: int | None = None) -> Rule:
  """Returns the rule of lists.

  Args:
    each: rule of each item.
    length: number of items; None: any number.
    most: largest number of items.
  """
  count = f" of {length}" if length is not None else f" of at most {most}" if most else ""
  wanted = f"a list{count}, each {each.wanted}"

  def check(value: Any, path: str) -> None:
    fits = isinstance(value, list | tuple) and (length is None or len(value) == length)
    if not fits or (most is not None and len(value) > most):
      raise MisfitError(path, f"must be {wanted}", value)
    for index, item in enumerate(value):
      each.check(item, f"{path}[{index}]")

  return Rule(wanted, check)


def row(*rules: Rule) -> Rule:
  """Returns the rule of lists with one item for each of several rules, in this order."""
  wanted = f"a list of {len(rules)}: {', '.join(rule.wanted for rule in rules)}"

  def check(value: Any, path: str) -> None:
    if not isinstance(value, list | tuple) or len(value) != len(rules):
      raise MisfitError(path, f"must be {wanted}", value)
    for index, (rule, item) in enumerate(zip(rules, value)):
      rule.check(item, f"{path}[{index}]")

  return Rule(wanted, check)


def table(each: Rule, name: Rule | None = None, *, most: int | None = None) -> Rule:
  """Returns the rule of tables with any names.

  Args:
    each: rule of each value.
    name: rule of each name; None: any string.
    most: largest number of names.
  """
  count = f"of at most {most} names " if most else ""
  wanted = f"a table {count}{{{'name' if name is None else name.wanted}: {each.wanted}}}"
  names = text() if name is None else name

  def check(value: Any, path: str) -> None:
    if not isinstance(value, Mapping) or (most is not None and len(value) > most):
      raise MisfitError(path, f"must be {wanted}", value)
    for key, item in value.items():
      try:
        names.check(key, path)
      except MisfitError:
        raise MisfitError(path, f"must be {wanted}, and has the name", key) from None
      each.check(item, below(path, key))

  return Rule(wanted, check)


def record(
  fields: Mapping[str, Rule],
  *,
  required: Iterable[str] = (),
  others: Rule | None = None,
  name: Rule | None = None,
) -> Rule:
  """Returns the rule of tables with known fields.

  Args:
    fields: name of each field, to its rule.
    required: names of the fields that must be there.
    others: rule of the values of unknown fields. None: unknown fields are refused. An unknown name
      is also refused if it is close to the name of a field that is missing.
    name: rule of unknown names; None: any string.
  """
  required = tuple(required)
  named = ", ".join([*(required or fields)][:3])
  wanted = f"a table of fields such as {named}" if named else "a table"

  def check(value: Any, path: str) -> None:
    if not isinstance(value, Mapping):
      raise MisfitError(path, f"must be {wanted}", value)
    missing = [field for field in fields if field not in value]
    unknowns = {key: item for key, item in value.items() if key not in fields}
    for key in unknowns:
      if others is None or _misspelt(key, missing):
        raise MisfitError("", str(unknown("field", below(path, key), _named(path, fields))))
    for field in required:
      if field in missing:
        raise MisfitError(below(path, field), "is missing")
    for field, rule in fields.items():
      if field in value:
        rule.check(value[field], below(path, field))
    if others is not None:
      table(others, name).check(unknowns, path)

  return Rule(wanted, check)


def _misspelt(name: Any, missing: Iterable[str]) -> bool:
  """Tells if a name is close to one of the missing names."""
  return bool(difflib.get_close_matches(str(name)[:100], missing, n=1, cutoff=0.8))


def _named(path: str, fields: Iterable[str]) -> list[str]:
  return [below(path, name) for name in fields]


def below(path: str, name: Any) -> str:
  """Returns the path of a field in a table; a name that is no plain word is quoted."""
  plain = isinstance(name, str) and len(name) <= 60 and name.replace("-", "_").isidentifier()
  if not plain or not name.isprintable():
    return f"{path}[{shown(name)}]"
  return f"{path}.{name}" if path else name


def either(*rules: Rule) -> Rule:
  """Returns the rule of values that one of several rules takes."""
  wanted = " or ".join(rule.wanted for rule in rules)

  def check(value: Any, path: str) -> None:
    misfits = []
    for rule in rules:
      try:
        return rule.check(value, path)
      except MisfitError as misfit:
        misfits.append(misfit)
    # A list with one wrong item is refused for the item, not for being a list.
    nearest = max(misfits, key=lambda misfit: len(misfit.path))
    raise nearest if nearest.path != path else MisfitError(path, f"must be {wanted}", value)

  return Rule(wanted, check)


def optional(rule: Rule) -> Rule:
  """Returns the rule of values that a rule takes, and of null."""
  return either(rule, null)


def _is_scalar(value: Any) -> bool:
  """Tells if a value is a boolean, a finite number, a string or null."""
  return (
    value is None
    or isinstance(value, bool)
    or _is_text(value)
    or (_is_number(value, numbers.Real) and _is_finite(value))
  )


# One test, not `either` of four rules, which would raise errors for most items of a long list.
_SCALAR = _rule("true or false or a finite number or a string or null", _is_scalar)


def _anything(name: Rule, depth: int = 8, most: int | None = None) -> Rule:
  """Returns the rule of all values that JSON holds, down to some depth and up to some length."""
  if depth == 0:
    return _SCALAR
  inner = _anything(name, depth - 1, most)
  wanted = "a finite number, a string, true, false, null, or a list or table of these"
  lists, tables = items(inner, most=most), table(inner, name, most=most)

  def check(value: Any, path: str) -> None:
    if isinstance(value, Mapping):
      tables.check(value, path)
    elif isinstance(value, list | tuple):
      lists.check(value, path)
    else:
      _SCALAR.check(value, path)

  return Rule(wanted, check)


identifier = _rule(
  "a name of letters, digits and _",
  lambda value: isinstance(value, str) and value.isidentifier() and not value.startswith("__"),
)
anything = _anything(text())
"""The rule of all values of JSON that are finite and not nested deeply."""
LONGEST = 100
"""Largest number of items in an attribute of a model, such as stages."""
overrides = table(_anything(text(), most=LONGEST), most=LONGEST)
"""The rule of the attributes that model.json gives. The model has a rule for each."""
attributes = _anything(identifier)
"""The rule of the same values whose tables have names that are words of Python."""


def check(value: Any, rule: Rule, name: str = "") -> None:
  """Checks a value of Python.

  Args:
    value: the value.
    rule: the rule of the value.
    name: name of the value in the message.

  Raises:
    InputError: the rule refuses the value.
  """
  try:
    rule.check(value, name)
  except MisfitError as misfit:
    raise InputError(misfit.words(shown)) from None


class _Short(reprlib.Repr):
  """Writes values of Python in few characters, on one line and without control characters."""

  def __init__(self):
    super().__init__()
    self.maxlist = self.maxtuple = self.maxdict = 8
    self.maxstring = self.maxother = 80

  def repr_int(self, x: int, level: int) -> str:
    del level
    # Python refuses to write numbers of thousands of digits.
    return repr(x) if abs(x) < 10**20 else f"a number of {x.bit_length()} bits"


shown = _Short().repr
"""Writes a value of Python for a message."""
