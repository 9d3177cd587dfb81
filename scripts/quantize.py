"""Quantizes a workdir's deploy form to int8 for ONNX Runtime, and says what that costs and gives.

python scripts/quantize.py --workdir runs/digits --to exported/digits-int8
python scripts/quantize.py --workdir runs/digits --to exported/digits-int8 --float-layers 2
python scripts/quantize.py --workdir runs/digits --compare

Ranges are calibrated, and layers ranked, on images of the training split; accuracy is that on the
evaluation split. `--compare` measures each thing that can be done about a loss; without `--to` no
folder is written.
"""

import argparse
import importlib.metadata
import importlib.util
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import timing

import repjax
from repjax import training
from repjax.data import Source, eval_batches
from repjax.deploy import Sensitivity
from repjax.deploy.export import write_folder
from repjax.deploy.function import inference
from repjax.deploy.onnx.proto import OPSET
from repjax.deploy.quantization import runtime
from repjax.deploy.quantization.equalization import EQUALIZATIONS
from repjax.deploy.quantization.sensitivity import compared
from repjax.errors import InputError, one_paragraph
from repjax.training import settings

_WORTH_PROCESSES = 10_000  # images


class Row(NamedTuple):
  """A line of the table; speed is None where the runtime is another."""

  accuracy: float
  error: float
  size: int
  seconds: float | None


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument("--to", type=Path, help="the folder to be made")
  parser.add_argument("--dataset", help="a TFDS name instead of the run's own, or synthetic")
  parser.add_argument("--split", help="for accuracy, instead of the run's own")
  parser.add_argument("--calibration-split", help="instead of the run's training split")
  parser.add_argument("--data-dir", help="where TFDS keeps the data set")
  parser.add_argument("--num-workers", type=int, help="processes that read images")
  parser.add_argument("--images", type=int, default=256, help="to calibrate with")
  parser.add_argument("--weights-only", action="store_true", help="write int8 weights alone")
  parser.add_argument("--calibration", choices=runtime.CALIBRATIONS, default="minmax")
  parser.add_argument(
    "--activations", choices=runtime.ACTIVATIONS, default="uint8", help="int8 for TensorRT"
  )
  parser.add_argument("--per-tensor", action="store_true", help="one scale for a whole kernel")
  parser.add_argument(
    "--weight-bits", type=int, choices=(7, 8), default=7, help="8 is for CPUs with VNNI, and GPUs"
  )
  parser.add_argument("--equalize", choices=EQUALIZATIONS, default="activations")
  parser.add_argument("--no-bias-correction", action="store_true", help="leave biases alone")
  parser.add_argument("--float-layers", type=int, default=0, metavar="N", help="the worst N")
  parser.add_argument("--compare", action="store_true", help="a row for each measure")
  parser.add_argument("--batch-size", type=int, default=1, help="images a call, for speed")
  parser.add_argument("--rounds", type=int, default=30, help="of calls in turns, for speed")
  with one_paragraph():
    quantize(parser.parse_args())


def quantize(flags: argparse.Namespace) -> None:
  """Does what the flags say, printing as it goes."""
  if flags.to and flags.to.exists():
    raise InputError(f"{flags.to} exists already; give another path, or remove it first")
  runtime.need_runtime()
  loaded = repjax.load(flags.workdir)
  spec = loaded[2]
  calibration, evaluation, config = open_splits(flags, spec)
  images = spread(calibration, flags.images, spec.preprocessing)
  task = {"image_size": spec.preprocessing.image_size, "preprocessing": spec.preprocessing}
  proto = repjax.deploy.to_onnx(*loaded[:2], **task)
  chosen: dict[str, Any] = {
    "activations": flags.activations,
    "calibration": flags.calibration,
    "per_channel": not flags.per_tensor,
    "weight_bits": flags.weight_bits,
    "equalize": flags.equalize,
    "correct_bias": not flags.no_bias_correction,
  }
  ranked = repjax.deploy.sensitivity(proto, images, **chosen)
  if not 0 <= flags.float_layers < len(ranked):
    raise InputError(f"--float-layers takes 0 to {len(ranked) - 1}, got {flags.float_layers}")
  chosen["float_layers"] = [row.node for row in ranked[: flags.float_layers]]
  print_sensitivity(ranked, flags.float_layers)
  made = {"float32": proto, "int8 weights": repjax.deploy.quantize_weights(proto)}
  if not flags.weights_only:
    made["int8"] = repjax.deploy.quantize(proto, images, **chosen)
  if flags.compare:
    for name, changes in measures(ranked).items():
      print(f"quantizing: {name}", flush=True)
      made[name] = repjax.deploy.quantize(proto, images, **chosen | changes)
  half = inference(*loaded[:2], **task, dtype="bfloat16", probabilities=False)
  split = evaluation_batches(evaluation, spec.preprocessing, config)
  rows = measured(made, half, split, images, flags)
  print_table(rows, flags.batch_size)
  print(
    f"accuracy on every image of {config.dataset}'s {config.eval_split} split, calibrated with "
    f"{len(images)} of its {config.train_split} split; error: of the logits against float32"
  )
  if flags.to:
    name = "int8 weights" if flags.weights_only else "int8"
    facts = {
      "format": "onnx",
      "dtype": name,
      "image_size": spec.preprocessing.image_size,
      "input": "uint8",
      "output": "logits",
      "opset": OPSET,
      "onnxruntime": importlib.metadata.version("onnxruntime"),
      "calibration_images": len(images),
      "settings": {} if flags.weights_only else chosen,
      "accuracy": {key: rows[key].accuracy for key in ("float32", name)},
      "error": rows[name].error,
      "sensitivity": [row._asdict() for row in ranked],
    }
    write(flags.to, made[name], spec, facts, chosen["float_layers"])


