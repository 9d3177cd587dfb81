"""Reads what `torch.save` wrote, without torch and without running anything from the file.

A pickle is a program that names functions and calls them. Here no name is ever imported and nothing
outside this file is ever called: the few names that make up a state dict stand for functions of
this file, classes that merely hold data become inert placeholders, and a file that asks for
anything else is refused.
"""

import math
import mmap
import pickle
import re
import struct
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import jax.numpy as jnp
import numpy as np

from repjax.errors import InputError

_DTYPES: dict[str, Any] = {
  **{name: getattr(np, name) for name in ("float64", "float32", "float16")},
  **{name: getattr(np, name) for name in ("complex128", "complex64")},
  **{name: getattr(np, name) for name in ("int64", "int32", "int16", "int8")},
  **{name: getattr(np, name) for name in ("uint64", "uint32", "uint16", "uint8")},
  "bool": np.bool_,
  **{name: getattr(jnp, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
  **{name: getattr(jnp, name) for name in ("float8_e4m3fnuz", "float8_e5m2fnuz")},
  "float8_e8m0fnu": jnp.float8_e8m0fnu,
}
_A_DTYPE = re.compile(r"(bits|bfloat|complex|float|q?u?int)\d\w*")
_STORAGES = {
  f"{storage}Storage": dtype
  for storage, dtype in (
    *(("Float", "float32"), ("Double", "float64"), ("Half", "float16"), ("BFloat16", "bfloat16")),
    *(("Long", "int64"), ("Int", "int32"), ("Short", "int16"), ("Char", "int8")),
    *(("Byte", "uint8"), ("Bool", "bool")),
    *(("ComplexFloat", "complex64"), ("ComplexDouble", "complex128")),
    *(("QInt8", "qint8"), ("QInt32", "qint32"), ("QUInt8", "quint8")),
    *(("QUInt4x2", "quint4x2"), ("QUInt2x4", "quint2x4")),
  )
}
_REFUSED_TENSORS = ("sparse_tensor", "sparse_csr_tensor", "qtensor", "nested_tensor")

# Data of the standard library, NumPy and torch that training scripts leave in checkpoints.
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
  **dict.fromkeys(
    ("pathlib", "pathlib._local"),
    ("Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"),
  ),
  "types": ("SimpleNamespace",),
  "typing": ("Any",),
  "uuid": ("UUID",),
  **dict.fromkeys(("numpy.core.multiarray", "numpy._core.multiarray"), ("_reconstruct", "scalar")),
  **dict.fromkeys(("numpy.core.numeric", "numpy._core.numeric"), ("_frombuffer",)),
  "numpy": ("dtype", "ndarray"),
  "torch": ("device", "Generator"),
  "torch.serialization": ("_get_layout",),
}
_STANDARD_LIBRARY = sys.stdlib_module_names | {"__builtin__", "copy_reg", "nt", "posix"}

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class RefusedPickleError(InputError):
  """The pickle asks for something that no state dict needs."""


class _Storage(NamedTuple):
  """The name of the bytes behind tensors, and how many elements of which dtype they hold.

  Immutable, as all that a pickle can get hold of, and looked up only after the pickle was read.
  """

  key: str
  dtype: str
  elements: int


class _Tensor(NamedTuple):
  """A view of a storage, in elements of its own dtype."""

  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: str


class _Function(NamedTuple):
  """A function of this file that a name in a pickle stands for."""

  call: Callable[..., Any]


class _Inert:
  """Stands for an object of a class that is not looked up: takes everything, does nothing."""

  def __init__(self, class_name: str):
    self.class_name = class_name

  def append(self, value: Any) -> None:
    del value

  extend = append


class _Class(NamedTuple):
  """A class that is not looked up; its objects are placeholders."""

  name: str


def _dtype(name: Any) -> np.dtype:
  if not isinstance(name, str):
    raise ValueError("a dtype that is none")
  if name not in _DTYPES:
    raise InputError(f"it holds tensors of {name}, a dtype that NumPy lacks; convert them first")
  return np.dtype(_DTYPES[name])


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> _Tensor:
  """A tensor whose elements all lie in its storage; in Python's numbers, which do not overflow."""
  own = isinstance(storage, _Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
  if not own or len(shape) != len(strides) or len(shape) > 32:
    raise ValueError("a tensor of no storage, or of strides of another rank")
  if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
    raise ValueError("a tensor whose sizes are no whole numbers")
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
  held = storage.elements * _dtype(storage.dtype).itemsize
  if 0 not in shape and (last + 1) * _dtype(dtype).itemsize > held:
    raise ValueError("a tensor that leaves its storage")
  return _Tensor(storage, offset, shape, strides, dtype)


def _rebuild_tensor(storage, offset, shape, strides, *rest):
  """Arguments: requires_grad, hooks and, in newer files, marks of a value not yet computed."""
  if any(rest[2:]):
    raise InputError(
      "it holds a tensor that is conjugated or negated on paper only; save "
      "t.resolve_conj().resolve_neg()"
    )
  if not isinstance(storage, _Storage):
    raise ValueError("a tensor of no storage")
  return _tensor(storage, offset, shape, strides, storage.dtype)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *rest):
  del requires_grad, hooks
  _rebuild_tensor(storage, 0, (), (), None, None, *rest)
  return _tensor(storage, offset, shape, strides, dtype)


def _rebuild_from_type(function, of_type, arguments, state):
  """A tensor with attributes of its own, which are dropped."""
  del of_type, state
  if function not in _REBUILDERS:
    raise ValueError("a tensor of an unknown kind")
  return function.call(*arguments)


def _refuse_kind(*arguments):
  del arguments
  raise InputError("it holds a sparse, quantized or nested tensor; save dense ones")


def _refuse_meta(*arguments):
  del arguments
  raise InputError("it holds a meta tensor, which has no values; save the model with its weights")


def _ordered_dict(pairs=()):
  """Python 3 fills it afterwards, Python 2 hands over a list of lists of two."""
  made = OrderedDict()
  for key, value in pairs:
    if not _is_plain(key):
      raise ValueError("a dictionary with keys that are no plain values")
    made[key] = value
  return made


def _is_plain(key: Any) -> bool:
  """Whether a key is hashed without a walk through what it holds."""
  plain = str | bytes | int | float | None
  return isinstance(key, plain) or (
    isinstance(key, tuple) and len(key) < 16 and all(isinstance(item, plain) for item in key)
  )


def _size(sizes=()):
  if len(sizes) > 32:
    raise ValueError("a shape of too many axes")
  return tuple(sizes)


def _attribute(owner: Any, name: Any) -> _Inert:
  """What mmengine's logs hold, methods of a class by name; never the attribute itself."""
  if not isinstance(owner, _Class):
    raise _refusal("builtins", "getattr")
  del name
  return _Inert("method")


_DENSE, _DENSE_V3 = _Function(_rebuild_tensor), _Function(_rebuild_tensor_v3)
_PARAMETER = _Function(lambda data, *_: data)
_REBUILDERS = (_DENSE, _DENSE_V3, _PARAMETER)

_KNOWN: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): _Function(_ordered_dict),
  ("builtins", "getattr"): _Function(_attribute),
  ("__builtin__", "getattr"): _Function(_attribute),
  ("torch", "Size"): _Function(_size),
  ("torch._utils", "_rebuild_tensor"): _DENSE,
  ("torch._utils", "_rebuild_tensor_v2"): _DENSE,
  ("torch._utils", "_rebuild_tensor_v3"): _DENSE_V3,
  ("torch._utils", "_rebuild_parameter"): _PARAMETER,
  ("torch._utils", "_rebuild_parameter_with_state"): _PARAMETER,
  ("torch._tensor", "_rebuild_from_type_v2"): _Function(_rebuild_from_type),
  **{("torch._utils", f"_rebuild_{kind}"): _Function(_refuse_kind) for kind in _REFUSED_TENSORS},
  ("torch._utils", "_rebuild_meta_tensor_no_storage"): _Function(_refuse_meta),
  **{("torch", name): name for name in _DTYPES},
  **{("torch", name): dtype for name, dtype in _STORAGES.items()},
  ("torch.storage", "UntypedStorage"): "uint8",
}


