"""Reads what `torch.save` wrote, without torch and without running code from the file.

A pickle is a program that names functions and calls them. Here a name is never imported: the few
that make up a state dict stand for functions of this file, classes that merely hold data become
inert placeholders, and a file that asks for anything else is refused.
"""

import mmap
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from repjax.errors import InputError

_DTYPES: dict[str, Any] = {
  **{name: getattr(np, name) for name in ("float64", "float32", "float16", "complex64")},
  **{name: getattr(np, name) for name in ("int64", "int32", "int16", "int8", "uint8")},
  **{name: getattr(np, name) for name in ("uint16", "uint32", "uint64", "complex128")},
  "bool": np.bool_,
  "bfloat16": jnp.bfloat16,
  "float8_e4m3fn": jnp.float8_e4m3fn,
  "float8_e5m2": jnp.float8_e5m2,
}
_STORAGES = {
  "FloatStorage": "float32",
  "DoubleStorage": "float64",
  "HalfStorage": "float16",
  "BFloat16Storage": "bfloat16",
  "BoolStorage": "bool",
  "ByteStorage": "uint8",
  "CharStorage": "int8",
  "ShortStorage": "int16",
  "IntStorage": "int32",
  "LongStorage": "int64",
  "ComplexFloatStorage": "complex64",
  "ComplexDoubleStorage": "complex128",
}

# Kinds of data from the standard library that training scripts leave in checkpoints.
_INERT = {
  **dict.fromkeys(
    ("__builtin__", "builtins"),
    (
      *("bool", "bytearray", "bytes", "complex", "dict", "float", "frozenset", "int", "list"),
      *("object", "set", "slice", "str", "tuple"),
    ),
  ),
  **dict.fromkeys(("copy_reg", "copyreg"), ("_reconstructor",)),
  "_codecs": ("encode",),
  "argparse": ("Namespace",),
  "collections": ("Counter", "defaultdict", "deque"),
  "datetime": ("date", "datetime", "timedelta", "timezone"),
  "decimal": ("Decimal",),
  "fractions": ("Fraction",),
  "pathlib": ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
  "types": ("SimpleNamespace",),
  "typing": ("Any",),
  "uuid": ("UUID",),
  **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), ("_reconstruct", "scalar")),
  "numpy.core.numeric": ("_frombuffer",),
  "numpy._core.numeric": ("_frombuffer",),
  "numpy": ("dtype", "ndarray"),
  "torch": ("device", "Generator"),
  "torch.serialization": ("_get_layout",),
}
_STANDARD_LIBRARY = sys.stdlib_module_names | {"__builtin__", "copy_reg", "nt", "posix"}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class RefusedPickleError(InputError):
  """The pickle asks for something that no state dict needs."""


class _Storage:
  """The bytes behind tensors; of the legacy format they are known after the pickle was read."""

  def __init__(self, dtype: np.dtype, count: int):
    self.dtype, self.count = dtype, count
    self.bytes: Any = None


