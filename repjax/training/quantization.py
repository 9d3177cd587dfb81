"""Quantization-aware training: branches learn through the fold and through the rounding to 8 bits.

A step folds the branches into the deploy form. It rounds the weights of that form, and the values
that flow between its layers, exactly as the exported file will. It then differentiates through all
of this. Batch norms keep their running statistics, so that each norm is an affine map that learns,
and the rounded kernel is the kernel that is shipped.

runs/digits-qat/
rounding.json             how tensors are rounded, found once, at the start
int8/                     model.onnx, model.json, export.json
"""

import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from repjax import runs
from repjax.config import Config
from repjax.data.sources import Examples, Source
from repjax.deploy.export import onnx_facts
from repjax.errors import InputError, sentences
from repjax.onnx import metadata, to_onnx
from repjax.quantization import processor, quantize_by, roundings_of, runtime, simulated
from repjax.quantization.roundings import Roundings
from repjax.reparam import reparameterize
from repjax.spec import ModelSpec, Preprocessing, load
from repjax.training import evaluation
from repjax.training.planning import Plan
from repjax.training.state import TrainState
from repjax.training.step import Network

FEW = 100
"""Number of images below which ranges are said to be unreliable."""


def begin(config: Config, plan: Plan, state: TrainState, workdir: Path) -> Roundings:
  """Returns how a run rounds: as it began, or calibrated on some training images.

  A continued run reads rounding.json, since other ranges would be a different network. A new run
  calibrates the network that it starts from, and writes the file.

  Args:
    config: a config with `qat`.
    plan: the plan that follows from it.
    state: the state to start from.
    workdir: folder of the run.

  Raises:
    InputError: a package is missing, there are too few images to calibrate with, or rounding.json
      is damaged.
  """
  runtime.need_runtime()
  if runs.checkpoints(workdir):
    return _read(workdir)
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
  runs.write_roundings(workdir, roundings._asdict())
  return roundings


def network(spec: ModelSpec, variables: Any, roundings: Roundings) -> Network:
  """Returns the deploy form in 8 bits as a pure function of the training form's variables.

  Args:
    spec: spec of the model.
    variables: variables of the training form. Their shapes matter, their values do not.
    roundings: result of `begin`.

  Returns:
    A function of {"params", "batch_stats"} and normalized images (N, S, S, 3) that returns logits
    (N, K). Gradients flow through the rounding and the fold to the branches.
  """
  size = spec.preprocessing.image_size
  rounded = simulated(spec.create_model(), variables, roundings, image_size=size)

  def apply(variables: Any, images: jax.Array) -> jax.Array:
    # The fold is part of the function, so each step rounds the kernels that the branches sum to.
    params = reparameterize(variables["params"], variables["batch_stats"])
    return rounded({"params": params}, images)

  return apply


def write_int8(config: Config, plan: Plan, roundings: Roundings, workdir: Path) -> dict[str, Any]:
  """Writes the deploy form of a run as `workdir/int8` for ONNX Runtime, and measures its accuracy.

  Args:
    config: a config with `qat`.
    plan: the plan that follows from it.
    roundings: result of `begin`.
    workdir: folder of the run, with a deploy form.

  Returns:
    The content of export.json. Its `accuracy` on the evaluation split is given for the deploy form
    in "float32", for the simulation of 8 bits in JAX, "simulated", and for the file, "int8".
  """
  model, variables, spec = load(workdir)
  preprocessing = spec.preprocessing
  size = preprocessing.image_size
  proto = to_onnx(
    model,
    variables,
    image_size=size,
    preprocessing=preprocessing,
    class_names=spec.class_names,
  )
  made = quantize_by(proto, roundings)
  rounded = simulated(model, variables, roundings, image_size=size)
  simulation = jax.jit(lambda images: rounded(variables, preprocessing.normalize(images)))
  ready = runtime.session(made)
  split = evaluation.host_batches(
    plan.eval, preprocessing, batch_size=64, num_workers=config.num_workers
  )
  measured = _accuracies(
    {"simulated": simulation, "int8": runtime.classifier(ready)},
    split,
  )
  plain = runs.read_conversion_report(workdir)["accuracy"]["deploy"]
  facts = onnx_facts(spec, "int8") | {
    "settings": {name: config[name] for name in ("qat_activations", "qat_weight_bits")},
    "accuracy": {"float32": plain, **measured},
    "bytes": made.ByteSize(),
  }
  folder = runs.int8_folder(workdir)
  programs = metadata.files(runs.onnx_file(folder).name, made, preprocessing, spec.class_names)
  runs.write_export(folder, programs, spec=spec.to_json(), facts=facts, exists=True)
  return facts


