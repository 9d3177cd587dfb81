"""Compiled inference computes what the model computes, for every number of images."""

import functools
import importlib
import re
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.inference import inference
from repjax.layers import RepConv
from repjax.spec import Preprocessing
from tests.helpers import assert_close, halves, random_variables

PREPROCESSING = Preprocessing(16, 16, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

ONE = jax.local_devices()[:1]
compiled_plainly = functools.partial(repjax.deploy.compile, tune=False)
TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}


def noise(count, size=16, dtype=np.float32):
  rng = np.random.default_rng(count)
  if dtype == np.uint8:
    return rng.integers(0, 256, (count, size, size, 3), np.uint8)
  return rng.standard_normal((count, size, size, 3), dtype)


def logits_of(model, variables, images):
  return np.asarray(jax.jit(model.apply)(variables, images))


def deploy_form(model, variables):
  params = jax.jit(repjax.reparameterize)(*halves(variables))
  return model.clone(deploy=True), {"params": params}


@pytest.mark.parametrize("devices", [1, 4])
def test_batches_of_every_size_give_the_models_logits(small, fastest, devices):
  fastest(devices)
  compiled = compiled_plainly(*small, image_size=16, batch_sizes=(6, 1, 3))
  images = noise(20)
  expected = logits_of(*small, images)
  assert compiled.batch_sizes == (1, 3, 6)
  assert [plan.devices for plan in compiled.plans.values()] == [1, devices, devices]
  assert [plan.images for plan in compiled.plans.values()] == (
    [1, 4, 8] if devices == 4 else [1, 3, 6]
  )
  for count in (0, 1, 2, 3, 4, 6, 7, 13, 20):
    logits = compiled(images[:count])
    assert (logits.shape, logits.dtype) == ((count, 10), np.float32)
    if count:
      assert_close(logits, expected[:count], 1e-5)


def test_nothing_is_compiled_in_a_call(small, monkeypatch):
  compiled = compiled_plainly(*small, image_size=16, batch_sizes=(2, 4))
  images = noise(11)
  on_device = [jnp.asarray(images[:count]) for count in (1, 2, 3, 4, 11)]
  compiles = []

  def listener(name, seconds, **_):
    if "compile" in name:
      compiles.append(name)

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for each in (*on_device, *map(np.asarray, on_device)):
      compiled(each)
    assert compiles == []
    jax.jit(lambda x: x * 3 + jnp.float32(1))(images[:7])
    assert compiles  # the listener hears
  finally:
    jax._src.monitoring.unregister_event_duration_listener(listener)


def test_the_faster_way_is_taken_and_can_be_read(monkeypatch, small):
  devices = importlib.import_module("repjax.deploy.devices")
  start = devices.BatchProgram.start
  slow = {(4, 4), (1, 8)}  # (devices, images)

  def late(program, images):
    if (program.arrangement.devices, program.images) in slow:
      time.sleep(0.05)
    return start(program, images)

  monkeypatch.setattr(devices.BatchProgram, "start", late)
  plans = compiled_plainly(*small, image_size=16, batch_sizes=(1, 3, 8)).plans
  assert {size: plan.devices for size, plan in plans.items()} == {1: 1, 3: 1, 8: 4}
  assert {size: plan.images for size, plan in plans.items()} == {1: 1, 3: 3, 8: 8}
  assert plans[1].seconds == {}
  assert plans[3].seconds[4, 1] > 0.05 > plans[3].seconds[1, 3] > 0
  assert plans[8].seconds[1, 8] > 0.05 > plans[8].seconds[4, 2] > 0
  assert all(plan.compile_seconds > 0 for plan in plans.values())


