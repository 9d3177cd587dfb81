"""Random programs: the fused function is the same at three sizes, and never costs more."""

import jax
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from tests.fusion.programs import random_program

pytestmark = pytest.mark.usefixtures("x64")

SIZES = ((2, 12, 11), (1, 15, 12), (3, 13, 13))
SEEDS = range(30)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_program_computes_the_same(seed):
  program = random_program(seed)
  fused = repjax.fuse(program.function, program.params, program.images(*SIZES[0]), check=False)
  small = fused.fold(program.params)
  for size in SIZES:
    images = program.images(*size)
    try:
      wanted = jax.jit(program.function)(program.params, images)
    except (TypeError, ValueError, KeyError):
      assert size != SIZES[0]  # some programs hold for some sizes only
      continue
    try:
      results = jax.jit(fused)(small, images)
    except InputError:
      assert size != SIZES[0]  # the sizes need different fused parameters
      continue
    for result, each in zip(results, wanted, strict=True):
      scale = float(np.abs(each).max()) or 1
      assert float(np.abs(result - each).max()) / scale <= 1e-12
  assert fused.report.after.products <= fused.report.before.products
  assert fused.report.after.multiplications <= fused.report.before.multiplications


def test_random_programs_merge():
  before = after = 0
  for seed in SEEDS:
    program = random_program(seed)
    report = repjax.fuse(
      program.function, program.params, program.images(*SIZES[0]), check=False
    ).report
    before, after = before + report.before.products, after + report.after.products
  assert after < 0.8 * before