def format_int8(facts: Mapping[str, Any]) -> str:
  """Formats the result of `write_int8` as a sentence."""
  accuracy = facts["accuracy"]
  return (
    f"in 8 bits: {accuracy['int8']:.2%} in ONNX Runtime, {accuracy['simulated']:.2%} as simulated "
    f"here, {accuracy['float32']:.2%} in float32; {facts['bytes']:,} bytes"
  )


def _read(workdir: Path) -> Roundings:
  """Reads rounding.json of a run."""
  try:
    return Roundings(**runs.read_roundings(workdir))
  except InputError as error:
    why = (
      f"The file {runs.rounding_file(workdir).name} says how tensors are rounded, and without it "
      "the run cannot continue as it began"
    )
    raise InputError(sentences(error, why)) from error


def _accuracies(
  classifiers: Mapping[str, Callable[[np.ndarray], Any]],
  split: Iterable[Mapping[str, np.ndarray]],
) -> dict[str, float]:
  """Returns the accuracy of each classifier, in one pass over a split."""
  right, count = dict.fromkeys(classifiers, 0), 0
  for batch in split:
    count += int(batch["mask"].sum())
    for name, classify in classifiers.items():
      predicted = np.asarray(classify(batch["image"])).argmax(-1)
      right[name] += int(((predicted == batch["label"]) & batch["mask"]).sum())
  return {name: hits / count for name, hits in right.items()}


def calibration_images(source: Source, count: int, preprocessing: Preprocessing) -> np.ndarray:
  """Returns images at equal distances over a split, prepared as in evaluation.

  Image i is example floor(i n / count) of n. The first `count` examples would cover few classes,
  since many data sets are sorted by class. Where the split has fewer images, all of them are taken,
  and a line on stderr says so.

  Args:
    source: a split on which no accuracy is reported.
    count: number of images; some hundreds give reliable ranges.
    preprocessing: preprocessing of the model.

  Returns:
    uint8 (count, S, S, 3), or fewer.

  Raises:
    InputError: `count` is below 1, the split is empty, or an image cannot be decoded.
  """
  have = len(source.examples)
  if count < 1 or have < 1:
    raise InputError(
      f"{count} images to calibrate with are asked for (--images, or config.qat_images), and the "
      f"split has {have}. At least one is needed; some hundreds give reliable ranges"
    )
  if count > have:
    print(
      f"warning: the split has {have:,} images, and {count:,} were asked for to calibrate with. "
      f"All {have:,} are taken" + ("; ranges of so few are unreliable" if have < FEW else ""),
      file=sys.stderr,
      flush=True,
    )
    count = have
  chosen = source._replace(examples=_Spread(source.examples, count))
  batches = evaluation.host_batches(
    chosen, preprocessing, batch_size=min(64, count), canvas=chosen.canvas()
  )
  return np.concatenate([batch["image"][batch["mask"]] for batch in batches])


def check_apart(calibration: Source, held_out: Source) -> None:
  """Raises InputError if accuracy would be measured on the images that calibrate.

  Two sources are the same if their fingerprints agree, or the checksums over all their images. Only
  a set made from a folder has a checksum. Single images that two splits share are not found.
  """
  facts = (calibration.fingerprint, held_out.fingerprint)
  checksums = [each.get("checksum") for each in facts]
  if facts[0] == facts[1] or (checksums[0] is not None and checksums[0] == checksums[1]):
    names = sorted({f"the {each['split']} split of {each['name']}" for each in facts})
    raise InputError(
      f"the images to calibrate with and to measure accuracy on are the same: {' and '.join(names)}"
      ". This would flatter the accuracy; name a different one with --calibration-split or --split"
    )


class _Spread:
  """A sequence of `count` examples at equal distances."""

  def __init__(self, examples: Examples, count: int):
    self._examples, self._count = examples, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._examples[index * len(self._examples) // self._count]
