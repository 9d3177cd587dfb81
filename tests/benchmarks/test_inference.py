"""Tests of benchmarks/inference.py and its helpers, with a small run of every kind of subject."""

import functools
import importlib
import json
import re

import jax
import numpy as np
import pytest

import repjax.models
import repjax.weights.sources
from repjax.errors import InputError
from repjax.models.repvgg import RepVGG
from tests.helpers import random_variables
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")
BENCHMARKS = tiny.ROOT / "benchmarks"


@pytest.fixture
def load(monkeypatch):
  """Imports a file of benchmarks/ by its name."""
  monkeypatch.syspath_prepend(BENCHMARKS)  # as Python does when it runs a program
  return importlib.import_module


class Clock:
  """A clock that stands still unless a test moves `now`."""

  now = 0.0

  def __call__(self):
    return self.now


@pytest.fixture
def run(load, monkeypatch, run_script):
  """Runs the benchmark, with a small model called tiny."""
  official = repjax.weights.sources.NAMINGS["repvgg_a0"]
  monkeypatch.setitem(repjax.models._MODELS, "tiny", (RepVGG, tiny.OVERRIDES))
  monkeypatch.setitem(repjax.weights.sources.NAMINGS, "tiny", official)
  monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  return functools.partial(run_script, "benchmarks/inference.py")


def stub(timing, clock, log, name, start=0.0, run=0.0, wait=0.0, output=0.0):
  """Returns a subject that takes the given seconds, and logs every call."""

  def spend(what, seconds, x=None):
    log.append((name, what, x))
    clock.now += seconds
    return x

  def started(x):
    spend("start", start)
    return timing.Running(lambda x: spend("run", run, x))

  return timing.Subject(
    started,
    lambda x: spend("prepare", 1000.0, x),
    lambda x: spend("wait", wait),
    lambda x: np.asarray([output]),
  )


def test_subjects_take_turns_and_who_begins_moves_on(load):
  log, clock = [], Clock()

  def turn_of(name, seconds):
    def turn(number, calls):
      log.append((name, number, calls))
      clock.now += seconds * calls

    return turn

  # Two more calls bring a fast subject to speed.
  turns = {"a": turn_of("a", 1.0), "b": turn_of("b", 2.0), "c": turn_of("c", 0.01)}
  times = load("timing").time_in_turns(turns, rounds=4, calls=5, clock=clock)
  warm, rest = log[:3], log[3:]
  assert warm == [(name, 0, 2) for name in "abc"]
  calls_of = {"a": (1, 5), "b": (1, 5), "c": (1, 2, 5)}
  assert rest == [
    (name, number, calls)
    for number, order in enumerate(("abc", "bca", "cab", "abc"))
    for name in order
    for calls in calls_of[name]
  ]
  for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 0.01)):
    np.testing.assert_allclose(times[name], [seconds] * 4)


@pytest.mark.parametrize("calls", [1, 3])
def test_times_are_those_of_calls_with_waiting_and_of_nothing_else(load, calls):
  timing, log, clock = load("timing"), [], Clock()
  make = functools.partial(stub, timing, clock, log)
  subjects = {"a": make("a", start=7, run=2, wait=3), "b": make("b", start=100, run=0.5)}
  found = timing.race(subjects, ["x", "y"], rounds=4, repeats=2, calls=calls, clock=clock)
  assert found["a"].seconds == [[2 + 3 / calls] * 4] * 2
  assert found["b"].seconds == [[0.5] * 4] * 2
  assert (found["a"].compile_s, found["b"].compile_s) == ([7 + 2 + 3] * 2, [100.5] * 2)
  assert found["a"].median == 2 + 3 / calls
  runs = [x for name, what, x in log if (name, what) == ("a", "run")]
  round_of = [x for x in "xyxy" for _ in range(1 + calls)]
  assert runs == ["x", "x", "x", *round_of] * 2


def test_outputs_are_compared_before_anything_is_timed(load):
  timing, log, clock = load("timing"), [], Clock()
  make = functools.partial(stub, timing, clock, log)
  subjects = {"right": make("right", output=1.0), "wrong": make("wrong", output=1.001)}

  def check(outputs):
    timing.relative_errors(outputs, np.asarray([-1.0, 1.0])[1:], 1e-4)

  with pytest.raises(InputError, match=r"wrong differs .* 1\.0e-03, where at"):
    timing.race(subjects, ["x"], rounds=1, check=check)
  assert [what for name, what, _ in log if name == "wrong"] == ["prepare", "start", "run", "wait"]


def test_an_output_that_is_no_number_is_refused(load):
  check = load("timing").relative_errors
  assert check({"a": np.asarray([2.0, -4.5])}, np.asarray([2.0, -4.0]), 0.2) == {"a": 0.125}
  with pytest.raises(InputError, match="a differs"):
    check({"a": np.asarray([np.nan])}, np.ones(1), 1.0)