class Tensor(NamedTuple):
  """A view of a storage, in elements of its dtype."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: np.dtype

  def array(self, byteorder: str) -> np.ndarray:
    """A read-only view; NumPy refuses one that leaves the storage."""
    dtype = self.dtype
    strides = [stride * dtype.itemsize for stride in self.strides]
    if dtype.itemsize > 1 and byteorder != sys.byteorder:
      dtype = dtype.newbyteorder()
    start = self.offset * dtype.itemsize
    array = np.ndarray(self.shape, dtype, self.storage.bytes, start, strides)
    array.flags.writeable = False
    return array


class _Inert:
  """Stands for an object of a class that is not looked up: takes everything, does nothing."""

  def __init__(self, *args: Any, **kwargs: Any):
    del args, kwargs

  def __setstate__(self, state: Any) -> None:
    del state

  def __setitem__(self, key: Any, value: Any) -> None:
    del key, value

  def append(self, value: Any) -> None:
    del value

  def extend(self, values: Any) -> None:
    del values

  def add(self, value: Any) -> None:
    del value


def _refusal(module: str, name: str) -> RefusedPickleError:
  return RefusedPickleError(
    f"it asks for {module}.{name}, which no state dict needs and which could run code; nothing was "
    "run. If you trust the file, write its state dict anew: "
    "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
  )


class _Unpickler(pickle.Unpickler):
  """An unpickler that imports nothing; `storage` makes a storage from a persistent id."""

  def __init__(self, file: Any, storage: Callable[[Any], _Storage]):
    super().__init__(file, encoding="latin1")  # Python 2's strings
    self._storage = storage
    self._known = _state_dict_names()

  def persistent_load(self, pid: Any) -> _Storage:
    return self._storage(pid)

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in self._known:
      return self._known[module, name]
    if name in _INERT.get(module, ()):
      return type(name, (_Inert,), {})
    if module in ("builtins", "__builtin__") and name == "getattr":
      return _inert_getattr
    is_class = name.rpartition(".")[2][:1].isupper()
    if module.partition(".")[0] in _STANDARD_LIBRARY or not is_class:
      raise _refusal(module, name)
    return type(name, (_Inert,), {})


def _inert_getattr(owner: Any, name: str) -> _Inert:
  """What mmengine's logs hold, methods of a class by name; never the attribute itself."""
  if not (isinstance(owner, type) and issubclass(owner, _Inert)):
    raise _refusal("builtins", f"getattr of {name}")
  return _Inert()


def _state_dict_names() -> dict[tuple[str, str], Any]:
  """What the names in a state dict's pickle stand for, made anew so that no file can alter it."""

  def rebuild_tensor(storage, offset, shape, strides, *_):
    return _tensor(storage, offset, shape, strides, storage.dtype)

  def rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *_):
    del requires_grad, hooks
    return _tensor(storage, offset, shape, strides, _dtype(dtype))

  def rebuild_parameter(data, *_):
    return data

  def rebuild_from_type(function, of_type, arguments, state):
    del of_type, state
    if function not in (rebuild_tensor, rebuild_tensor_v3, rebuild_parameter):
      raise ValueError("a tensor of an unknown kind")
    return function(*arguments)

  def unsupported(*_):
    raise InputError("it holds a sparse, quantized or nested tensor; save dense ones")

  return {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch", "Size"): lambda sizes=(): tuple(sizes),
    ("torch._utils", "_rebuild_tensor"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): rebuild_parameter,
    ("torch._tensor", "_rebuild_from_type_v2"): rebuild_from_type,
    **{
      ("torch._utils", f"_rebuild_{kind}"): unsupported
      for kind in ("sparse_tensor", "sparse_csr_tensor", "qtensor", "nested_tensor")
    },
    **{("torch", name): name for name in _DTYPES},
    **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    ("torch.storage", "UntypedStorage"): "uint8",
  }


def _dtype(name: Any) -> np.dtype:
  if not isinstance(name, str) or name not in _DTYPES:
    raise InputError(f"it holds tensors of a kind that NumPy has no dtype for, {name}")
  return np.dtype(_DTYPES[name])


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> Tensor:
  numbers = (offset, *shape, *strides)
  if not isinstance(storage, _Storage) or len(shape) != len(strides):
    raise ValueError("a tensor without a storage, or with strides of another rank")
  if not all(isinstance(number, int) and number >= 0 for number in numbers):
    raise ValueError("a tensor whose sizes are not whole numbers")
  return Tensor(storage, offset, tuple(shape), tuple(strides), dtype)


