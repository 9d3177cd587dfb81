"""The learning rate against the formulas of the papers, written out in Python."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from repjax.configs import common
from repjax.training import planning
from repjax.training.schedules import CURVES, learning_rate_schedule, weight_decay_schedule

pytest_plugins = ["tests.training.fixtures"]

TOTAL, WARMUP = 110, 10


def rates(schedule, steps=TOTAL + 1):
  return np.array([float(schedule(step)) for step in range(steps)])


def formula(curve, done, *, final=0.0, step=0, power=0.9, drop_steps=30, drop_factor=0.1):
  """Of a peak of 1."""
  return {
    "cosine": final + (1 - final) * (1 + math.cos(math.pi * done)) / 2,
    "poly": final + (1 - final) * (1 - done) ** power,
    "step": max(final, drop_factor ** (step // drop_steps)),
  }[curve]


@pytest.mark.parametrize("batch_size", [64, 256, 1024])
def test_the_rate_warms_up_linearly_then_falls_as_a_cosine_to_zero(batch_size):
  schedule = learning_rate_schedule(0.1, batch_size, 10, 110)
  peak = 0.1 * batch_size / 256
  expected = {
    0: 0,
    1: 0.1 * peak,
    5: 0.5 * peak,
    10: peak,
    35: (2 + math.sqrt(2)) / 4 * peak,
    60: 0.5 * peak,
    85: (2 - math.sqrt(2)) / 4 * peak,
    110: 0,
    111: 0,
  }
  for step, rate in expected.items():
    assert float(schedule(step)) == pytest.approx(rate, rel=1e-6, abs=1e-7 * peak), step


@pytest.mark.parametrize("curve", CURVES)
def test_without_warm_up_the_first_step_is_at_the_peak(curve):
  schedule = learning_rate_schedule(0.1, 256, 0, 100, curve=curve, drop_steps=30)
  expected = [0.1 * formula(curve, step / 100, step=step) for step in range(101)]
  np.testing.assert_allclose(rates(schedule, 101), expected, rtol=1e-5, atol=1e-8)
  assert float(schedule(0)) == pytest.approx(0.1)


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("curve", CURVES)
def test_every_rate_is_scaled_with_the_batch(curve, overlaps):
  options = {"warmup_rate": 0.001, "final_rate": 0.002, "warmup_overlaps": overlaps}
  one, four = (
    learning_rate_schedule(0.1, size, WARMUP, TOTAL, curve=curve, drop_steps=30, **options)
    for size in (256, 1024)
  )
  np.testing.assert_allclose(rates(four), 4 * rates(one), rtol=1e-5)
  assert float(one(0)) == pytest.approx(0.001, rel=1e-5)
  assert float(one(WARMUP // 2)) == pytest.approx(0.0505, rel=1e-5)
  assert float(one(TOTAL)) == pytest.approx(0.002, rel=1e-5)


@pytest.mark.parametrize("curve", ["cosine", "poly"])
def test_behind_the_warm_up_the_curve_is_complete(curve):
  schedule = learning_rate_schedule(
    0.1, 256, WARMUP, TOTAL, curve=curve, power=2.0, final_rate=0.01
  )
  expected = [
    0.1 * formula(curve, (step - WARMUP) / (TOTAL - WARMUP), final=0.1, power=2.0)
    for step in range(WARMUP, TOTAL + 1)
  ]
  np.testing.assert_allclose(rates(schedule)[WARMUP:], expected, rtol=1e-5)


@pytest.mark.parametrize("curve", ["cosine", "poly"])
def test_beneath_the_warm_up_the_curve_is_over_the_whole_run(curve):
  schedule = learning_rate_schedule(0.1, 256, WARMUP, TOTAL, curve=curve, warmup_overlaps=True)
  expected = [0.1 * formula(curve, step / TOTAL) for step in range(TOTAL + 1)]
  np.testing.assert_allclose(rates(schedule)[WARMUP:], expected[WARMUP:], rtol=1e-5, atol=1e-8)
  rising = rates(schedule)[:WARMUP]
  np.testing.assert_allclose(rising, np.arange(WARMUP) * 0.1 / WARMUP, rtol=1e-5)
  # Where the warm-up would have reached the peak the curve is below it already.
  assert float(schedule(WARMUP)) < 0.1 - 1e-4


@pytest.mark.parametrize("overlaps", [False, True])
def test_drops_are_counted_from_the_first_step(overlaps):
  schedule = learning_rate_schedule(
    1.0,
    256,
    WARMUP,
    TOTAL,
    curve="step",
    drop_steps=30,
    drop_factor=0.5,
    final_rate=0.2,
    warmup_overlaps=overlaps,
  )
  expected = {9: 0.9, 10: 1, 29: 1, 30: 0.5, 59: 0.5, 60: 0.25, 89: 0.25, 90: 0.2, 110: 0.2}
  for step, rate in expected.items():
    assert float(schedule(step)) == pytest.approx(rate), step


@pytest.mark.parametrize("curve", ["cosine", "poly"])
def test_a_cooldown_is_at_the_final_rate_and_part_of_the_run(curve):
  config = common.get_config()
  config.update({"schedule": curve, "final_rate": 0.01, "cooldown_epochs": 3.0})
  plan = types.SimpleNamespace(warmup_steps=WARMUP, total_steps=TOTAL + 12, steps_per_epoch=4.0)
  cooled = planning.make_schedule(config, plan)
  alone = learning_rate_schedule(0.1, 256, WARMUP, TOTAL, curve=curve, final_rate=0.01)
  np.testing.assert_array_equal(rates(cooled), rates(alone))
  np.testing.assert_allclose(rates(cooled, TOTAL + 13)[TOTAL:], 0.01, rtol=1e-6)


@pytest.mark.parametrize("curve", CURVES)
def test_a_run_that_is_all_warm_up_has_a_schedule(curve):
  schedule = learning_rate_schedule(0.1, 256, 4, 4, curve=curve, drop_steps=9)
  assert rates(schedule, 4).tolist() == pytest.approx([0, 0.025, 0.05, 0.075])


def test_a_polynomial_that_rounding_takes_below_0_at_its_end_is_the_final_rate(monkeypatch):
  polynomial = optax.polynomial_schedule

  def rounded(*arguments):
    exact = polynomial(*arguments)
    return lambda step: jnp.where(step < 10, exact(step), jnp.nan)

  monkeypatch.setattr(optax, "polynomial_schedule", rounded)
  schedule = learning_rate_schedule(0.1, 256, 0, 10, curve="poly", final_rate=0.01)
  np.testing.assert_allclose(rates(schedule, 13)[9:], [*rates(schedule, 10)[9:], *[0.01] * 3])


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("curve", CURVES)
def test_the_schedule_is_the_same_for_a_traced_step_under_strict_promotion(
  curve, warmup_steps, overlaps
):
  schedule = learning_rate_schedule(
    0.1, 256, warmup_steps, 10, curve=curve, drop_steps=3, warmup_overlaps=overlaps
  )
  with jax.numpy_dtype_promotion("strict"):
    traced = jax.jit(jax.vmap(schedule))(jnp.arange(11))
  np.testing.assert_allclose(traced, rates(schedule, 11), 1e-6, 1e-8)


def test_the_weight_decay_falls_along_a_cosine_and_stays_at_its_end():
  falling = rates(weight_decay_schedule(1e-4, 0.1, TOTAL), TOTAL + 5)
  done = np.minimum(np.arange(TOTAL + 5) / TOTAL, 1)
  expected = 1e-5 + 9e-5 * (1 + np.cos(np.pi * done)) / 2
  np.testing.assert_allclose(falling, expected, rtol=1e-5)


def test_the_weight_decay_has_no_warm_up_and_ends_before_the_cooldown():
  config = common.get_config()
  config.update({"weight_decay": 0.5, "cooldown_epochs": 3.0})
  plan = types.SimpleNamespace(warmup_steps=WARMUP, total_steps=TOTAL + 12, steps_per_epoch=4.0)
  assert planning.make_weight_decay(config, plan) == 0.5
  config.final_decay_factor = 0.1
  cooled = planning.make_weight_decay(config, plan)
  np.testing.assert_array_equal(rates(cooled), rates(weight_decay_schedule(0.5, 0.1, TOTAL)))