def test_devices_can_be_chosen(small):
  third = jax.devices()[2]
  compiled = compiled_plainly(*small, image_size=16, batch_sizes=3, devices=[third])
  assert compiled.plans[3][:4] == (1, 3, 3, {})
  assert all(leaf.devices() == {third} for leaf in jax.tree.leaves(compiled.programs[3]._tree))
  images = noise(3)
  assert_close(compiled(jax.device_put(images, jax.devices()[0])), logits_of(*small, images), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", jnp.bfloat16, "float16"])
def test_parameters_are_cast_once_behind_the_folding(small, dtype):
  compiled = compiled_plainly(*small, image_size=16, dtype=dtype, batch_sizes=(4,), devices=ONE)
  tree = compiled.programs[4]._tree
  assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(dtype)}
  folded = deploy_form(*small)[1]
  jax.tree.map(np.testing.assert_array_equal, tree, jax.tree.map(lambda x: x.astype(dtype), folded))
  images = noise(4)
  logits = compiled(images)
  assert logits.dtype == np.float32
  tolerance = TOLERANCES[jnp.dtype(dtype).name]
  expected = logits_of(*small, images)
  assert_close(logits, expected, tolerance)
  if dtype != "float32":
    assert np.abs(logits - expected).max() > 0.01 * tolerance * np.abs(expected).max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_convolutions_and_products_are_computed_in_the_dtype(small, dtype):
  function, tree, *_ = inference(
    *small, image_size=16, dtype=dtype, preprocessing=PREPROCESSING, probabilities=False
  )
  text = jax.jit(function).lower(tree, noise(2, dtype=np.uint8)).as_text()
  lines = [line for line in text.splitlines() if "convolution" in line or "dot_general" in line]
  short = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[dtype]
  assert len(lines) >= 6
  for line in lines:
    assert set(re.findall(r"x(b?f\d\d)>", line)) == {short}, line


class TwoConvolutionsAndAPool(nn.Module):
  """A network for which jax 0.12 computes NaN in bfloat16 on CPUs, unless options prevent it."""

  dtype: jnp.dtype = jnp.float32  # pyright: ignore[reportInvalidTypeForm]

  @nn.compact
  def __call__(self, x):
    for _ in range(2):
      x = nn.relu(nn.Conv(128, (3, 3), bias_init=nn.initializers.normal(), dtype=self.dtype)(x))
    return nn.max_pool(x, (2, 2), (2, 2)).mean((1, 2))


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("tune", [False, True])
def test_pools_after_convolutions_are_finite_in_bfloat16(tune):
  model = TwoConvolutionsAndAPool()
  images = noise(4, 8)
  variables = model.init(jax.random.key(0), images)
  compiled = repjax.deploy.compile(
    model, variables, image_size=8, dtype="bfloat16", batch_sizes=(4,), devices=ONE, tune=tune
  )
  assert_close(compiled(images), logits_of(model, variables, images), TOLERANCES["bfloat16"])


def test_both_forms_of_a_model_give_the_same(small):
  images = noise(4)
  of_train, of_deploy = (
    compiled_plainly(*form, image_size=16, batch_sizes=(4,), devices=ONE)(images)
    for form in (small, deploy_form(*small))
  )
  np.testing.assert_array_equal(of_train, of_deploy)
  mixed = compiled_plainly(
    small[0], deploy_form(*small)[1], image_size=16, batch_sizes=(4,), devices=ONE
  )
  np.testing.assert_array_equal(mixed(images), of_deploy)


