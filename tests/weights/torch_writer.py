"""Writes files as `torch.save` does, without torch, and pickles that no torch would write."""

import io
import pickle
import struct
import sys
import zipfile
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
STORAGES = {
  "float32": "FloatStorage",
  "float64": "DoubleStorage",
  "float16": "HalfStorage",
  "bfloat16": "BFloat16Storage",
  "bool": "BoolStorage",
  "uint8": "ByteStorage",
  "int8": "CharStorage",
  "int16": "ShortStorage",
  "int32": "IntStorage",
  "int64": "LongStorage",
  "complex64": "ComplexFloatStorage",
  "complex128": "ComplexDoubleStorage",
}
UNTYPED = ("uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2")
DTYPES = (*STORAGES, *UNTYPED)


class Name(NamedTuple):
  """A global in a pickle; nothing of that name need exist."""

  module: str
  name: str

  def __call__(self) -> None:
    """Makes pickle take the object for a function."""


class Call:
  """An object that unpickles as function(*arguments), with `state` for its BUILD."""

  def __init__(self, function: Name, *arguments: Any, state: Any = None):
    self.function, self.arguments, self.state = function, arguments, state


class Built:
  """A value, and the state that BUILD then gives it."""

  def __init__(self, inner: Any, state: Any):
    self.inner, self.state = inner, state


class Raw(bytes):
  """Opcodes to write as they are."""


class Storage:
  """The numbers that tensors share; the pickle says `kind` and `count` about them."""

  def __init__(self, values: Any):
    self.values = np.ascontiguousarray(values).reshape(-1)
    self.kind = STORAGES.get(self.values.dtype.name, "UntypedStorage")
    self.count: Any = self.values.nbytes if self.kind == "UntypedStorage" else self.values.size


def tensor(storage: Any, offset: Any = 0, shape: Any = (4,), strides: Any = (1,)) -> Call:
  """Makes a view of a storage as torch pickles it; the numbers need not make sense."""
  hooks = Call(Name("collections", "OrderedDict"))
  arguments = (storage, offset, shape, strides, False, hooks)
  if isinstance(storage, Storage) and storage.kind == "UntypedStorage":
    dtype = Name("torch", storage.values.dtype.name)
    return Call(Name("torch._utils", "_rebuild_tensor_v3"), *arguments, dtype)
  return Call(Name("torch._utils", "_rebuild_tensor_v2"), *arguments)


def dense(array: Any) -> Call:
  """Makes a contiguous tensor with a new storage."""
  array = np.asarray(array)
  strides = np.cumprod((1, *array.shape[:0:-1]))[::-1][: array.ndim]
  return tensor(Storage(array), 0, array.shape, tuple(map(int, strides)))


class _Pickler(pickle._Pickler):
  """The pickler in Python, whose table of types can be extended."""

  def __init__(self, file: Any, protocol: int, legacy: bool):
    super().__init__(file, protocol)
    self.legacy, self.storages = legacy, []

  def save(self, obj: Any, save_persistent_id: bool = True) -> None:
    if isinstance(obj, Raw):
      self.write(bytes(obj))
    elif isinstance(obj, Name) and self.proto < 4:
      self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
    elif isinstance(obj, Name):
      self.save(obj.module)
      self.save(obj.name)
      self.write(pickle.STACK_GLOBAL)
    elif isinstance(obj, Call):
      self.save_reduce(obj.function, obj.arguments, obj.state, obj=obj)
    elif isinstance(obj, Built):
      self.save(obj.inner)
      self.save(obj.state)
      self.write(pickle.BUILD)
    elif isinstance(obj, np.ndarray):
      self.save(dense(obj))
    else:
      super().save(obj, save_persistent_id)

  def save_reduce(self, func: Any, args: Any, state: Any = None, *rest: Any, obj: Any = None):
    if id(obj) in self.memo:
      return self.write(self.get(self.memo[id(obj)][0]))
    return super().save_reduce(func, args, state, *rest, obj=obj)

  def persistent_id(self, obj: Any) -> Any:
    if not isinstance(obj, Storage):
      return None
    if obj not in self.storages:
      self.storages.append(obj)
    module = "torch.storage" if obj.kind == "UntypedStorage" else "torch"
    pid = ("storage", Name(module, obj.kind), str(self.storages.index(obj)), "cpu", obj.count)
    return (*pid, None) if self.legacy else pid


def pickled(value: Any, protocol: int = 2, legacy: bool = False) -> tuple[bytes, list[Storage]]:
  """Returns the pickle of a value and the storages in it; a storage's key is its position."""
  file = io.BytesIO()
  pickler = _Pickler(file, protocol, legacy)
  pickler.dump(value)
  return file.getvalue(), pickler.storages


def zip_bytes(path: Any, records: Any, compression: int = zipfile.ZIP_STORED) -> Any:
  """Writes an archive of records (name, bytes) in order; data begin at multiples of 64."""
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in records:
      info = zipfile.ZipInfo(f"archive/{name}")
      info.compress_type = compression
      padding = -(archive.fp.tell() + 30 + len(info.filename) + 4) % 64
      info.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
      archive.writestr(info, content)
  return path


def records(value: Any, protocol: int = 2, byteorder: str = sys.byteorder) -> dict[str, bytes]:
  """Returns the records of the zip format by name."""
  data, storages = pickled(value, protocol)
  swap = byteorder == "big"
  return {
    "data.pkl": data,
    "byteorder": byteorder.encode(),
    **{f"data/{key}": _raw(storage.values, swap) for key, storage in enumerate(storages)},
    "version": b"3\n",
  }


def _raw(values: np.ndarray, swap: bool) -> bytes:
  if not swap or values.dtype.itemsize == 1:
    return values.tobytes()
  size = values.real.dtype.itemsize if values.dtype.kind == "c" else values.dtype.itemsize
  return values.view(f"u{size}").byteswap().tobytes()


def save_zip(path: Any, value: Any, **how: Any) -> Any:
  """Writes the zip format."""
  return zip_bytes(path, records(value, **how).items())


def legacy_parts(value: Any, protocol: int = 2, little_endian: bool = True) -> dict[str, bytes]:
  """Returns the parts of the legacy format in order."""
  data, storages = pickled(value, protocol, legacy=True)
  sizes = {"short": 2, "int": 4, "long": 4}
  system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": sizes}
  plain = {"magic": MAGIC, "version": 1001, "system": system}
  return {
    **{name: pickle.dumps(part, 2) for name, part in plain.items()},
    "object": data,
    "keys": pickle.dumps([str(key) for key in range(len(storages))], 2),
    "storages": b"".join(map(_counted, storages)),
  }


def _counted(storage: Storage) -> bytes:
  fits = isinstance(storage.count, int) and -(2**63) <= storage.count < 2**63
  return struct.pack("<q", storage.count if fits else 0) + storage.values.tobytes()


def save_legacy(path: Any, value: Any, **how: Any) -> Any:
  """Writes the legacy format."""
  path.write_bytes(b"".join(legacy_parts(value, **how).values()))
  return path


FORMATS = {"zip": save_zip, "legacy": save_legacy}


def sample(dtype: str, shape: tuple[int, ...] = (2, 3)) -> np.ndarray:
  """Numbers that tell their bytes, places and dtypes apart."""
  values = np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape)
  if dtype == "bool":
    return values % 2 == 0
  if dtype.startswith("complex"):
    return (values + 0.25j * values).astype(dtype)
  fraction = 0.5 if "float" in dtype else 1
  return (values * fraction).astype(jnp.dtype(dtype))
