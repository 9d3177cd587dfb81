"""The fastest algorithm is measured once, kept on disk, and used."""

import json
import types

import jax
import numpy as np
import pytest

import repjax
from repjax.deploy import devices, gpu, tuning, xla
from tests.deploy.test_convolutions import PLAIN
from tests.helpers import assert_close

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

CPU = jax.local_devices()[:1]
STRIDED = PLAIN._replace(strides=(2, 2))


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """The folder in which this test keeps measurements."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  return tmp_path / "repjax" / "measured"


@pytest.fixture
def speeds(monkeypatch):
  """Seconds by algorithm that are 'measured', and what was."""
  table, seen = {"direct": 1.0, "matmul": 2.0, "winograd2": 0.5, "winograd4": 0.3}, []

  def seconds(wanted, names, device):
    del device
    seen.append(wanted)
    return {name: [9.0, table[name]] for name in names}

  monkeypatch.setattr(tuning, "time_algorithms", seconds)
  return table, seen


def test_the_fastest_is_chosen_and_remembered(folder, speeds):
  _, seen = speeds
  expected = {PLAIN: "winograd4", STRIDED: "direct"}
  assert tuning.fastest([PLAIN, STRIDED, PLAIN], CPU[0]) == expected
  assert sorted(seen) == sorted([PLAIN, STRIDED])
  assert tuning.fastest([PLAIN, STRIDED], CPU[0]) == expected
  assert len(seen) == 2
  answers = [json.loads(file.read_text())["answer"] for file in folder.iterdir()]
  assert sorted(answers) == ["direct", "winograd4"]
  more = STRIDED._replace(groups=2, kernel=(3, 3, 8, 12))
  assert tuning.fastest([PLAIN, more], CPU[0]) == {PLAIN: "winograd4", more: "direct"}
  assert len(seen) == 3


@pytest.mark.parametrize("other", [0.96, 1.0])
def test_what_is_hardly_faster_is_left_to_xla(folder, speeds, other):
  table, _ = speeds
  table.update(matmul=other, winograd2=other, winograd4=other)
  assert tuning.fastest([PLAIN], CPU[0]) == {PLAIN: "direct"}


@pytest.mark.parametrize(
  "content", ["{", "[]", "null", '{"answer": "winograd99"}', '{"answer": []}']
)
def test_a_damaged_file_is_measured_again(folder, speeds, content):
  tuning.fastest([PLAIN], CPU[0])
  (file,) = folder.iterdir()
  file.write_text(content)
  assert tuning.fastest([PLAIN], CPU[0]) == {PLAIN: "winograd4"}
  assert len(speeds[1]) == 2
  assert tuning.fastest([PLAIN], CPU[0]) == {PLAIN: "winograd4"}
  assert len(speeds[1]) == 2


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch, speeds):
  (tmp_path / "file").touch()
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
  assert tuning.fastest([PLAIN], CPU[0]) == {PLAIN: "winograd4"}


def test_a_folder_in_the_place_of_a_file_is_no_error(folder, speeds):
  tuning.fastest([PLAIN], CPU[0])
  (file,) = folder.iterdir()
  file.unlink()
  (file / "more").mkdir(parents=True)
  assert tuning.fastest([PLAIN], CPU[0]) == {PLAIN: "winograd4"}


def test_gpus_choose_themselves():
  gpu = types.SimpleNamespace(platform="gpu")
  assert tuning.make_tuner({}, gpu, np.asarray, tune=True) is None
  assert tuning.make_tuner({}, CPU[0], np.asarray, tune=False) is None
  assert tuning.make_tuner({}, CPU[0], np.asarray, tune=True) is not None


def test_every_way_is_measured(folder):
  times = tuning.time_algorithms(PLAIN, ["direct", "winograd2"], CPU[0])
  assert list(times) == ["direct", "winograd2"]
  assert all(value > 0 for row in times.values() for value in row)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tuned_program_computes_the_same(small, folder, speeds, dtype, monkeypatch):
  speeds[0]["matmul"] = 0.7

  measurements = []

  def measured(programs, batch):
    measurements.append(batch.shape)
    return {program.arrangement: program.arrangement.chunk for program in programs}

  monkeypatch.setattr(devices, "time_programs", measured)
  plain, tuned = (
    repjax.deploy.compile(
      *small, image_size=16, dtype=dtype, batch_sizes=(10,), devices=CPU, tune=tune
    )
    for tune in (False, True)
  )
  names = tuned.plans[10].convolutions
  assert set(names.values()) == ({"matmul", "winograd4"} if dtype == "float32" else {"matmul"})
  assert plain.plans[10].convolutions == {}
  assert tuned.plans[10][:3] == (1, tuning.CHUNK, 12)
  again = repjax.deploy.compile(*small, image_size=16, dtype=dtype, batch_sizes=(10,), devices=CPU)
  assert again.plans[10][:4] == (1, tuning.CHUNK, 12, {})
  assert len(measurements) == 1
  images = np.random.default_rng(0).standard_normal((10, 16, 16, 3), np.float32)
  for count in (7, 10):
    tolerance = 1e-5 if dtype == "float32" else 5e-2
    assert_close(tuned(images[:count]), plain(images[:count]), tolerance)


@pytest.fixture
def on_a_gpu(folder, monkeypatch):
  """Lets `compile` treat a CPU as it treats a GPU."""
  monkeypatch.setattr(devices, "make_tuner", lambda *_: None)
  monkeypatch.setattr(devices, "is_gpu", lambda device: True)


def depthwise(kernel, images):
  """Returns the means of a depthwise convolution."""
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(
    images, kernel, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=3
  ).mean((1, 2))


def test_on_a_gpu_the_faster_way_of_depthwise_convolutions_is_kept(on_a_gpu, monkeypatch):
  tried = []

  def measured(programs, batch):
    assert set(timed(programs, batch)) == set(programs)
    tried.append((*programs, batch.shape))
    return {limit: -limit for limit in programs}

  timed = devices.time_on_device
  monkeypatch.setattr(devices, "time_on_device", measured)

  rng = np.random.default_rng(0)
  kernel, images = (
    rng.standard_normal(shape, np.float32) for shape in ((3, 3, 1, 6), (2, 16, 16, 3))
  )
  compiled = [
    repjax.deploy.compile(
      depthwise, kernel, image_size=16, batch_sizes=(2,), devices=CPU, tune=tune
    )
    for tune in (False, True, True)
  ]
  assert tried == [(0, 9, (2, 16, 16, 3))]
  plain, summed, again = (each.plans[2].convolutions for each in compiled)
  assert plain == {}
  assert set(summed.values()) == {"shifts"}
  assert again == summed
  assert_close(compiled[1](images), compiled[0](images), 1e-5)


def test_sums_that_a_gpu_cannot_run_are_left_out_with_a_warning(on_a_gpu, monkeypatch):
  start = devices.BatchProgram.start

  def without_sums(program, images):
    if program.convolutions:
      raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 9 GB are too much\nat some place")
    return start(program, images)

  monkeypatch.setattr(devices.BatchProgram, "start", without_sums)
  kernel = np.ones((3, 3, 1, 6), np.float32)
  with pytest.warns(UserWarning, match=r"up to 9 taps as sums.*RESOURCE_EXHAUSTED.*much$"):
    compiled = repjax.deploy.compile(
      depthwise, kernel, image_size=8, batch_sizes=(2,), devices=CPU, tune=True
    )
  assert compiled.plans[2].convolutions == {}


def test_an_answer_holds_for_the_options_of_its_programs():
  batch = jax.ShapeDtypeStruct((1, 8, 8, 3), np.uint8)
  plain, graphs = (
    devices.PlacedTree(np.ones(2, np.float32), CPU, options=options).question(batch)
    for options in ({}, gpu.GRAPHS)
  )
  assert plain != graphs


def test_limits_of_taps():
  assert devices._limits([]) == [0]
  assert devices._limits([9, 9, 25]) == [0, 25]
  assert devices._limits([9, 49, 25, 81]) == [0, 25, 81]
  assert devices._limits([49]) == [0, 49]


class Failing:
  """A program that does not compile."""

  def compile(self, compiler_options=None):
    raise jax.errors.JaxRuntimeError("no memory is left")


def test_an_option_that_xla_has_forgotten_is_left_out(monkeypatch):
  monkeypatch.setattr(xla, "CPU_OPTIONS", {"xla_cpu_no_such_option": "1"})
  assert xla.compile_lowered(jax.jit(lambda x: x + 1).lower(1.0), CPU[0])(1.0) == 2
  with pytest.raises(jax.errors.JaxRuntimeError, match="no memory is left"):
    xla.compile_lowered(Failing(), CPU[0])
