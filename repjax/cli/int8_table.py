"""The table that compares ONNX files in 8 bits with the float32 file of the same model.

Each row is an ONNX file, or the deploy form computed in bfloat16 by JAX. A row holds the scores on
every image of the evaluation split, the error of the logits, the size, and the time of a call in
ONNX Runtime. `repjax quantize` and benchmarks/int8.py print the table.

A file takes images of one size. For segmentation this is the canvas of the evaluation split, or the
window that slides over it. Windows and mirror images are averaged as in the evaluation of the run.
"""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import repjax
from repjax import timing, training
from repjax.config import Config, check_evaluation, default_of
from repjax.data import Source
from repjax.data.pairs import color_of, laid_out
from repjax.deploy.canvases import Canvases
from repjax.quantization import runtime
from repjax.quantization.sensitivity import check_logits
from repjax.training import evaluation, planning, tasks
from repjax.training.display import title
from repjax.training.quantization import calibration_images, check_apart
from repjax.training.tasks import Task

_CALLS = 10  # timed calls of a file in a round
FLOAT, HALF, WEIGHTS, INT8 = "float32", "bfloat16, JAX", "int8 weights", "int8"


class Baseline(NamedTuple):
  """The float32 model that files in 8 bits are compared with, and the images for the comparison.

  Attributes:
    config: config of the run; names the data set and its splits.
    spec: describes the model.
    model: the deploy form.
    variables: variables of the deploy form.
    proto: the deploy form in float32, as an ONNX model that takes uint8 images.
    images: calibration images, uint8 (N, H, W, 3).
    evaluation: the split to measure the scores on.
    task: the task of the model.
  """

  config: Config
  spec: repjax.ModelSpec
  model: Any
  variables: Any
  proto: Any
  images: np.ndarray
  evaluation: Source
  task: Task

  @property
  def size(self) -> tuple[int, int]:
    """The (height, width) of the images that the files take."""
    return self.images.shape[1:3]


class Int8Row(NamedTuple):
  """A row of the table.

  Attributes:
    scores: name to score between 0 and 1; the first is the one by which checkpoints are compared.
    loss: mean cross-entropy.
    error: relative root mean square error of the logits against those of the float32 file.
    size: bytes of the file, or of the weights.
    seconds: seconds of a call in ONNX Runtime in each round; None for the form that JAX computes.
  """

  scores: Mapping[str, float]
  loss: float
  error: float
  size: int
  seconds: Sequence[float] | None

  def facts(self) -> dict[str, Any]:
    """Returns the row for a file, with the median of the seconds."""
    seconds = None if self.seconds is None else statistics.median(self.seconds)
    return {**self.scores, **self._asdict(), "seconds": seconds}


def read_baseline(folder: Path, count: int, *, verify: bool = True, **changes: Any) -> Baseline:
  """Reads the model of a workdir and the images to calibrate with.

  Args:
    folder: folder of a run, or of imported weights.
    count: number of calibration images, taken from the training split; all if it has fewer.
    verify: as in `repjax.load`.
    **changes: fields of the run's config and their values; None keeps the run's value.

  Raises:
    InputError: the folder, data set or split does not exist, the split for calibration is also the
      one for evaluation, or `count` is below 1.
  """
  model, variables, spec = repjax.load(folder, verify=verify)
  config = training.read_config(folder, **changes)
  if "train_split" not in config:
    # The config of imported weights names no training split.
    config.train_split = default_of("train_split")
  check_evaluation(config)
  calibration, held_out = (
    planning.open_split(config, split, spec) for split in (config.train_split, config.eval_split)
  )
  check_apart(calibration, held_out)
  images = calibration_images(calibration, count, spec.preprocessing)
  if spec.task == "segmentation":
    window = config.get("eval_window", 0)
    canvas = planning.canvas(config, held_out, spec)
    assert canvas is not None
    size = (window, window) if window else canvas
    images = np.stack([_fitted(each, size, color_of(spec.preprocessing.mean)) for each in images])
  proto = repjax.onnx.to_onnx(
    model,
    variables,
    image_size=images.shape[1:3],
    preprocessing=spec.preprocessing,
    class_names=spec.class_names,
  )
  task = tasks.create(spec.task, config)
  return Baseline(config, spec, model, variables, proto, images, held_out, task)