def _refusal(module: str, name: str) -> RefusedPickleError:
  shown = ascii(f"{module[:80]}.{name[:80]}")[1:-1]  # nothing that a terminal would obey
  return RefusedPickleError(
    f"it asks for {shown}, which no state dict needs and which could run code; "
    "nothing was run. If it comes from somebody you trust, load it with PyTorch and save "
    "model.state_dict() alone"
  )


_PURE_PYTHON: Any = pickle._Unpickler  # its memo cannot be made to take gigabytes, as C's can


class _Unpickler(_PURE_PYTHON):
  """An unpickler that looks nothing up and calls nothing but the functions of this file."""

  dispatch: ClassVar[dict[int, Any]] = dict(_PURE_PYTHON.dispatch)

  def __init__(self, file: Any, announce: Callable[[_Storage], Any] | None = None):
    super().__init__(file, encoding="latin1")  # Python 2's strings
    self._announce = announce
    self._handed_over = 0  # elements of lists that functions were given, so that none grows

  def persistent_load(self, pid: Any) -> Any:
    if not isinstance(pid, tuple) or not 0 < len(pid) < 8:
      raise ValueError("a persistent id that is no storage's")
    if pid[0] == "module":  # the class of a whole pickled model, with its source
      return pid[1]
    kind, dtype, key, _, count, *rest = pid
    if kind != "storage" or not isinstance(key, str) or type(count) is not int or count < 0:
      raise ValueError("a persistent id that is no storage's")
    if any(view is not None for view in rest):
      raise InputError("it was written by PyTorch 0.3 or older; save it again with a newer one")
    if isinstance(dtype, str) and dtype.startswith("q"):
      _refuse_kind()
    _dtype(dtype)
    storage = _Storage(key, dtype, count)
    if self._announce is not None:
      self._announce(storage)
    return storage

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) in _KNOWN:
      return _KNOWN[module, name]
    if name in _INERT.get(module, ()):
      return _Class(name)
    if module == "torch" and _A_DTYPE.fullmatch(name):
      return name
    is_class = name.rpartition(".")[2][:1].isupper()
    if module.partition(".")[0] in _STANDARD_LIBRARY or not is_class:
      raise _refusal(module, name)
    return _Class(name)

  def get_extension(self, code: int) -> Any:
    raise _refusal("copyreg", f"extension {code}")

  def _make(self, what: Any, arguments: Any) -> None:
    """Puts what a name makes of its arguments on the stack."""
    if isinstance(what, _Function) and isinstance(arguments, tuple) and len(arguments) < 32:
      self._handed_over += sum(len(a) for a in arguments if isinstance(a, list))
      if self._handed_over > 10**6:
        raise ValueError("too many elements in lists that are copied")
      self.append(what.call(*arguments))
    elif isinstance(what, _Class):
      self.append(_Inert(what.name))
    else:
      raise ValueError("a call of something that is no function")

  def load_reduce(self) -> None:
    arguments = self.stack.pop()
    self._make(self.stack.pop(), arguments)

  load_newobj = load_reduce

  def load_newobj_ex(self) -> None:
    self.stack.pop()  # keywords
    self.load_reduce()

  def load_inst(self) -> None:
    module = self.readline()[:-1].decode("ascii")
    name = self.readline()[:-1].decode("ascii")
    self._make(self.find_class(module, name), tuple(self.pop_mark()))

  def load_obj(self) -> None:
    what, *arguments = self.pop_mark()
    self._make(what, tuple(arguments))

  def load_build(self) -> None:
    self.stack.pop()  # attributes, which no state dict needs

  def _put(self, items: list[Any]) -> None:
    """Puts keys and values into the dictionary on the stack; only plain keys are hashed."""
    target = self.stack[-1]
    if isinstance(target, dict):
      for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, _Inert):  # of an Enum, for example; no state dict has such keys
          continue
        if not _is_plain(key):
          raise ValueError("a dictionary with keys that are no plain values")
        target[key] = value
    elif not isinstance(target, _Inert):
      raise ValueError("items for something that is no dictionary")

  def load_setitem(self) -> None:
    value, key = self.stack.pop(), self.stack.pop()
    self._put([key, value])

  def load_setitems(self) -> None:
    self._put(self.pop_mark())

  def load_dict(self) -> None:
    items = self.pop_mark()
    self.append({})
    self._put(items)

  def load_empty_set(self) -> None:
    self.append(_Inert("set"))

  def load_additems(self) -> None:
    self.pop_mark()

  def load_frozenset(self) -> None:
    self.pop_mark()
    self.append(_Inert("frozenset"))

  dispatch |= {
    pickle.REDUCE[0]: load_reduce,
    pickle.NEWOBJ[0]: load_newobj,
    pickle.NEWOBJ_EX[0]: load_newobj_ex,
    pickle.INST[0]: load_inst,
    pickle.OBJ[0]: load_obj,
    pickle.BUILD[0]: load_build,
    pickle.SETITEM[0]: load_setitem,
    pickle.SETITEMS[0]: load_setitems,
    pickle.DICT[0]: load_dict,
    pickle.EMPTY_SET[0]: load_empty_set,
    pickle.ADDITEMS[0]: load_additems,
    pickle.FROZENSET[0]: load_frozenset,
  }


