"""Tests of programs that ONNX Runtime or OpenVINO computes, and of the choice among runtimes."""

import importlib.metadata
import importlib.util
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.cache import remember
from repjax.deploy import runtimes
from repjax.errors import InputError
from tests.deploy.tiny import SPEC
from tests.helpers import assert_close

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
FLOATS = IMAGES.astype(np.float32) / 255
INSTALLED = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]

pytestmark = pytest.mark.skipif(
  "onnxruntime" not in INSTALLED, reason="ONNX Runtime is not installed"
)


def compiled(small, **options):
  defaults = {"image_size": 16, "batch_sizes": (1, 4), "tune": False, "devices": jax.devices()[:1]}
  return repjax.deploy.compile(*small, **defaults | options)


@pytest.fixture
def only_onnxruntime(monkeypatch):
  """Hides OpenVINO, which may be installed or not."""
  monkeypatch.setattr(runtimes, "_installed", lambda: ["onnxruntime"])


@pytest.fixture
def timed(monkeypatch, tmp_path, only_onnxruntime):
  """Empties the cache and returns milliseconds that are measured, which a test may change."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  found = {"xla": 20.0, "onnxruntime": 10.0}
  monkeypatch.setattr(
    runtimes, "measured", lambda programs, _: {name: found[name] / 1e3 for name in programs}
  )
  return found


@pytest.mark.parametrize("runtime", INSTALLED)
def test_a_runtime_computes_what_xla_computes(small, runtime):
  options = {"preprocessing": SPEC.preprocessing, "probabilities": True}
  found = compiled(small, runtime=runtime, **options)
  assert [plan.runtime for plan in found.plans.values()] == [runtime] * 2
  rows = found(IMAGES)
  assert (rows.shape, rows.dtype) == ((5, 10), np.float32)
  assert_close(rows, compiled(small, **options)(IMAGES), 1e-5)


def test_maps_come_with_channels_last(small):
  network = small[0].clone(features_only=True), small[1]
  found = compiled(network, runtime="onnxruntime")(FLOATS)
  wanted = compiled(network)(FLOATS)
  assert found.keys() == wanted.keys()
  for name, maps in wanted.items():
    assert_close(found[name], maps, 1e-5)


def test_the_fastest_is_taken_and_known_from_then_on(small, timed, capsys, monkeypatch):
  plan = compiled(small, runtime="auto", batch_sizes=(2,)).plans[2]
  assert (plan.runtime, plan.runtimes) == ("onnxruntime", {"xla": 0.02, "onnxruntime": 0.01})
  said = capsys.readouterr().err
  assert "batches of 2: onnxruntime" in said
  assert "2.00 times as fast as xla" in said
  monkeypatch.setattr(runtimes, "measured", None)
  # The answer was kept. So nothing is measured again, and XLA compiles nothing.
  monkeypatch.setattr(runtimes.PlacedTree, "program", None)
  again = compiled(small, runtime="auto", batch_sizes=(2,)).plans[2]
  assert (again.runtime, again.runtimes) == (plan.runtime, plan.runtimes)
  assert capsys.readouterr().err == ""


def test_xla_stays_where_the_others_are_hardly_faster(small, timed):
  timed["onnxruntime"] = 19.5
  found = compiled(small, runtime="auto", batch_sizes=(2,))
  assert found.plans[2].runtime == "xla"
  np.testing.assert_array_equal(found(FLOATS), compiled(small, batch_sizes=(2,))(FLOATS))


@pytest.mark.parametrize(
  "answer",
  [
    None,
    [],
    {"runtime": "a runtime", "seconds": {}},
    {"runtime": "xla", "seconds": 1},
    {"runtime": "openvino", "seconds": {}},  # not installed here
  ],
)
def test_a_damaged_answer_is_no_answer(timed, answer):
  remember("the fastest", answer)
  assert runtimes._recalled("the fastest") is None


def test_programs_take_turns_and_the_least_time_counts(monkeypatch):
  clock, order = [0.0], []

  def program(name, seconds):
    def start(images):
      order.append(name)
      clock[0] += seconds[min(len(seconds), order.count(name)) - 1]

    return types.SimpleNamespace(start=start, finish=lambda results, count: None)

  monkeypatch.setattr(runtimes.time, "perf_counter", lambda: clock[0])
  batch = jax.ShapeDtypeStruct((2, 8, 8, 3), np.uint8)
  both = {"a": program("a", [9, 1, 2]), "b": program("b", [4, 3])}
  assert runtimes.measured(both, batch) == {"a": 1, "b": 3}
  assert "".join(order) == "aabb" * 2  # no more rounds after three seconds


def sorted_pixels(params, images):
  """A function that ONNX files of repjax cannot hold."""
  return jnp.sort(images.mean((1, 2)) * params["scale"])


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"runtime": "onnx_runtime"}, "unknown runtime .*did you mean onnxruntime"),
    ({"runtime": "auto", "dtype": "bfloat16"}, "float32 on CPUs.*bfloat16"),
    ({"runtime": "onnxruntime", "cuda_graphs": True}, "without cuda_graphs"),
    ({"runtime": "openvino"}, "needs the package openvino: pip install"),
  ],
)
def test_what_a_runtime_cannot_do_is_refused(small, only_onnxruntime, options, said):
  with pytest.raises(InputError, match=said):
    compiled(small, **options)


def test_a_choice_of_one_is_refused(small, monkeypatch):
  monkeypatch.setattr(runtimes, "_installed", list)
  with pytest.raises(InputError, match="neither is installed: pip install"):
    compiled(small, runtime="auto")


def test_a_model_that_a_runtime_cannot_load_is_refused_with_the_way_out():
  with pytest.raises(InputError, match=r"onnxruntime cannot load .*runtime='xla' runs such"):
    runtimes._load("onnxruntime", b"no model")


def test_runtimes_are_known_by_their_modules(monkeypatch, only_onnxruntime):
  # The distribution that has the module may be called onnxruntime-gpu.
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  placed = runtimes.PlacedRuntimes("auto", {"scale": jnp.ones(3)}, jax.devices()[:1])
  question = placed._question(jax.ShapeDtypeStruct((2, 8, 8, 3), np.float32))
  assert re.search(r"onnxruntime \d+\.\d+", question)


def test_a_function_that_onnx_cannot_hold_is_refused_with_the_way_out(timed):
  with pytest.raises(InputError, match=r"sort.*runtime='xla' runs such a model"):
    compiled((sorted_pixels, {"scale": jnp.ones(())}), runtime="auto")


def test_different_results_are_refused(small, monkeypatch):
  def wrong(content):
    run = runtimes.in_onnxruntime(content)
    return lambda images: [1.01 * rows for rows in run(images)]

  monkeypatch.setitem(runtimes._LOADERS, "onnxruntime", wrong)
  with pytest.raises(InputError, match=r"onnxruntime computes something else than XLA.* 1\.0e-02"):
    compiled(small, runtime="onnxruntime")
