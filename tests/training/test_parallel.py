"""Data parallelism on four fake devices."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.training import optimizer, parallel
from repjax.training.state import create_state
from repjax.training.step import make_eval_step, make_train_step
from repjax.training.tasks import Classification
from tests.helpers import F64, random_variables
from tests.training import tiny

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
  mean = jax.lax.pmean(batch["x"].sum(), parallel.AXIS)
  return state + mean, {"mean": mean}


@pytest.mark.parametrize("donate", [False, True])
def test_data_parallel_runs_a_step_on_each_devices_part(donate):
  step = parallel.data_parallel(mean_step, donate=donate)
  state = parallel.place(jnp.ones((3,)))
  result, metrics = step(state, parallel.split({"x": np.arange(8, dtype=np.float32)}))
  assert metrics["mean"] == np.arange(8).sum() / 4
  np.testing.assert_array_equal(result, 1 + np.full(3, np.arange(8).sum() / 4))
  assert state.is_deleted() == donate


def test_kernels_lie_in_the_layout_of_the_platform_and_nothing_else_changes(monkeypatch):
  def step(state, batch):
    return jax.tree.map(
      lambda leaf: leaf + jax.lax.pmean(batch["x"].sum(), parallel.AXIS), state
    ), {}

  kernel, bias = np.arange(48.0, dtype=np.float32).reshape(2, 2, 3, 4), np.ones(4, np.float32)
  batch = parallel.split({"x": np.ones(4, np.float32)})
  orders = []
  for platforms in ((), ("cpu",)):
    monkeypatch.setattr(parallel, "_REORDERING", platforms)
    run = parallel.data_parallel(step, donate=True)
    state = parallel.place({"conv": {"kernel": kernel, "bias": bias}})
    for _ in range(2):  # the state comes back as the next step takes it
      held = jax.tree.leaves(state)
      state, _ = run(state, batch)
      assert all(leaf.is_deleted() for leaf in held)
    orders.append(state["conv"]["kernel"].format.layout.major_to_minor)
    np.testing.assert_array_equal(state["conv"]["kernel"], kernel + 2)
    np.testing.assert_array_equal(state["conv"]["bias"], bias + 2)
    assert np.array(state["conv"]["kernel"]).tobytes() == (kernel + 2).tobytes()
  assert orders == [(0, 1, 2, 3), (3, 0, 1, 2)]


@pytest.mark.parametrize("batch_size", [8, 12, 256])
def test_mixing_takes_batches_of_two_and_more_images_a_device(batch_size):
  parallel.check_batch_size(batch_size, mixing=True)


def test_mixing_refuses_one_image_a_device():
  with pytest.raises(InputError, match="batch_size 4 over 4 devices leaves it one; use at least 8"):
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


@pytest.mark.usefixtures("optimized")
def test_pools_after_convolutions_are_finite_in_bfloat16():
  """Without options, XLA of jax 0.12 computes NaN here on CPUs."""

  def step(state, batch):
    x = batch["x"].astype(jnp.bfloat16)
    for _ in range(2):
      axes = ("NHWC", "HWIO", "NHWC")
      x = jax.lax.conv_general_dilated(x, state["kernel"], (1, 1), "SAME", dimension_numbers=axes)
      x = jax.nn.relu(x + state["bias"])
    window = (1, 2, 2, 1)
    x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, window, "VALID")
    return jax.lax.pmean(x.astype(jnp.float32).mean(), parallel.AXIS)

  shapes = {"kernel": (3, 3, 128, 128), "bias": (1, 1, 1, 128), "x": (4, 8, 8, 128)}
  key = jax.random.key(0)
  drawn = {name: jax.random.normal(key, shape, jnp.bfloat16) for name, shape in shapes.items()}
  batch = parallel.split({"x": np.asarray(drawn.pop("x"), np.float32)})
  run = parallel.data_parallel(step, dtype="bfloat16")
  assert np.isfinite(run(parallel.place(drawn), batch))
  assert np.isfinite(run.lower(drawn, batch).compile()(parallel.place(drawn), batch))


PREPROCESSING = Preprocessing(16, 16, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


def test_synchronised_batch_norm_has_the_gradients_of_one_device_with_the_whole_batch(x64):
  model = repjax.create_model("repvgg_a0", num_classes=10, **tiny.OVERRIDES, **F64)
  rng = np.random.default_rng(0)
  images = rng.standard_normal((8, 16, 16, 3))
  weights = rng.standard_normal((8, 10))
  variables = random_variables(model, jnp.ones((1, 16, 16, 3)))

  def gradients(axis_name, reduce):
    def step(state, batch):
      def loss_of(params):
        logits, updates = model.clone(axis_name=axis_name).apply(
          {**state, "params": params}, batch["image"], train=True, mutable=["batch_stats"]
        )
        return (jnp.sin(logits) * batch["weight"]).sum(-1).mean(), updates["batch_stats"]

      (loss, stats), grads = jax.value_and_grad(loss_of, has_aux=True)(state["params"])
      return reduce((loss, stats, grads))

    return step

  def mean(tree):
    return jax.lax.pmean(tree, parallel.AXIS)

  batch = {"image": images, "weight": weights}
  expected = jax.jit(gradients(None, lambda tree: tree))(variables, batch)
  placed = parallel.place(variables)
  shared = parallel.data_parallel(gradients(parallel.AXIS, mean))(placed, parallel.split(batch))
  largest = max(np.abs(value).max() for value in jax.tree.leaves(expected[2]))
  for ours, theirs in zip(jax.tree.leaves(shared), jax.tree.leaves(expected), strict=True):
    assert np.abs(ours - theirs).max() <= 1e-12 * largest


@pytest.mark.proof
def test_everything_that_steps_return_is_the_same_on_every_device():
  overrides = {**tiny.OVERRIDES, "se": "post", "se_reduction": 4}
  model = repjax.create_model("repvgg_a0", num_classes=10, dropout=0.3, **overrides)
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=True, weight_decay=1e-4)
  state = create_state(random_variables(model, jnp.ones((1, 16, 16, 3))), sgd)
  step = make_train_step(
    model,
    sgd,
    PREPROCESSING,
    task=Classification(label_smoothing=0.1, mixup=0.2, cutmix=1.0),
    axis_name=parallel.AXIS,
  )
  train_step = parallel.data_parallel(step, donate=True)
  eval_step = parallel.data_parallel(
    make_eval_step(model.apply, PREPROCESSING, axis_name=parallel.AXIS)
  )
  state, seen = parallel.place(state), []
  for seed in range(2):
    rng = np.random.default_rng(seed)
    batch = {
      "image": rng.integers(0, 256, (8, 16, 16, 3), np.uint8),
      "label": rng.integers(0, 10, (8,), np.int32),
      "mask": np.arange(8) < 5,
    }
    state, metrics = train_step(state, parallel.split(batch))
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    seen.append((metrics, eval_step(variables, parallel.split(batch))))
  assert len(jax.tree.leaves(state)) > 80
  for value in jax.tree.leaves((state, seen)):
    copies = [np.asarray(shard.data) for shard in value.addressable_shards]
    assert len(copies) == 4
    assert {copy.tobytes() for copy in copies} == {copies[0].tobytes()}
    assert copies[0].shape == value.shape
