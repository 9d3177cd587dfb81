"""Times training steps on data that are on the device, in PyTorch too where it is installed.

A step is that of main.py: normalise uint8 images, forward, backward, SGD with momentum, and the
average over all devices. The same network is written here in PyTorch (channels last and automatic
mixed precision on a GPU), for one device. Both take turns, several steps each, so that both meet
the same noise; the ratio is the median of the rounds' ratios: above 1 repjax is faster.

Memory: what XLA plans for the compiled step, and the most that the device has held. For JAX that
is since the program began, which counts compilation and earlier models; PyTorch's is the model's.

    python scripts/benchmark_training.py --batch-sizes 128 --dtype bfloat16
"""

import argparse
import importlib
import importlib.util
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import repjax
from repjax.errors import one_paragraph
from repjax.models.repvgg import RepVGG
from repjax.spec import Preprocessing
from repjax.training import optimizer, parallel
from repjax.training.step import create_state, make_train_step

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RATE, MOMENTUM, DECAY = 0.1, 0.9, 1e-4
CLASSES = 1000

Run = Callable[[int], float]
"""Takes a number of steps and waits until they are done; returns the last loss."""


def make_batch(batch_size: int, image_size: int) -> dict[str, np.ndarray]:
  """Noise with labels."""
  rng = np.random.default_rng(0)
  return {
    "image": rng.integers(0, 256, (batch_size, image_size, image_size, 3), np.uint8),
    "label": rng.integers(0, CLASSES, (batch_size,), np.int32),
  }


def mebibytes(count: int | None) -> float | None:
  return None if count is None else round(count / 2**20, 1)


def in_jax(
  model: Any, batch: dict[str, np.ndarray], image_size: int, dtype: Any
) -> tuple[Run, dict[str, Any]]:
  """The training step, compiled, and what compiling it took."""
  sgd = optimizer.sgd(lambda step: RATE, momentum=MOMENTUM, nesterov=False, weight_decay=DECAY)
  preprocessing = Preprocessing(image_size, image_size, "bilinear", MEAN, STD)
  step: Any = parallel.data_parallel(
    make_train_step(model.clone(dtype=dtype), sgd, preprocessing, axis_name=parallel.AXIS),
    donate=True,
  )
  variables = repjax.init(model, jax.random.key(0), image_size)
  held = parallel.place(create_state(variables, sgd))
  ready = next(iter(parallel.prefetch([batch])))
  start = time.perf_counter()
  program = step.lower(held, ready).compile()
  seconds = time.perf_counter() - start
  plan = program.memory_analysis()
  planned = None
  if plan is not None:
    planned = plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
    planned -= plan.alias_size_in_bytes

  def run(steps: int) -> float:
    nonlocal held
    metrics = {}
    for _ in range(steps):
      held, metrics = program(held, ready)
    jax.block_until_ready(held)
    return float(metrics["loss"])

  return run, {"compile_s": seconds, "planned_mib": mebibytes(planned)}


def torch_network(model: RepVGG) -> Any:
  """The same network in training form, in PyTorch."""
  torch: Any = importlib.import_module("torch")
  nn: Any = torch.nn

  def conv_bn(inputs: int, outputs: int, size: int, stride: int, groups: int) -> Any:
    conv = nn.Conv2d(inputs, outputs, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))

  class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, groups: int):
      super().__init__()
      branches = [conv_bn(inputs, outputs, size, stride, groups) for size in (3, 1)]
      if inputs == outputs and stride == 1:
        branches.append(nn.BatchNorm2d(inputs))
      self.branches = nn.ModuleList(branches)

    def forward(self, x: Any) -> Any:
      return torch.relu(sum(branch(x) for branch in self.branches))

  features = min(64, int(64 * model.width_multipliers[0]))
  blocks = [Block(3, features, model.strides[0], 1)]
  for stage in model.stages():
    for index in range(stage.blocks):
      stride = stage.step.strides if index == 0 else 1
      groups = model.groups_of(stage.first_block + index)
      blocks.append(Block(features, stage.features, stride, groups))
      features = stage.features
  pool = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, model.num_classes))
  return nn.Sequential(*blocks, *pool)


def in_torch(
  model: RepVGG, batch: dict[str, np.ndarray], dtype: str, compiled: bool
) -> tuple[Run, Callable[[], int | None]]:
  """The same step in PyTorch, and a function that tells the most memory it has held, in bytes."""
  torch: Any = importlib.import_module("torch")

  gpu = torch.cuda.is_available()
  device = torch.device("cuda" if gpu else "cpu")
  torch.backends.cudnn.benchmark = True
  torch.backends.cuda.matmul.allow_tf32 = True  # as JAX does by default; convolutions do anyway
  network = torch_network(model).to(device)
  if gpu:
    network = network.to(memory_format=torch.channels_last)
    torch.cuda.reset_peak_memory_stats()
  call = torch.compile(network) if compiled else network
  sgd = torch.optim.SGD(network.parameters(), RATE, momentum=MOMENTUM, weight_decay=DECAY)
  # Permuted, so that on a GPU they are channels last as well.
  images = torch.from_numpy(batch["image"]).to(device).permute(0, 3, 1, 2)
  images = images if gpu else images.contiguous()
  labels = torch.from_numpy(batch["label"]).long().to(device)
  mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (MEAN, STD))

  def run(steps: int) -> float:
    loss = torch.zeros(())
    for _ in range(steps):
      sgd.zero_grad(set_to_none=True)
      with torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = call((images.float() / 255 - mean) / std)
        loss = torch.nn.functional.cross_entropy(logits.float(), labels)
      loss.backward()
      sgd.step()
    if gpu:
      torch.cuda.synchronize()
    return loss.item()

  return run, lambda: torch.cuda.max_memory_allocated() if gpu else None


