"""Fused functions at sizes besides the first: plans, refusals, threads, and symbols."""

import concurrent.futures
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import repjax
from repjax.errors import InputError
from repjax.fusion.planning import Planner
from tests.fusion.block import BRANCHES, IMAGES, branches, drawn, random
from tests.fusion.nets import convolved
from tests.helpers import assert_one_paragraph, relative_error


class TestSizes:
  def test_sizes_that_need_different_kernels_are_refused(self):
    def function(params, x):
      return branches(params, x, (2, 2), "SAME")

    fused, params = repjax.fuse(function, drawn(), IMAGES), drawn()
    with pytest.raises(InputError, match=r"different fused parameters.*wide.*also") as raised:
      fused(fused.fold(params), random(2, 9, 9, 3))
    assert_one_paragraph(raised.value)

  def test_also_merges_what_holds_for_all_sizes(self):
    def function(params, x):
      return branches(params, x, (2, 2), "SAME")

    params = drawn()
    fused = repjax.fuse(function, params, IMAGES, also=[random(2, 9, 9, 3), (random(1, 7, 8, 3),)])
    small = fused.fold(params)
    for height, width in ((8, 9), (9, 9), (7, 8)):
      x = random(2, height, width, 3)
      assert relative_error(fused(small, x), function(params, x)) <= 1e-5
    assert fused.report.after.products == 2
    assert "other folded parameters at some of the shapes" in str(fused.report)

  def test_results_without_numbers(self):
    def function(params, x):
      y = lax.reduce_window(x, np.float32(0), lax.add, (1, 1, 2, 1), (1, 1, 3, 1), "VALID")
      return jnp.sin(convolved(-y, params["wide"]) * params["scale"].reshape(1, 1, 1, -1)), 2.5

    for features, width in ((0, 9), (4, 1), (4, 0)):
      params = drawn(wide=(3, 3, 3, features), scale=(features,))
      x = random(2, 8, width, 3)
      fused = repjax.fuse(function, params, x)
      result, number = fused(fused.fold(params), x)
      assert result.shape == function(params, x)[0].shape
      assert isinstance(number, jax.Array)

  def test_new_sizes_are_planned_while_a_call_is_traced(self):
    fused, params = repjax.fuse(branches, drawn(), IMAGES), drawn()
    x = random(1, 12, 5, 3)
    assert relative_error(jax.jit(fused)(fused.fold(params), x), branches(params, x)) <= 1e-5

  def test_batches_without_an_image_are_planned_as_others_are(self):
    def function(params, x):
      return 2 * jnp.einsum("bhwc,cnd->bnhwd", x, params["dense"]) + branches(params, x)[:, None]

    params = drawn(**BRANCHES, dense=(3, 2, 4))
    fused = repjax.fuse(function, params, IMAGES)
    assert fused(fused.fold(params), random(0, 8, 9, 3)).shape == (0, 2, 8, 9, 4)

  def test_threads_may_plan_new_sizes_at_once(self, monkeypatch):
    planned, inside, found = Planner.planned, [], []

    def slowly(self, *given):
      inside.append(self)
      time.sleep(0.02)
      found.append(len(inside))
      inside.remove(self)
      return planned(self, *given)

    fused, params = repjax.fuse(branches, drawn(), IMAGES), drawn()
    small, count = fused.fold(params), 8
    inputs = [random(1, 5 + place, 6, 3) for place in range(count)]
    start = threading.Barrier(count)
    monkeypatch.setattr(Planner, "planned", slowly)

    def call(x):
      start.wait()
      return fused(small, x)

    with concurrent.futures.ThreadPoolExecutor(count) as pool:
      for x, result in zip(inputs, pool.map(call, inputs), strict=True):
        assert relative_error(result, branches(params, x)) <= 1e-5
    assert found == [1] * count  # all plans share a table, which holds one thread at a time

  def test_plans_follow_the_settings_of_jax(self):
    fused, params, x = repjax.fuse(self.two, drawn(), IMAGES), drawn(), random(2, 8, 9, 3)
    small = fused.fold(params)
    fused(small, x)
    with jax.default_matmul_precision("highest"):
      assert str(jax.make_jaxpr(fused)(small, x)).count("precision=(Precision.HIGHEST") == 2
    with jax.enable_x64(True):
      assert fused(small, x).dtype == self.two(params, x).dtype

  def two(self, params, x):
    """Returns a merge beside a convolution that stays, times a number of the default dtype."""
    y = convolved(jnp.sin(x), params["point"])
    with jax.numpy_dtype_promotion("standard"):
      return (branches(params, x) + jnp.sin(y)) * jnp.arange(2.0)[1]

  def test_sizes_that_are_symbols_cannot_be_checked(self):
    fused, params, x = repjax.fuse(branches, drawn(), IMAGES), drawn(), random(3, 8, 9, 3)
    small, (n,) = fused.fold(params), jax.export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, 8, 9, 3), jnp.float32)
    with pytest.raises(InputError, match=r"sizes are symbols.*without_checks") as raised:
      jax.export.export(jax.jit(fused))(small, images)
    assert_one_paragraph(raised.value)
    exported = jax.export.export(jax.jit(fused.without_checks()))(small, images)
    assert relative_error(exported.call(small, x), branches(params, x)) <= 1e-5
