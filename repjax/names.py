"""Names of folders and files, as users give them: checked before any work begins."""

import os
import re
import unicodedata
from pathlib import Path

from repjax.errors import InputError, printable

_LONGEST_PART = 255  # bytes of one name, in all common file systems
_LONGEST = 3600  # bytes of a path: Linux allows 4096, and the files below a folder need the rest
_DEEPEST = 200  # parts of a path; making very many parents is recursion in Python
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_HUB = re.compile(r"https?://(?:huggingface\.co|hf\.co)/([^/?#]+/[^/?#]+)")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")


def file(name: str | os.PathLike[str]) -> Path:
  """Returns the path of a file or folder that a user names, with "~" as the home folder.

  The path stays relative where the name is, so that messages show the name that was given.

  Args:
    name: the name; it may hold any byte that the system allows.

  Raises:
    InputError: the name is no text, empty, too long, a URL, or holds a NUL byte.
  """
  try:
    text = os.fsdecode(name)
  except TypeError as error:
    kind = type(name).__name__
    raise InputError(f"the name of a file or folder must be text or a path, got {kind}") from error
  shown = f'the name "{printable(text, 60)}"'
  if not text:
    raise InputError("the name of a file or folder is empty; use . for the current folder")
  if "\0" in text:
    raise InputError(f"{shown} holds a NUL character, which no file name can; leave it out")
  if _URL.match(text):
    raise InputError(f"{shown} is a URL. {_way_out_of_url(text)}")
  try:
    path = Path(text).expanduser() if text.startswith("~") else Path(text)
  except RuntimeError as error:
    raise InputError(
      f"{shown} begins with ~, which names no known home folder; write ./~ for such a name"
    ) from error
  try:
    os.fsencode(path)
  except UnicodeEncodeError as error:
    raise InputError(f"{shown} holds half a character, which no file name can; leave it out") from (
      error
    )
  if len(path.parts) > _DEEPEST:
    raise InputError(
      f"{shown} is too deep: it has {len(path.parts):,} parts between slashes and may have "
      f"{_DEEPEST}; use a folder nearer to the root"
    )
  for part in path.parts:
    if len(os.fsencode(part)) > _LONGEST_PART:
      raise InputError(
        f"{shown} is too long: a file system takes {_LONGEST_PART} bytes between two slashes, got "
        f"{len(os.fsencode(part))}; give a shorter name"
      )
  length = len(os.fsencode(path.absolute()))
  if length > _LONGEST:
    raise InputError(
      f"{shown} is too long: the whole path has {length} bytes and may have {_LONGEST}; use a "
      "folder nearer to the root"
    )
  return path


def _way_out_of_url(url: str) -> str:
  """Returns what to give in place of a URL."""
  if repository := _HUB.match(url):
    return f"Weights of the Hugging Face hub are named hf:{printable(repository[1], 200)}"
  if url.startswith(("http:", "https:")):
    return "Fetch the file, and give its path on this machine"
  return (
    "Give a folder or file of this machine: mount the bucket, for example by gcsfuse, or copy the "
    "files"
  )


def folder(name: str | os.PathLike[str]) -> Path:
  """Returns the path of a folder that a user names and that holds arrays, such as a workdir.

  The libraries that store arrays read a backslash as a slash, list folders by patterns, and take
  UTF-8 only. They would write a run to its end into a folder that nothing can read.

  Args:
    name: the name; "~" is the home folder.

  Raises:
    InputError: as in `file`; or the path holds a backslash, one of * ? [, control characters, a
      part such as "gs:", or bytes that are not UTF-8.
  """
  path = file(name)
  text = str(path.absolute())
  shown = f'the folder "{printable(text, 60)}"'
  way_out = "give a folder whose path has none"
  if "\\" in text:
    raise InputError(f"{shown} has a backslash in its path, which array files cannot; {way_out}")
  if any(each in text for each in "*?["):
    raise InputError(
      f"{shown} has one of * ? [ in its path, which array files take for a pattern of several "
      f"names; {way_out}"
    )
  if not text.isprintable() and any(unicodedata.category(each) == "Cc" for each in text):
    raise InputError(
      f"{shown} has a control character in its path, such as a line break; {way_out}"
    )
  try:
    text.encode()
  except UnicodeEncodeError as error:
    raise InputError(f"{shown} has bytes in its path that are not UTF-8; {way_out}") from error
  for part in path.absolute().parts:
    if _SCHEME.fullmatch(part):
      raise InputError(
        f"{shown} has the part {part!r}, which array files take for the beginning of a URL; "
        f"{way_out}"
      )
  # A path that ends in ".." or is "." has no name beside which a draft could be written.
  return path.resolve() if path.name in ("", "..") and path != Path() else path
