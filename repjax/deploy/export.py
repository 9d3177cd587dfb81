"""A deploy form written for other programs: as StableHLO by `jax.export`, or as ONNX.

exported/a0/
model.stablehlo   the program, for any batch size and several platforms, without its parameters
model.onnx        or this, for any batch size, with its parameters
params/           these, in the program's dtype
model.json        the ModelSpec: `repjax.load` and `repjax.deploy.Predictor` take the folder too
export.json       what the program takes and returns, and how long it can be read or how it compares
"""

import importlib.metadata
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
from repjax.errors import InputError, unknown
from repjax.inference import checked_dtype, inference
from repjax.onnx import of_function, written_dtype
from repjax.onnx.check import checked
from repjax.onnx.proto import OPSET
from repjax.spec import ModelSpec

FORMATS = ("stablehlo", "onnx")
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
  format: str = "stablehlo",  # noqa: A002
  dtype: jax.typing.DTypeLike = "float32",
  platforms: Sequence[str] = ("cpu", "cuda"),
  normalize: bool = True,
  probabilities: bool = False,
) -> dict[str, Any]:
  """Writes a model's deploy form as StableHLO or ONNX, with its parameters beside it.

  StableHLO takes the tree {"params": ...} and images (N, S, S, 3) with any N, and returns float32
  (N, K). Any program that reads `jax.export`'s format can run it, without repjax and Flax.
  ONNX is as `repjax.onnx.to_onnx` makes it, images (N, 3, S, S); the ONNX checker and, where it
  is installed, ONNX Runtime try it before it is written.

  Args:
    model: in either form, as `repjax.load` returns it; a training form is re-parameterized first.
    variables: of the model.
    spec: of the model.
    folder: to be made.
    format: "stablehlo" or "onnx".
    dtype: as in `repjax.deploy.compile`, or in `repjax.onnx.to_onnx`.
    platforms: that StableHLO is for, among PLATFORMS.
    normalize: take uint8 images and normalize them inside; otherwise they are normalized, float32,
      or for ONNX of `dtype`.
    probabilities: return a softmax of the logits.

  Returns:
    What export.json says.

  Raises:
    InputError: the folder exists, the package flatbuffers or onnx is missing, or as in `compile`
      and `to_onnx`.

  Example:
    repjax.deploy.export(*repjax.load("runs/a0"), "exported/a0", dtype="bfloat16")
  """
  path = Path(folder)
  if path.exists():
    raise InputError(f"{path} exists already; give another path, or remove it first")
  if format not in FORMATS:
    raise unknown("format", format, FORMATS)
  for platform in platforms:
    if platform not in PLATFORMS:
      raise unknown("platform", platform, PLATFORMS)
  dtype = _written_dtype(format, dtype)
  size = spec.preprocessing.image_size
  function, tree, *_ = inference(
    model,
    variables,
    image_size=size,
    dtype=dtype,
    preprocessing=spec.preprocessing if normalize else None,
    probabilities=probabilities,
  )
  input_dtype = np.dtype(np.uint8 if normalize else dtype if format == "onnx" else np.float32)
  facts = {
    "format": format,
    "dtype": dtype.name,
    "image_size": size,
    "input": input_dtype.name,
    "output": _output(model, probabilities),
    "jax": jax.__version__,
  }
  if format == "onnx":
    program = of_function(function, tree, size, input_dtype, probabilities).SerializeToString()
    facts |= {"opset": OPSET, "checked": checked(program, function, tree, size)}
  else:
    program = _serialized(function, tree, size, input_dtype, platforms)
    facts |= {"platforms": list(platforms), "note": PROMISE}
  write_folder(path, {f"model.{format}": program}, spec, facts, tree["params"])
  return facts


def _output(model: nn.Module, probabilities: bool) -> str:
  if getattr(model, "features_only", False):
    return "feature maps"
  return "probabilities" if probabilities else "logits"


def _written_dtype(format: str, dtype: jax.typing.DTypeLike) -> np.dtype:  # noqa: A002
  """The dtype, where what the format needs is here."""
  if format == "onnx":
    return written_dtype(dtype)
  _need_flatbuffers()
  return checked_dtype(dtype)


def load_exported(
  folder: str | os.PathLike[str],
  *,
  batch_sizes: Iterable[int] = BATCH_SIZES,
  devices: Sequence[Any] | None = None,
) -> CompiledModel:
  """Reads what `export` wrote and compiles it; builds no model.

  It is compiled as it stands: convolutions are XLA's, see `tune` in `repjax.deploy.compile`.

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
  if facts.get("format") == "onnx":
    way_out = f"repjax.deploy.compile(*repjax.load({str(path)!r})[:2], ...)"
    raise InputError(
      f"{path} holds an ONNX file, which ONNX Runtime, OpenVINO or TensorRT runs and JAX does not"
      + (f"; to run its parameters here: {way_out}" if (path / "params").exists() else "")
    )
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
      f"write it again: repjax export --workdir {path} --to NEW_FOLDER"
    ) from error


def _need_flatbuffers() -> None:
  if importlib.util.find_spec("flatbuffers") is None:
    raise InputError(
      "StableHLO files need the package flatbuffers: pip install 'repjax[export]', or "
      "pip install flatbuffers"
    )


def onnx_facts(spec: ModelSpec, dtype: str) -> dict[str, Any]:
  """What export.json says first of a file that ONNX Runtime's quantizer made."""
  return {
    "format": "onnx",
    "dtype": dtype,
    "image_size": spec.preprocessing.image_size,
    "input": "uint8",
    "output": "logits",
    "opset": OPSET,
    "onnxruntime": importlib.metadata.version("onnxruntime"),
  }


def write_folder(
  path: Path,
  files: Mapping[str, bytes],
  spec: ModelSpec,
  facts: Mapping[str, Any],
  params: Any = None,
) -> None:
  """Writes the whole folder beside its place, then moves it there."""
  draft = path.with_name(f"{path.name}.draft")
  shutil.rmtree(draft, ignore_errors=True)
  try:
    with disk.writing(path):
      draft.mkdir(parents=True)
      for name, content in files.items():
        (draft / name).write_bytes(content)
      if params is not None:
        disk.write_tree(draft / "params", params)
      spec.write(draft)
      disk.write_json(draft / "export.json", facts)
      disk.replace_folder(draft, path)
  finally:
    shutil.rmtree(draft, ignore_errors=True)
