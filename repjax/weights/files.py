"""`read`: reads a checkpoint file of any usual format into a flat dictionary of arrays."""

import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repjax import extras, names, regular_files
from repjax.errors import InputError, listed, printable
from repjax.weights import torch_files
from repjax.weights.kinds import kind_of_folder
from repjax.weights.wrappers import with_plain_names

_COMPRESSION = 64
"""The arrays in a .npz file may be as many times as large as the file, which may be compressed."""

_USUAL_ENTRIES = ("state_dict", "model", "state_dict_ema")


def read(path: str | os.PathLike[str], *, entry: str | None = None) -> dict[str, np.ndarray]:
  """Reads the state dict in a checkpoint file, without torch and without running code from it.

  Args:
    path: a .safetensors, .pth, .pth.tar, .pt, .bin or .npz file. The content decides how the file
      is read, not its name.
    entry: name of the state dict to take if the file holds several, for example "state_dict_ema".
      A prefix of names, such as "ema_model", takes the tensors below it. None takes the only state
      dict, or the first of "state_dict", "model" and "state_dict_ema".

  Returns:
    Name to array, in the dtypes of the file, without what PyTorch's wrappers add to names.
    Arrays from .pth files are read-only views of the mapped file, so nothing is held twice.

  Raises:
    InputError: the file does not exist, is truncated or damaged, asks for code to be run, or holds
      no state dict.
  """
  return read_entry(names.file(path), entry)[2]


def read_entry(
  path: Path, entry: str | None = None
) -> tuple[str, list[str], dict[str, np.ndarray]]:
  """Reads a file like `read`, and tells which state dict was taken.

  Returns:
    The name of the entry that was taken ("" if the file itself is the state dict), the names of the
    entries that were left, and the state dict.

  Raises:
    InputError: as in `read`.
  """
  if path.is_dir():
    raise InputError(f"{path} is a folder. {kind_of_folder(path)}")
  try:
    with regular_files.opened(path) as file:
      head = file.read(9) or b""  # None: a file of the kernel that would have to be waited for
  except FileNotFoundError:
    # A name of two parts may be that of a repository.
    hub = "" if path.is_absolute() or len(path.parts) != 2 else f", or hf:{path} for the hub"
    raise InputError(f"{path} does not exist; give the path of a checkpoint file{hub}") from None
  except OSError as error:
    raise InputError(f"{path} cannot be opened: {error.strerror}") from error
  if len(head) < 9:
    raise InputError(f"{path} has {len(head)} bytes; fetch it again")
  # A .safetensors file begins with the length of its JSON header in 8 bytes, then the header.
  if head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
    value = _read_safetensors(path)
  elif _is_npz(path):
    value = _read_npz(path)
  else:
    value = torch_files.load(path)
  found = state_dicts(value)
  if entry is not None and entry not in found:
    found = {**found, **_below(found, entry)}
  name = _choose(path, value, found, entry)
  # The file itself has no name by which it could be chosen.
  others = [other for other in found if other not in ("", name)]
  return name, others, _flat(path, found[name])


def _below(found: Mapping[str, Mapping[str, Any]], prefix: str) -> dict[str, dict[str, Any]]:
  """Returns the part of a state dict whose names begin with a prefix, under this prefix, or {}.

  A checkpoint in training can hold a network and its average in one state dict.
  """
  for state in found.values():
    start = f"{prefix.removesuffix('.')}."
    part = {name.removeprefix(start): x for name, x in state.items() if name.startswith(start)}
    if part:
      return {prefix: part}
  return {}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  extras.need("safetensors", printable(path))
  from safetensors import SafetensorError, safe_open

  try:
    # "pread" reads and does not map the file: mapped pages would need memory beside the arrays.
    with safe_open(path, framework="numpy", backend="pread") as file:
      return {name: _safetensor(path, file, name) for name in file.keys()}  # noqa: SIM118
  except SafetensorError as error:
    raise InputError(
      f"{path} cannot be read: it is truncated or damaged ({printable(error, 300)}). Compare its "
      "size with the original's and fetch it again"
    ) from error


def _safetensor(path: Path, file: Any, name: str) -> np.ndarray:
  """Returns one tensor of an open .safetensors file.

  Raises:
    InputError: NumPy lacks its dtype.
  """
  try:
    return file.get_tensor(name)
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    held = printable(file.get_slice(name).get_dtype(), 100)
    raise InputError(
      f"{path} holds {printable(name, 100)} in {held}, a dtype that NumPy lacks. Write the file "
      "again in float32: for floats of 8 bits, multiply them by their scales first"
    ) from error


