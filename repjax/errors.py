"""Errors for the person at the keyboard: one clear paragraph instead of a traceback."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class InputError(ValueError):
  """An error about an input of the user: a name, flag or folder. The text says what to do."""


def printable(text: object) -> str:
  """Returns a text as a terminal can show it: one line, without control characters.

  Texts from files that someone else made can hold line breaks, sequences that move the cursor, and
  bytes that are not UTF-8. All of these are escaped.

  Args:
    text: text or path from outside, such as the name of a file or of a class.
  """
  return "".join(each if each.isprintable() else repr(each)[1:-1] for each in str(text))


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
  """Returns the error for an unknown name, with the closest known names in its text.

  Args:
    kind: kind of thing that the name should name, for example "model".
    name: the unknown name.
    known: all known names.
  """
  known = sorted({printable(each) for each in known})
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
