"""Times the gradient step with statistics from the covariance of the input, and without.

A step is forward pass, loss, backward pass and updated statistics, in training mode. The ways are
the values of `statistics` of a model. The ratio is the time with "outputs" divided by that of a
way, measured in turns. The memory is what XLA plans for intermediate values.

On a machine that does other work, --cpu-time counts the seconds of all cores that the process used,
in place of the seconds that passed.

Example:
  python benchmarks/covariance.py --models repvgg_a0 --batch-sizes 8 --image-sizes 96 224
"""

import argparse
import functools
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
from timing import Running, Subject

import repjax
from repjax.errors import one_paragraph

MODELS = ["repvgg_a0", "repvgg_b1g4", "parnet_s"]
WAYS = ("outputs", "auto", "covariance")


def gradient_step(model: Any, variables: Any, images: jax.Array) -> tuple[jax.Array, Any, Any]:
  """Returns the loss, the gradients of the parameters, and the updated statistics."""
  labels = jnp.arange(len(images)) % model.num_classes

  def loss_of(params: Any) -> tuple[jax.Array, Any]:
    logits, updates = model.apply(
      {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updates["batch_stats"]

  (loss, stats), gradients = jax.value_and_grad(loss_of, has_aux=True)(variables["params"])
  return loss, gradients, stats


def subject(model: Any, variables: Any) -> Subject:
  """Returns the gradient step of a model."""

  def start(images: Any) -> Running:
    step = jax.jit(functools.partial(gradient_step, model))
    executable: Any = step.lower(variables, images).compile()
    run = functools.partial(executable, variables)
    return Running(run, lambda: executable.memory_analysis().temp_size_in_bytes)

  return Subject(start, read=lambda outputs: np.asarray(outputs[0]))


def measure(
  name: str, batch_size: int, image_size: int, arguments: argparse.Namespace
) -> dict[str, Any]:
  """Times all ways at one size, and returns the row."""
  models = {way: repjax.create_model(name, dropout=0.0, statistics=way) for way in WAYS}
  variables = repjax.init(models["auto"], jax.random.key(0), image_size)
  subjects = {way: subject(model, variables) for way, model in models.items()}

  def agree(losses: dict[str, np.ndarray]) -> None:
    timing.relative_errors(losses, losses["outputs"], 1e-4)

  results = timing.race(
    subjects,
    timing.random_images(batch_size, image_size),
    rounds=arguments.rounds,
    repeats=arguments.repeats,
    clock=timing.cpu_time if arguments.cpu_time else time.perf_counter,
    check=agree,
  )
  plain = results["outputs"].seconds
  return {
    "model": name,
    "batch_size": batch_size,
    "image_size": image_size,
    **{
      way: {
        "ms": 1e3 * found.median,
        "ratios": [timing.median_ratio(*pair) for pair in zip(plain, found.seconds)],
        "temporary_mib": (found.memory or 0) / 2**20,
      }
      for way, found in results.items()
    },
  }


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=MODELS, help=f"default: {' '.join(MODELS)}")
  parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8], help="default: 8")
  parser.add_argument("--image-sizes", nargs="+", type=int, default=[96, 224], help="in pixels")
  parser.add_argument("--repeats", type=int, default=1, help="times that all ways start again")
  parser.add_argument("--rounds", type=int, default=8, help="rounds in each repeat")
  parser.add_argument("--cpu-time", action="store_true", help="count the seconds of all cores")
  parser.add_argument("--json", type=Path, help="also write the results to this file")
  arguments = parser.parse_args()
  rows = []
  with one_paragraph():
    for name in arguments.models:
      for batch_size in arguments.batch_sizes:
        for image_size in arguments.image_sizes:
          row = measure(name, batch_size, image_size, arguments)
          rows.append(row)
          print(f"{name}, batch {batch_size}, {image_size} px")
          for way in WAYS:
            own = row[way]
            print(
              f"  {way:<12}{own['ms']:>9.1f} ms  ratio {statistics.median(own['ratios']):.2f}"
              f"{own['temporary_mib']:>9.1f} MiB",
              flush=True,
            )
  if arguments.json:
    facts = {name: getattr(arguments, name) for name in ("repeats", "rounds", "cpu_time")}
    timing.write_json(arguments.json, {**facts, "dtype": "float32"}, models=rows)


if __name__ == "__main__":
  main()
