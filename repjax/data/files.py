"""Files and folders that users name: what is read, what is found, and how a list is understood.

Nothing here trusts a name. A link in a circle is not followed twice, and a list that is too large
is refused before anything is allocated.
"""

import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from repjax import regular_files
from repjax.errors import InputError, printable

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""The endings of the files that are looked for in folders."""
LARGEST = 2**29
"""Bytes of the largest image file that is read."""
_LARGEST_LIST = 2**26


def walk(folder: str | os.PathLike[str], problems: list[str]) -> Iterator[str]:
  """Yields the relative paths of everything below a folder that is no folder, in a fixed order.

  Links are followed. No folder is visited twice, so that links in a circle do no harm. Hidden files
  are left out.

  Args:
    folder: the folder.
    problems: takes a line for each folder that cannot be read.
  """
  pending, seen = [""], set()
  while pending:
    inside = pending.pop()
    here = os.path.join(folder, inside)
    real = os.path.realpath(here)
    if real in seen:
      continue
    seen.add(real)
    inner = []
    for entry in entries(here, problems):
      name = os.path.join(inside, entry.name)
      if is_folder(entry):
        inner.append(name)
      else:
        yield name
    pending += reversed(inner)


def entries(folder: str | os.PathLike[str], problems: list[str]) -> list[os.DirEntry[str]]:
  """Returns what is in a folder, sorted by name, without the files that file managers leave.

  Args: as in `walk`.
  """
  try:
    with os.scandir(folder) as found:
      return sorted((e for e in found if not _is_hidden(e.name)), key=lambda entry: entry.name)
  except OSError as error:
    problems.append(f"{printable(os.fspath(folder))} cannot be read: {error.strerror}")
    return []


def is_folder(entry: os.DirEntry[str]) -> bool:
  """Tells if an entry is a folder or a link to a folder; a link to itself is none."""
  try:
    return entry.is_dir()
  except OSError:
    return False


def is_image(name: str) -> bool:
  """Tells if a name has the ending of an image."""
  return name.lower().endswith(ENDINGS)


def _is_hidden(name: str) -> bool:
  """Tells if a name is that of a hidden file, or of a folder that a file manager leaves."""
  return name.startswith((".", "__MACOSX", "@eaDir"))


def read_list(path: str | os.PathLike[str]) -> list[Path]:
  """Reads a text file with the path of a file in each line.

  The text may be UTF-8 or UTF-16, with any kind of line ends. Blank lines do not count. A path may
  be in quotation marks. A path that does not exist may have been written on a different system. It
  is then looked for with slashes in place of backslashes, and with accents in their other forms.

  Raises:
    InputError: the file cannot be read or is no text.
  """
  try:
    text = _decoded(regular_files.read(path, _LARGEST_LIST))
  except (OSError, UnicodeError) as error:
    reason = getattr(error, "strerror", None) or error
    raise InputError(f"{printable(path)} cannot be read as a list of paths: {reason}") from error
  # Names of files may hold characters at which `splitlines` would split, such as a form feed.
  lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
  return [_existing(line.strip(" \t")) for line in lines if line.strip()]


def _decoded(data: bytes) -> str:
  """Returns the text of a list.

  Raises:
    UnicodeError: the bytes are no text.
  """
  if data.startswith((b"\xff\xfe", b"\xfe\xff")):
    text = data.decode("utf-16")
  # No path holds a zero byte. Every second byte of western text in UTF-16 is zero.
  elif b"\0" in data[:2]:
    text = data.decode("utf-16-be" if data[0] == 0 else "utf-16-le")
  else:
    # The name of a file may be any bytes. The escapes stand for bytes that are not UTF-8.
    text = data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")
  if "\0" in text:
    raise UnicodeError("it is neither UTF-8 nor UTF-16, or no text")
  return text.removesuffix("\x1a")  # with which editors for DOS end a text


def _existing(line: str) -> Path:
  """Returns the path that a line means: the first of its possible forms that exists."""
  forms = [line]
  if len(line) > 2 and line[0] == line[-1] and line[0] in "\"'":
    forms.append(line[1:-1])
  plain = forms[-1]
  forms.append(plain.replace("\\", "/"))
  if not plain.isprintable():  # the bytes may be those of a western Windows
    raw = plain.encode("utf-8", "surrogateescape")
    forms += [form.replace("\\", "/") for form in (plain, raw.decode("cp1252", "replace"))]
  forms += [unicodedata.normalize(kind, form) for form in forms for kind in ("NFC", "NFD")]
  return Path(next((form for form in forms if os.path.exists(form)), plain))
