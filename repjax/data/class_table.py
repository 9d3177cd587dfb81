"""Reads `classes.json`, which says how the masks in a folder name classes."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from repjax import json_files
from repjax.data import layout, masks
from repjax.data.masks import IGNORED, MOST_CLASSES, Color, Rules
from repjax.errors import InputError, listed, sentences
from repjax.schema import MisfitError, either, items, record, text, whole

NAME = "classes.json"
"""The file in a folder that says how its masks name classes."""
_COLOR = items(whole(0, 255), length=3)
_RULE = record(
  {
    "names": items(text(), most=MOST_CLASSES),
    "colors": items(_COLOR, most=MOST_CLASSES),
    "values": items(whole(0, 255), most=MOST_CLASSES),
    "ignore": items(either(whole(0, 255), _COLOR), most=2**16),
  },
  required=("names",),
)
_EXAMPLE = '{"names": ["background", "cat"], "colors": [[0, 0, 0], [255, 0, 0]]}'


class ClassTable(NamedTuple):
  """The content of `classes.json`.

  Attributes:
    names: the names of the classes; None where there is no such file.
    colors: the colour of each class; empty where the file has none.
    rules: how masks name classes.
  """

  names: tuple[str, ...] | None
  colors: tuple[Color, ...]
  rules: Rules


def read(path: Path) -> ClassTable:
  """Reads `classes.json`; without the file, the values of masks are the classes.

  Raises:
    InputError: the file cannot be read, is no such table, or contradicts itself.
  """
  if not path.exists():
    values = {value: value for value in range(MOST_CLASSES)}
    return ClassTable(None, (), Rules(masks.lookup(values), None))
  try:
    with json_files.opened(path) as file:
      content = json_files.parse(file.read(json_files.LARGEST + 1), _RULE)
  except MisfitError as misfit:
    problem = misfit.words(json_files.shown)
    raise InputError(
      sentences(f"{path} cannot be used: {problem}", f"A table of classes looks like {_EXAMPLE}")
    ) from None
  if problems := _table_problems(content):
    raise InputError(f"{path} cannot be used: {listed(problems, between='; ', longest=None)}")
  return _class_table(content)


def _table_problems(table: Mapping[str, Any]) -> list[str]:
  """Returns all that is wrong with a table whose fields have the right types."""
  problems = layout.name_problems(table["names"], "Give them different names")
  count = len(table["names"])
  if count < 2:
    problems.append(f"it has {count} names, and at least two classes are needed")
  for field in ("names", "colors", "values"):
    given = [json_files.shown(each) for each in table.get(field, ())]
    if len(given) not in (0, count):
      problems.append(f"it has {count} names and {len(given)} {field}; give one for each class")
    if twice := sorted({each for each in given if given.count(each) > 1}):
      problems.append(f"{field} that stand there twice: {listed(twice)}")
  used = {json_files.shown(each) for each in (*_values(table), *table.get("colors", ()))}
  if both := [each for each in map(json_files.shown, table.get("ignore", ())) if each in used]:
    problems.append(f"values or colours that are ignored and are those of a class: {listed(both)}")
  return problems


def _values(table: Mapping[str, Any]) -> Sequence[int]:
  """Returns the value of each class in index masks."""
  return table.get("values") or range(len(table["names"]))


def _class_table(table: Mapping[str, Any]) -> ClassTable:
  """Returns what a table without mistakes says."""
  ignored = table.get("ignore", ())
  values = dict.fromkeys((each for each in ignored if isinstance(each, int)), IGNORED)
  values |= {value: number for number, value in enumerate(_values(table))}
  colors = masks.colors_of(table.get("colors", ()))
  known = None
  if colors:
    skipped = masks.colors_of([each for each in ignored if not isinstance(each, int)])
    known = dict.fromkeys(skipped, IGNORED) | {color: n for n, color in enumerate(colors)}
  return ClassTable(tuple(table["names"]), colors, Rules(masks.lookup(values), known))
