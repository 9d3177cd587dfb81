"""StableHLO for other programs: a deploy form written by `jax.export`, and read back.

exported/a0/
model.stablehlo   the program, for any batch size and several platforms, without its parameters
params/           these, in the program's dtype
model.json        the ModelSpec: `repjax.load` and `repjax.deploy.Predictor` take the folder too
export.json       what the program takes and returns, and how long it can be read
"""

import importlib.util
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from repjax import disk
from repjax.deploy.compile import BATCH_SIZES, CompiledModel
from repjax.deploy.function import inference
from repjax.errors import InputError, unknown
from repjax.spec import ModelSpec

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
PROMISE = (
  "JAX promises that versions up to six months younger than the one that wrote this program read "
  "it, and versions up to three weeks older; later, write it again from params and model.json, "
  "which do not expire"
)


def export(
  model: nn.Module,
  variables: Mapping[str, Any],
  spec: ModelSpec,
  folder: str | os.PathLike[str],
  *,
  dtype: jax.typing.DTypeLike = "float32",
  platforms: Sequence[str] = ("cpu", "cuda"),
  normalize: bool = True,
  probabilities: bool = False,
) -> dict[str, Any]:
  """Writes a model's deploy form as StableHLO, with its parameters beside it.

  The program takes the tree {"params": ...} and images (N, S, S, 3) with any N, and returns float32
  (N, K). Any program that reads `jax.export`'s format can run it, without repjax and Flax.

  Args:
    model: in either form, as `repjax.load` returns it; a training form is re-parameterized first.
    variables: of the model.
    spec: of the model.
    folder: to be made.
    dtype: as in `repjax.deploy.compile`.
    platforms: that it is for, among PLATFORMS.
    normalize: take uint8 images and normalize them inside; otherwise they are normalized float32.
    probabilities: return a softmax of the logits.

  Returns:
    What export.json says.

  Raises:
    InputError: the folder exists, the package flatbuffers is missing, or as in `compile`.

  Example:
    repjax.deploy.export(*repjax.load("runs/a0"), "exported/a0", dtype="bfloat16")
  """
  path = Path(folder)
  if path.exists():
    raise InputError(f"{path} exists already; give another path, or remove it first")
  for platform in platforms:
    if platform not in PLATFORMS:
      raise unknown("platform", platform, PLATFORMS)
  _need_flatbuffers()
  size = spec.preprocessing.image_size
  function, tree, *_ = inference(
    model,
    variables,
    image_size=size,
    dtype=dtype,
    preprocessing=spec.preprocessing if normalize else None,
    probabilities=probabilities,
  )
  input_dtype = np.dtype(np.uint8 if normalize else np.float32)
  facts = {
    "dtype": jax.numpy.dtype(dtype).name,
    "image_size": size,
    "input": input_dtype.name,
    "output": "probabilities" if probabilities else "logits",
    "platforms": list(platforms),
    "jax": jax.__version__,
    "note": PROMISE,
  }
  program = _serialized(function, tree, size, input_dtype, platforms)
  _write(path, program, tree["params"], spec, facts)
  return facts


def load_exported(
  folder: str | os.PathLike[str],
  *,
  batch_sizes: Iterable[int] = BATCH_SIZES,
  devices: Sequence[Any] | None = None,
) -> CompiledModel:
  """Reads what `export` wrote and compiles it; builds no model.

  A file like this is a program: read only those that you trust.

  Args:
    folder: that `export` made.
    batch_sizes: as in `repjax.deploy.compile`.
    devices: as in `repjax.deploy.compile`.

  Returns:
    A function of images (N, S, S, 3), uint8 or normalized float32, as export.json says.

  Raises:
    InputError: the folder is none of these, is damaged, has expired, or is for other platforms.
  """
  path = Path(folder)
  facts = disk.read_json(path / "export.json")
  program = _deserialized(path)
  own = {"gpu": "cuda"}.get(platform := (devices or jax.local_devices())[0].platform, platform)
  if own not in program.platforms:
    raise InputError(
      f"{path} is for {' and '.join(program.platforms)}, and the devices here are {own}; export it "
      f"with --platforms {' '.join(program.platforms)} {own}"
    )
  (shapes, images), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
  params = disk.read_tree(path / "params", shapes["params"])
  return CompiledModel(
    program.call,
    {"params": params},
    image_size=(facts["image_size"], facts["image_size"]),
    input_dtype=images.dtype,
    batch_sizes=batch_sizes,
    devices=devices,
  )


def _serialized(
  function: Any, tree: Any, size: int, input_dtype: np.dtype, platforms: Sequence[str]
) -> bytes:
  from jax import export as jax_export

  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
  symbols = jax_export.symbolic_shape(f"batch, {size}, {size}, 3")
  images = jax.ShapeDtypeStruct(symbols, input_dtype)
  exported = jax_export.export(jax.jit(function), platforms=platforms)(shapes, images)
  return bytes(exported.serialize())


def _deserialized(path: Path) -> Any:
  from jax import export as jax_export

  _need_flatbuffers()
  file = path / "model.stablehlo"
  try:
    return jax_export.deserialize(bytearray(file.read_bytes()))
  except OSError as error:
    raise InputError(f"{file} cannot be read: {error.strerror}") from error
  except Exception as error:  # JAX, flatbuffers and MLIR have many kinds
    first = str(error).partition("\n")[0][:300]
    raise InputError(
      f"{file} cannot be read by jax {jax.__version__}: {first}. It is damaged or has expired; "
      f"write it again: python scripts/export.py --workdir {path} --to NEW_FOLDER"
    ) from error


def _need_flatbuffers() -> None:
  if importlib.util.find_spec("flatbuffers") is None:
    raise InputError(
      "StableHLO files need the package flatbuffers: pip install 'repjax[export]', or "
      "pip install flatbuffers"
    )


def _write(
  path: Path, program: bytes, params: Any, spec: ModelSpec, facts: Mapping[str, Any]
) -> None:
  """Writes the whole folder beside its place, then moves it there."""
  draft = path.with_name(f"{path.name}.draft")
  shutil.rmtree(draft, ignore_errors=True)
  try:
    with disk.writing(path):
      draft.mkdir(parents=True)
      (draft / "model.stablehlo").write_bytes(program)
      disk.write_tree(draft / "params", params)
      spec.write(draft)
      disk.write_json(draft / "export.json", facts)
      disk.put(draft, path)
  finally:
    shutil.rmtree(draft, ignore_errors=True)