@pytest.mark.parametrize(
  ("name", "overrides", "size"),
  [
    (
      "repmlp_cifar",
      {"widths": (8, 8), "stage_sizes": (1, 1), "tile": 4, "local_kernels": ()},
      8,
    ),
    ("resnet18", {"widths": (4, 4, 8, 8), "stage_sizes": (1, 1, 1, 1)}, (40, 32)),
  ],
)
def test_other_families_and_sizes(name, overrides, size):
  model = repjax.create_model(name, num_classes=3, **overrides)
  height, width = size if isinstance(size, tuple) else (size, size)
  images = np.random.default_rng(0).standard_normal((3, height, width, 3), np.float32)
  variables = random_variables(model, images)
  compiled = compiled_plainly(model, variables, image_size=size, batch_sizes=(4,), devices=ONE)
  assert compiled.image_size == (height, width)
  assert_close(compiled(images), logits_of(model, variables, images), 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_normalization_and_softmax_are_compiled_in(small, dtype):
  images = noise(5, dtype=np.uint8)
  compiled = compiled_plainly(
    *small,
    image_size=16,
    dtype=dtype,
    batch_sizes=(4,),
    devices=ONE,
    preprocessing=PREPROCESSING,
    probabilities=True,
  )
  expected = jax.nn.softmax(logits_of(*small, PREPROCESSING.normalize(jnp.asarray(images))))
  rows = compiled(images)
  assert_close(rows, expected, TOLERANCES[dtype])
  np.testing.assert_allclose(rows.sum(1), 1, atol=1e-6)


def test_feature_maps_come_by_name_with_a_whole_classifiers_variables(small, fastest):
  fastest(4)
  model, variables = small
  images = noise(6)
  backbone = model.clone(features_only=True)
  compiled = compiled_plainly(backbone, variables, image_size=16, batch_sizes=(3,))
  maps, expected = compiled(images), jax.jit(backbone.apply)(variables, images)
  assert maps.keys() == expected.keys()
  for name, each in maps.items():
    assert_close(each, expected[name], 1e-5)


class Own(nn.Module):
  """Somebody's module, with a norm of its own whose statistics stay."""

  deploy: bool = False

  @nn.compact
  def __call__(self, images, train=False):
    x = RepConv(4, ("conv3x3", "conv1x1"), deploy=self.deploy)(images, train)
    return nn.BatchNorm(not train, name="norm")(x).mean((1, 2))


@pytest.fixture(scope="module")
def kept():
  """Variables of `Own`, and those of its deploy form."""
  variables = random_variables(Own(), noise(2))
  params = repjax.reparameterize(*halves(variables), keep="norm")
  return variables, {"params": params, "batch_stats": {"norm": variables["batch_stats"]["norm"]}}


@pytest.mark.usefixtures("optimized")
@pytest.mark.parametrize("tune", [True, False])
def test_optimized_programs_compute_the_same(kept, tune):
  variables, folded = kept
  settings = {"image_size": 16, "batch_sizes": (4,), "devices": ONE, "tune": tune}
  compiled = repjax.deploy.compile(Own(deploy=True), folded, **settings)
  images = noise(4)
  assert_close(compiled(images), logits_of(Own(), variables, images), 1e-5)


def test_a_module_with_a_norm_of_its_own_is_compiled_in_its_deploy_form(kept):
  images = noise(2)
  variables, kept = kept
  compiled = compiled_plainly(Own(deploy=True), kept, image_size=16, batch_sizes=(2,), devices=ONE)
  assert_close(compiled(images), logits_of(Own(), variables, images), 1e-5)
  with pytest.raises(InputError, match="Own has no attribute `dtype`"):
    compiled_plainly(Own(deploy=True), kept, image_size=16, dtype="bfloat16")


def test_programs_are_kept_for_the_next_process_however_fast_they_compile(small, tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path))
  jax.experimental.compilation_cache.compilation_cache.reset_cache()
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 1000.0)
  compiled_plainly(*small, image_size=16, batch_sizes=(2,), devices=jax.devices()[:1])
  kept = [path.name for path in tmp_path.iterdir()]
  assert sum(name.startswith("jit_inference") for name in kept) >= 1


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"dtype": "float64"}, "unknown dtype 'float64'; did you mean float"),
    ({"dtype": "int8"}, "unknown dtype 'int8'"),
    ({"dtype": "half-ish"}, "unknown dtype 'half-ish'"),
    ({"batch_sizes": ()}, r"batch_sizes .* got \(\)"),
    ({"batch_sizes": (1, 0)}, r"batch_sizes .* got \(1, 0\)"),
    ({"batch_sizes": (2.5,)}, "batch_sizes .* whole numbers"),
    ({"devices": ()}, r"different devices .* got \[\]"),
    ({"devices": "twice"}, "different devices"),
    ({"image_size": 1}, "must be"),
  ],
  ids=str,
)
def test_settings_that_cannot_be_are_refused(small, changes, said):
  if changes.get("devices") == "twice":
    changes = {"devices": jax.devices()[:1] * 2}
  with pytest.raises(InputError, match=said):
    compiled_plainly(*small, **{"image_size": 16, "batch_sizes": (1,), **changes})


