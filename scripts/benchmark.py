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
from collections.abc import Callable, Sequence
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


def time_forms(
  forms: Sequence[tuple[Any, Any]], images: jax.Array, repeats: int, rounds: int
) -> tuple[list[list[list[float]]], list[list[float]]]:
  """Times forms of one model in turns, with programs and variables made anew several times.

  Args:
    forms: pairs of a model and its variables.
    images: what all of them take.
    repeats: how often they are made anew.
    rounds: of each repeat.

  Returns:
    Seconds as [repeat][form][round], and seconds of compiling as [repeat][form].
  """
  times, compile_times = [], []
  for _ in range(repeats):
    made = [
      compiled(model, jax.tree.map(jnp.copy, variables), images) for model, variables in forms
    ]
    compile_times.append([seconds for _, seconds in made])
    times.append(time_in_turns([call for call, _ in made], rounds))
  return times, compile_times


def median_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
  """The median of the rounds' ratios."""
  return statistics.median(a / b for a, b in zip(numerators, denominators))


def random_images(batch_size: int, image_size: int) -> jax.Array:
  """Noise."""
  shape = (batch_size, image_size, image_size, 3)
  return jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))


def measure(
  name: str, batch_size: int, image_size: int, dtype: Any, repeats: int, rounds: int
) -> dict[str, Any]:
  """Both forms of one model at one batch size."""
  train, deploy = (repjax.create_model(name, deploy=form, dtype=dtype) for form in (False, True))
  variables = repjax.init(train, jax.random.key(0), image_size)
  params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  forms = [(train, variables), (deploy, {"params": params})]
  images = random_images(batch_size, image_size)
  times, compile_times = time_forms(forms, images, repeats, rounds)
  train_times, deploy_times = (
    [seconds for repeat in times for seconds in repeat[form]] for form in (0, 1)
  )
  train_compile, deploy_compile = map(statistics.median, zip(*compile_times))
  return {
    "model": name,
    "batch_size": batch_size,
    "train_ms": 1e3 * statistics.median(train_times),
    "deploy_ms": 1e3 * statistics.median(deploy_times),
    "ratio": median_ratio(train_times, deploy_times),
    "ratio_of_each_repeat": [median_ratio(*repeat) for repeat in times],
    "train_compile_s": train_compile,
    "deploy_compile_s": deploy_compile,
  }


def write_json(path: Path, facts: dict[str, Any], **results: Any) -> None:
  """Writes results, with the machine that gave them first."""
  machine = {
    "device": jax.devices()[0].device_kind,
    "devices": jax.device_count(),
    "cpus": os.cpu_count(),
    "jax": jax.__version__,
  }
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(json.dumps({**machine, **facts, **results}, indent=2) + "\n")


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
    names = ("dtype", "image_size", "repeats", "rounds")
    facts = {name: getattr(arguments, name) for name in names}
    write_json(arguments.json, facts, results=results)


if __name__ == "__main__":
  main()