def load(path: Path) -> Any:
  """What a file of `torch.save` holds, with NumPy views of the mapped file for tensors.

  Both formats are read: the zip archive (PyTorch 1.6 and later) and the legacy stream. Tensors may
  have any dtype that NumPy or ml_dtypes knows, any strides, and share storages.

  Returns:
    The saved object. Dictionaries, lists and tuples are rebuilt, tensors become read-only arrays,
    everything else but plain values becomes a placeholder.

  Raises:
    InputError: the file is truncated or damaged, asks for code to be run, or holds tensors of a
      kind that a state dict does not have.
  """
  try:
    with path.open("rb") as file:
      buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
      if zipfile.is_zipfile(file):
        value, byteorder = _load_zip(file, buffer)
      else:
        file.seek(0)
        value, byteorder = _load_legacy(file, buffer)
    return _arrays(value, byteorder)
  except InputError as error:
    raise type(error)(f"{path} is refused: {error}") from None
  except Exception as error:  # a damaged pickle can raise nearly anything
    raise InputError(
      f"{path} cannot be read: it is truncated, damaged or not written by torch.save "
      f"({type(error).__name__}: {str(error)[:200]}). Compare its size with the original's and "
      "fetch it again"
    ) from error


def _load_zip(file: BinaryIO, buffer: mmap.mmap) -> tuple[Any, str]:
  """`<name>/data.pkl` and a stored, hence mappable, record `<name>/data/<key>` for each storage."""
  with zipfile.ZipFile(file) as archive:
    records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
    if "constants.pkl" in records:
      raise InputError("it is a TorchScript program, not a state dict; save model.state_dict()")
    byteorder = "little"
    if "byteorder" in records:
      byteorder = archive.read(records["byteorder"]).decode()

    def storage(pid: Any) -> _Storage:
      kind, dtype, key, _, count = pid
      if kind != "storage":
        raise ValueError(f"an unknown persistent id {kind!r}")
      if key not in storages:
        info = records[f"data/{key}"]
        storages[key] = _Storage(_dtype(dtype), count)
        size = count * storages[key].dtype.itemsize
        if info.compress_type != zipfile.ZIP_STORED or size > info.file_size:
          raise ValueError(f"record {info.filename} is compressed or too short")
        start = _start(info)
        storages[key].bytes = memoryview(buffer)[start : start + size]
      return storages[key]

    def _start(info: zipfile.ZipInfo) -> int:
      name, extra = struct.unpack_from("<26x2H", buffer, info.header_offset)
      return info.header_offset + 30 + name + extra

    storages: dict[str, _Storage] = {}
    with archive.open(records["data.pkl"]) as pickled:
      return _Unpickler(pickled, storage).load(), byteorder


def _load_legacy(file: BinaryIO, buffer: mmap.mmap) -> tuple[Any, str]:
  """Pickles of magic number, version, system, the object and the keys; then the storages."""
  storages: dict[str, _Storage] = {}

  def storage(pid: Any) -> _Storage:
    kind, dtype, key, _, count, view = pid
    if kind != "storage":
      raise ValueError(f"an unknown persistent id {kind!r}")
    if view is not None:
      raise InputError("it was written by PyTorch 0.3 or older; save it again with a newer one")
    return storages.setdefault(key, _Storage(_dtype(dtype), count))

  magic, version, system = (_Unpickler(file, storage).load() for _ in range(3))
  if magic != _LEGACY_MAGIC or version != 1001:
    raise ValueError("no magic number of PyTorch in it")
  value = _Unpickler(file, storage).load()
  for key in _Unpickler(file, storage).load():
    made = storages[key]
    (count,) = struct.unpack("<q", file.read(8))
    start, size = file.tell(), count * made.dtype.itemsize
    if count != made.count or start + size > len(buffer):
      raise ValueError(f"storage {key} is cut short")
    made.bytes = memoryview(buffer)[start : start + size]
    file.seek(start + size)
  return value, "little" if system["little_endian"] else "big"


def _arrays(value: Any, byteorder: str) -> Any:
  """The same with arrays for tensors."""
  if isinstance(value, Tensor):
    return value.array(byteorder)
  if isinstance(value, Mapping):
    return {key: _arrays(item, byteorder) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_arrays(item, byteorder) for item in value]
  return value
