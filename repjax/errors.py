"""Errors for the person at the keyboard: one clear paragraph instead of a traceback."""

import contextlib
import difflib
import os
import unicodedata
from collections.abc import Iterable, Iterator


class InputError(ValueError):
  """An error about an input of the user: a name, flag or folder. The text says what to do.

  Texts often quote files of strangers. A terminal would obey control characters in them, so every
  one except a line's end is escaped. `printable` escapes ends of lines too: pass each foreign
  string through it, so that it cannot forge a line of the message.
  """

  def __init__(self, text: str):
    super().__init__("\n".join(printable(line) for line in str(text).split("\n")))


def printable(text: object, longest: int | None = None) -> str:
  r"""Returns a text as one line that a terminal can show, with control characters escaped.

  Args:
    text: a name, value or message from a file, from the network or from a library that quotes it.
    longest: number of characters after which the rest is left out; None leaves nothing out.

  Example:
    >>> printable("weight\x1b[2J\nall is well")
    'weight\\x1b[2J\\nall is well'
  """
  text = str(text)
  if longest is not None and len(text) > longest:
    text = f"{text[:longest]}..."
  return "".join(
    char.encode("unicode_escape").decode() if _controls(char) else char for char in text
  )


def listed(
  things: Iterable[object], most: int = 5, *, between: str = ", ", longest: int | None = 100
) -> str:
  """Joins the first of some things for a message.

  Args:
    things: names, values or sentences, of which a file or folder may hold thousands.
    most: number of things after which only the number of the others is said.
    between: text between two things.
    longest: number of characters of a thing after which its rest is left out; None: whole things.

  Example:
    >>> listed("abcdef", 2)
    'a, b and 4 more'
  """
  texts = [str(thing) for thing in things]
  shown = between.join(printable(text, longest) for text in texts[:most])
  more = len(texts) - most
  return f"{shown}{between if between.isspace() else ' '}and {more:,} more" if more > 0 else shown


def sentences(*texts: object) -> str:
  """Joins texts to sentences, with a full stop after each that has no mark at its end but the last.

  Example:
    >>> sentences("unknown name; did you mean b?", "no file", "Give one")
    'unknown name; did you mean b? no file. Give one'
  """
  parts = [str(text) for text in texts]
  ends = ["" if part.endswith((".", "?", "!")) else "." for part in parts[:-1]]
  return " ".join(part + end for part, end in zip(parts, [*ends, ""]))


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
  known = sorted({printable(each) for each in known})
  # A name from a file can have any length, of which the comparison takes the square.
  text = str(name)
  name = name if len(text) <= 80 else f"{text[:80]}..."
  plain = str(name).lower().replace("-", "_")
  close = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
  if not close:  # initials, such as lr for learning_rate
    initials = {each: "".join(word[:1] for word in each.split("_")) for each in known}
    close = [each for each in known if len(plain) > 1 and initials[each] == plain][:3]
  if close:
    hint = f"did you mean {' or '.join(close)}?"
  elif len(known) <= 80:
    hint = f"known: {', '.join(known)}"
  else:
    hint = f"none of the {len(known)} known ones is close to it"
  return InputError(f"unknown {kind} {name!r}; {hint}")


@contextlib.contextmanager
def one_paragraph() -> Iterator[None]:
  """Turns an `InputError` in its block into exit status 1 and the text of the error alone.

  So does an error of the system about a file, such as a folder that this user may not read; and an
  error of JAX on a machine that lacks the devices that JAX_PLATFORMS asks for.
  """
  try:
    yield
  except InputError as error:
    raise SystemExit(f"error: {error}") from None
  except OSError as error:
    if error.filename is None:
      raise
    path = os.fsdecode(error.filename) if isinstance(error.filename, bytes) else error.filename
    reason = error.strerror or type(error).__name__
    raise SystemExit(f"error: {printable(path)} cannot be used: {printable(reason)}") from None
  except (AssertionError, RuntimeError):
    from repjax.devices import missing_devices  # imported here: that module imports this one

    if missing := missing_devices():
      raise SystemExit(f"error: {missing}") from None
    raise