def time_in_turns(runs: dict[str, Run], rounds: int, steps: int) -> dict[str, list[float]]:
  """Seconds a step of each in each round, after a warm-up of two steps."""
  for name, run in runs.items():
    loss = run(2)
    if not np.isfinite(loss):
      raise SystemExit(f"error: the loss in {name} is {loss}, so that its speed means nothing")
  times = {name: [] for name in runs}
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      run(steps)
      times[name].append((time.perf_counter() - start) / steps)
  return times


def measure(
  name: str, batch_size: int, arguments: argparse.Namespace, with_torch: bool
) -> dict[str, Any]:
  """One model at one batch size."""
  model: Any = repjax.create_model(name, num_classes=CLASSES)
  parallel.check_batch_size(batch_size)
  batch = make_batch(batch_size, arguments.image_size)
  runs, facts = {}, {"model": name, "batch_size": batch_size}
  runs["repjax"], compiling = in_jax(model, batch, arguments.image_size, DTYPES[arguments.dtype])
  torch_peak = None
  plain = isinstance(model, RepVGG) and model.se is None and not model.aux_heads
  if with_torch and plain:
    runs["torch"], torch_peak = in_torch(model, batch, arguments.dtype, arguments.torch_compile)
  times = time_in_turns(runs, arguments.rounds, arguments.steps)
  held = jax.local_devices()[0].memory_stats() or {}
  facts |= {**compiling, "peak_mib": mebibytes(held.get("peak_bytes_in_use"))}
  for each, seconds in times.items():
    facts[f"{each}_images_per_s"] = batch_size / statistics.median(seconds)
    facts[f"{each}_ms"] = [1e3 * value for value in seconds]
  if torch_peak is not None:
    facts["torch_peak_mib"] = mebibytes(torch_peak())
    facts["ratio"] = statistics.median(b / a for a, b in zip(times["repjax"], times["torch"]))
  return facts


def row(facts: dict[str, Any]) -> str:
  """One line of the table."""

  def cell(name: str, form: str, unit: str, width: int) -> str:
    value = facts.get(name)
    return ("-" if value is None else f"{value:{form}}{unit}").rjust(width)

  return (
    f"{facts['model']:<16}{facts['batch_size']:>6}"
    + cell("repjax_images_per_s", ",.1f", "", 12)
    + cell("torch_images_per_s", ",.1f", "", 12)
    + cell("ratio", ".2f", "", 8)
    + cell("compile_s", ".1f", " s", 10)
    + cell("planned_mib", ",.0f", " MiB", 13)
    + cell("peak_mib", ",.0f", " MiB", 13)
    + cell("torch_peak_mib", ",.0f", " MiB", 13)
  )


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  models = ["repvgg_a0", "repvgg_a2", "repvgg_b1"]
  parser.add_argument("--models", nargs="+", default=models, help=f"default: {' '.join(models)}")
  parser.add_argument(
    "--batch-sizes", nargs="+", type=int, default=[32], help="over all devices; default: 32"
  )
  parser.add_argument("--image-size", type=int, default=224, help="pixels")
  parser.add_argument("--dtype", choices=DTYPES, default="float32", help="of the computation")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--steps", type=int, default=10, help="of each in a round")
  parser.add_argument("--no-torch", action="store_true", help="leave PyTorch out")
  parser.add_argument("--torch-compile", action="store_true", help="by torch.compile")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  # JAX would take most of a GPU's memory at once and leave PyTorch too little.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  with_torch = not arguments.no_torch and importlib.util.find_spec("torch") is not None
  with_torch = with_torch and jax.device_count() == 1
  facts = {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "processor": platform.processor() or platform.machine(),
    "cpus": os.cpu_count(),
    "jax": jax.__version__,
    **(torch_facts(arguments.torch_compile) if with_torch else {}),
    **{name: getattr(arguments, name) for name in ("dtype", "image_size", "rounds", "steps")},
  }
  print(", ".join(f"{name} {value}" for name, value in facts.items()))
  print(
    f"{'model':<16}{'batch':>6}{'images/s':>12}{'PyTorch':>12}{'ratio':>8}{'compile':>10}"
    f"{'XLA plans':>13}{'JAX peak':>13}{'PyTorch peak':>13}"
  )
  results = []
  with one_paragraph():
    for name in arguments.models:
      for batch_size in arguments.batch_sizes:
        results.append(measure(name, batch_size, arguments, with_torch))
        print(row(results[-1]), flush=True)
  if arguments.json:
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


def torch_facts(compiled: bool) -> dict[str, Any]:
  """What the results in PyTorch depend on."""
  torch: Any = importlib.import_module("torch")

  gpu = torch.cuda.is_available()
  device = torch.cuda.get_device_name() if gpu else f"{torch.get_num_threads()} threads"
  return {"torch": torch.__version__, "torch_device": device, "torch_compile": compiled}


if __name__ == "__main__":
  main()
