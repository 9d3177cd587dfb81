"""Times a model's training form and deploy form in evaluation mode, in turns, in one process.

Each round runs both forms once, so that both meet the same noise. The ratio is the median of the
rounds' ratios: above 1 the deploy form is faster. Programs and parameters are made anew several
times, since speed depends on where they lie in memory; the range of the ratio over these repeats
is printed beside it.

    python scripts/benchmark.py --models repvgg_a0 --batch-sizes 1 8 --image-size 224
"""

import argparse
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

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compiled(model: Any, variables: Any, images: jax.Array) -> tuple[Callable[[], Any], float]:
  """A call of the compiled model on the images, and the seconds that compiling took."""
  start = time.perf_counter()
  program = jax.jit(model.apply).lower(variables, images).compile()
  seconds = time.perf_counter() - start
  return lambda: jax.block_until_ready(program(variables, images)), seconds


def time_in_turns(calls: list[Callable[[], Any]], rounds: int) -> list[list[float]]:
  """Seconds of each call in each round, after a warm-up."""
  for call in calls:
    call()
    call()
  times = [[] for _ in calls]
  for _ in range(rounds):
    for call, row in zip(calls, times):
      start = time.perf_counter()
      call()
      row.append(time.perf_counter() - start)
  return times


def measure(
  name: str, batch_size: int, image_size: int, dtype: Any, repeats: int, rounds: int
) -> dict[str, Any]:
  """Both forms of one model at one batch size."""
  train, deploy = (repjax.create_model(name, deploy=form, dtype=dtype) for form in (False, True))
  variables = repjax.init(train, jax.random.key(0), image_size)
  params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  rng = np.random.default_rng(0)
  shape = (batch_size, image_size, image_size, 3)
  images = jnp.asarray(rng.standard_normal(shape, np.float32))
  train_times, deploy_times, compile_times, ratios = [], [], [], []
  for _ in range(repeats):
    own_variables, own_params = jax.tree.map(jnp.copy, (variables, params))
    run_train, train_compile = compiled(train, own_variables, images)
    run_deploy, deploy_compile = compiled(deploy, {"params": own_params}, images)
    compile_times.append((train_compile, deploy_compile))
    new_train, new_deploy = time_in_turns([run_train, run_deploy], rounds)
    train_times += new_train
    deploy_times += new_deploy
    ratios.append(statistics.median(a / b for a, b in zip(new_train, new_deploy)))
  return {
    "model": name,
    "batch_size": batch_size,
    "train_ms": 1e3 * statistics.median(train_times),
    "deploy_ms": 1e3 * statistics.median(deploy_times),
    "ratio": statistics.median(a / b for a, b in zip(train_times, deploy_times)),
    "ratio_of_each_repeat": ratios,
    "train_compile_s": statistics.median(train for train, _ in compile_times),
    "deploy_compile_s": statistics.median(deploy for _, deploy in compile_times),
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=["repvgg_a0"])
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8])
  parser.add_argument("--image-size", type=int, default=224, help="pixels")
  parser.add_argument("--dtype", choices=DTYPES, default="float32")
  parser.add_argument("--repeats", type=int, default=5, help="programs made anew")
  parser.add_argument("--rounds", type=int, default=20, help="of each repeat")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  device = jax.devices()[0]
  print(
    f"{device.device_kind} ({platform.processor() or platform.machine()}), jax {jax.__version__}, "
    f"{arguments.dtype}, {arguments.image_size} px, medians of {arguments.repeats} x "
    f"{arguments.rounds} rounds"
  )
  print(f"{'model':<18}{'batch':>6}{'train form':>14}{'deploy form':>14}{'ratio':>8}  repeats")
  results = []
  with one_paragraph():
    for name in arguments.models:
      for batch_size in arguments.batch_sizes:
        row = measure(
          name,
          batch_size,
          arguments.image_size,
          DTYPES[arguments.dtype],
          arguments.repeats,
          arguments.rounds,
        )
        low, high = min(row["ratio_of_each_repeat"]), max(row["ratio_of_each_repeat"])
        print(
          f"{name:<18}{batch_size:>6}{row['train_ms']:>11.1f} ms{row['deploy_ms']:>11.1f} ms"
          f"{row['ratio']:>8.2f}  {low:.2f}-{high:.2f}",
          flush=True,
        )
        results.append(row)
  if arguments.json:
    facts = {
      "device": device.device_kind,
      "devices": jax.device_count(),
      "cpus": os.cpu_count(),
      "jax": jax.__version__,
      "dtype": arguments.dtype,
      "image_size": arguments.image_size,
      "repeats": arguments.repeats,
      "rounds": arguments.rounds,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({**facts, "results": results}, indent=2) + "\n")


if __name__ == "__main__":
  main()
