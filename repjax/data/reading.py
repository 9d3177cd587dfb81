"""Image files are read and decoded once, by several threads."""

import collections
import hashlib
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image, UnidentifiedImageError

FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # of the contents, whatever a file's ending says


class ImageFile(NamedTuple):
  """A file that was read; `fault` is why it is no image."""

  name: str
  label: int
  data: bytes
  digest: bytes
  fault: str | None


def read_image(path: Path, name: str, label: int) -> ImageFile:
  """Reads a file and looks whether it is an image."""
  data, digest = b"", b""
  try:
    data = path.read_bytes()
    digest = hashlib.sha256(data).digest()
    fault = fault_of(data)
  except OSError as error:
    fault = error.strerror or str(error)
  return ImageFile(name, label, data, digest, fault)


def fault_of(data: bytes) -> str | None:
  """Why these bytes are not a whole image; None where they are."""
  if not data:
    return "empty file"
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      image.draft(None, (1, 1))  # a JPEG at an eighth of its size: all of it is read, in less time
      image.load()
  except UnidentifiedImageError:
    return f"not an image of a known kind ({', '.join(FORMATS)})"
  except Exception as error:  # Pillow has many kinds for damaged files
    return " ".join(str(error).split()) or type(error).__name__
  return None


def in_order(
  function: Callable[..., ImageFile], arguments: Iterable[tuple], num_workers: int
) -> Iterator[ImageFile]:
  """Results of threads, in order, with few of them in memory at a time."""
  arguments, pending = iter(arguments), collections.deque()
  with ThreadPoolExecutor(num_workers) as pool:
    while True:
      for each in itertools.islice(arguments, 4 * num_workers - len(pending)):
        pending.append(pool.submit(function, *each))
      if not pending:
        return
      yield pending.popleft().result()
