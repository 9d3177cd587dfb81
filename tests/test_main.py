"""main.py as people call it."""

import json

import pytest

from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture
def run_main(tmp_path, cache_home):
  """Runs main.py in an empty folder."""

  def run(*arguments):
    return tiny.run_python(str(tiny.ROOT / "main.py"), *arguments, cwd=tmp_path, cache=cache_home)

  return run


A0 = f"--config={tiny.ROOT}/configs/repvgg_a0.py"


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "error: no --config given; the configs are in configs/, for example configs/digits.py"),
    (["--config=configs/none.py"], "No such file or directory: 'configs/none.py"),
    ([A0, "--config.bach_size=64"], 'Did you mean "batch_size" instead of "bach_size"?'),
    ([A0, "--config.dataset=imagnet2012"], "error: unknown data set 'imagnet2012'; did you mean"),
    ([A0, "--resume=must"], "error: runs/repvgg_a0 holds no checkpoint to continue from; is it"),
  ],
  ids=["none", "file", "field", "value", "resume"],
)
def test_a_mistake_is_named_without_a_traceback_and_nothing_is_written(
  run_main, tmp_path, arguments, message
):
  finished = run_main(*arguments)
  assert finished.returncode == 1
  assert "Traceback" not in finished.stderr
  assert message in finished.stderr
  assert list(tmp_path.iterdir()) == []


def test_a_run_goes_into_a_folder_called_like_its_config(run_main, finished, tmp_path, digits_dir):
  # The finished run's programs, which its fixture has compiled.
  config = tmp_path / "small.py"
  config.write_text(
    "from tests.training import tiny\n"
    f"def get_config():\n  return tiny.config({str(digits_dir)!r})\n"
  )
  ended = run_main(f"--config={config}", "--config.log_every_steps=5")
  assert ended.returncode == 0, ended.stderr
  lines = ended.stdout.splitlines()
  assert lines[0] == "workdir: runs/small"
  assert lines[-2:] == ["saved: runs/small/deploy", "picture: runs/small/report.png"]
  held = json.loads((tmp_path / "runs" / "small" / "config.json").read_text())
  assert held["log_every_steps"] == 5
  assert (tmp_path / "runs" / "small" / "deploy" / "report.json").exists()
