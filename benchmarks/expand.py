"""Fine-tunes a network of which only the deploy form is left, in several ways, on digits.

A small RepVGG learns the digits of scikit-learn. Only its deploy form is kept. Then the digits
change, with the same labels: a little (noise is added) or much (mirrored and turned by 90 degrees).
A few of the new images are there for fine-tuning, in these ways:

  plain       the deploy form itself is trained, without branches and norms
  expanded    `repjax.expand` with the first batch as images, then training of the training form
  no images   `repjax.expand` without images
  original    the training form that was lost, for comparison

Each way runs at several learning rates. The table has the mean and the standard deviation of the
accuracy over seeds. A seed draws the first network, the new images and their order.

Example:
  python benchmarks/expand.py --seeds 5 --json benchmarks/results/expand_cpu_2cores.json
"""

import argparse
import functools
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing

import repjax

OVERRIDES = {
  "num_classes": 10,
  "stage_sizes": (1, 1, 2, 1),
  "width_multipliers": (0.25, 0.25, 0.25, 0.125),
  "strides": (1, 1, 1, 2, 2),
}
BATCH = 32
FIRST_EPOCHS = 8
Split = tuple[np.ndarray, np.ndarray]


def digits() -> tuple[Split, Split]:
  """Returns training and test split of the digits: images (N, 8, 8, 3) and labels (N,)."""
  from sklearn.datasets import load_digits

  loaded: Any = load_digits()
  images = np.repeat((loaded.images[..., None] / 16 - 0.3) / 0.35, 3, -1).astype(np.float32)
  test = np.arange(len(images)) % 5 == 0
  labels = loaded.target.astype(np.int32)
  return (images[~test], labels[~test]), (images[test], labels[test])


def little(split: Split) -> Split:
  """Returns a split with noise added to its images."""
  images, labels = split
  noise = np.random.default_rng(0).standard_normal((*images.shape[:3], 1)).astype(np.float32)
  return images + noise, labels


def much(split: Split) -> Split:
  """Returns a split whose images are mirrored and turned by 90 degrees."""
  images, labels = split
  return np.ascontiguousarray(np.rot90(images[:, :, ::-1], axes=(1, 2))), labels


CHANGES = {"little": little, "much": much}


