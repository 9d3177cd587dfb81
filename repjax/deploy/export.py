"""Writes a deploy form for other programs: StableHLO, ONNX, a web page. Reads StableHLO back.

An exported folder:

  exported/a0/
    model.stablehlo   the program without its parameters, for any batch size and several platforms
    model.onnx        or this: the program with its parameters, for any batch size
    run_onnx.py       beside the ONNX file of a classifier: labels images, without repjax and JAX
    params/           the parameters, in the program's dtype
    model.json        the ModelSpec; `repjax.load` and `repjax.deploy.Predictor` take the folder,
                      but not that of a function, which has no ModelSpec
    index.html ...    for the web, beside model.onnx: a page that runs the file in a browser, and
                      training.onnx, the training form (see `repjax.web`); no params/
    export.json       what the program takes and returns; for StableHLO, for how long it can be
                      read, and the matrices that GPUs read faster transposed, with the axis that
                      is summed over; for ONNX, how it compares with JAX
"""

import dataclasses
import functools
import importlib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax import disk, functions, names, runs, web
from repjax.deploy.compile import BATCH_SIZES, CompiledModel
from repjax.deploy.devices import PlacedTree
from repjax.deploy.gpu import summed_axes
from repjax.deploy.stablehlo import (
  PLATFORMS,
  PROMISE,
  deserialize,
  need_flatbuffers,
  serialize,
)
from repjax.devices import need_devices
from repjax.errors import InputError, unknown
from repjax.functions import Function
from repjax.inference import checked_dtype, inference
from repjax.models.checks import check_image_size
from repjax.onnx import metadata, of_function, written_dtype
from repjax.onnx.check import checked
from repjax.onnx.proto import OPSET
from repjax.spec import ModelSpec, Preprocessing, check_preprocessing
from repjax.trees import is_key, leaf_name

FORMATS = ("stablehlo", "onnx", "web")
NO_MODEL = (
  "none of repjax.list_models: the folder has no model.json, so that repjax.load and Predictor "
  "cannot read it. repjax.deploy.load_exported runs StableHLO, and ONNX Runtime runs ONNX"
)
"""The entry of export.json that says why a folder has no model.json."""
_PLAIN_NAME = re.compile(r"\w[\w.~-]{0,200}", re.ASCII)


