"""Compares the training form and the deploy form of every model in float64.

The script prints the relative error, max|a - b| / max|b| over the logits. Statistics, scales,
biases and images are random: with their initial values, a wrong fold could go unnoticed. The exit
status is 1 where an error exceeds 1e-12.

Example:
  python scripts/prove_equivalence.py --models repvgg_a0 repvgg_b1g4
"""

import argparse
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import repjax
from repjax.errors import one_paragraph
from repjax.recognition import is_mark

TOLERANCE = 1e-12
IMAGE_SIZE = 96


def randomise(path: tuple[Any, ...], leaf: jax.Array, rng: np.random.Generator) -> np.ndarray:
  """Returns kernels and notes unchanged, and random values for others, positive where required."""
  name = path[-1].key
  if name == "kernel" or is_mark(name):
    return np.asarray(leaf)
  bounds = (0.5, 1.5) if name in ("scale", "var") else (-0.3, 0.3)
  return rng.uniform(*bounds, leaf.shape)


def relative_error(name: str, image_size: int | None) -> float:
  """Returns the relative error of the deploy form on one random image."""
  rng = np.random.default_rng(0)
  dtypes: dict[str, Any] = {"dtype": jnp.float64, "param_dtype": jnp.float64}
  train = repjax.create_model(name, **dtypes)
  if image_size is None:
    image_size = int(getattr(train, "image_size", IMAGE_SIZE))
  deploy = repjax.create_model(name, deploy=True, **dtypes)
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: randomise(path, leaf, rng), repjax.init(train, jax.random.key(0), image_size)
  )
  images = rng.standard_normal((1, image_size, image_size, 3))
  params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  expected = np.asarray(train.apply(variables, images))
  got = np.asarray(deploy.apply({"params": params}, images))
  return float(np.abs(got - expected).max() / np.abs(expected).max())


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=repjax.list_models(), help="default: all")
  parser.add_argument("--image-size", type=int, help="pixels (default: 96, or the model's size)")
  arguments = parser.parse_args()
  jax.config.update("jax_enable_x64", True)
  worst = 0.0
  for name in arguments.models:
    start = time.perf_counter()
    with one_paragraph():
      error = relative_error(name, arguments.image_size)
    worst = max(worst, error)
    print(f"{name:<20}{error:>10.1e}   ({time.perf_counter() - start:.0f} s)", flush=True)
  print(f"{'worst':<20}{worst:>10.1e}   tolerance {TOLERANCE:.0e}")
  sys.exit(not worst <= TOLERANCE)


if __name__ == "__main__":
  main()
