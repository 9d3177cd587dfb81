"""Reads JSON files that people can edit, or that a killed program may have left half-written.

`schema` has the rules by which the content is checked. Files may be huge, deeply nested, of any
encoding, or no files at all.
"""

import collections
import json
from pathlib import Path
from typing import Any, BinaryIO

from repjax import regular_files
from repjax.errors import InputError, printable, sentences
from repjax.schema import MisfitError, Rule, anything, below

LARGEST = 32 * 2**20
"""Bytes of the largest JSON file that is read."""
DEEPEST = 32
"""Levels of lists and tables that a JSON file may have."""
_TOO_DEEP = f"lists and tables are nested more than {DEEPEST} deep"


def read(path: Path, rule: Rule = anything) -> Any:
  """Reads a JSON file of a person, or of a program that may have been killed.

  Args:
    path: path of the file.
    rule: the rule of its content.

  Raises:
    InputError: the file cannot be read, is no JSON, or holds a value that the rule refuses.
  """
  with opened(path) as file:
    return content(path, file.read(LARGEST + 1), rule)


def content(path: Path, data: bytes, rule: Rule = anything) -> Any:
  """Returns the value of a JSON file whose bytes were read already.

  Args:
    path: path of the file, for the message.
    data: the bytes.
    rule: the rule of the value.

  Raises:
    InputError: the bytes are no JSON, or the rule refuses the value.
  """
  try:
    return parse(data, rule)
  except MisfitError as misfit:
    way_out = "Mend this place or restore the file, or start in a new folder"
    raise InputError(sentences(f"{path} is damaged: {misfit.words(shown)}", way_out)) from None


def opened(path: Path) -> BinaryIO:
  """Opens a file to read its bytes.

  Raises:
    InputError: the file cannot be read, or is no regular file.
  """
  try:
    return regular_files.opened(path)
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror}") from error


def parse(data: bytes | str, rule: Rule = anything) -> Any:
  """Returns the value of a JSON text.

  NaN and infinities are read as such, since records of a run hold them. `number` refuses them.

  Raises:
    MisfitError: the text is no JSON, or its value is refused by the rule.
  """
  try:
    value = json.loads(_decoded(data), object_pairs_hook=_without_doubles, parse_int=_whole_number)
  except json.JSONDecodeError as error:
    raise MisfitError("", f"it is no JSON: {error}") from None
  except RecursionError:
    raise MisfitError("", _TOO_DEEP) from None
  if _is_deep(value):
    raise MisfitError("", _TOO_DEEP)
  rule.check(value, "")
  return value


def _decoded(data: bytes | str) -> str:
  """Returns the text of a file.

  Raises:
    MisfitError: the file is empty, too large, or not encoded as UTF-8.
  """
  if len(data) > LARGEST:
    raise MisfitError("", f"it is larger than {LARGEST // 2**20} MiB")
  if not data.strip():
    raise MisfitError("", "it is empty")
  if isinstance(data, str):
    return data
  if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
    raise MisfitError("", "it begins with a byte order mark. Save it as UTF-8 without this mark")
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise MisfitError("", f"it is not encoded as UTF-8: byte {error.start} is wrong") from None


def _whole_number(digits: str) -> int | float:
  """Returns a whole number, or a float if no field of any file takes so many digits."""
  return int(digits) if len(digits) <= 20 else float(digits)


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """Returns a table; raises MisfitError if a name is given twice, where `json` takes the last."""
  result = dict(pairs)
  if len(result) < len(pairs):
    counts = collections.Counter(name for name, _ in pairs)
    raise MisfitError(below("", counts.most_common(1)[0][0]), "is given twice in one table")
  return result


def _is_deep(value: Any) -> bool:
  """Tells if lists and tables are nested too deep, level by level: recursion could end here too."""
  level = [value]
  for _ in range(DEEPEST):
    level = [
      item
      for each in level
      if isinstance(each, dict | list)
      for item in (each.values() if isinstance(each, dict) else each)
    ]
  return bool(level)


def shown(value: Any) -> str:
  """Writes a value of a file for a message, as the file has it, in at most 80 characters."""
  return printable(json.dumps(value), 80)