def export(
  model: Any,
  variables: Any,
  spec: ModelSpec | Preprocessing,
  folder: str | os.PathLike[str],
  *,
  format: str = "stablehlo",  # noqa: A002
  dtype: jax.typing.DTypeLike = "float32",
  platforms: Sequence[str] = ("cpu", "cuda"),
  normalize: bool = True,
  probabilities: bool = False,
  image_size: int | tuple[int, int] | None = None,
  web_runtime: str | os.PathLike[str] | None = None,
) -> dict[str, Any]:
  """Writes a model's deploy form as StableHLO, as ONNX or as a web page.

  StableHLO takes the tree {"params": ...} and images (N, S, S, 3) with any N, and returns float32
  (N, K), or for segmentation (N, H, W, K). Any program that reads the format of `jax.export` can
  run it, without repjax and Flax.
  ONNX is made by `repjax.onnx.to_onnx` and takes images (N, 3, S, S). Before the file is written,
  the ONNX checker tests it, and ONNX Runtime too if it is installed. The parameters lie
  beside both files.

  A web page runs the ONNX file in the browser of whoever opens it, on a picture that is dropped or
  drawn. Any web server can show the folder. A model in training form is there twice, so that the
  page compares the times of both forms.

  Args:
    model: the model in either form, as `repjax.load` returns it; a training form is
      re-parameterized first. Or a function or a fused function, as in `repjax.deploy.compile`.
    variables: variables of the model, or parameters of the function.
    spec: ModelSpec of the model. For a model that is not one of `repjax.list_models`, its
      Preprocessing: the folder then has no model.json.
    folder: the folder to write, which must not exist yet.
    format: "stablehlo", "onnx" or "web". A web page needs a ModelSpec.
    dtype: as in `repjax.deploy.compile`, or in `repjax.onnx.to_onnx`.
    platforms: platforms that StableHLO is lowered for, among PLATFORMS.
    normalize: takes uint8 images and normalizes them inside. False: images are normalized already
      and float32, or for ONNX of `dtype`.
    probabilities: returns a softmax of the logits.
    image_size: for segmentation, the size of the images in pixels, one number or (height, width).
      None: the size of the training crops.
    web_runtime: the package onnxruntime-web, or a folder with its files, for a web page. None: the
      user's cache, or the registry of npm.

  Returns:
    The content of export.json.

  Raises:
    InputError: the folder cannot be made, the package flatbuffers or onnx is missing, or an
      argument is refused as in `compile` and `to_onnx`.

  Example:
    repjax.deploy.export(*repjax.load("runs/a0"), "exported/a0", dtype="bfloat16")
  """
  path = names.folder(folder)
  disk.check_new(path)
  if format not in FORMATS:
    raise unknown("format", format, FORMATS)
  for platform in platforms:
    if platform not in PLATFORMS:
      raise unknown("platform", platform, PLATFORMS)
  dtype = _written_dtype(format, dtype)
  known = isinstance(spec, ModelSpec)
  preprocessing = spec.preprocessing if known else spec
  check_preprocessing(preprocessing)
  if format == "web":
    _check_web(model, spec, normalize, image_size)
  if image_size is not None and isinstance(spec, ModelSpec) and spec.task == "classification":
    raise InputError(
      f"{spec.name} takes squares of {preprocessing.image_size} px, to which its preprocessing "
      "resizes images, so image_size cannot be given. Change spec.preprocessing instead"
    )
  size = preprocessing.image_size if image_size is None else image_size
  check_image_size(size)
  size = size if isinstance(size, tuple) else (size, size)
  function, tree, _, network = inference(
    model,
    variables,
    image_size=size,
    dtype=dtype,
    preprocessing=preprocessing if normalize else None,
    probabilities=probabilities,
  )
  if not known or [*tree] != ["params"]:
    function, tree = _with_named_leaves(function, tree)
  is_onnx = format in ("onnx", "web")
  name = (runs.onnx_file if is_onnx else runs.stablehlo_file)(path).name
  input_dtype = np.dtype(np.uint8 if normalize else dtype if is_onnx else np.float32)
  facts = {
    "format": format,
    "dtype": dtype.name,
    "image_size": _written_size(size),
    "input": input_dtype.name,
    "output": _output(network, probabilities),
    "jax": jax.__version__,
  }
  if not known:
    facts |= {"preprocessing": dataclasses.asdict(preprocessing), "model": NO_MODEL}
  if is_onnx:
    proto = of_function(function, tree, size, input_dtype, probabilities)
    class_names = spec.class_names if known else ()
    files = metadata.files(name, proto, preprocessing, class_names)
    facts |= {"opset": OPSET, "checked": checked(files[name], function, tree, size)}
  else:
    images = jax.ShapeDtypeStruct((1, *size, 3), input_dtype)
    if network is None:
      functions.warn_of_training(function, tree, images)
    program = serialize(function, tree, size, input_dtype, platforms)
    files = {name: program}
    facts |= {
      "platforms": list(platforms),
      "summed_axes": summed_axes(function, tree, images),
      "note": PROMISE,
    }
  if format == "web":
    assert isinstance(spec, ModelSpec)  # checked above
    forms = {"deploy form": (name, files[name])}
    if _is_training_form(model, variables):
      trained = _training_form(model, preprocessing, dtype, probabilities)
      content = of_function(trained, variables, size, input_dtype, probabilities)
      forms["training form"] = ("training.onnx", content.SerializeToString())
      facts["checked_training"] = checked(forms["training form"][1], trained, variables, size)
    pages = web.folder_files(spec, forms, probabilities=probabilities, runtime=web_runtime)
    files = {name: files[name], **pages}
  runs.write_export(
    path,
    files,
    spec=spec.to_json() if known else None,
    facts=facts,
    params=None if format == "web" else tree["params"],
  )
  return facts


def _written_size(size: tuple[int, int]) -> int | list[int]:
  """Returns a size as export.json has it: one number for a square, else height and width."""
  height, width = size
  return height if height == width else [height, width]


def _check_web(
  model: Any, spec: ModelSpec | Preprocessing, normalize: bool, image_size: Any
) -> None:
  """Raises unless a web page can be made of a model."""
  if not isinstance(spec, ModelSpec):
    raise InputError(
      "a web page shows labels or classes of pixels, so it needs a ModelSpec, and got a "
      'Preprocessing. Export this function with format="onnx"'
    )
  if not normalize:
    raise InputError(
      "a web page gives uint8 pixels to the network, which must normalize them. Leave out "
      "--normalized (normalize=False in Python)"
    )
  if image_size is not None:
    raise InputError(
      f"a web page cuts pictures to squares of {spec.preprocessing.image_size} px, the size of the "
      "training crops. Leave image_size (--image-size) out"
    )
  if getattr(model, "features_only", False):
    raise InputError(
      "a model with features_only=True has no labels for a web page. Leave features_only out"
    )


def _is_training_form(model: Any, variables: Any) -> bool:
  """Tells if a model and its variables are a training form, with the branches of its layers."""
  return not getattr(model, "deploy", True) and bool(variables.get("batch_stats"))


def _training_form(
  model: Any, preprocessing: Preprocessing, dtype: np.dtype, probabilities: bool
) -> Function:
  """Returns the training form of a model, at inference, as a function of variables and images."""
  network = model.clone(dtype=dtype)

  def function(variables: Any, images: jax.Array) -> jax.Array:
    outputs = network.apply(variables, preprocessing.normalize(images, dtype)).astype(jnp.float32)
    return jax.nn.softmax(outputs) if probabilities else outputs

  return function


def _output(network: Any, probabilities: bool) -> str:
  """Names what the program returns."""
  if getattr(network, "features_only", False):
    return "feature maps"
  if network is None and not probabilities:
    return "results"  # A function may return anything.
  return "probabilities" if probabilities else "logits"


