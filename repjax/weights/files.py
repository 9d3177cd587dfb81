"""`read`: a checkpoint file of any of the usual formats as a flat dictionary of arrays."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from repjax.errors import InputError
from repjax.weights import torch_files

_WRAPPERS = ("state_dict", "model", "state_dict_ema")
_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and of torch.compile


def read(path: str | os.PathLike[str], *, entry: str | None = None) -> dict[str, np.ndarray]:
  """Reads the state dict in a checkpoint file, without torch and without running code from it.

  Args:
    path: a .safetensors, .pth, .pth.tar, .pt, .bin or .npz file; its content decides.
    entry: which of several state dicts in it, for example "state_dict_ema"; None takes the only
      one, or the first of "state_dict", "model" and "state_dict_ema".

  Returns:
    Name to array, in the file's own dtypes, without the prefix that data-parallel training adds.
    Arrays from .pth files are read-only views of the mapped file, so nothing is held twice.

  Raises:
    InputError: there is no such file, it is truncated or damaged, it asks for code to be run, or it
      holds no state dict.
  """
  path = Path(path)
  if not path.is_file():
    raise InputError(f"{path} does not exist; give the path of a checkpoint file")
  with path.open("rb") as file:
    head = file.read(9)
  if len(head) < 9:
    raise InputError(f"{path} has {len(head)} bytes; fetch it again")
  if head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**32:
    value = _read_safetensors(path)
  elif _is_npz(path):
    value = _read_npz(path)
  else:
    value = torch_files.load(path)
  return _flat(path, _unwrap(path, value, entry))


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
  try:
    from safetensors import SafetensorError, safe_open
  except ImportError:
    raise InputError(
      f"{path} needs the safetensors package: pip install 'repjax[weights]'"
    ) from None
  try:
    # Reading instead of mapping: the mapped pages would count beside the copies.
    with safe_open(path, framework="numpy", backend="pread") as file:
      return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
  except SafetensorError as error:
    raise InputError(
      f"{path} cannot be read: it is truncated or damaged ({error}). Compare its size with the "
      "original's and fetch it again"
    ) from error


def _is_npz(path: Path) -> bool:
  try:
    with zipfile.ZipFile(path) as archive:
      return any(name.endswith(".npy") for name in archive.namelist())
  except zipfile.BadZipFile:
    return False


def _read_npz(path: Path) -> dict[str, np.ndarray]:
  try:
    with np.load(path, allow_pickle=False) as file:
      return dict(file)
  except (ValueError, OSError, zipfile.BadZipFile) as error:
    raise InputError(f"{path} cannot be read: {error}") from error


def _unwrap(path: Path, value: Any, entry: str | None) -> Mapping[str, Any]:
  """The state dict itself."""
  found = state_dicts(value)
  if entry is not None:
    if entry not in found:
      names = ", ".join(name or "(the file itself)" for name in found) or "none"
      raise InputError(f"{path} has no state dict called {entry!r}; it has: {names}")
    return found[entry]
  for name in ("", *_WRAPPERS):
    if name in found:
      return found[name]
  if len(found) == 1:
    return next(iter(found.values()))
  kind = type(value).__name__
  held = f"a dictionary of {', '.join(map(str, list(value)[:12]))}" if _is_dict(value) else kind
  raise InputError(
    f"{path} holds no state dict, a dictionary of tensors by name: it is {held}. Save one with "
    "torch.save(model.state_dict(), FILE), or name one of several with entry="
  )


def state_dicts(value: Any) -> dict[str, Mapping[str, Any]]:
  """The state dicts in a checkpoint by the name of their entry; "" is the checkpoint itself."""
  if not _is_dict(value):
    return {}
  if _is_state_dict(value):
    return {"": value}
  return {str(key): item for key, item in value.items() if _is_state_dict(item)}


def _is_dict(value: Any) -> bool:
  return isinstance(value, Mapping)


def _is_state_dict(value: Any) -> bool:
  return (
    _is_dict(value)
    and len(value) > 0
    and all(isinstance(key, str) and isinstance(item, np.ndarray) for key, item in value.items())
  )


def _flat(path: Path, state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Without the prefixes of wrapped modules."""
  plain = {}
  for key, value in state.items():
    name = key
    while name.startswith(_PREFIXES):
      name = name.partition(".")[2]
    if name in plain:
      raise InputError(f"{path} holds {name} twice, once with a prefix of {_PREFIXES}")
    plain[name] = value
  return plain
