"""`load`: reads a file of `torch.save` in either of its formats."""

import math
import mmap
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repjax.errors import InputError, listed, printable
from repjax.weights.kinds import is_text, kind_of_file
from repjax.weights.torch_files.pickles import Reader, Unpickler
from repjax.weights.torch_files.tensors import Storage, Tensor, numpy_dtype

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001
_PADDLE = "StructuredToParameterName@@"

EXPANSION = 8
"""All tensors together may be as many times as large as the file, and one MiB for small files."""


def load(path: Path) -> Any:
  """Reads the object in a file of `torch.save`, with NumPy views of the mapped file for tensors.

  Both formats are read: the zip archive (PyTorch 1.6 and later) and the legacy stream. Tensors may
  have any dtype that NumPy or ml_dtypes knows and any strides, and may share storages.

  Returns:
    The saved object. Tensors are read-only arrays, valid as long as the file is not cut short.
    Tuples are lists. Everything else but plain values is a placeholder.

  Raises:
    InputError: the file is truncated or damaged, asks for code to be run, or holds tensors of a
      kind that a state dict does not have.
  """
  other = kind_of_file(path)
  if other:
    raise InputError(f"{path} cannot be read: it is {other}")
  try:
    with path.open("rb") as file:
      buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    read = _load_zip if buffer[:2] == b"PK" else _load_legacy
    value, storages, byteorder = read(path, buffer)
    return _Arrays(storages, byteorder, len(buffer)).of(value)
  except InputError as error:
    raise type(error)(f"{path} is refused: {error}") from None
  except Exception as error:  # A damaged pickle can raise nearly anything.
    if is_text(path):
      raise InputError(
        f"{path} cannot be read: it is a text, not a checkpoint. Give the path of a checkpoint file"
      ) from None
    raise InputError(
      f"{path} cannot be read: it is truncated, damaged or not a checkpoint{_text(error)}. "
      "Compare its size with the original's and fetch it again"
    ) from None


def _text(error: Exception) -> str:
  """Returns an exception in parentheses if its text is this package's or a library's, else "".

  Texts of other exceptions quote bytes of the file.
  """
  words = error.args[0] if error.args and isinstance(error, ValueError | EOFError | OSError) else ""
  told = isinstance(words, str) and words.isprintable() and words
  return f" ({printable(f'{type(error).__name__}: {words}', 300)})" if told else ""


def _load_zip(path: Path, buffer: mmap.mmap) -> tuple[Any, dict[str, memoryview], str]:
  """Reads the zip format: `<name>/data.pkl`, and `<name>/data/<key>` for each storage.

  Nothing in the archive is compressed, so that storages can be views of the mapped file.

  Returns:
    The object with a `Tensor` for each tensor, the bytes of each storage by key, the byte order.
  """
  with zipfile.ZipFile(path) as archive:
    records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
  if "constants.pkl" in records:
    raise InputError("it is a TorchScript program, not a state dict; save model.state_dict()")

  if "data.pkl" not in records:
    held = listed((info.filename for info in records.values()), 4)
    raise InputError(
      "it is a ZIP archive without data.pkl, so torch.save did not write it. It holds "
      f"{held or 'nothing'}. Unpack it, or get the checkpoint that it was made from"
    )

  def content(name: str) -> memoryview:
    info = records.get(name)
    if info is None:
      raise ValueError(f"there is no {ascii(name)[1:-1]} in it")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise ValueError("a compressed or encrypted record, which torch.save does not write")
    # A record begins with a header of 30 bytes, its name, and a field that pads the data to a
    # multiple of 64. The lengths of both are in the header.
    name_length, extra_length = struct.unpack_from("<26x2H", buffer, info.header_offset)
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > len(buffer):
      raise ValueError("a record that leaves the file")
    return memoryview(buffer)[start : start + info.file_size]

  storages = {}

  def announce(storage: Storage) -> None:
    if len(storage.key) > 40:
      raise ValueError("a storage of an impossible name")
    if storage.key not in storages:
      storages[storage.key] = content(f"data/{storage.key}")

  pickled = content("data.pkl")
  byteorder = bytes(content("byteorder")[:7]) if "byteorder" in records else b"little"
  if byteorder not in (b"little", b"big"):
    raise ValueError("an unknown byte order")
  return Unpickler(Reader(pickled), announce).load(), storages, byteorder.decode()


