"""Prepares the package's docstrings for the site, which takes them for Markdown.

Docstrings are plain text with `code` in backticks, and equations, programs and tables stand
indented. An extension of Griffe shows these as blocks of code, and protects all other characters.
"""

import inspect
import re
from typing import Any

import griffe

# Sections that Griffe understands. It makes tables of them.
SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Warns", "Yields")
PROGRAMS = ("Example", "Examples")
PLAIN = re.compile(r"(`[^`]*`|https?://\S+)")
NAMES = re.compile(r"  (\*{0,2}\w+(?:, \*{0,2}\w+)*): ")


class Docstrings(griffe.Extension):
  """Rewrites each docstring before Griffe reads its sections."""

  def on_module(self, *, mod: griffe.Module, **_: Any) -> None:
    """Leaves to the page of a module what its readers need.

    A page has a text of its own: a module's docstring is for those who change the module. A public
    name is that of the function, where a file of the package is called the same.
    """
    mod.docstring = None
    for name in mod.exports or ():
      file = mod.members.get(str(name))
      if isinstance(file, griffe.Module) and str(name) in file.members:
        mod.members[str(name)] = griffe.Alias(str(name), file.members[str(name)], parent=mod)

  def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
    if obj.docstring:
      obj.docstring.value = as_markdown(obj.docstring.value)


def as_markdown(docstring: str) -> str:
  """Returns a docstring as Markdown with sections of the Google style.

  Example:
    >>> as_markdown("Adds x_1 to y.\\n\\n  y = x_1 + y")
    'Adds x\\\\_1 to y.\\n\\n```text\\ny = x_1 + y\\n```'
  """
  blocks = inspect.cleandoc(docstring).split("\n\n")
  return "\n\n".join(part for block in joined(blocks) for part in shown(block))


def joined(blocks: list[str]) -> list[str]:
  """Joins paragraphs that begin indented to the paragraph before them, such as a second example."""
  whole: list[str] = []
  for block in blocks:
    if whole and block.startswith("  ") and is_indented(whole[-1].splitlines()[-1]):
      whole[-1] += f"\n\n{block}"
    else:
      whole.append(block)
  return whole


def is_indented(line: str) -> bool:
  return line.startswith("  ")


def shown(block: str) -> list[str]:
  """Returns the Markdown of a paragraph and of the lines that stand indented below its lines."""
  title, _, body = block.partition("\n")
  name = title.removesuffix(":")
  if name in SECTIONS:
    return [f"{title}\n{with_single_names(body)}"]
  if name in PROGRAMS:
    return [f"**{name}**", fenced(body, "python")]
  if name == "References":
    return [f"**{name}**", "  \n".join(protected(line.strip()) for line in body.splitlines())]
  parts, lines = [], block.splitlines()
  while lines:
    indented = is_indented(lines[0])
    count = next(
      (i for i, line in enumerate(lines) if line and is_indented(line) != indented), len(lines)
    )
    text, lines = "\n".join(lines[:count]), lines[count:]
    parts.append(fenced(text, "text") if indented else protected(text))
  return parts


def fenced(text: str, language: str) -> str:
  return f"```{language}\n{inspect.cleandoc(text)}\n```"


def with_single_names(body: str) -> str:
  """Returns the lines of a section, with one line for each name where several share a text."""
  lines = []
  for entry in re.split(r"\n(?=  \S)", body):
    match = NAMES.match(entry)
    if match:
      names = match[1].split(", ")
      lines += [f"  {name}: {protected(entry[match.end() :])}" for name in names]
    else:
      lines.append(protected(entry))
  return "\n".join(lines)


def protected(text: str) -> str:
  """Escapes what Markdown would take for emphasis, links or HTML, outside of code and addresses."""
  parts = PLAIN.split(text)
  parts[::2] = [re.sub(r"([\\_*\[\]<>#|])", r"\\\1", part) for part in parts[::2]]
  return "".join(parts)