def measures(ranked: Sequence[Sensitivity]) -> dict[str, dict[str, Any]]:
  """What `--compare` tries, as changes to what was chosen."""
  worst = [row.node for row in ranked]
  counts = [count for count in (1, 2, 4) if count < len(worst)]
  plain = {"equalize": "none", "correct_bias": False}
  return {
    "by the quantizer alone": plain,
    "+ a scale for all of a kernel": plain | {"per_channel": False},
    "+ 8 bits in weights": plain | {"weight_bits": 8},
    "+ equalized weights": plain | {"equalize": "weights"},
    "+ equalized activations": plain | {"equalize": "activations"},
    "+ corrected biases": plain | {"correct_bias": True},
    "int8, 8 bits in weights": {"weight_bits": 8},
    "int8, entropy": {"calibration": "entropy"},
    "int8, percentile": {"calibration": "percentile"},
    "int8, symmetric, 8 bits": {"activations": "int8", "weight_bits": 8},
    **{f"int8, {count} in float32": {"float_layers": worst[:count]} for count in counts},
  }


def open_splits(
  flags: argparse.Namespace, spec: repjax.ModelSpec
) -> tuple[Source, Source, settings.Config]:
  """The splits for calibration and for accuracy, and the config."""
  config = training.read_config(
    flags.workdir,
    dataset=flags.dataset,
    eval_split=flags.split,
    train_split=flags.calibration_split,
    data_dir=flags.data_dir,
    num_workers=flags.num_workers,
  )
  if "train_split" not in config:
    config.train_split = "train"  # of an import
  settings.check_evaluation(config)
  calibration = settings.open_split(config, config.train_split, spec)
  return calibration, settings.open_split(config, config.eval_split, spec), config


