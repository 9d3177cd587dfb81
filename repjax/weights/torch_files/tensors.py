"""Descriptions of the tensors in a pickle of `torch.save`, and the functions that make them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from repjax.errors import InputError

DTYPES: dict[str, Any] = {
  **{name: getattr(np, name) for name in ("float64", "float32", "float16")},
  **{name: getattr(np, name) for name in ("complex128", "complex64")},
  **{name: getattr(np, name) for name in ("int64", "int32", "int16", "int8")},
  **{name: getattr(np, name) for name in ("uint64", "uint32", "uint16", "uint8")},
  "bool": np.bool_,
  **{name: getattr(jnp, name) for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")},
  **{name: getattr(jnp, name) for name in ("float8_e4m3fnuz", "float8_e5m2fnuz")},
  "float8_e8m0fnu": jnp.float8_e8m0fnu,
}
"""PyTorch's name of a dtype to the NumPy dtype with the same bits."""

STORAGES = {
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
"""Name of a storage class of torch to the name of its elements' dtype."""

MOST_AXES = 32  # as many as NumPy allows in every version


class Storage(NamedTuple):
  """A description of the bytes that tensors share: their key in the file, and what they hold.

  The bytes themselves are looked up only after the whole pickle was read.

  Attributes:
    key: name of the bytes in the file.
    dtype: PyTorch's name of the dtype of the elements.
    elements: number of elements.
  """

  key: str
  dtype: str
  elements: int


class Tensor(NamedTuple):
  """A description of a tensor: a strided view of a storage.

  Attributes:
    storage: the storage.
    offset: position of the first element; like `strides`, counted in elements of `dtype`.
    shape: shape of the tensor.
    strides: steps along each axis.
    dtype: PyTorch's name of the tensor's dtype, which may differ from the storage's.
  """

  storage: Storage
  offset: int
  shape: tuple[int, ...]
  strides: tuple[int, ...]
  dtype: str


class PickledFunction(NamedTuple):
  """A function of this package that a name in a pickle stands for."""

  call: Callable[..., Any]


def numpy_dtype(name: Any) -> np.dtype:
  """Returns the NumPy dtype with PyTorch's name.

  Raises:
    ValueError: the name is not a string.
    InputError: NumPy lacks this dtype.
  """
  if not isinstance(name, str):
    raise ValueError("a dtype that is none")
  if name not in DTYPES:
    raise InputError(f"it holds tensors of {name}, a dtype that NumPy lacks; convert them first")
  return np.dtype(DTYPES[name])


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> Tensor:
  """Describes a tensor after checking that all its elements are inside its storage.

  The check uses Python's integers, which do not overflow: foreign numbers of any size cannot make a
  view of memory outside the file.

  Raises:
    ValueError: the description is not that of a tensor inside its storage.
  """
  described = (
    isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
  )
  if not described or len(shape) != len(strides) or len(shape) > MOST_AXES:
    raise ValueError("a tensor of no storage, or of strides of another rank")
  # `type` and not `isinstance`: True is an int too.
  if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
    raise ValueError("a tensor whose sizes are no whole numbers")
  last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides))
  held = storage.elements * numpy_dtype(storage.dtype).itemsize
  if 0 not in shape and (last + 1) * numpy_dtype(dtype).itemsize > held:
    raise ValueError("a tensor that leaves its storage")
  return Tensor(storage, offset, shape, strides, dtype)


# The functions below have the arguments of the functions of torch that they stand for. A pickle
# decides what it passes, so that any argument may be anything.


def _rebuild_tensor(storage, offset, shape, strides, *rest):
  """Describes a tensor.

  `rest` is requires_grad, hooks and, in newer files, marks of a value that is not yet computed.
  """
  if any(rest[2:]):
    raise InputError(
      "it holds a tensor that is marked as conjugated or negated and stored without it; save "
      "t.resolve_conj().resolve_neg()"
    )
  if not isinstance(storage, Storage):
    raise ValueError("a tensor of no storage")
  return _tensor(storage, offset, shape, strides, storage.dtype)


def _rebuild_tensor_v3(storage, offset, shape, strides, requires_grad, hooks, dtype, *rest):
  """Describes a tensor whose dtype is not the storage's."""
  del requires_grad, hooks
  _rebuild_tensor(storage, 0, (), (), None, None, *rest)  # for its checks
  return _tensor(storage, offset, shape, strides, dtype)


def _rebuild_from_type(function, of_type, arguments, state):
  """Describes a tensor that has attributes, without these attributes."""
  del of_type, state
  # Only functions that rebuild tensors: with any other, calls could nest without end.
  if function not in _REBUILDERS:
    raise ValueError("a tensor of an unknown kind")
  return function.call(*arguments)


def _refuse_meta(*arguments):
  del arguments
  raise InputError("it holds a meta tensor, which has no values; save the model with its weights")


def refuse_kind(*arguments):
  """Raises InputError for a tensor that is not a dense one."""
  del arguments
  raise InputError("it holds a sparse, quantized or nested tensor; save dense ones")


_DENSE, _DENSE_V3 = PickledFunction(_rebuild_tensor), PickledFunction(_rebuild_tensor_v3)
_PARAMETER = PickledFunction(lambda data, *_: data)
_REBUILDERS = (_DENSE, _DENSE_V3, _PARAMETER)
_REFUSED_KINDS = ("sparse_tensor", "sparse_csr_tensor", "qtensor", "nested_tensor")

TENSOR_FUNCTIONS: dict[tuple[str, str], PickledFunction] = {
  ("torch._utils", "_rebuild_tensor"): _DENSE,
  ("torch._utils", "_rebuild_tensor_v2"): _DENSE,
  ("torch._utils", "_rebuild_tensor_v3"): _DENSE_V3,
  ("torch._utils", "_rebuild_parameter"): _PARAMETER,
  ("torch._utils", "_rebuild_parameter_with_state"): _PARAMETER,
  ("torch._tensor", "_rebuild_from_type_v2"): PickledFunction(_rebuild_from_type),
  **{("torch._utils", f"_rebuild_{kind}"): PickledFunction(refuse_kind) for kind in _REFUSED_KINDS},
  ("torch._utils", "_rebuild_meta_tensor_no_storage"): PickledFunction(_refuse_meta),
}
"""(module, name) of torch's functions to the functions here that stand for them."""