def _with_named_leaves(function: Function, tree: Any) -> tuple[Function, dict[str, Any]]:
  """Returns a function of {"params": arrays by name} instead of a tree of any kind, and this tree.

  Only dictionaries can be read back without the library that made the tree. The names are those of
  the leaves, or numbers where these cannot be names of folders. Random keys become numbers.
  """
  paths = jax.tree_util.tree_leaves_with_path(tree)
  structure = jax.tree.structure(tree)
  keys = [leaf_name(path).replace("/", ".") for path, _ in paths]
  if len(set(keys)) < len(keys) or not all(map(_PLAIN_NAME.fullmatch, keys)):
    keys = [f"{place:05}" for place in range(len(keys))]

  kinds = [jax.random.key_impl(leaf) if is_key(leaf) else None for _, leaf in paths]
  arrays = [
    leaf if kind is None else jax.random.key_data(leaf) for (_, leaf), kind in zip(paths, kinds)
  ]

  def named(named: Any, images: jax.Array) -> Any:
    leaves = [
      named["params"][key]
      if kind is None
      else jax.random.wrap_key_data(named["params"][key], impl=kind)
      for key, kind in zip(keys, kinds)
    ]
    return function(structure.unflatten(leaves), images)

  return named, {"params": dict(zip(keys, arrays))}


def _written_dtype(format: str, dtype: jax.typing.DTypeLike) -> np.dtype:  # noqa: A002
  """Returns the dtype; raises InputError if the format cannot hold it or its package is missing."""
  if format != "stablehlo":
    return written_dtype(dtype)
  need_flatbuffers()
  return checked_dtype(dtype)


def load_exported(
  folder: str | os.PathLike[str],
  *,
  batch_sizes: Iterable[int] = BATCH_SIZES,
  devices: Sequence[Any] | None = None,
  verify: bool = True,
) -> CompiledModel:
  """Reads a StableHLO program that `export` wrote, and compiles it without building a model.

  The program is compiled as it is. Its convolutions are XLA's: `tune` in `repjax.deploy.compile`
  has no counterpart here.

  The file is a program. Read only files that you trust.

  Args:
    folder: a folder that `export` made.
    batch_sizes: as in `repjax.deploy.compile`.
    devices: as in `repjax.deploy.compile`.
    verify: as in `repjax.load`.

  Returns:
    A function of images (N, S, S, 3), uint8 or normalized float32, as export.json says.

  Raises:
    InputError: the folder is not an exported one, is damaged, has expired, or is for different
      platforms.
  """
  need_devices()
  path = names.folder(folder)
  facts, program, params = runs.read_exported(
    path, lambda snapshot: _read(snapshot, devices), verify=verify
  )
  _, images = jax.tree.unflatten(program.in_tree, program.in_avals)[0]
  return CompiledModel(
    program.call,
    {"params": params},
    image_size=(images.shape[1], images.shape[2]),
    input_dtype=images.dtype,
    batch_sizes=batch_sizes,
    devices=devices,
    # The program is closed, so that its products cannot be looked for.
    place=functools.partial(PlacedTree, axes=facts.get("summed_axes", {})),
  )


def _read(
  snapshot: disk.Snapshot, devices: Sequence[Any] | None
) -> tuple[dict[str, Any], Any, Any]:
  """Reads the facts, the program and the parameters of a StableHLO folder for some devices."""
  path = snapshot.folder
  facts = runs.read_export(snapshot)
  if facts.get("format") in ("onnx", "web"):
    way_out = f"repjax.deploy.compile(*repjax.load({str(path)!r})[:2], ...)"
    raise InputError(
      f"{path} holds an ONNX file, which ONNX Runtime, OpenVINO or TensorRT runs and JAX does not."
      + (f" Run its parameters in JAX by {way_out}." if runs.params_folder(path).exists() else "")
    )
  program = deserialize(runs.stablehlo_file(path), path, snapshot.read_bytes)
  platform = (devices or jax.local_devices())[0].platform
  platform = {"gpu": "cuda"}.get(platform, platform)  # The two names that JAX has for NVIDIA.
  if platform not in program.platforms:
    raise InputError(
      f"{path} is for {' and '.join(program.platforms)}, and the devices here are {platform}. "
      f"Export the model with --platforms {' '.join(program.platforms)} {platform}."
    )
  shapes, _ = jax.tree.unflatten(program.in_tree, program.in_avals)[0]
  return facts, program, runs.read_params(snapshot, shapes["params"])


def onnx_facts(spec: ModelSpec, dtype: str, size: tuple[int, int] | None = None) -> dict[str, Any]:
  """Returns the first entries of export.json for a file that ONNX Runtime's quantizer made.

  Args:
    spec: describes the model.
    dtype: what the file computes in.
    size: (height, width) of the images; None: those of the spec.
  """
  side = spec.preprocessing.image_size
  return {
    "format": "onnx",
    "dtype": dtype,
    "image_size": _written_size(size or (side, side)),
    "input": "uint8",
    "output": "logits",
    "opset": OPSET,
    "onnxruntime": importlib.import_module("onnxruntime").__version__,
  }
