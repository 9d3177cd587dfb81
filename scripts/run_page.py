"""Runs the programs and commands of a page in order, and compares or writes what they print.

A block of text that follows a block of code holds its output. Where such a block begins with "...",
it holds the last lines only. Numbers differ between processors, so a comparison leaves them out.

Examples:
  python scripts/run_page.py docs/tutorials/linen.md           # fails where the output differs
  python scripts/run_page.py docs/tutorials/linen.md --write   # writes the new output
"""

import argparse
import contextlib
import io
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from repjax.errors import InputError, one_paragraph

ROOT = Path(__file__).resolve().parents[1]
BLOCK = re.compile(r"^```(python|sh|text)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
INSTALLS = ("pip ", "git ", "make ")  # commands that change the environment are not run
MASKS = (
  (re.compile(r"\b(at \w+/\S+|sha256 \w+)"), "#"),  # the worst layer, the sum of a file
  (re.compile(r"\bunclear\b|\d[\d.,:e+-]*x?"), "#"),  # a speed may be too noisy to be told
  (re.compile(r" +"), " "),
)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("page", type=Path, help="page with blocks of code")
  parser.add_argument("--write", action="store_true", help="write the output into the page")
  arguments = parser.parse_args()
  page = arguments.page.resolve()
  with one_paragraph(), tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    os.environ["HOME"] = folder  # data sets and compiled programs lie there
    for name in ("scripts", "configs"):
      Path(name).symlink_to(ROOT / name)
    text = with_output(page.read_text(), compare=not arguments.write)
  if arguments.write:
    page.write_text(text)


def with_output(text: str, compare: bool) -> str:
  """Runs a page in the current folder, and returns its text with the output of this run.

  Raises:
    InputError: a command failed, or, with `compare`, the output is not what the page says.
  """
  scope: dict[str, Any] = {"__name__": "__main__"}
  output, end, parts, last = "", 0, [], 0
  for block in BLOCK.finditer(text):
    language, body = block[1], block[2]
    if language != "text":
      output = printed(language, body, scope).replace(os.environ["HOME"], "~")
      print(output, end="", flush=True)
    elif not text[end : block.start()].strip():
      found = shortened(output, body)
      if compare and masked(found) != masked(body):
        raise InputError(f"a page says\n{body}and its code printed\n{found}")
      parts += [text[last : block.start(2)], found]
      last = block.end(2)
    end = block.end()
  return "".join([*parts, text[last:]])


def printed(language: str, body: str, scope: dict[str, Any]) -> str:
  """Runs a block, and returns what it printed to stdout."""
  if language == "python":
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
      exec(compile(body, "page", "exec"), scope)
    return stdout.getvalue()
  lines = [line for line in body.splitlines() if not line.startswith(INSTALLS)]
  path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
  run = subprocess.run(
    ["bash", "-e", "-c", "\n".join(lines)],
    stdout=subprocess.PIPE,
    env=os.environ | {"PATH": path, "COLUMNS": "100"},
    text=True,
  )
  if run.returncode:
    raise InputError(f"a command of the page failed with status {run.returncode}:\n{body}")
  return run.stdout


def shortened(output: str, body: str) -> str:
  """Returns the output, or its last lines where the page shows only these."""
  lines = body.splitlines()
  if lines[:1] != ["..."]:
    return output
  return "\n".join(["...", *output.splitlines()[1 - len(lines) :]]) + "\n"


def masked(text: str) -> str:
  """Returns a text without its numbers, and without what numbers change."""
  for pattern, mask in MASKS:
    text = pattern.sub(mask, text)
  return text.strip()


if __name__ == "__main__":
  main()
