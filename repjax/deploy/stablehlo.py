"""Writes and reads programs as StableHLO, in the format of `jax.export`.

The format needs the package flatbuffers, which `repjax[deploy]` installs.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repjax import extras
from repjax.errors import InputError

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROMISE = (
  "JAX promises that this program can be read for six months: by newer versions up to that age, "
  "and by versions that are up to three weeks older. After that, write it again from params and "
  "model.json, which do not expire"
)
"""The sentence of export.json that says for how long a program can be read."""


def serialize(
  function: Any, tree: Any, size: tuple[int, int], input_dtype: np.dtype, platforms: Sequence[str]
) -> bytes:
  """Serializes a function of a tree and of images (N, H, W, 3), for any N.

  The tree's numbers are no part of the program, which takes the tree as an argument.

  Args:
    function: a function of the tree and of images.
    tree: arrays, for their shapes and dtypes.
    size: (height, width) of the images in pixels.
    input_dtype: dtype of the images.
    platforms: names among PLATFORMS for which the program is lowered.
  """
  from jax import export as jax_export

  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  symbols = jax_export.symbolic_shape(f"batch, {size[0]}, {size[1]}, 3")
  images = jax.ShapeDtypeStruct(symbols, input_dtype)
  exported = jax_export.export(jax.jit(function), platforms=platforms)(shapes, images)
  return bytes(exported.serialize())


def deserialize(file: Path, folder: Path, read_bytes: Callable[[Path], bytes]) -> Any:
  """Reads a program as a `jax.export.Exported`.

  Args:
    file: the file of the program.
    folder: the folder that the file belongs to, for the error message.
    read_bytes: reads the file, and may compare it with a checksum.

  Raises:
    InputError: the file cannot be read, is damaged, or was written by a version of JAX that is too
      old or too new; or flatbuffers is missing.
  """
  from jax import export as jax_export

  need_flatbuffers()
  try:
    return jax_export.deserialize(bytearray(read_bytes(file)))
  except InputError:
    raise
  except OSError as error:
    raise InputError(f"{file} cannot be read: {error.strerror}") from error
  except Exception as error:  # JAX, flatbuffers and MLIR raise many kinds of errors.
    first = str(error).partition("\n")[0][:300]
    raise InputError(
      f"{file} cannot be read by jax {jax.__version__}: {first}. The file is damaged or has "
      f"expired. Write it again: repjax export --workdir {folder} --to NEW_FOLDER"
    ) from error


def need_flatbuffers() -> None:
  """Raises InputError if the package flatbuffers is not installed."""
  extras.need("flatbuffers", "StableHLO files")
