"""Errors for the person at the keyboard: one clear paragraph instead of a traceback."""

import contextlib
import difflib
import unicodedata
from collections.abc import Iterable, Iterator


class InputError(ValueError):
  """An error about an input of the user: a name, flag or folder. The text says what to do.

  The text may quote files of strangers, so control characters in it are escaped.
  """

  def __init__(self, text: str):
    super().__init__("\n".join(map(printable, str(text).split("\n"))))


def printable(text: str) -> str:
  """Returns a text in which control characters are escaped, so that a terminal can show it."""
  return "".join(
    char.encode("unicode_escape").decode() if _controls(char) else char for char in text
  )


def _controls(char: str) -> bool:
  """Tells if a character is a control character, or changes the direction or the line of a text."""
  return not char.isprintable() and unicodedata.category(char) != "Zs"  # Zs: spaces of all kinds


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
  """Returns the error for an unknown name, with the closest known names in its text.

  Args:
    kind: kind of thing that the name should name, for example "model".
    name: the unknown name.
    known: all known names.
  """
  known = sorted(set(known))
  # A name from a file can have any length, of which the comparison takes the square.
  text = str(name)
  name = name if len(text) <= 80 else f"{text[:80]}..."
  plain = str(name).lower().replace("-", "_")
  close = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
  if close:
    hint = f"did you mean {' or '.join(close)}?"
  elif len(known) <= 60:
    hint = f"known: {', '.join(known)}"
  else:
    hint = f"none of the {len(known)} known ones is close to it"
  return InputError(f"unknown {kind} {name!r}; {hint}")


@contextlib.contextmanager
def one_paragraph() -> Iterator[None]:
  """Turns an `InputError` in its block into exit status 1 and the text of the error alone."""
  try:
    yield
  except InputError as error:
    raise SystemExit(f"error: {error}") from None
