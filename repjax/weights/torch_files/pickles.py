"""An unpickler that imports nothing, and calls nothing but the functions of `names` and `tensors`.

A pickle is a program for a small machine with a stack and a memo. Python's unpickler is this
machine; most opcodes only push plain values. The class here replaces every opcode that looks up a
name, makes an object, calls something or hashes a key. A foreign file can then neither run code nor
take unbounded time or memory.
"""

import pickle
import struct
from collections.abc import Callable
from typing import Any, ClassVar

from repjax.errors import InputError
from repjax.weights.torch_files.names import (
  Placeholder,
  PlaceholderClass,
  find,
  is_plain_key,
  refusal,
)
from repjax.weights.torch_files.tensors import PickledFunction, Storage, numpy_dtype, refuse_kind

# Python has a fast unpickler in C and this one. The memo of the one in C is an array: a pickle of a
# few bytes that names a large index makes it take gigabytes. The memo of this one is a dictionary.
_PURE_PYTHON: Any = pickle._Unpickler

_MOST_HANDED_OVER = 10**6


class Unpickler(_PURE_PYTHON):
  """An unpickler that imports nothing, and calls only functions of `names` and `tensors`.

  `load` returns the object: plain values, lists, tuples and dictionaries, with a `Tensor` for each
  tensor and a `Placeholder` for every object of a class.
  """

  dispatch: ClassVar[dict[int, Any]] = dict(_PURE_PYTHON.dispatch)

  def __init__(self, file: Any, announce: Callable[[Storage], Any] | None = None):
    """Prepares to read a pickle.

    Args:
      file: the file, or a `Reader`.
      announce: called with each storage that the pickle mentions.
    """
    super().__init__(file, encoding="latin1")  # strings of Python 2 are bytes
    self._announce = announce
    self._handed_over = 0

  # Names and storages

  def persistent_load(self, pid: Any) -> Any:
    """Returns the object of a persistent id: torch's way to mention a storage.

    Raises:
      ValueError: the id is not that of a storage or of a pickled model's class.
      InputError: the storage is one that cannot be read.
    """
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
      refuse_kind()
    numpy_dtype(dtype)  # raises for a dtype that NumPy lacks
    storage = Storage(key, dtype, count)
    if self._announce is not None:
      self._announce(storage)
    return storage

  def find_class(self, module: str, name: str) -> Any:
    return find(module, name)

  def get_extension(self, code: int) -> Any:
    # An extension is a number for a name in a registry of this process.
    raise refusal("copyreg", f"extension {code}")

  # Objects and calls

  def _make(self, what: Any, arguments: Any) -> None:
    """Calls what a name stands for, and pushes the result on the stack.

    Functions copy the lists that they get. A pickle could pass one long list a million times, so
    the number of elements that are passed in all is limited.
    """
    if isinstance(what, PickledFunction) and isinstance(arguments, tuple) and len(arguments) < 32:
      self._handed_over += sum(len(a) for a in arguments if isinstance(a, list))
      if self._handed_over > _MOST_HANDED_OVER:
        raise ValueError("too many elements in lists that are copied")
      self.append(what.call(*arguments))
    elif isinstance(what, PlaceholderClass):
      self.append(Placeholder(what.name))
    else:
      raise ValueError("a call of something that is no function")

  def load_reduce(self) -> None:  # function(*arguments)
    arguments = self.stack.pop()
    self._make(self.stack.pop(), arguments)

  load_newobj = load_reduce  # class.__new__(class, *arguments)

  def load_newobj_ex(self) -> None:  # the same with keyword arguments, which are dropped
    self.stack.pop()
    self.load_reduce()

  def load_inst(self) -> None:  # protocol 0: the name follows the opcode
    module = self.readline()[:-1].decode("ascii")
    name = self.readline()[:-1].decode("ascii")
    self._make(self.find_class(module, name), tuple(self.pop_mark()))

  def load_obj(self) -> None:  # protocol 1: the class is on the stack
    what, *arguments = self.pop_mark()
    self._make(what, tuple(arguments))

  def load_bytearray8(self) -> None:
    # Python's method allocates as many bytes as the pickle names, before it reads any.
    (count,) = struct.unpack("<Q", self.read(8))
    self.append(bytearray(self.read(count)))

  def load_build(self) -> None:
    # Sets attributes of the object on the stack. No state dict needs them, and one of them could
    # change a function of this package.
    self.stack.pop()

  # Dictionaries and sets, which hash what they are given

  def _put(self, items: list[Any]) -> None:
    """Puts keys and values, in turns, into the dictionary on the stack.

    Raises:
      ValueError: a key is not plain, or no dictionary is on the stack.
    """
    target = self.stack[-1]
    if isinstance(target, dict):
      for key, value in zip(items[::2], items[1::2], strict=True):
        if isinstance(key, Placeholder):  # of an Enum, for example; no state dict has such keys
          continue
        if not is_plain_key(key):
          raise ValueError("a dictionary with keys that are no plain values")
        target[key] = value
    elif not isinstance(target, Placeholder):
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
    self.append(Placeholder("set"))

  def load_additems(self) -> None:
    self.pop_mark()

  def load_frozenset(self) -> None:
    self.pop_mark()
    self.append(Placeholder("frozenset"))

  # Python's unpickler finds methods by opcode in this table, not by name.
  dispatch |= {
    pickle.REDUCE[0]: load_reduce,
    pickle.NEWOBJ[0]: load_newobj,
    pickle.NEWOBJ_EX[0]: load_newobj_ex,
    pickle.INST[0]: load_inst,
    pickle.OBJ[0]: load_obj,
    pickle.BYTEARRAY8[0]: load_bytearray8,
    pickle.BUILD[0]: load_build,
    pickle.SETITEM[0]: load_setitem,
    pickle.SETITEMS[0]: load_setitems,
    pickle.DICT[0]: load_dict,
    pickle.EMPTY_SET[0]: load_empty_set,
    pickle.ADDITEMS[0]: load_additems,
    pickle.FROZENSET[0]: load_frozenset,
  }


class Reader:
  """A file over bytes in memory, which never allocates more than there is.

  A real file's `read(n)` would allocate n bytes first, and a pickle can ask for any n.
  """

  def __init__(self, view: memoryview):
    self._view, self._at = view, 0

  def read(self, count: int = -1) -> bytes:
    """Returns exactly `count` bytes, or all that are left if the count is negative.

    Raises:
      EOFError: fewer bytes are left.
    """
    end = len(self._view) if count < 0 else min(len(self._view), self._at + count)
    if count > end - self._at:
      raise EOFError("the pickle is cut short")
    part = bytes(self._view[self._at : end])
    self._at = end
    return part

  def readline(self) -> bytes:
    """Returns the bytes up to a line's end and with it, or up to the file's end."""
    line = bytearray()
    while self._at < len(self._view) and not line.endswith(b"\n"):
      line += self.read(1)
    return bytes(line)

  def tell(self) -> int:
    """Returns the position in bytes."""
    return self._at

  def seek(self, position: int) -> None:
    """Moves to a position in bytes."""
    self._at = position
