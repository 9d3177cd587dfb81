"""Everything that a name in a pickle of `torch.save` can stand for.

A pickle is a program: it names functions and classes of Python modules and calls them. Reading one
with Python's own unpickler can therefore run any code. Here a name is never imported. `find` looks
it up in tables.

  name in the pickle                             outcome
  a part of a state dict                         a `PickledFunction`, or the name of a dtype
  a class of data that training scripts leave    a `PlaceholderClass`, whose objects do nothing
  a class outside the standard library           a `PlaceholderClass` too
  everything else                                `RefusedPickleError`

The entries of these tables are immutable, so that no pickle can change how the next one is read.
"""

import re
import sys
from collections import OrderedDict
from typing import Any, NamedTuple

from repjax.errors import InputError
from repjax.weights.torch_files.tensors import (
  DTYPES,
  MOST_AXES,
  STORAGES,
  TENSOR_FUNCTIONS,
  PickledFunction,
)

# Names of dtypes that NumPy lacks, such as quint4x2, and of any that newer versions of torch add.
_ANY_DTYPE_NAME = re.compile(r"(bits|bfloat|complex|float|q?u?int)\d\w*")

# Data of the standard library, NumPy and torch that training scripts leave in checkpoints.
_DATA_CLASSES = {
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


_SUBCLASSES = ("DTensor", "ShardedTensor", "DistributedTensor", "AffineQuantizedTensor")


class RefusedPickleError(InputError):
  """An error for a pickle that asks for something that no state dict needs."""


class PlaceholderClass(NamedTuple):
  """A class that is not looked up; its objects are placeholders."""

  name: str


class Placeholder:
  """An object of a class that is not looked up; takes everything that is added and does nothing.

  Attributes:
    class_name: name of the class, for error messages.
  """

  def __init__(self, class_name: str):
    self.class_name = class_name

  def append(self, value: Any) -> None:
    del value

  extend = append


def find(module: str, name: str) -> Any:
  """Returns what a name in a pickle stands for, without importing anything.

  Args:
    module: name of the module, as the pickle has it.
    name: name in this module.

  Returns:
    A `PickledFunction`, a `PlaceholderClass`, or the name of a dtype.

  Raises:
    RefusedPickleError: the name may be a function, or a class that can do harm.
    InputError: the file holds tensors of a subclass.
  """
  if (module, name) == ("torch._utils", "_rebuild_wrapper_subclass") or name in _SUBCLASSES:
    raise InputError(
      "it holds tensors of a subclass: DTensors (FSDP2, tensor parallelism), of which each process "
      "has a part, or quantized ones. Save plain tensors: on all processes take {name: "
      "t.full_tensor() for name, t in model.state_dict().items()}, or dequantize() quantized ones; "
      "then torch.save the dictionary on one process"
    )
  if (module, name) in _STATE_DICT_NAMES:
    return _STATE_DICT_NAMES[module, name]
  if name in _DATA_CLASSES.get(module, ()):
    return PlaceholderClass(name)
  if module == "torch" and _ANY_DTYPE_NAME.fullmatch(name):
    return name
  # Classes of training code, such as a config or a logger, are harmless as placeholders. Functions,
  # and everything else of the standard library, would be harmless too, since nothing is called.
  # They are refused all the same, so that the user learns that the file may be an attack.
  is_class = name.rpartition(".")[2][:1].isupper()
  if module.partition(".")[0] in _STANDARD_LIBRARY or not is_class:
    raise refusal(module, name)
  return PlaceholderClass(name)


def refusal(module: str, name: str) -> RefusedPickleError:
  """Returns the error for a name that no state dict needs."""
  shown = ascii(f"{module[:80]}.{name[:80]}")[1:-1]  # without bytes that a terminal would obey
  return RefusedPickleError(
    f"it asks for {shown}, which no state dict needs and which could run code; nothing was run. "
    "If you trust its source, load it with PyTorch and save model.state_dict() alone"
  )


def is_plain_key(key: Any) -> bool:
  """Returns True if a key is a plain value, or a short tuple of plain values.

  Hashing such a key takes no time. Nested tuples could take forever: n of them, each of which holds
  the one before it twice, have 2^n leaves to hash.
  """
  plain = str | bytes | int | float | None
  return isinstance(key, plain) or (
    isinstance(key, tuple) and len(key) < 16 and all(isinstance(item, plain) for item in key)
  )


def _ordered_dict(pairs=()):
  """Makes an ordered dictionary from pairs.

  A pickle of Python 3 passes no pairs and fills the dictionary later. A pickle of Python 2 passes
  all pairs as lists of two.
  """
  made = OrderedDict()
  for key, value in pairs:
    if not is_plain_key(key):
      raise ValueError("a dictionary with keys that are no plain values")
    made[key] = value
  return made


def _size(sizes=()):
  if len(sizes) > MOST_AXES:
    raise ValueError("a shape of too many axes")
  return tuple(sizes)


def _attribute(owner: Any, name: Any) -> Placeholder:
  """Returns a placeholder for an attribute of a class, and never the attribute.

  The logs of mmengine hold methods of classes by name, which the pickle reads by `getattr`.
  """
  if not isinstance(owner, PlaceholderClass):
    raise refusal("builtins", "getattr")
  del name
  return Placeholder("method")


_STATE_DICT_NAMES: dict[tuple[str, str], Any] = {
  ("collections", "OrderedDict"): PickledFunction(_ordered_dict),
  ("builtins", "getattr"): PickledFunction(_attribute),
  ("__builtin__", "getattr"): PickledFunction(_attribute),
  ("torch", "Size"): PickledFunction(_size),
  **TENSOR_FUNCTIONS,
  **{("torch", name): name for name in DTYPES},
  **{("torch", name): dtype for name, dtype in STORAGES.items()},
  ("torch.storage", "UntypedStorage"): "uint8",
}
"""(module, name) of everything that a state dict is made of."""