def _fitted(pixels: np.ndarray, size: tuple[int, int], fill: tuple[int, int, int]) -> np.ndarray:
  """Returns the centre of an image, laid on a canvas of (height, width) where it is smaller."""
  tops = [max(0, have - want) // 2 for have, want in zip(pixels.shape, size)]
  cut = pixels[tops[0] : tops[0] + size[0], tops[1] : tops[1] + size[1]]
  return laid_out(cut, size, fill)


def measure(
  baseline: Baseline, files: Mapping[str, Any], *, batch_size: int, rounds: int
) -> dict[str, Int8Row]:
  """Returns the rows: the float32 file, bfloat16 in JAX, then each of `files`.

  Args:
    baseline: from `read_baseline`.
    files: name to `onnx.ModelProto`; each model takes uint8 images and returns logits.
    batch_size: images in a timed call.
    rounds: rounds of timed calls.

  Raises:
    InputError: a row's logits are not finite.
  """
  files = {FLOAT: baseline.proto, **files}
  sessions = {name: session(proto) for name, proto in files.items()}
  classifiers = {name: runtime.classifier(ready) for name, ready in sessions.items()}
  sizes = {name: proto.ByteSize() for name, proto in files.items()}
  classifiers[HALF], sizes[HALF] = _in_jax(baseline)
  found, errors = _judged(classifiers, baseline)
  batch = np.resize(baseline.images, (batch_size, *baseline.images.shape[1:]))
  seconds = speeds(sessions, batch, rounds)
  return {
    name: Int8Row(
      {score: found[name][score] for score in baseline.task.scores},
      found[name]["loss"],
      errors[name],
      sizes[name],
      seconds.get(name),
    )
    for name in (FLOAT, HALF, *(name for name in files if name != FLOAT))
  }


def print_rows(rows: Mapping[str, Int8Row], batch_size: int) -> None:
  """Prints the table. The last columns are times, and the speed relative to the float32 file."""
  rounds = len(rows[FLOAT].seconds or ())
  titles = "".join(f"{title(score):>9}" for score in rows[FLOAT].scores)
  print(
    f"{'':<30}{titles}{'loss':>9}{'error':>9}{'bytes':>13}{'min ms':>10}{'median':>10}{'speed':>9}"
  )
  for name, row in rows.items():
    times = ""
    if row.seconds is not None:
      times = f"{1000 * min(row.seconds):>10.3f}{1000 * statistics.median(row.seconds):>10.3f}"
      times += f"{speed(rows[FLOAT].seconds or (), row.seconds):>9}"
    scores = "".join(f"{score:>9.2%}" for score in row.scores.values())
    print(f"{name:<30}{scores}{row.loss:>9.4f}{row.error:>9.2%}{row.size:>13,}{times}")
  print(
    f"times: {rounds} rounds of {_CALLS} calls with a batch of {batch_size}; speed: against "
    "float32 in the same round, unclear where a quarter of the rounds says faster and a quarter "
    "slower, or where the ratio of the fastest rounds differs by more than a quarter"
  )


def speed(base: Sequence[float], seconds: Sequence[float]) -> str:
  """Returns how many times as fast something is, or that the rounds do not agree.

  Args:
    base: seconds of what it is compared with, in each round.
    seconds: its seconds in the same rounds.
  """
  if base == seconds:
    return "1.00x"
  ratios = sorted(one / other for one, other in zip(base, seconds, strict=True))
  quarter = len(ratios) // 4
  low, high = ratios[quarter], ratios[-1 - quarter]
  agree = len(ratios) > 1 and (low > 1 or high < 1)
  # If a busy machine slows one file down in most rounds, the fastest rounds show a different speed.
  usual, fastest = statistics.median(ratios), min(base) / min(seconds)
  agree = agree and max(usual, fastest) <= 1.25 * min(usual, fastest)
  return f"{usual:.2f}x" if agree else "unclear"


def session(proto: Any) -> Any:
  """Returns an ONNX Runtime session on all CPUs, with the faster of two ways to store weights."""
  # Where only the weights are int8, ONNX Runtime would convert them to float in every call. With
  # the weights unpacked at the start, the file is as fast as the float32 file.
  rounds_activations = any(node.op_type == "QuantizeLinear" for node in proto.graph.node)
  return runtime.session(proto, timing.cpus(), unpacked=not rounds_activations)


def _in_jax(baseline: Baseline) -> tuple[runtime.Classify, int]:
  """Returns the deploy form in bfloat16, and the bytes of its weights."""
  compiled = repjax.deploy.compile(
    baseline.model,
    baseline.variables,
    image_size=baseline.size,
    preprocessing=baseline.spec.preprocessing,
    dtype="bfloat16",
    batch_sizes=(_batch_size(baseline),),
    devices=jax.local_devices()[:1],
    tune=False,
  )
  numbers = sum(leaf.size for leaf in jax.tree.leaves(baseline.variables))
  return compiled, numbers * jnp.dtype("bfloat16").itemsize


def _batch_size(baseline: Baseline) -> int:
  """Returns the number of images that are computed at once; maps take more memory than rows."""
  most = 8 if baseline.spec.task == "segmentation" else 64
  return min(most, len(baseline.evaluation.examples))


def _judged(
  classifiers: Mapping[str, runtime.Classify], baseline: Baseline
) -> tuple[dict[str, dict[str, Any]], dict[str, float]]:
  """Returns the summary of each classifier on the evaluation split, and the error of its logits.

  The split is read once for all classifiers, and no logits are kept.
  """
  split = evaluation.host_batches(
    baseline.evaluation,
    baseline.spec.preprocessing,
    batch_size=_batch_size(baseline),
    num_workers=baseline.config.num_workers,
    canvas=planning.canvas(baseline.config, baseline.evaluation, baseline.spec),
  )
  whole = {name: _on_canvas(classify, baseline) for name, classify in classifiers.items()}
  sums: dict[str, dict[str, Any]] = {name: {} for name in whole}
  squares, total = dict.fromkeys(whole, 0.0), 0.0
  add = jax.jit(baseline.task.sums)
  for batch in split:
    mask = batch["mask"]
    logits = {name: classify(batch["image"]) for name, classify in whole.items()}
    wanted = logits[FLOAT][mask]
    total += float(np.square(wanted, dtype=np.float64).sum())
    for name, found in logits.items():
      check_logits(found[mask], wanted, f"the row {name!r}")
      squares[name] += float(np.square(found[mask].astype(np.float64) - wanted).sum())
      judged = {key: batch[key] for key in ("label", "mask")}
      sums[name] = evaluation.add(sums[name], jax.device_get(add(jnp.asarray(found), judged)))
  return (
    {name: baseline.task.summary(found) for name, found in sums.items()},
    {name: float(np.sqrt(square / total)) for name, square in squares.items()},
  )


def _on_canvas(classify: runtime.Classify, baseline: Baseline) -> runtime.Classify:
  """Returns a function of the images of the split, which may be larger than what a file takes."""
  how = {name: baseline.config.get(f"eval_{name}", 0) for name in ("window", "flip")}
  if not any(how.values()):
    return classify
  build: Any = lambda size: classify  # noqa: E731
  # Batches of the split lie on their canvas already.
  canvases = Canvases(build, color_of(baseline.spec.preprocessing.mean), lambda size: size, **how)
  # A probability of 0 has no logarithm.
  return lambda images: np.log(np.maximum(canvases.scores(images), 1e-30))


def speeds(
  sessions: Mapping[str, Any], images: np.ndarray, rounds: int, calls: int = _CALLS
) -> dict[str, list[float]]:
  """Returns the seconds of a call of each session, in each round.

  Args:
    sessions: name to session, from `session`.
    images: uint8 images (N, S, S, 3) of a call.
    rounds: number of rounds; every session has one turn in each round.
    calls: timed calls in a turn.
  """
  batch = runtime.fed(images)

  def turn(ready: Any) -> timing.Turn:
    return lambda number, calls: [ready.run(None, batch) for _ in range(calls)]

  turns = {name: turn(ready) for name, ready in sessions.items()}
  return timing.time_in_turns(turns, rounds, calls)
