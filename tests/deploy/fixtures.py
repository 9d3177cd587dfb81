"""Fixtures of the inference tests: a small model, its folder, and plans that are not measured."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.disk import trees
from repjax.quantization import equalization, runtime
from repjax.quantization.graph import constants, layers_of, with_constants
from tests.deploy.tiny import SPEC
from tests.helpers import halves, random_input, random_variables
from tests.quantization import int8
from tests.training import tiny


@pytest.fixture(scope="session")
def small():
  """A small model in training form with gates and heads, and random variables."""
  model = SPEC.create_model()
  return model, random_variables(model, random_input(1, 16, 16, 3).astype(np.float32))


@pytest.fixture(scope="session")
def small_folder(small, tmp_path_factory):
  """The small model's deploy folder, which no test may change."""
  folder = tmp_path_factory.mktemp("small") / "deploy"
  params = jax.jit(repjax.reparameterize)(*halves(small[1]))
  trees.write_tree(folder / "params", params)
  SPEC.write(folder)
  return folder


@pytest.fixture(scope="module")
def quickly(cache_home):
  """`tiny.quick_programs` for what a module's tests share."""
  with tiny.quick_programs(cache_home / "repjax" / "xla"):
    yield


@pytest.fixture
def fastest(monkeypatch):
  """Returns a function that makes batches run on so many devices, whatever is faster."""
  devices = importlib.import_module("repjax.deploy.devices")

  def choose(count):
    def measured(programs, batch):
      del batch
      arrangements = [program.arrangement for program in programs]
      return {each: float(each.devices != count) for each in arrangements}

    monkeypatch.setattr(devices, "time_programs", measured)

  return choose


@pytest.fixture(scope="session")
def small_proto(cache_home):
  """A small RepVGG that takes uint8 images, as an ONNX file, which no test may change."""
  with tiny.quick_programs(cache_home / "repjax" / "xla"):
    return int8.made("repvgg_a0", tiny.OVERRIDES, preprocessing=int8.SPEC.preprocessing)


@pytest.fixture(scope="session")
def small_logits(small_proto):
  """The logits of the small ONNX file for `int8.IMAGES`."""
  return runtime.logits_of(small_proto, int8.IMAGES)


@pytest.fixture(scope="session")
def uneven(small_proto):
  """The same function, with channels between stage 2 and 3 of very different ranges."""
  first, second = (
    layer for layer in layers_of(small_proto) if layer.title.startswith(("stage2", "stage3"))
  )
  arrays = constants(small_proto)
  convs = [equalization._conv(arrays, layer) for layer in (first, second)]
  rng = np.random.default_rng(0)
  scale = jnp.exp(jnp.asarray(3 * rng.standard_normal(convs[0].bias.size), jnp.float32))
  convs = equalization.rescale_between(*convs, scale)
  for layer, conv in zip((first, second), convs):
    arrays |= equalization._arrays(layer, conv)
  return with_constants(small_proto, arrays)