class _Some:
  """Examples at equal distances."""

  def __init__(self, examples: Any, count: int):
    self._examples, self._count = examples, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._examples[index * len(self._examples) // self._count]


def spread(source: Source, count: int, preprocessing: repjax.spec.Preprocessing) -> np.ndarray:
  """Images (N, S, S, 3) at equal distances over a split, as evaluation prepares them.

  Raises:
    InputError: the split has fewer images than asked for, or none is.
  """
  have = len(source.examples)
  if not 1 <= count <= have:
    raise InputError(
      f"{count} images to calibrate with are asked for, and the split has {have}: give --images 1 "
      f"to {have}, some hundreds for ranges that can be trusted"
    )
  split = source._replace(examples=_Some(source.examples, count))
  batches = evaluation_batches(split, preprocessing)
  return np.concatenate([batch["image"][batch["mask"]] for batch in batches])


def evaluation_batches(
  source: Source, preprocessing: repjax.spec.Preprocessing, config: Any = None
) -> Any:
  """A split in batches; in processes where it is a large one and a config is given."""
  workers = config.num_workers if config and len(source.examples) >= _WORTH_PROCESSES else 0
  return eval_batches(
    source.examples,
    batch_size=min(64, len(source.examples)),
    image_size=preprocessing.image_size,
    resize_size=preprocessing.resize_size,
    interpolation=preprocessing.interpolation,
    num_workers=workers,
  )


def measured(
  made: Mapping[str, Any], half: Any, split: Any, images: np.ndarray, flags: argparse.Namespace
) -> dict[str, Row]:
  """A row for each file, and one for bfloat16 in JAX."""
  sessions = {
    name: runtime.session(proto, timing.cpus(), unpacked=name == "int8 weights")
    for name, proto in made.items()
  }
  run = jax.jit(half.function)
  classifiers: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    name: lambda batch, ready=ready: ready.run(None, runtime.fed(batch))[0]
    for name, ready in sessions.items()
  }
  classifiers["bfloat16, JAX"] = lambda batch: np.asarray(run(half.tree, batch))
  logits, labels = outputs_of(classifiers, split)
  sizes = {name: proto.ByteSize() for name, proto in made.items()}
  sizes["bfloat16, JAX"] = sum(leaf.nbytes for leaf in jax.tree.leaves(half.tree))
  seconds = speeds(sessions, images, flags.batch_size, flags.rounds)
  order = ["float32", "bfloat16, JAX", *(name for name in made if name != "float32")]
  return {
    name: Row(
      float((logits[name].argmax(-1) == labels).mean()),
      compared(logits[name], logits["float32"])[0],
      sizes[name],
      seconds.get(name),
    )
    for name in order
  }


def outputs_of(
  classifiers: Mapping[str, Callable[[np.ndarray], np.ndarray]], split: Any
) -> tuple[dict[str, np.ndarray], np.ndarray]:
  """The logits of each over a split, which is read once, and the labels."""
  found: dict[str, list[np.ndarray]] = {name: [] for name in classifiers}
  labels = []
  for batch in split:
    for name, classify in classifiers.items():
      found[name].append(classify(batch["image"])[batch["mask"]])
    labels.append(batch["label"][batch["mask"]])
  return {name: np.concatenate(parts) for name, parts in found.items()}, np.concatenate(labels)


def speeds(
  sessions: Mapping[str, Any], images: np.ndarray, batch_size: int, rounds: int
) -> dict[str, float]:
  """Seconds of a call: the median of rounds in turns."""
  batch = runtime.fed(np.resize(images, (batch_size, *images.shape[1:])))

  def turn(ready: Any) -> timing.Turn:
    return lambda number, calls: [ready.run(None, batch) for _ in range(calls)]

  turns = {name: turn(ready) for name, ready in sessions.items()}
  found = timing.time_in_turns(turns, rounds, calls=10)
  return {name: statistics.median(seconds) for name, seconds in found.items()}


def print_sensitivity(ranked: Sequence[Sensitivity], left: int) -> None:
  print(f"{'layer alone in 8 bits':<40}{'error':>9}{'changed':>9}")
  for number, row in enumerate(ranked):
    kept = "  left in float32" if number < left else ""
    print(f"{row.layer:<40}{row.error:>9.2%}{row.changed:>9.2%}{kept}")


def print_table(rows: Mapping[str, Row], batch_size: int) -> None:
  print(f"\n{'':<30}{'accuracy':>9}{'error':>9}{'bytes':>13}{f'ms, batch {batch_size}':>14}{'':>9}")
  for name, row in rows.items():
    speed = ""
    if row.seconds is not None:
      ratio = (rows["float32"].seconds or 0) / row.seconds
      speed = f"{1000 * row.seconds:>14.3f}{ratio:>8.2f}x"
    print(f"{name:<30}{row.accuracy:>9.2%}{row.error:>9.2%}{row.size:>13,}{speed}")


def write(
  folder: Path, proto: Any, spec: repjax.ModelSpec, facts: Mapping[str, Any], left: Sequence[str]
) -> None:
  """Writes the folder, with the picture where matplotlib is installed."""
  files = {"model.onnx": proto.SerializeToString()}
  if importlib.util.find_spec("matplotlib"):
    from repjax.deploy.quantization.drawing import picture

    rows = [Sensitivity(**row) for row in facts["sensitivity"]]
    files["sensitivity.png"] = picture(rows, left, f"{spec.name}: what 8 bits cost, layer by layer")
  else:
    print("no picture, which needs matplotlib: pip install 'repjax[report]'")
  write_folder(folder, files, spec, facts)
  print(f"saved: {folder}")


if __name__ == "__main__":
  main()