def _load_legacy(path: Path, buffer: mmap.mmap) -> tuple[Any, dict[str, memoryview], str]:
  """Reads the legacy format: five pickles, one after the other, and then the storages.

  The pickles are a magic number, a version, facts about the system, the object, and the keys of the
  storages in the order in which they follow. A storage is its number of elements and its bytes.

  Returns:
    As `_load_zip`.
  """
  del path
  file = Reader(memoryview(buffer))
  announced: dict[str, Storage] = {}
  magic = Unpickler(file).load()
  if magic != _LEGACY_MAGIC:
    raise InputError(_of_other_pickle(magic))
  version, system = (Unpickler(file).load() for _ in range(2))
  if version != _LEGACY_VERSION or not (isinstance(system, dict) and system):
    raise ValueError("no version of PyTorch in it")
  value = Unpickler(file, lambda storage: announced.setdefault(storage.key, storage)).load()
  storages = {}
  for key in Unpickler(file).load():
    if not isinstance(key, str) or key not in announced:
      raise ValueError("a storage that no tensor has")
    (count,) = struct.unpack("<q", file.read(8))
    size = count * numpy_dtype(announced[key].dtype).itemsize
    start = file.tell()
    if count < 0 or start + size > len(buffer):
      raise EOFError("a storage is cut short")
    storages[key] = memoryview(buffer)[start : start + size]
    file.seek(start + size)
  return value, storages, "little"  # PyTorch writes this format so on every machine.


def _of_other_pickle(value: Any) -> str:
  """Returns the error text for a pickle that another program than `torch.save` wrote."""
  if isinstance(value, dict) and _PADDLE in value:
    return (
      "Paddle wrote it, and not PyTorch. Load it with paddle.load, rename its tensors as PyTorch "
      "names them, and write them with numpy.savez"
    )
  return (
    f"it is a Python pickle that torch.save did not write (a {type(value).__name__}). If it holds "
    "NumPy arrays by name, load it with the program that wrote it, and write them with numpy.savez"
  )


class _Arrays:
  """The conversion of descriptions of tensors into arrays, which are views of the mapped file.

  Tensors may share storages, and strides of 0 repeat numbers without holding them. A few bytes
  could therefore claim any size. All tensors together may be EXPANSION times as large as the file.

  Args:
    storages: bytes of each storage by key.
    byteorder: "little" or "big".
    size: number of bytes in the file.
  """

  def __init__(self, storages: Mapping[str, memoryview], byteorder: str, size: int):
    self._storages, self._byteorder = storages, byteorder
    self._left = EXPANSION * size + 2**20
    # Id of each converted container and tensor to its copy. A pickle can hold the same list any
    # number of times, and lists that contain themselves.
    self._done: dict[int, Any] = {}

  def of(self, value: Any) -> Any:
    """Replaces each `Tensor` in a value by an array.

    Raises:
      InputError: the tensors claim more than the file can stand for.
    """
    if id(value) in self._done or not isinstance(value, dict | list | tuple):
      return self._done.get(id(value), value)
    if isinstance(value, Tensor):
      return self._done.setdefault(id(value), self._array(value))
    # The copy is entered before it is filled: a container that contains itself finds it there.
    if isinstance(value, dict):
      converted = self._done[id(value)] = {}
      for key, item in value.items():
        converted[key] = self.of(item)
    else:
      converted = self._done[id(value)] = []
      converted += [self.of(item) for item in value]
    return converted

  def _array(self, tensor: Tensor) -> np.ndarray:
    if tensor.storage.key not in self._storages:
      raise EOFError("a storage is missing")
    self._left -= math.prod(tensor.shape) * numpy_dtype(tensor.dtype).itemsize
    if self._left < 0:
      raise InputError(
        f"its tensors claim more than {EXPANSION} times the bytes of the file, as tensors do that "
        "repeat few numbers (torch.expand). Save tensor.contiguous()"
      )
    return _array(tensor, self._storages[tensor.storage.key], self._byteorder)


def _array(tensor: Tensor, held: memoryview, byteorder: str) -> np.ndarray:
  """Returns a tensor as a read-only view of its storage's bytes.

  The tensor was checked against the size that the pickle declares for its storage. What is left to
  check is that the storage has this size.
  """
  declared = tensor.storage.elements * numpy_dtype(tensor.storage.dtype).itemsize
  if len(held) < declared:
    raise EOFError("a storage that is cut short")
  dtype = numpy_dtype(tensor.dtype)
  if 0 in tensor.shape:
    return np.zeros(tensor.shape, dtype)
  # The stride of an axis with one element is never used and may be any number, too large for NumPy.
  strides = [s * dtype.itemsize * (n > 1) for n, s in zip(tensor.shape, tensor.strides)]
  swapped = dtype.newbyteorder() if dtype.itemsize > 1 and byteorder != sys.byteorder else dtype
  offset = tensor.offset * dtype.itemsize
  array = np.ndarray(tensor.shape, swapped, held, offset, strides)
  array.flags.writeable = False
  return array