def load(path: Path) -> Any:
  """What a file of `torch.save` holds, with NumPy views of the mapped file for tensors.

  Both formats are read: the zip archive (PyTorch 1.6 and later) and the legacy stream. Tensors may
  have any dtype that NumPy or ml_dtypes knows, any strides, and share storages.

  Returns:
    The saved object. Tensors are read-only arrays, valid as long as nobody cuts the file short;
    tuples become lists; everything else but plain values is a placeholder.

  Raises:
    InputError: the file is truncated or damaged, asks for code to be run, or holds tensors of a
      kind that a state dict does not have.
  """
  try:
    with path.open("rb") as file:
      buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    read = _load_zip if buffer[:2] == b"PK" else _load_legacy
    value, storages, byteorder = read(path, buffer)
    return _arrays(value, storages, byteorder, {})
  except InputError as error:
    raise type(error)(f"{path} is refused: {error}") from None
  except Exception as error:  # a damaged pickle can raise nearly anything
    raise InputError(
      f"{path} cannot be read: {_guess(path)} ({_text(error)}). Compare its size with the "
      "original's and fetch it again"
    ) from None


def _text(error: Exception) -> str:
  """What an exception says where that is this file's or the library's own words."""
  words = error.args[0] if error.args and isinstance(error, ValueError | EOFError | OSError) else ""
  own = isinstance(words, str) and words.isprintable()
  return f"{type(error).__name__}: {words[:200]}" if own and words else type(error).__name__


