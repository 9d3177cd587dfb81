"""What scripts about 8 bits share: a workdir that is ready for them, and the table of its files.

A row is an ONNX file of any kind, or the deploy form in bfloat16 in JAX: accuracy on every image of
the evaluation split, the error of its logits, its size, and how fast ONNX Runtime runs it.
"""

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing

import repjax
from repjax import training
from repjax.config import Config, check_evaluation
from repjax.data import Source
from repjax.inference import inference
from repjax.quantization import runtime
from repjax.quantization.sensitivity import compared
from repjax.training import evaluation, planning
from repjax.training.quantization import calibration_images, check_apart

FLOAT, HALF, WEIGHTS, INT8 = "float32", "bfloat16, JAX", "int8 weights", "int8"

Classifier = Callable[[np.ndarray], np.ndarray]
"""Takes uint8 images (B, S, S, 3) and returns logits (B, K)."""


class Workdir(NamedTuple):
  """A run or an import, with its deploy form as an ONNX file that takes uint8 images.

  Attributes:
    config: names the splits.
    spec: of the model.
    model: the deploy form.
    variables: of the deploy form.
    proto: the file, in float32.
    images: to calibrate with, uint8 (N, S, S, 3).
    evaluation: the split for accuracy.
  """

  config: Config
  spec: repjax.ModelSpec
  model: Any
  variables: Any
  proto: Any
  images: np.ndarray
  evaluation: Source


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    accuracy: 0 ... 1.
    loss: mean cross-entropy.
    error: of the logits against those of the file in float32, root mean square.
    size: bytes of the file, or of the weights.
    seconds: of a call in ONNX Runtime; None where the runtime is another.
  """

  accuracy: float
  loss: float
  error: float
  size: int
  seconds: float | None


def open_workdir(folder: Path, count: int, **changes: Any) -> Workdir:
  """Reads a workdir and images to calibrate with.

  Args:
    folder: of a run or an import.
    count: of images to calibrate with, from the training split.
    **changes: to fields of its config, where they are not None.

  Raises:
    InputError: no such folder, data set or split, one split for both, or too few images.
  """
  model, variables, spec = repjax.load(folder)
  config = training.read_config(folder, **changes)
  if "train_split" not in config:
    config.train_split = "train"  # of an import
  check_evaluation(config)
  calibration, held_out = (
    planning.open_split(config, split, spec) for split in (config.train_split, config.eval_split)
  )
  check_apart(calibration, held_out)
  images = calibration_images(calibration, count, spec.preprocessing)
  size = spec.preprocessing.image_size
  proto = repjax.onnx.to_onnx(model, variables, image_size=size, preprocessing=spec.preprocessing)
  return Workdir(config, spec, model, variables, proto, images, held_out)


def measured(
  workdir: Workdir, files: Mapping[str, Any], *, batch_size: int, rounds: int
) -> dict[str, Row]:
  """A row for the workdir's file in float32, one for bfloat16 in JAX, and one for each other file.

  Args:
    workdir: from `open_workdir`.
    files: name to `onnx.ModelProto`, each with uint8 images for input and logits for output;
      theirs is the order of the rows.
    batch_size: images in a call, for speed.
    rounds: of calls in turns, for speed.
  """
  files = {FLOAT: workdir.proto, **files}
  sessions = {name: session(proto) for name, proto in files.items()}
  classifiers = {name: _classifier(ready) for name, ready in sessions.items()}
  sizes = {name: proto.ByteSize() for name, proto in files.items()}
  classifiers[HALF], sizes[HALF] = _in_jax(workdir)
  logits, labels = _outputs(classifiers, workdir)
  seconds = speeds(
    sessions, np.resize(workdir.images, (batch_size, *workdir.images.shape[1:])), rounds
  )
  return {
    name: Row(
      float((logits[name].argmax(-1) == labels).mean()),
      _loss(logits[name], labels),
      compared(logits[name], logits[FLOAT])[0],
      sizes[name],
      seconds.get(name),
    )
    for name in (FLOAT, HALF, *(name for name in files if name != FLOAT))
  }


def print_rows(rows: Mapping[str, Row], batch_size: int) -> None:
  """Prints the table; speeds are against the file in float32."""
  print(
    f"{'':<30}{'accuracy':>9}{'loss':>9}{'error':>9}{'bytes':>13}{f'ms, batch {batch_size}':>14}"
  )
  for name, row in rows.items():
    speed = ""
    if row.seconds is not None:
      ratio = (rows[FLOAT].seconds or 0) / row.seconds
      speed = f"{1000 * row.seconds:>14.3f}{ratio:>8.2f}x"
    print(f"{name:<30}{row.accuracy:>9.2%}{row.loss:>9.4f}{row.error:>9.2%}{row.size:>13,}{speed}")


def _loss(logits: np.ndarray, labels: np.ndarray) -> float:
  return float(optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(logits), labels).mean())


def session(proto: Any) -> Any:
  """A file that is ready to run on all cores, in the way that is fastest for it."""
  # A file whose weights alone are int8 is as fast as before only with these unpacked at the start.
  rounds_activations = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
  return runtime.session(proto, timing.cpus(), unpacked=not rounds_activations)


def _classifier(ready: Any) -> Classifier:
  return lambda images: ready.run(None, runtime.fed(images))[0]


def _in_jax(workdir: Workdir) -> tuple[Classifier, int]:
  """The deploy form in bfloat16, and the bytes of its weights."""
  preprocessing = workdir.spec.preprocessing
  half = inference(
    workdir.model,
    workdir.variables,
    image_size=preprocessing.image_size,
    preprocessing=preprocessing,
    dtype="bfloat16",
    probabilities=False,
  )
  run = jax.jit(half.function)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(half.tree))
  return lambda images: np.asarray(run(half.tree, images)), size


def _outputs(
  classifiers: Mapping[str, Classifier], workdir: Workdir
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """The logits of each over the evaluation split, which is read once, and the labels."""
  split = evaluation.host_batches(
    workdir.evaluation,
    workdir.spec.preprocessing,
    batch_size=min(64, len(workdir.evaluation.examples)),
    num_workers=workdir.config.num_workers,
  )
  found: dict[str, list[np.ndarray]] = {name: [] for name in classifiers}
  labels = []
  for batch in split:
    for name, classify in classifiers.items():
      found[name].append(classify(batch["image"])[batch["mask"]])
    labels.append(batch["label"][batch["mask"]])
  return {name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(labels)


def speeds(
  sessions: Mapping[str, Any], images: np.ndarray, rounds: int, calls: int = 10
) -> dict[str, float]:
  """Seconds of a call with images (N, S, S, 3): the median of rounds in turns."""
  batch = runtime.fed(images)

  def turn(ready: Any) -> timing.Turn:
    return lambda number, calls: [ready.run(None, batch) for _ in range(calls)]

  turns = {name: turn(ready) for name, ready in sessions.items()}
  found = timing.time_in_turns(turns, rounds, calls)
  return {name: statistics.median(seconds) for name, seconds in found.items()}