def test_the_table_compares_with_the_fastest_of_the_others(load):
  benchmark, timing = load("inference"), load("timing")
  results = {
    "repjax-deploy": timing.Result([[0.1, 0.2], [0.2, 0.3]], [5.0, 1.0], 2**20),
    "torch-eager": timing.Result([[0.4, 0.4], [0.4, 0.4]], [1.0], None),
    "openvino": timing.Result([[0.2, 0.2], [0.2, 0.9]], [1.0], None),
  }
  flops = {"repjax-deploy": 4_000, "torch-eager": 4_000, "openvino": 4_000}
  rows = benchmark.rows_of(results, batch_size=8, flops=flops, rate=100_000.0)
  ours, eager, best = rows
  assert {row["best_peer"] for row in rows} == {"openvino"}
  # Medians of the ratios of the rounds: (2, 1, 1, 3), (0.5, 0.5, 0.5, 2.25), and 1.
  assert [row["to_best"] for row in rows] == [1.5, 0.5, 1.0]
  assert (ours["ms"], ours["images_per_s"], ours["start_s"]) == (200, 40, 5)
  assert (ours["memory_mib"], eager["memory_mib"]) == (1, None)
  assert (ours["gflops"], ours["of_matmul"]) == pytest.approx((2e-5, 0.2))
  low, high = best["ms_quartiles"]
  assert low == 200 < high
  facts = {"model": "m", "batch_size": 8, "dtype": "float32"}
  assert benchmark.line(facts | eager).split()[-3:] == ["-", "0", "10%"]
  assert all(len(benchmark.line(facts | row)) == len(benchmark.HEADER) for row in rows)


def test_without_others_there_is_no_ratio(load):
  benchmark, timing = load("inference"), load("timing")
  results = {"repjax-deploy": timing.Result([[0.1]], [5.0], None)}
  (row,) = benchmark.rows_of(results, 1, {"repjax-deploy": 1}, 1.0)
  assert (row["best_peer"], row["to_best"]) == (None, None)


def test_a_small_run_of_our_forms(run, tmp_path):
  path = tmp_path / "results" / "file.json"
  ours = ("repjax-train-form", "repjax-deploy")
  sizes = ("--models", "tiny", "--batch-sizes", 2, "--image-size", 16, "--rounds", 3)
  dtypes = ("--dtypes", "float32", "bfloat16", "--repeats", 2)
  printed = run(*sizes, *dtypes, "--subjects", *ours, "--json", path)
  rows = [line.split()[:4] for line in printed.splitlines() if line.startswith("tiny")]
  assert rows == [["tiny", "2", dtype, name] for dtype in ("float32", "bfloat16") for name in ours]
  written = json.loads(path.read_text())
  facts = [written[name] for name in ("image_size", "rounds", "repeats", "calls", "training")]
  assert facts == [16, 3, 2, 1, False]
  for result in written["results"]:
    assert [len(repeat) for repeat in result["ms_of_each_round"]] == [3, 3]
    assert min(result["ms"], result["start_s"], result["memory_mib"], result["gflops"]) > 0
    assert 0 <= result["relative_error"] < (1e-5 if result["dtype"] == "float32" else 0.1)
  train, deploy = written["results"][:2]
  flops = [row["gflops"] * row["ms"] * 1e6 for row in (train, deploy)]
  found = repjax.analysis.summary(repjax.create_model("tiny"), 16)
  assert flops == pytest.approx([4 * found.train.macs, 4 * found.deploy.macs])


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--models", "repvgg_a9"), "error: unknown model 'repvgg_a9'; did you mean"),
    (("--cpu-time",), "error: --cpu-time adds up the time of parallel threads"),
    (("--subjects", "torch"), "error: torch is no subject here; there are: repjax-train-form,"),
    (
      ("--training", "--batch-sizes", 6),
      "error: batch_size 6 does not divide over 4 devices; use 4 or 8",
    ),
  ],
)
def test_a_mistake_is_one_paragraph(run, load, monkeypatch, arguments, message):
  monkeypatch.setattr(load("timing"), "cpus", lambda: 2)  # on one, CPU time is no mistake
  with pytest.raises(SystemExit) as stop:
    run(*arguments)
  assert stop.value.code.startswith(message)


def test_subjects_that_cannot_are_left_out_with_the_reason(load, monkeypatch, capsys):
  benchmark, subjects = load("inference"), load("subjects")
  task = subjects.Task("repmlp_cifar", 1, 32, "float16")
  monkeypatch.setattr(
    subjects.importlib.util,
    "find_spec",
    lambda name: None if name == "no_such_package" else name,
  )
  kinds = {
    "ours": subjects.Kind(lambda task: "made"),
    "absent": subjects.Kind(lambda task: "made", ("no_such_package",)),
    "other": subjects.Kind(lambda task: "made", ("torch",)),
    "wide": subjects.Kind(lambda task: "made", dtypes=lambda: ["float32"]),
    "single": subjects.Kind(lambda task: "made", one_device=True),
  }
  assert benchmark.chosen(kinds, task, None) == {"ours": "made"}
  absent, other, wide, single = capsys.readouterr().out.splitlines()
  assert absent == "  without absent: not installed: no_such_package (pip install 'repjax[bench]')"
  assert other.startswith("  without other: repmlp_cifar is not written in PyTorch here;")
  assert wide == "  without wide: it does not compute in float16 here"
  assert single == "  without single: it uses one device, and JAX all 4"
  with pytest.raises(InputError, match="absent is not installed: no_such_package"):
    benchmark.chosen(kinds, task, ["absent"])
  with pytest.raises(InputError, match="no subject is left for repmlp_cifar in float16"):
    benchmark.chosen(kinds, task, ["other"])
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  reason = subjects.why_not(subjects.Kind(lambda task: "made", on=("cpu",)), task)
  assert reason == "it is timed on a cpu only"