def _guess(path: Path) -> str:
  """What an unreadable file probably is."""
  with path.open("rb") as file:
    head = file.read(64).lstrip()
  if head.startswith(b"version https://git-lfs"):
    return "it is the placeholder that Git LFS leaves for a large file"
  if head.startswith(b"<"):
    return "it is a web page"
  return "it is truncated, damaged or not a checkpoint"


def _load_zip(path: Path, buffer: mmap.mmap) -> tuple[Any, dict[str, memoryview], str]:
  """`<name>/data.pkl`, and a record `<name>/data/<key>` for each storage; nothing is compressed."""
  with zipfile.ZipFile(path) as archive:
    records = {info.filename.partition("/")[2]: info for info in archive.infolist()}
  if "constants.pkl" in records:
    raise InputError("it is a TorchScript program, not a state dict; save model.state_dict()")

  def content(name: str) -> memoryview:
    info = records.get(name)
    if info is None:
      raise ValueError(f"there is no {ascii(name)[1:-1]} in it")
    if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
      raise ValueError("a compressed or encrypted record, which torch.save does not write")
    name_length, extra_length = struct.unpack_from("<26x2H", buffer, info.header_offset)
    start = info.header_offset + 30 + name_length + extra_length
    if start + info.file_size > len(buffer):
      raise ValueError("a record that leaves the file")
    return memoryview(buffer)[start : start + info.file_size]

  storages = {}

  def announce(storage: _Storage) -> None:
    if len(storage.key) > 40:
      raise ValueError("a storage of an impossible name")
    if storage.key not in storages:
      storages[storage.key] = content(f"data/{storage.key}")

  pickled = content("data.pkl")
  byteorder = bytes(content("byteorder")[:7]) if "byteorder" in records else b"little"
  if byteorder not in (b"little", b"big"):
    raise ValueError("an unknown byte order")
  return _Unpickler(_Reader(pickled), announce).load(), storages, byteorder.decode()


