"""Fuses random programs at three sizes, and shows that no result differs.

Each program is fused for one size and called at three. The script prints each program whose result
differs by more than 1e-11, and each that has more products, multiplications or weights than before.

  python scripts/fuzz_fuse.py --first 0 --count 1000
"""

import argparse
import pathlib
import sys
from collections import Counter

import jax
import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import repjax
from repjax.errors import InputError
from tests.fusion.programs import random_program

SIZES = ((2, 12, 11), (1, 15, 12), (3, 13, 13))


def main() -> int:
  """Fuses the programs, and returns 1 if one of them differs."""
  parser = argparse.ArgumentParser(description="Fuses random programs at three sizes.")
  parser.add_argument("--first", type=int, default=0, help="the first seed")
  parser.add_argument("--count", type=int, default=100, help="the number of programs")
  flags = parser.parse_args()
  jax.config.update("jax_enable_x64", True)
  jax.config.update("jax_disable_most_optimizations", True)  # each program runs once
  total = Counter()
  for seed in range(flags.first, flags.first + flags.count):
    total += tried(seed)
    if seed % 25 == 24:
      print(f"after seed {seed}: {dict(total)}", flush=True)
  print(dict(total))
  return 1 if total["wrong"] or total["more"] else 0


def tried(seed: int) -> Counter:
  """Fuses one program, and returns what was seen."""
  program = random_program(seed)
  fused = repjax.fuse(program.function, program.params, program.images(*SIZES[0]), check=False)
  before, after = fused.report.before, fused.report.after
  seen = Counter(programs=1, products_before=before.products, products_after=after.products)
  if after.products > before.products or after.multiplications > before.multiplications:
    print(f"seed {seed}: {before} became {after}")
    seen["more"] += 1
  small = fused.fold(program.params)
  for size in SIZES:
    images = program.images(*size)
    try:
      wanted = jax.jit(program.function)(program.params, images)
    except (TypeError, ValueError, KeyError):
      continue  # some programs hold for some sizes only
    try:
      results = jax.jit(fused)(small, images)
    except InputError:
      seen["refused sizes"] += 1
      continue
    error = max(map(_error, results, wanted))
    if not error <= 1e-11:
      print(f"seed {seed} at {size}: relative error {error:.1e}")
      seen["wrong"] += 1
  return seen


def _error(result: jax.Array, wanted: jax.Array) -> float:
  largest = float(np.abs(wanted).max())
  return float(np.abs(np.asarray(result) - np.asarray(wanted)).max()) / (largest or 1)


if __name__ == "__main__":
  sys.exit(main())
