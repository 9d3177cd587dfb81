"""Fuses the training form of every model, and compares it with the layers' own folds.

For each model the script prints the number of convolutions and matrix products: of the training
form, of the fused function and of the deploy form. It also prints how many kernels of the deploy
form the fold did not give. With `--run` it also prints the relative error of the fused function on
random images, in float64. With `--networks` it compares networks of other people's styles instead,
at four sizes each, and with `--libraries` models of published libraries, those that are installed.
The exit status is 1 if a product is left, or an error exceeds 1e-12.

Example:
  python scripts/prove_fuse.py --models repvgg_a0 parnet_s --run
"""

import argparse
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import repjax
from repjax.fusion.report import counts_of, total
from repjax.program import trace
from scripts.prove_equivalence import randomise
from tests.fusion.nets import Net, fused_error, lenient, nets
from tests.fusion.published import published
from tests.fusion.roads import unmatched

TOLERANCE = 1e-12
IMAGE_SIZE = 96


def proved(name: str, run: bool) -> bool:
  """Compares both roads for one model, prints a line, and returns if all is well."""
  start = time.perf_counter()
  dtypes: dict[str, Any] = {"dtype": jnp.float64, "param_dtype": jnp.float64}
  model = repjax.create_model(name, **dtypes)
  size = int(getattr(model, "image_size", None) or IMAGE_SIZE)
  rng = np.random.default_rng(0)
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: randomise(path, leaf, rng), repjax.init(model, jax.random.key(0), size)
  )
  images = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float64)
  fused = repjax.fuse(model.apply, variables, images, check=False)
  folded = fused.fold(variables)
  params = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  products = deploy_products(name, dtypes, params, images)
  before, after = fused.report.before.products, fused.report.after.products
  lost = unmatched(params, folded, TOLERANCE)
  error = error_of(model, fused, folded, variables, size) if run else 0.0
  seconds = time.perf_counter() - start
  print(
    f"{name:<24}{before:>5} -> {after:<5} deploy form {products:<5} "
    f"kernels elsewhere {len(lost):<4}"
    f"{f'error {error:.1e}' if run else ''}   ({seconds:.0f} s)",
    flush=True,
  )
  return after <= products and error <= TOLERANCE


def deploy_products(name: str, dtypes: dict[str, Any], params: Any, images: Any) -> int:
  """Returns the number of products of a model's deploy form."""
  deploy = repjax.create_model(name, deploy=True, **dtypes)
  program = trace(lambda held, x: deploy.apply({"params": held}, x), params, images)
  return total(map(counts_of, program.equations)).products


def error_of(model: Any, fused: Any, folded: Any, variables: Any, size: int) -> float:
  """Returns the relative error of the fused function on one random image."""
  images = jnp.asarray(np.random.default_rng(1).normal(size=(1, size, size, 3)))
  wanted = np.asarray(jax.jit(model.apply)(variables, images))
  return float(
    np.abs(np.asarray(jax.jit(fused)(folded, images)) - wanted).max() / np.abs(wanted).max()
  )


def proved_network(name: str, made: Callable[[], Net]) -> bool:
  """Compares a network with its fused function at all sizes, and prints a line."""
  try:
    with lenient():
      net = made()
      worst, fused = fused_error(net, net.sizes)
  except pytest.skip.Exception as missing:
    print(f"{name:<36}{missing}", flush=True)
    return True
  before, after, norms = fused.report.before, fused.report.after, len(fused.report.norms)
  print(
    f"{name:<36}{before.products:>5} -> {after.products:<5} norms left {norms:<4}error {worst:.1e}",
    flush=True,
  )
  met = (before.products, after.products, norms) == (*net.products, net.norms)
  return met and worst <= net.tolerance


def main() -> int:
  """Compares the models, and returns 1 if one of them fails."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--models", nargs="+", default=repjax.list_models(), help="default: all")
  parser.add_argument("--run", action="store_true", help="compare results on random images too")
  parser.add_argument("--networks", action="store_true", help="networks of other styles instead")
  parser.add_argument("--libraries", action="store_true", help="models of other libraries instead")
  arguments = parser.parse_args()
  jax.config.update("jax_enable_x64", True)
  others = (nets() if arguments.networks else {}) | (published() if arguments.libraries else {})
  if others:
    results = [proved_network(name, made) for name, made in others.items()]
  else:
    results = [proved(name, arguments.run) for name in arguments.models]
  return 0 if all(results) else 1


if __name__ == "__main__":
  sys.exit(main())