class _Reader:
  """A file over bytes, which never allocates more than there is."""

  def __init__(self, view: memoryview):
    self._view, self._at = view, 0

  def read(self, count: int = -1) -> bytes:
    end = len(self._view) if count < 0 else min(len(self._view), self._at + count)
    if count > end - self._at:
      raise EOFError("the pickle is cut short")
    part = bytes(self._view[self._at : end])
    self._at = end
    return part

  def readline(self) -> bytes:
    line = bytearray()
    while self._at < len(self._view) and not line.endswith(b"\n"):
      line += self.read(1)
    return bytes(line)

  def tell(self) -> int:
    return self._at

  def seek(self, position: int) -> None:
    self._at = position


def _load_legacy(path: Path, buffer: mmap.mmap) -> tuple[Any, dict[str, memoryview], str]:
  """Pickles of magic number, version, system, the object and the keys; then the storages."""
  del path
  file = _Reader(memoryview(buffer))
  announced: dict[str, _Storage] = {}
  magic, version, system = (_Unpickler(file).load() for _ in range(3))
  if magic != _LEGACY_MAGIC or version != 1001 or not (isinstance(system, dict) and system):
    raise ValueError("no magic number of PyTorch in it")
  value = _Unpickler(file, lambda storage: announced.setdefault(storage.key, storage)).load()
  storages = {}
  for key in _Unpickler(file).load():
    if not isinstance(key, str) or key not in announced:
      raise ValueError("a storage that no tensor has")
    (count,) = struct.unpack("<q", file.read(8))
    size = count * _dtype(announced[key].dtype).itemsize
    start = file.tell()
    if count < 0 or start + size > len(buffer):
      raise EOFError("a storage is cut short")
    storages[key] = memoryview(buffer)[start : start + size]
    file.seek(start + size)
  return value, storages, "little"  # whatever machine wrote them


def _arrays(
  value: Any, storages: Mapping[str, memoryview], byteorder: str, done: dict[int, Any]
) -> Any:
  """The same with arrays for tensors; what occurs many times is converted once."""
  if isinstance(value, _Tensor):
    if value.storage.key not in storages:
      raise EOFError("a storage is missing")
    return _array(value, storages[value.storage.key], byteorder)
  if id(value) in done or not isinstance(value, dict | list | tuple):
    return done.get(id(value), value)
  if isinstance(value, dict):
    converted = done[id(value)] = {}
    for key, item in value.items():
      converted[key] = _arrays(item, storages, byteorder, done)
  else:
    converted = done[id(value)] = []
    converted += [_arrays(item, storages, byteorder, done) for item in value]
  return converted


def _array(tensor: _Tensor, held: memoryview, byteorder: str) -> np.ndarray:
  """A read-only view of a storage's bytes; that it lies within them was checked by `_tensor`."""
  declared = tensor.storage.elements * _dtype(tensor.storage.dtype).itemsize
  if len(held) < declared:
    raise EOFError("a storage that is cut short")
  dtype = _dtype(tensor.dtype)
  if 0 in tensor.shape:
    return np.zeros(tensor.shape, dtype)
  # A stride along one element alone says nothing, and may be any number.
  strides = [s * dtype.itemsize * (n > 1) for n, s in zip(tensor.shape, tensor.strides)]
  if math.prod(tensor.shape) * dtype.itemsize >= 2**48:
    raise ValueError("a tensor of an impossible size")
  swapped = dtype.newbyteorder() if dtype.itemsize > 1 and byteorder != sys.byteorder else dtype
  offset = tensor.offset * dtype.itemsize
  array = np.ndarray(tensor.shape, swapped, held, offset, strides)
  array.flags.writeable = False
  return array