def test_probabilities_need_a_classifier(small):
  model = small[0].clone(features_only=True)
  with pytest.raises(InputError, match="has no classifier"):
    compiled_plainly(model, small[1], image_size=16, probabilities=True)


@pytest.mark.parametrize(
  "case", ["bare", "no statistics", "classes", "other", "more", "strays", "int8", "list"]
)
def test_variables_that_do_not_fit_are_refused(small, case):
  model, variables = small
  plain = deploy_form(*small)[1]["params"]
  bad, said = {
    "bare": (plain, 'variables must be .* {"params": tree}'),
    "no statistics": ({"params": variables["params"]}, 'is missing.*with their "batch_stats"'),
    "classes": (
      {"params": {**plain, "head": jax.tree.map(lambda leaf: leaf[..., :3], plain["head"])}},
      r"params/head/\w+ is \(.*3,?\) where the model has \(.*10,?\)",
    ),
    "other": ({"params": {"stem": plain["stem"]}}, "params/head/bias is missing.* and .* more"),
    "more": ({"params": {**plain, "neck": plain["stem"]}}, "params/neck/.* is unknown"),
    "int8": (
      {"params": {**plain, "head": jax.tree.map(lambda x: x.astype(jnp.int8), plain["head"])}},
      "params/head/bias must hold floating-point numbers, got int8",
    ),
    "list": (
      {"params": {**plain, "head": {**plain["head"], "bias": [[0.0], [0.0, 1.0]]}}},
      "params/head/bias is a list where the model has",
    ),
    "strays": (
      {**variables, "batch_stats": {**variables["batch_stats"], "neck": np.ones(3)}},
      "batch_stats hold neck, which no fold has used",
    ),
  }[case]
  with pytest.raises(InputError, match=said):
    compiled_plainly(model, bad, image_size=16, batch_sizes=(1,))


@pytest.mark.parametrize(
  ("images", "said"),
  [
    (noise(1)[0], r"got \(16, 16, 3\).*images\[None\]"),
    (noise(1, 17), r"compiled for images \(N, 16, 16, 3\), got \(1, 17, 17, 3\)"),
    (noise(1)[..., :1], "compiled for images"),
    (noise(1).transpose(0, 3, 1, 2), r"Put channels last: images\.transpose\(0, 2, 3, 1\)"),
    (
      noise(1).astype(np.float64),
      r"must be float32, got float64.*images.astype\('float32'",
    ),
    (noise(1, dtype=np.uint8), "got uint8.*spec.preprocessing.normalize"),
    ([noise(1)[0]], "must be one array"),
  ],
  ids=["rank", "size", "channels", "channels first", "float64", "uint8", "list"],
)
def test_images_that_do_not_fit_are_refused(small, images, said):
  compiled = compiled_plainly(*small, image_size=16, batch_sizes=(1,))
  with pytest.raises(InputError, match=said):
    compiled(images)


def test_normalized_images_are_refused_where_normalization_is_compiled_in(small):
  compiled = compiled_plainly(*small, image_size=16, batch_sizes=(1,), preprocessing=PREPROCESSING)
  with pytest.raises(InputError, match=r"must be uint8, got float32.*normalization is compiled in"):
    compiled(noise(1))
