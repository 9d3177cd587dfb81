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
from tests.helpers import assert_close, quick_jit, random_variables
from tests.models.families import FAMILIES

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


@pytest.fixture
def two(timed, monkeypatch):
  """Takes ONNX Runtime for OpenVINO too, which may be installed or not."""
  monkeypatch.setattr(runtimes, "_installed", lambda: ["onnxruntime", "openvino"])
  for table in (runtimes._PACKAGES, runtimes._LOADERS):
    monkeypatch.setitem(table, "openvino", table["onnxruntime"])


@pytest.mark.parametrize("runtime", INSTALLED)
def test_a_runtime_computes_what_xla_computes(small, runtime):
  options = {"preprocessing": SPEC.preprocessing, "probabilities": True}
  found = compiled(small, runtime=runtime, **options)
  assert [plan.runtime for plan in found.plans.values()] == [runtime] * 2
  rows = found(IMAGES)
  assert (rows.shape, rows.dtype) == ((5, 10), np.float32)
  assert_close(rows, compiled(small, **options)(IMAGES), 1e-5)


@pytest.mark.parametrize("runtime", INSTALLED)
def test_a_runtime_resizes_logits_as_xla_does(runtime):
  overrides = FAMILIES["pspnet"].overrides
  model = repjax.create_model("pspnet", num_classes=3, deploy=True, **overrides)
  x = np.random.default_rng(0).standard_normal((1, 40, 49, 3), np.float32)
  variables = random_variables(model, x)
  program = compiled((model, variables), image_size=(40, 49), batch_sizes=(1,), runtime=runtime)
  assert_close(program(x), quick_jit(model.apply)(variables, x), 1e-4)


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
  assert re.search(r"batches of 2: onnxruntime takes 10\.0 ms.*earlier", capsys.readouterr().err)


def test_times_have_three_digits():
  known = runtimes._Measured("xla", {"xla": 1.234e-5, "openvino": 1.2345})
  said = runtimes.described(known)
  assert "xla takes 0.0123 ms" in said
  assert "(1,234 ms)" in said


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
  rounds = {"a": [9, 1, 2], "b": [4, 3, 5]}

  def program(name):
    return types.SimpleNamespace(
      start=lambda images: name, finish=lambda name, _: order.append(name)
    )

  def timed(turn, number):
    turn(number, 1)
    seconds = rounds[order[-1]][number]
    clock[0] += seconds
    return seconds

  monkeypatch.setattr(runtimes.time, "perf_counter", lambda: clock[0])
  monkeypatch.setattr(runtimes, "time_turn", timed)
  batch = jax.ShapeDtypeStruct((2, 8, 8, 3), np.uint8)
  assert runtimes.measured({name: program(name) for name in "ab"}, batch) == {"a": 1, "b": 3}
  assert "".join(order) == "ab" * 2  # no more rounds after five seconds


def sorted_pixels(params, images):
  """A function that ONNX files of repjax cannot hold."""
  return jnp.sort(images.mean((1, 2)) * params["scale"])


@pytest.mark.parametrize(
  ("options", "said"),
  [
    ({"runtime": "onnx_runtime"}, "unknown runtime .*did you mean onnxruntime"),
    ({"runtime": "auto", "dtype": "bfloat16"}, "does not go with dtype='bfloat16', since"),
    ({"cuda_graphs": True}, "cuda_graphs=True .* the device here is a cpu"),
    ({"runtime": "openvino"}, "needs packages that are not installed: pip install openvino\\."),
  ],
)
def test_what_a_runtime_cannot_do_is_refused(small, only_onnxruntime, options, said):
  with pytest.raises(InputError, match=said):
    compiled(small, **options)


def test_each_cause_for_which_a_runtime_is_refused_is_named():
  with pytest.raises(InputError, match="go with dtype='float16' and cuda_graphs=True, since"):
    runtimes.check("auto", np.dtype("float16"), None, in_streams=False, cuda_graphs=True)


@pytest.mark.parametrize(
  ("runtime", "said"), [("auto", "onnx onnxruntime openvino"), ("openvino", "onnx openvino")]
)
def test_all_missing_packages_are_named_at_once(small, monkeypatch, runtime, said):
  monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(InputError, match=f"not installed: pip install {said}\\."):
    compiled(small, runtime=runtime)


def test_a_model_that_a_runtime_cannot_load_is_refused_with_the_way_out():
  with pytest.raises(InputError, match=r"onnxruntime cannot load .*runtime='xla' runs such"):
    runtimes._load("onnxruntime", b"no model")


def test_mistakes_of_repjax_are_no_reasons_of_a_runtime(monkeypatch):
  monkeypatch.setitem(runtimes._LOADERS, "onnxruntime", lambda content: content.lost)
  with pytest.raises(AttributeError):
    runtimes._load("onnxruntime", b"")


def test_runtimes_are_known_by_their_modules(monkeypatch, only_onnxruntime):
  # The distribution that has the module may be called onnxruntime-gpu.
  def version(name):
    raise importlib.metadata.PackageNotFoundError(name)

  monkeypatch.setattr(importlib.metadata, "version", version)
  placed = runtimes.PlacedRuntimes("auto", {"scale": jnp.ones(3)}, jax.devices()[:1])
  question = placed._question(jax.ShapeDtypeStruct((2, 8, 8, 3), np.float32))
  assert re.search(r"onnxruntime \d+\.\d+", question)


def test_a_function_that_onnx_cannot_hold_is_refused_or_left_to_xla(two, capsys):
  model = sorted_pixels, {"scale": jnp.ones(())}
  with pytest.raises(InputError, match=r"sort.*runtime='xla' runs such a model"):
    compiled(model, runtime="onnxruntime")
  plan = compiled(model, runtime="auto", batch_sizes=(2,)).plans[2]
  assert (plan.runtime, plan.runtimes) == ("xla", {})
  said = capsys.readouterr().err
  assert re.search(r"batches of 2: without onnxruntime and openvino: .*sort", said)


def test_a_runtime_that_fails_is_left_out_and_tried_again(small, two, monkeypatch, capsys):
  def fail(content):
    raise RuntimeError("no such layer")

  monkeypatch.setitem(runtimes._LOADERS, "openvino", fail)
  for _ in range(2):
    plan = compiled(small, runtime="auto", batch_sizes=(2,)).plans[2]
    assert (plan.runtime, {*plan.runtimes}) == ("onnxruntime", {"xla", "onnxruntime"})
    assert "without openvino: openvino cannot load" in capsys.readouterr().err


def test_different_results_are_refused(small, monkeypatch):
  def wrong(content):
    run = runtimes.in_onnxruntime(content)
    return lambda images: [1.01 * rows for rows in run(images)]

  monkeypatch.setitem(runtimes._LOADERS, "onnxruntime", wrong)
  with pytest.raises(InputError, match=r"onnxruntime computes something else than XLA.* 1\.0e-02"):
    compiled(small, runtime="onnxruntime")
