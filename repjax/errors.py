"""Errors meant for the person at the keyboard: one clear paragraph instead of a traceback."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator


class InputError(ValueError):
  """Something a person gave (a name, flag, folder) cannot be used; the text says the way out."""


def unknown(kind: str, name: object, known: Iterable[str]) -> InputError:
  """The error for a name that is not among the known ones, with the closest of them.

  Args:
    kind: what the name should have named, for example "model".
    name: what came.
    known: every name that would have been right.
  """
  known = sorted(set(known))
  plain = str(name).lower().replace("-", "_")
  close = difflib.get_close_matches(plain, known, n=3, cutoff=0.5)
  if close:
    hint = f"did you mean {' or '.join(close)}?"
  elif len(known) <= 40:
    hint = f"known: {', '.join(known)}"
  else:
    hint = f"none of the {len(known)} known ones is close to it"
  return InputError(f"unknown {kind} {name!r}; {hint}")


@contextlib.contextmanager
def one_paragraph() -> Iterator[None]:
  """Ends the program with status 1 and the error's text alone when an `InputError` gets here."""
  try:
    yield
  except InputError as error:
    raise SystemExit(f"error: {error}") from None
