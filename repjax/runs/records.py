"""Files of records, one JSON object a line: `metrics.jsonl` and `timing.jsonl`."""

import errno
import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from repjax import disk, json_files
from repjax.config import SCORES
from repjax.runs import contents
from repjax.schema import MisfitError, Rule

_LONGEST_LINE = 2**16


def judged(names: Collection[str]) -> str | None:
  """Returns the name of the metric by which checkpoints are compared; None if there is none.

  In a run that averages its variables, that is the score of the average.

  Args:
    names: names in a record, or in all records of a run.
  """
  candidates = (f"{part}_{score}" for score in SCORES for part in ("eval_ema", "eval"))
  return next((name for name in candidates if name in names), None)


class RecordsFile:
  """A file to which records are appended, one JSON object a line, each with its `step`.

  Attributes:
    count: number of lines in the file.
  """

  def __init__(self, path: Path, first_step: int, count: int | None = None):
    """Opens the file for a run that continues after `first_step`.

    Records of steps that the run will do again are dropped, so that no record appears twice.

    Args:
      path: path of the file; a missing file is made.
      first_step: records of later steps are dropped.
      count: number of lines to keep; None: every line up to `first_step`.

    Raises:
      InputError: the file cannot be written.
    """
    lines = _lines(path)
    kept = [line for line in lines if _step_of(line) <= first_step][:count]
    if count is not None and len(kept) < count:
      print(f"{path} lacks {count - len(kept)} records; the run continues without them", flush=True)
    with disk.replacing_file(path) as draft:
      draft.write_text("".join(f"{line}\n" for line in kept))
    with disk.writing(path):
      # Without a buffer, a record is in the file when `write` returns, even if the process is
      # killed right after.
      self._file = path.open("ab", buffering=0)
    self._path, self.count = path, len(kept)

  def write(self, **values: Any) -> None:
    """Appends one record.

    Raises:
      InputError: the record cannot be written.
    """
    line = f"{json.dumps(values)}\n".encode()
    with disk.writing(self._path):
      # A file without a buffer may write a part of the line and raise nothing: the disk is full.
      if self._file.write(line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self.count += 1

  def sync(self) -> None:
    """Waits until every record would survive a power cut."""
    with disk.writing(self._path):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


def read_records(path: Path) -> tuple[list[dict[str, Any]], int]:
  """Returns the records of a file, and the number of lines that hold no record.

  A record has a whole step, and all of its values are finite numbers. A missing file is empty.

  Raises:
    InputError: the file cannot be read.
  """
  lines = _lines(path)
  records = [record for record in map(_parse, lines) if record is not None]
  return records, len(lines) - len(records)


def _lines(path: Path) -> list[str]:
  """Returns the lines of a file, each up to a length that no record has; a missing file is empty.

  Raises:
    InputError: the file cannot be read.
  """
  if not path.exists():
    return []
  lines = []
  with json_files.opened(path) as file:
    while line := file.readline(_LONGEST_LINE):
      lines.append(line.decode(errors="replace").removesuffix("\n"))
      while len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
        line = file.readline(_LONGEST_LINE)
  return lines


def _parse(line: str, rule: Rule = contents.RECORD) -> dict[str, Any] | None:
  """Returns the record in a line, or None if the line holds no record of the rule."""
  try:
    return json_files.parse(line, rule)
  except MisfitError:
    return None


def _step_of(line: str) -> float:
  """Returns the step of a record; infinity for a line that a crash cut short."""
  record = _parse(line, contents.STEP)
  return float("inf") if record is None else record["step"]
