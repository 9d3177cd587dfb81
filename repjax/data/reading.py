"""Reads image files in several threads, and checks that each file is a whole image."""

import collections
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple, TypeVar

from repjax import regular_files
from repjax.data import files
from repjax.data.decode import REDUCTIONS, Picture, fault_of, image_errors
from repjax.errors import InputError


class ImageFile(NamedTuple):
  """A file that was read.

  Attributes:
    name: the file's path below the folder that was given.
    label: the number of its class.
    data: the bytes of the file.
    digest: the SHA-256 of the bytes.
    fault: why the file is no image; None where it is one.
  """

  name: str
  label: int
  data: bytes
  digest: bytes
  fault: str | None


def read_image_file(path: Path, name: str, label: int) -> ImageFile:
  """Reads a file and checks whether it is an image; a problem becomes the result's `fault`."""
  data, digest = b"", b""
  try:
    with image_errors(name):
      data = regular_files.read(path, files.LARGEST)
      digest = hashlib.sha256(data).digest()
    fault = find_fault(data)
  except InputError as error:
    fault = fault_of(error)
  return ImageFile(name, label, data if fault is None else b"", digest, fault)


def find_fault(data: bytes) -> str | None:
  """Returns why these bytes are not a whole image, or None where they are one.

  The rules are those of `Picture`, which training, evaluation and predictions read images by.
  """
  try:
    # A JPEG is decoded at an eighth of its size. All of its bytes are read, in less time.
    Picture(data).pixels(max(REDUCTIONS))
  except InputError as error:
    return fault_of(error)
  return None


Result = TypeVar("Result")


def in_order(
  function: Callable[..., Result], arguments: Iterable[tuple], num_workers: int
) -> Iterator[Result]:
  """Calls a function in several threads, and yields the results in the order of the arguments.

  At most four results per thread are in memory at a time, so a large folder needs little. When the
  caller stops early, or a signal stops the caller, files that wait are not begun. The threads end
  with the files that they are reading.
  """
  arguments, pending = iter(arguments), collections.deque()
  pool = ThreadPoolExecutor(num_workers)
  try:
    while True:
      for each in itertools.islice(arguments, 4 * num_workers - len(pending)):
        pending.append(pool.submit(function, *each))
      if not pending:
        return
      yield pending.popleft().result()  # waits for the oldest; the others go on meanwhile
  finally:
    pool.shutdown(cancel_futures=True)
