"""Files and folders that users name: what is read, what is found, and how a list is understood.

Nothing here trusts a name. A pipe or a device is not read, a link in a circle is not followed
twice, and a file that is too large is refused before anything is allocated.
"""

import errno
import os
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from repjax.errors import InputError, printable

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
"""The endings of the files that are looked for in folders."""
LARGEST = 2**29
"""Bytes of the largest image file that is read."""
_LARGEST_LIST = 2**26


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
  """Opens a regular file, or a link to one, to read its bytes.

  Raises:
    OSError: the file cannot be read, or is a pipe, a socket or a device.
  """
  if "\0" in os.fsdecode(path):
    raise OSError(errno.EINVAL, "its name holds a NUL character, which no file has")
  # Without O_NONBLOCK, opening a pipe would wait until a different program writes to it.
  file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
  mode = os.fstat(file).st_mode
  if stat.S_ISREG(mode):
    return open(file, "rb")
  os.close(file)
  if stat.S_ISDIR(mode):
    raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
  raise OSError(errno.EINVAL, "it is no file but a pipe, a socket or a device", os.fspath(path))


def read(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
  """Reads a regular file.

  Args:
    path: path of the file, which may be a link.
    largest: number of bytes that the file may have.

  Raises:
    OSError: as in `open_regular`, or the file is too large.
  """
  with open_regular(path) as stream:
    size = os.fstat(stream.fileno()).st_size
    if size > largest:
      raise OSError(errno.EFBIG, f"it has {size:,} bytes, and at most {largest:,} are read")
    return stream.read()


def is_regular(path: str | os.PathLike[str]) -> bool:
  """Tells if a path, or the target of a link, is a regular file."""
  try:
    return stat.S_ISREG(os.stat(path).st_mode)
  except (OSError, ValueError):
    return False


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
    text = _decoded(read(path, _LARGEST_LIST))
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
    return data.decode("utf-16")
  # No path holds a zero byte. Every second byte of western text in UTF-16 is zero.
  if b"\0" in data[:2]:
    return data.decode("utf-16-be" if data[0] == 0 else "utf-16-le")
  if b"\0" in data:
    raise UnicodeError("it holds zero bytes, so it is no text")
  # The name of a file may be any bytes. The escapes stand for bytes that are not UTF-8.
  return data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape")


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
