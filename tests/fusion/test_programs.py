"""Random programs: the fused function is the same at three sizes, and never costs more."""

import functools

import numpy as np
import pytest

import repjax
from tests.fusion.programs import random_program
from tests.helpers import quick_jit

pytestmark = pytest.mark.usefixtures("x64")

SIZES = ((2, 12, 11), (1, 15, 12), (3, 13, 13))
SEEDS = range(20)  # `python scripts/fuzz_fuse.py` tries thousands


@functools.cache
def fused_program(seed):
  """Returns a random program and the fused function."""
  program = random_program(seed)
  images = program.images(*SIZES[0])
  return program, repjax.fuse(program.function, program.params, images, check=False)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program_computes_the_same(seed):
  program, fused = fused_program(seed)
  small = fused.fold(program.params)
  # Compiled together, which takes less time than twice.
  both = quick_jit(lambda small, params, x: (program.function(params, x), fused(small, x)))
  for size in SIZES:
    try:
      wanted, results = both(small, program.params, program.images(*size))
    except (TypeError, ValueError, KeyError):
      # Some programs hold for some sizes only, and some need different parameters at each.
      if size == SIZES[0]:
        raise
      continue
    for result, each in zip(results, wanted, strict=True):
      scale = float(np.abs(each).max()) or 1
      assert float(np.abs(result - each).max()) / scale <= 1e-12
  assert fused.report.after.products <= fused.report.before.products
  assert fused.report.after.multiplications <= fused.report.before.multiplications


def test_random_programs_merge():
  reports = [fused_program(seed)[1].report for seed in SEEDS]
  before, after = (
    sum(getattr(each, when).products for each in reports) for when in ("before", "after")
  )
  assert after < 0.8 * before
