"""The benchmark of the training step."""

import json
import runpy

import pytest

import repjax.models
from repjax.models.repvgg import RepVGG
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")
SCRIPT = str(tiny.ROOT / "scripts" / "benchmark_training.py")


@pytest.fixture
def benchmark(monkeypatch, capsys):
  """Runs the script in this process; what it printed."""

  def run(*arguments):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    monkeypatch.setitem(repjax.models._MODELS, "tiny", (RepVGG, tiny.OVERRIDES))
    monkeypatch.setattr("sys.argv", [SCRIPT, *map(str, arguments)])
    runpy.run_path(SCRIPT, run_name="__main__")
    return capsys.readouterr().out

  return run


def test_it_times_a_step_and_writes_what_it_prints(benchmark, tmp_path):
  path = tmp_path / "results" / "file.json"
  sizes = ("--batch-sizes", 8, "--image-size", 16, "--rounds", 3, "--steps", 2)
  printed = benchmark("--models", "tiny", *sizes, "--no-torch", "--json", path)
  written = json.loads(path.read_text())
  assert [written[name] for name in ("devices", "dtype", "image_size")] == [4, "float32", 16]
  (result,) = written["results"]
  assert (result["model"], result["batch_size"]) == ("tiny", 8)
  median = sorted(result["repjax_ms"])[1]
  assert len(result["repjax_ms"]) == 3
  assert result["repjax_images_per_s"] == pytest.approx(8 / median * 1e3)
  assert min(result["compile_s"], result["planned_mib"]) > 0
  name, batch_size, rate, *_ = printed.splitlines()[-1].split()
  assert (name, batch_size) == ("tiny", "8")
  assert rate == f"{result['repjax_images_per_s']:,.1f}"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("--models", "repvgg_a9"), "error: unknown model 'repvgg_a9'; did you mean"),
    (("--batch-sizes", 6), "error: batch_size 6 does not divide over 4 devices; use 4 or 8"),
  ],
)
def test_a_mistake_is_one_paragraph(benchmark, arguments, message):
  with pytest.raises(SystemExit) as stop:
    benchmark(*arguments, "--no-torch")
  assert stop.value.code.startswith(message)
