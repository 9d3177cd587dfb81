"""Quantization-aware training: branches learn through the fold and through the rounding of 8 bits.

A step folds the branches into the deploy form, rounds its weights and what flows between them just
as the exported file will, and differentiates through all of it. Batch norms keep their statistics:
each is an affine map that learns, and the kernel that is rounded is the one that is shipped.

runs/digits-qat/
rounding.json             how tensors are rounded, found once, at the start
int8/                     model.onnx, model.json, export.json
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax import disk, runs
from repjax.deploy.export import onnx_facts, write_folder
from repjax.errors import InputError
from repjax.onnx import to_onnx
from repjax.quantization import processor, quantize_by, roundings_of, runtime, simulated
from repjax.quantization.roundings import Roundings
from repjax.reparam import reparameterize
from repjax.spec import ModelSpec, load
from repjax.training import evaluation
from repjax.training.calibration import calibration_images
from repjax.training.planning import Config, Plan
from repjax.training.step import Network, TrainState


def begin(config: Config, plan: Plan, state: TrainState, workdir: Path) -> Roundings:
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
  path = runs.rounding_file(workdir)
  if runs.checkpoints(workdir):
    return _read(path)
  if processor.saturates() and (config.qat_activations, config.qat_weight_bits) == ("uint8", 8):
    print(processor.SATURATES, "--config.qat_weight_bits=7", flush=True)
  images = calibration_images(plan.train, config.qat_images, plan.spec.preprocessing)
  print(f"calibrating the ranges of 8 bits on {len(images)} training images", flush=True)
  size = plan.spec.preprocessing.image_size
  roundings = roundings_of(
    to_onnx(plan.spec.create_model(), state.variables, image_size=size),
    np.asarray(plan.spec.preprocessing.normalize(jnp.asarray(images))),
    activations=config.qat_activations,
    weight_bits=config.qat_weight_bits,
  )
  with disk.writing(path):
    disk.write_json(path, roundings._asdict())
  return roundings


def network(spec: ModelSpec, variables: Any, roundings: Roundings) -> Network:
  """The deploy form in 8 bits as a function of the training form's variables; pure.

  Args:
    spec: of the model.
    variables: of the training form.
    roundings: from `begin`.

  Returns:
    A function of {"params", "batch_stats"} and normalized images (N, S, S, 3) that returns logits
    (N, K). Gradients go through rounding and fold to the branches.
  """
  size = spec.preprocessing.image_size
  rounded = simulated(spec.create_model(), variables, roundings, image_size=size)

  def apply(variables: Any, images: jax.Array) -> jax.Array:
    params = reparameterize(variables["params"], variables["batch_stats"])
    return rounded({"params": params}, images)

  return apply


def write_int8(config: Config, plan: Plan, roundings: Roundings, workdir: Path) -> dict[str, Any]:
  """Writes what a run has learned as `workdir/int8`, for ONNX Runtime, and measures it there.

  Args:
    config: with `qat`.
    plan: that follows from it.
    roundings: from `begin`.
    workdir: with a deploy form.

  Returns:
    What export.json says; among it `accuracy` on the evaluation split: of the deploy form in
    "float32", of it in 8 bits as "simulated" here, and of the file, "int8".
  """
  model, variables, spec = load(workdir)
  preprocessing = spec.preprocessing
  size = preprocessing.image_size
  proto = to_onnx(model, variables, image_size=size, preprocessing=preprocessing)
  made = quantize_by(proto, roundings)
  rounded = simulated(model, variables, roundings, image_size=size)
  simulation = jax.jit(lambda images: rounded(variables, preprocessing.normalize(images)))
  ready = runtime.session(made)
  split = evaluation.host_batches(
    plan.eval, preprocessing, batch_size=64, num_workers=config.num_workers
  )
  measured = _accuracies(
    {"simulated": simulation, "int8": lambda images: ready.run(None, runtime.fed(images))[0]},
    split,
  )
  plain = disk.read_json(runs.conversion_file(runs.deploy_folder(workdir)))["accuracy"]["deploy"]
  facts = onnx_facts(spec, "int8") | {
    "settings": {name: config[name] for name in ("qat_activations", "qat_weight_bits")},
    "accuracy": {"float32": plain, **measured},
    "bytes": made.ByteSize(),
  }
  folder = runs.int8_folder(workdir)
  write_folder(folder, {runs.onnx_file(folder).name: made.SerializeToString()}, spec, facts)
  return facts


def format_int8(facts: Mapping[str, Any]) -> str:
  """What `write_int8` returns, in words."""
  accuracy = facts["accuracy"]
  return (
    f"in 8 bits: {accuracy['int8']:.2%} in ONNX Runtime, {accuracy['simulated']:.2%} as simulated "
    f"here, {accuracy['float32']:.2%} in float32; {facts['bytes']:,} bytes"
  )


def _read(path: Path) -> Roundings:
  """What rounding.json of a run says."""
  try:
    return Roundings(**disk.read_json(path))
  except (TypeError, InputError) as error:
    raise InputError(
      f"{path} is missing or damaged: it says how tensors are rounded; restore it, without which "
      "the run cannot go on as it began"
    ) from error


def _accuracies(
  classifiers: Mapping[str, Callable[[np.ndarray], Any]],
  split: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, float]:
  """The share of right classes that each gives."""
  right, count = dict.fromkeys(classifiers, 0), 0
  for batch in split:
    count += int(batch["mask"].sum())
    for name, classify in classifiers.items():
      predicted = np.asarray(classify(batch["image"])).argmax(-1)
      right[name] += int(((predicted == batch["label"]) & batch["mask"]).sum())
  return {name: hits / count for name, hits in right.items()}