def test_cpu_time_of_one_core(load):
  check = load("inference").check_one_core
  check({"cpus": 1, "device": "cpu"})
  with pytest.raises(InputError, match=r"runs on 2 CPUs\. .*one core"):
    check({"cpus": 2, "device": "cpu"})


@pytest.mark.proof
def test_a_small_run_of_training(run, tmp_path):
  path = tmp_path / "file.json"
  sizes = ("--models", "tiny", "--batch-sizes", 8, "--image-size", 16, "--rounds", 3)
  rest = ("--calls", 2, "--subjects", "repjax-train-form", "--json", path)
  header, row = run("--training", *sizes, *rest).splitlines()[-2:]
  assert header.split()[-3:] == ["temporary", "arguments", "accessed"]
  assert len(row) == len(header)
  written = json.loads(path.read_text())
  assert [written[name] for name in ("devices", "training", "calls")] == [4, True, 2]
  (result,) = written["results"]
  assert (result["model"], result["batch_size"], result["relative_error"]) == ("tiny", 8, 0)
  assert result["images_per_s"] == pytest.approx(8e3 / result["ms"])
  assert min(result["start_s"], result["memory_mib"]) > 0
  assert result["accessed_mib"] > result["arguments_mib"] > 0 < result["temporary_mib"]
  macs = repjax.analysis.summary(repjax.create_model("tiny"), 16).train.macs
  assert result["gflops"] * result["ms"] * 1e6 == pytest.approx(3 * 2 * 8 * macs)


def test_published_accuracies_are_those_of_the_documents(load):
  text = (tiny.ROOT / "docs" / "models.md").read_text()
  rows = re.findall(r"^\| `(\w+)` \| [\d,]+ \| [\d,]+ \| (\d\d\.\d\d)", text, re.MULTILINE)
  stated = {name: float(value) for name, value in rows}
  published = load("plot").PUBLISHED
  assert published == {name: stated[name] for name in published}


def test_the_picture(load, tmp_path):
  pytest.importorskip("matplotlib")
  plot = load("plot")
  rows = [
    {"model": model, "batch_size": size, "dtype": "float32", "subject": name, "images_per_s": speed}
    for model, speed in (("repvgg_a0", 30.0), ("repvgg_b1", 4.0), ("of_no_paper", 1.0))
    for size in (1, 8)
    for name in load("subjects").KINDS
  ]
  path = tmp_path / "folder" / "picture.png"
  plot.save(rows, path)
  assert path.read_bytes().startswith(b"\x89PNG")
  with pytest.raises(InputError, match="none of these models has a published accuracy"):
    plot.save(rows[-1:], path)


NETWORKS = {
  "repvgg": ("repvgg_a0", {**tiny.OVERRIDES, "stage_sizes": (2, 2, 2, 1), "groups": 2}),
  "basic": ("resnet18", {"block": "basic", "widths": (6, 8, 12, 16), "stem_features": 6}),
  "bottleneck": ("resnet50", {"widths": (8, 16, 24, 32), "stem_features": 6}),
}


@pytest.mark.parametrize("deploy", [False, True])
@pytest.mark.parametrize("network", NETWORKS)
def test_the_network_in_pytorch_is_the_same(load, network, deploy):
  torch = pytest.importorskip("torch")
  name, overrides = NETWORKS[network]
  if network != "repvgg":
    overrides = {**overrides, "stage_sizes": (1, 1, 2, 1)}
  model = repjax.create_model(name, num_classes=5, deploy=deploy, **overrides)
  images = np.random.default_rng(0).standard_normal((2, 64, 64, 3), np.float32)
  variables = random_variables(model, images)
  twin = load("twins").twin(name, model, variables)
  with torch.inference_mode():
    found = twin(torch.from_numpy(images.transpose(0, 3, 1, 2)).contiguous()).numpy()
  expected = np.asarray(jax.jit(model.apply)(variables, images))
  assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(
  "subject", ["torch-eager", "onnxruntime", "openvino", "repjax-onnxruntime", "repjax-openvino"]
)
def test_a_small_run_of_the_others(load, run, subject):
  for package in load("subjects").KINDS[subject].needs:
    pytest.importorskip(package)
  sizes = ("--models", "tiny", "--batch-sizes", 2, "--image-size", 16, "--rounds", 2)
  printed = run(*sizes, "--subjects", "repjax-deploy", subject)
  assert f" {subject} " in printed.splitlines()[-1]
