"""Quantization-aware training: branches learn through the fold and through the rounding of 8 bits.

A step folds the branches into the deploy form, rounds what its layers read and their weights as the
exported file will, and differentiates through all of it. Batch norms keep their running statistics:
each is an affine map that learns, and the kernel that is rounded is the one that is shipped.

runs/digits-qat/
rounding.json             how inputs of layers are rounded, found once, at the start
int8/                     model.onnx, model.json, export.json
"""

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from repjax import deploy, disk, store
from repjax.deploy.export import write_folder
from repjax.deploy.onnx.proto import OPSET
from repjax.deploy.quantization import runtime
from repjax.deploy.quantization.roundings import Rounding
from repjax.deploy.quantization.simulation import simulated
from repjax.errors import InputError
from repjax.reparam import reparameterize
from repjax.spec import ModelSpec, load
from repjax.training import evaluation
from repjax.training.calibration import calibration_images
from repjax.training.settings import Config, Plan
from repjax.training.step import Network, TrainState


def begin(config: Config, plan: Plan, state: TrainState, workdir: Path) -> list[Rounding]:
  """How a run rounds: as it began, or by what the network that it starts from does on some images.

  Args:
    config: with `qat`.
    plan: that follows from it.
    state: to start from.
    workdir: of the run; rounding.json is written where it has no checkpoints yet.

  Raises:
    InputError: a package is missing, too few images to calibrate with, or a damaged file.
  """
  runtime.need_runtime()
  path = workdir / "rounding.json"
  if store.checkpoints(workdir):
    return _read(path)
  images = calibration_images(plan.train, config.qat_images, plan.spec.preprocessing)
  print(f"calibrating the ranges of 8 bits on {len(images)} training images", flush=True)
  proto = _graph(plan.spec, plan.spec.create_model(), state.variables)
  how = deploy.roundings_of(proto, images, config.qat_activations)
  with disk.writing(path):
    disk.write_json(path, [row._asdict() for row in how])
  return how


def network(config: Config, spec: ModelSpec, how: Sequence[Rounding]) -> Network:
  """The deploy form in 8 bits as a function of the training form's variables; pure.

  Args:
    config: with `qat`.
    spec: of the model.
    how: from `begin`.

  Returns:
    A function of {"params", "batch_stats"} and normalized images (N, S, S, 3) that returns logits
    (N, K). Gradients go through rounding and fold to the branches.
  """
  rounded = simulated(
    spec.create_model(deploy=True).apply,
    how,
    activations=config.qat_activations,
    weight_bits=config.qat_weight_bits,
  )

  def apply(variables: Any, images: jax.Array) -> jax.Array:
    params = reparameterize(variables["params"], variables["batch_stats"])
    return rounded({"params": params}, images)

  return apply


def write_int8(
  config: Config, plan: Plan, how: Sequence[Rounding], workdir: Path
) -> dict[str, Any]:
  """Writes what a run has learned as `workdir/int8`, for ONNX Runtime, and measures it there.

  Args:
    config: with `qat`.
    plan: that follows from it.
    how: from `begin`.
    workdir: with a deploy form.

  Returns:
    What export.json says; among it `accuracy` of "float32" and "int8" on the evaluation split.
  """
  model, variables, spec = load(workdir)
  images = calibration_images(plan.train, config.qat_images, spec.preprocessing)
  proto = _graph(spec, model, variables)
  made = deploy.quantize(
    proto,
    images,
    activations=config.qat_activations,
    weight_bits=config.qat_weight_bits,
    roundings=how,
  )
  facts = {
    "format": "onnx",
    "dtype": "int8",
    "image_size": spec.preprocessing.image_size,
    "input": "uint8",
    "output": "logits",
    "opset": OPSET,
    "onnxruntime": importlib.metadata.version("onnxruntime"),
    "calibration_images": len(images),
    "settings": {name: config[name] for name in ("qat_activations", "qat_weight_bits")},
    "accuracy": {
      "float32": disk.read_json(workdir / "deploy" / "report.json")["accuracy"]["deploy"],
      "simulated": max(store.checkpoints(workdir).values()),
      "int8": _accuracy(
        made, evaluation.host_batches(plan.eval, spec.preprocessing, batch_size=64)
      ),
    },
    "bytes": made.ByteSize(),
  }
  write_folder(workdir / "int8", {"model.onnx": made.SerializeToString()}, spec, facts)
  return facts


def format_int8(facts: Mapping[str, Any]) -> str:
  """What `write_int8` returns, in words."""
  accuracy = facts["accuracy"]
  return (
    f"in 8 bits: {accuracy['int8']:.2%} in ONNX Runtime, {accuracy['simulated']:.2%} as simulated "
    f"here, {accuracy['float32']:.2%} in float32; {facts['bytes']:,} bytes"
  )


def _read(path: Path) -> list[Rounding]:
  rows = disk.read_json(path)
  try:
    return [Rounding(**row) for row in rows]
  except TypeError as error:
    raise InputError(
      f"{path} is damaged: it does not hold how layers are rounded; restore it, without which the "
      "run cannot go on as it began"
    ) from error


def _accuracy(proto: Any, split: Iterable[Mapping[str, np.ndarray]]) -> float:
  """The share of right classes that ONNX Runtime gives."""
  ready, right, count = runtime.session(proto), 0, 0
  for batch in split:
    logits = ready.run(None, runtime.fed(batch["image"]))[0]
    right += int(((logits.argmax(-1) == batch["label"]) & batch["mask"]).sum())
    count += int(batch["mask"].sum())
  return right / count


def _graph(spec: ModelSpec, model: Any, variables: Any) -> Any:
  task = {"image_size": spec.preprocessing.image_size, "preprocessing": spec.preprocessing}
  return deploy.to_onnx(model, variables, **task)
