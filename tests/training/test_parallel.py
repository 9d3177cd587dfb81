"""How devices are used."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax.errors import InputError
from repjax.training import parallel

pytest_plugins = ["tests.training.fixtures"]


@pytest.mark.parametrize("batch_size", [4, 8, 256])
def test_batches_that_divide_over_the_devices_pass(batch_size):
  parallel.check_batch_size(batch_size)


@pytest.mark.parametrize(
  ("batch_size", "fitting"), [(30, "28 or 32"), (5, "4 or 8"), (3, "4"), (0, "4")]
)
def test_a_batch_that_does_not_divide_lists_the_nearest_that_do(batch_size, fitting):
  with pytest.raises(InputError) as caught:
    parallel.check_batch_size(batch_size)
  expected = f"batch_size {batch_size} does not divide over 4 devices; use {fitting}"
  assert str(caught.value) == expected


@pytest.mark.parametrize(("batch_size", "fitting"), [(1, 4), (30, 32), (32, 32)])
def test_evaluation_takes_the_next_batch_size_that_divides(batch_size, fitting):
  assert parallel.fitting_batch_size(batch_size) == fitting


def test_split_gives_each_device_neighbouring_examples():
  batch = {"image": np.arange(8 * 6).reshape(8, 2, 3), "label": np.arange(8)}
  split = parallel.split(batch)
  assert split["image"].shape == (4, 2, 2, 3)
  np.testing.assert_array_equal(split["label"], [[0, 1], [2, 3], [4, 5], [6, 7]])
  np.testing.assert_array_equal(np.concatenate(split["image"]), batch["image"])


def test_place_copies_a_tree_whole_onto_every_device():
  tree = {"a": jnp.arange(8.0), "b": {"step": jnp.asarray(3)}}
  placed = parallel.place(tree)
  assert jax.tree.structure(placed) == jax.tree.structure(tree)
  for value, original in zip(jax.tree.leaves(placed), jax.tree.leaves(tree)):
    assert value.dtype == original.dtype
    assert {shard.device for shard in value.addressable_shards} == set(jax.devices())
    for shard in value.addressable_shards:
      np.testing.assert_array_equal(shard.data, original)


def mean_step(state, batch):
  return state + jax.lax.pmean(batch["x"].sum(), parallel.AXIS)


@pytest.mark.parametrize("donate", [False, True])
def test_data_parallel_runs_a_step_on_each_devices_part(donate):
  step = parallel.data_parallel(mean_step, donate=donate)
  state = parallel.place(jnp.ones((3,)))
  result = step(state, parallel.split({"x": np.arange(8, dtype=np.float32)}))
  np.testing.assert_array_equal(result, 1 + np.full(3, np.arange(8).sum() / 4))
  assert state.is_deleted() == donate


@pytest.mark.parametrize("batch_size", [8, 12, 256])
def test_mixing_takes_batches_of_two_and_more_images_a_device(batch_size):
  parallel.check_batch_size(batch_size, mixing=True)


def test_mixing_refuses_one_image_a_device():
  with pytest.raises(InputError, match="batch_size 4 leaves it one; use at least 8, or set both"):
    parallel.check_batch_size(4, mixing=True)
  parallel.check_batch_size(4)


def some_batches(count=5):
  rng = np.random.default_rng(0)
  for _ in range(count):
    images = rng.integers(0, 256, (8, 6, 6, 3), np.uint8)
    yield {"image": images, "label": rng.integers(0, 10, (8,), np.int32)}


def test_prefetched_batches_are_split_ones_with_each_part_on_its_device():
  with contextlib.closing(parallel.prefetch(some_batches())) as ready:
    batches = list(ready)
  assert len(batches) == 5
  for batch, expected in zip(batches, map(parallel.split, some_batches())):
    assert batch.keys() == expected.keys()
    for name, value in batch.items():
      assert value.dtype == expected[name].dtype
      np.testing.assert_array_equal(value, expected[name])
      assert [shard.device for shard in value.addressable_shards] == jax.local_devices()
      for index, shard in enumerate(value.addressable_shards):
        np.testing.assert_array_equal(shard.data[0], expected[name][index])


def test_a_step_takes_prefetched_batches_without_moving_them_and_with_the_same_result():
  def weigh(state, batch):
    seen = jnp.sin(batch["image"].astype(jnp.float32)).sum()
    seen *= batch["label"].sum().astype(jnp.float32)
    return state + jax.lax.pmean(seen, parallel.AXIS)

  step = parallel.data_parallel(weigh)
  state = parallel.place(jnp.ones((3,)))
  with contextlib.closing(parallel.prefetch(some_batches())) as ready:
    for batch, plain in zip(ready, some_batches()):
      with jax.transfer_guard("disallow"):
        result = step(state, batch)
      np.testing.assert_array_equal(result, step(state, parallel.split(plain)))
  refused = pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed")
  with refused, jax.transfer_guard("disallow"):  # what has to be moved does not get through
    step(state, parallel.split(plain))


def test_one_process_reads_the_whole_data_set():
  assert parallel.shard() == (0, 1)


def test_programs_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  parallel.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "repjax" / "xla")


def test_without_a_setting_the_cache_folder_is_in_the_home(monkeypatch, tmp_path):
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  parallel.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / ".cache" / "repjax" / "xla")


def test_a_cache_folder_that_the_user_has_set_stays(monkeypatch, tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
  parallel.use_compilation_cache()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