def _is_npz(path: Path) -> bool:
  """Returns True for a zip archive that NumPy wrote; files of `torch.save` are zip archives too.

  An archive without arrays is one of NumPy's if it is empty, or called so.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      held = archive.namelist()
    if any(name.endswith(".npy") for name in held):
      return True
    return not held or (path.suffix == ".npz" and not any(map(_is_torchs, held)))
  except Exception:  # A damaged archive raises anything. Reading it as torch's says what is wrong.
    return False


def _is_torchs(name: str) -> bool:
  """Tells if a file in a zip archive is one that `torch.save` writes into every archive."""
  return name.endswith("data.pkl")


def _read_npz(path: Path) -> dict[str, np.ndarray]:
  try:
    _check_claims(path)
    with np.load(path, allow_pickle=False) as file:
      is_empty = not any(name.endswith(".npy") for name in file.zip.namelist())
      arrays = {} if is_empty else dict(file)
    for name, array in arrays.items():
      if array.dtype.kind == "V":
        raise ValueError(f"{name} has a dtype that .npz cannot hold; store it as float32")
  except Exception as error:  # A damaged archive or header can raise nearly anything.
    raise InputError(
      f"{path} cannot be read: it is damaged, or holds something else than plain arrays "
      f"({printable(f'{type(error).__name__}: {error}', 300)}). Fetch the file again, or write its "
      "arrays with numpy.savez"
    ) from error
  if not arrays:
    raise InputError(f"{path} holds no arrays. Write them by name: numpy.savez(FILE, **state_dict)")
  return arrays


def _check_claims(path: Path) -> None:
  """Checks the sizes that a .npz file names, before any of them is allocated.

  Raises:
    ValueError: an array is larger than its bytes, or all are much larger than the file.
  """
  with zipfile.ZipFile(path) as archive:
    records = archive.infolist()
    if sum(record.file_size for record in records) > _COMPRESSION * path.stat().st_size + 2**20:
      raise ValueError(f"arrays that are over {_COMPRESSION} times as large as the file")
    for record in records:
      if not record.filename.endswith(".npy"):
        continue
      with archive.open(record) as file:
        version = np.lib.format.read_magic(file)
        old = version == (1, 0)
        header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
        shape, _, dtype = header(file)
      # Arrays of objects are pickles of any size, which NumPy refuses to read.
      if not dtype.hasobject and math.prod(shape) * max(dtype.itemsize, 1) > record.file_size:
        raise ValueError(f"{record.filename} is larger than its bytes")


def _choose(path: Path, value: Any, found: Mapping[str, Any], entry: str | None) -> str:
  """Returns the name of the state dict to take among those that were found.

  Raises:
    InputError: the file holds no state dict, or several and none of a usual name, or none called
      `entry`.
  """
  if entry is not None:
    if entry not in found:
      names = listed((name or "(the file itself)" for name in found), 12) or "none"
      raise InputError(f"{path} has no state dict called {entry!r}; it has: {names}")
    return entry
  for name in ("", *_USUAL_ENTRIES):
    if name in found:
      return name
  if len(found) == 1:
    return next(iter(found))
  if found:
    raise InputError(
      f"{path} holds several state dicts, {listed(found, 12)}; name one with entry= or --entry"
    )
  held = printable(getattr(value, "class_name", type(value).__name__), 300)
  if isinstance(value, Mapping):
    plain = listed(filter(_is_plain, value), 12)
    held = f"a dictionary of {plain}" if value else "an empty dictionary"
  raise InputError(
    f"{path} holds no state dict, which is a dictionary of tensors by name: it is {held[:400]}. "
    "Save one with torch.save(model.state_dict(), FILE)"
  )


def _is_plain(name: Any) -> bool:
  """Checks whether a key of a dictionary is a name, not an object whose text can be anything."""
  return isinstance(name, str) or type(name) is int


def state_dicts(value: Any) -> dict[str, Mapping[str, Any]]:
  """Finds the state dicts in a checkpoint, by name of their entry; "" is the checkpoint itself."""
  if not isinstance(value, Mapping):
    return {}
  if _is_state_dict(value):
    return {"": value}
  return {
    str(key): item
    for key, item in value.items()
    if isinstance(key, str | int) and _is_state_dict(item)
  }


def _is_state_dict(value: Any) -> bool:
  """Returns True for a dictionary of at least one array, with nothing but arrays by name."""
  return (
    isinstance(value, Mapping)
    and len(value) > 0
    and all(isinstance(key, str) and isinstance(item, np.ndarray) for key, item in value.items())
  )


def _flat(path: Path, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns a state dict by plain names; raises InputError with the file's name if it cannot."""
  try:
    return with_plain_names(state)
  except InputError as error:
    raise InputError(f"{path} is refused: {error}") from None