def batches(split: Split, seed: int, epoch: int) -> Split:
  """Returns the whole batches of an epoch in random order: (steps, B, ...) each."""
  images, labels = split
  order = np.random.default_rng([seed, epoch]).permutation(len(labels))
  order = order[: len(labels) // BATCH * BATCH].reshape(-1, BATCH)
  return images[order], labels[order]


@functools.cache
def step_of(model: Any) -> Callable[..., Any]:
  """Returns a compiled function that trains a model in either form for one step."""

  def loss(params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> Any:
    if model.deploy:
      logits, updates = model.apply({"params": params}, images), {"batch_stats": stats}
    else:
      variables = {"params": params, "batch_stats": stats}
      logits, updates = model.apply(variables, images, train=True, mutable=["batch_stats"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), updates["batch_stats"]

  @jax.jit
  def step(carry: Any, batch: Any, rate: jax.Array) -> Any:
    params, stats, velocity = carry
    grads, stats = jax.grad(loss, has_aux=True)(params, stats, *batch)
    velocity = jax.tree.map(lambda v, g, p: 0.9 * v + g + 1e-4 * p, velocity, grads, params)
    params = jax.tree.map(lambda p, v: p - rate * v, params, velocity)
    return params, stats, velocity

  return step


@functools.cache
def predict_of(model: Any) -> Callable[..., Any]:
  """Returns the compiled model."""
  return jax.jit(model.apply)


def accuracy(model: Any, variables: Any, split: Split) -> float:
  """Returns the share of images that a model classifies as labelled; 0 for logits that are NaN."""
  logits = np.asarray(predict_of(model)(variables, split[0]))
  return float((np.isfinite(logits).all(-1) & (logits.argmax(-1) == split[1])).mean())


def train(
  model: Any, variables: Any, split: Split, seed: int, epochs: int, rate: float, test: Split
) -> tuple[Any, list[float]]:
  """Trains a model and returns its variables, and its accuracy before and after every epoch."""
  stats = variables.get("batch_stats", {})
  carry = (variables["params"], stats, jax.tree.map(jnp.zeros_like, variables["params"]))
  accuracies = [accuracy(model, variables, test)]
  for epoch in range(epochs):
    for batch in zip(*batches(split, seed, epoch)):
      carry = step_of(model)(carry, batch, jnp.float32(rate))
    variables = {"params": carry[0]} | ({"batch_stats": carry[1]} if stats else {})
    accuracies.append(accuracy(model, variables, test))
  return variables, accuracies


def measure(seed: int, arguments: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
  """Returns accuracies by change and way, and by learning rate: before and after every epoch."""
  model = repjax.create_model("repvgg_a0", **OVERRIDES)
  (first, test), key = digits(), jax.random.key(seed)
  variables, learned = train(
    model, repjax.init(model, key, 8), first, seed, FIRST_EPOCHS, 0.05, test
  )
  params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  few = np.random.default_rng(seed).permutation(len(first[1]))[: arguments.images]
  print(f"seed {seed}: {learned[-1]:.1%} on the first digits", flush=True)
  results = {}
  for name, change in CHANGES.items():
    new, new_test = change((first[0][few], first[1][few])), change(test)
    for way, (form, start) in starting_points(model, params, variables, new, seed).items():
      results[f"{name}: {way}"] = {
        str(rate): train(form, start, new, seed, arguments.epochs, rate, new_test)[1]
        for rate in arguments.rates
      }
  return results


def starting_points(
  model: Any, params: Any, variables: Any, new: Split, seed: int
) -> dict[str, tuple[Any, Any]]:
  """Returns the model and the variables from which each way starts.

  Args:
    model: the training form.
    params: parameters of the deploy form.
    variables: variables of the training form that was lost.
    new: images to fine-tune on.
    seed: seed of the order of these images, and of the branches.
  """
  key, images = jax.random.key(seed), batches(new, seed, 0)[0][0]
  shape = jax.ShapeDtypeStruct(images.shape, images.dtype)
  return {
    "plain": (model.clone(deploy=True), {"params": params}),
    "expanded": (model, repjax.expand(model, params, key, images=images)),
    "no images": (model, repjax.expand(model, params, key, images=shape)),
    "original": (model, variables),
  }


def table(results: list[dict[str, dict[str, list[float]]]], epochs: list[int]) -> str:
  """Returns a table in Markdown: mean and standard deviation over seeds."""
  lines = ["| change: way | learning rate | " + " | ".join(f"epoch {e}" for e in epochs) + " |"]
  lines.append("|---|---|" + "---|" * len(epochs))
  for way in results[0]:
    for rate in results[0][way]:
      cells = []
      for epoch in epochs:
        values = [100 * result[way][rate][epoch] for result in results]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        cells.append(f"{statistics.mean(values):.1f} ± {spread:.1f}")
      lines.append(f"| {way} | {rate} | " + " | ".join(cells) + " |")
  return "\n".join(lines)


def main() -> None:
  """Measures all ways with several seeds, prints the table, and writes the results."""
  parser = argparse.ArgumentParser(
    description="Fine-tunes a network of which only the deploy form is left, in several ways."
  )
  parser.add_argument("--seeds", type=int, default=5, help="number of seeds")
  parser.add_argument("--images", type=int, default=320, help="images to fine-tune on")
  parser.add_argument("--epochs", type=int, default=5, help="epochs of fine-tuning")
  parser.add_argument("--rates", type=float, nargs="+", default=[0.003, 0.01, 0.03])
  parser.add_argument("--json", type=Path, help="file to write")
  arguments = parser.parse_args()
  results = [measure(seed, arguments) for seed in range(arguments.seeds)]
  print(table(results, [0, 1, arguments.epochs]))
  if arguments.json:
    facts = {"jax": jax.__version__, "images": arguments.images, "batch": BATCH}
    timing.write_json(arguments.json, facts, accuracies=results)


if __name__ == "__main__":
  main()
