"""Loads a deploy form again and again while a second process replaces it.

The second process writes the deploy forms of two networks in turns into the same workdir, as every
conversion does at its end. Each load must return one of the two networks, bit by bit. The exit
status is 1 where a load failed or returned a mixture, or where only one network was ever loaded.

Example:
  python scripts/load_beside_conversions.py --loads 20000
"""

import argparse
import collections
import itertools
import multiprocessing
import multiprocessing.synchronize
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tqdm

import repjax
from repjax import runs, weights

_OVERRIDES = {
  "stage_sizes": (1, 1, 1, 1),
  "width_multipliers": (0.125,) * 4,
  "strides": (1, 1, 2, 2, 2),
}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--loads", type=int, default=20_000, help="number of loads (default: 20000)")
  arguments = parser.parse_args()
  jax.config.update("jax_platforms", "cpu")
  with tempfile.TemporaryDirectory(prefix="loads-") as temporary:
    folder = Path(temporary)
    networks = [_import(folder / f"network{seed}", seed) for seed in (0, 1)]
    workdir = folder / "network0"
    start = time.perf_counter()
    counts, replacements = load_beside(workdir, networks, arguments.loads)
    seconds = time.perf_counter() - start
  print(
    f"loads: {arguments.loads:,} ({counts[0]:,} and {counts[1]:,} of the two networks), "
    f"replacements: {replacements:,}, mixed: {counts['mixed']:,}, errors: {counts['errors']:,}, "
    f"in {seconds:.0f} s"
  )
  fine = counts[0] and counts[1] and not counts["mixed"] and not counts["errors"]
  sys.exit(0 if fine else 1)


def _import(workdir: Path, seed: int) -> Any:
  """Makes the workdir of a tiny network, and returns the parameters of its deploy form."""
  model = repjax.create_model("repvgg_a0", num_classes=10, **_OVERRIDES)
  variables = repjax.init(model, jax.random.key(seed), 16)
  file = workdir.with_suffix(".npz")
  state: Any = weights.to_torch("repvgg_a0", variables)  # so that no name is taken for an option
  np.savez(file, **state)
  weights.import_weights(str(file), workdir, model_name="repvgg_a0", overrides=_OVERRIDES)
  return jax.device_get(repjax.load(workdir)[1]["params"])


def load_beside(
  workdir: Path, networks: list[Any], loads: int
) -> tuple[collections.Counter[Any], int]:
  """Loads a deploy form while a process replaces it.

  Args:
    workdir: folder of an import.
    networks: parameters of two deploy forms.
    loads: number of loads.

  Returns:
    The numbers of loads that returned network 0, network 1, neither ("mixed") and nothing
    ("errors"); and the number of replacements.
  """
  context = multiprocessing.get_context("spawn")
  started, stop, replaced = context.Event(), context.Event(), context.Value("q", 0)
  arguments = (workdir, networks, started, stop, replaced)
  writer = context.Process(target=_replace_in_turns, args=arguments, daemon=True)
  writer.start()
  while not started.wait(0.1):
    if not writer.is_alive():
      raise SystemExit("error: the process that replaces the deploy form has ended by itself")
  counts, known = collections.Counter(), [_bits(network) for network in networks]
  for _ in tqdm.trange(loads, desc="loads", disable=None):
    try:
      found = _bits(repjax.load(workdir)[1]["params"])
    except Exception as error:  # every kind of error is counted
      counts["errors"] += 1
      tqdm.tqdm.write(f"{type(error).__name__}: {error}")
      continue
    counts[known.index(found) if found in known else "mixed"] += 1
  was_alive = writer.is_alive()
  stop.set()
  writer.join()
  if not was_alive:
    raise SystemExit("error: the process that replaces the deploy form ended before the last load")
  return counts, replaced.value


def _bits(tree: Any) -> list[bytes]:
  """Returns the bytes of all arrays of a tree."""
  return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def _replace_in_turns(
  workdir: Path,
  networks: list[Any],
  started: multiprocessing.synchronize.Event,
  stop: multiprocessing.synchronize.Event,
  replaced: Any,
) -> None:
  """Writes two deploy forms in turns, until it is told to stop."""
  jax.config.update("jax_platforms", "cpu")
  spec = repjax.ModelSpec.read(workdir).to_json()
  for number in itertools.cycle((0, 1)):
    runs.write_deploy(workdir, networks[number], spec, {"network": number})
    replaced.value += 1
    started.set()
    if stop.is_set():
      return


if __name__ == "__main__":
  main()
