"""main.py as people call it."""

import json

import pytest
from absl import flags
from absl.testing import flagsaver

import main
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

A0 = f"--config={tiny.ROOT}/configs/repvgg_a0.py"


@pytest.fixture
def run_main(tmp_path, cache_home):
  """Runs main.py in an empty folder, in a process of its own."""

  def run(*arguments):
    return tiny.run_python(str(tiny.ROOT / "main.py"), *arguments, cwd=tmp_path, cache=cache_home)

  return run


@pytest.fixture
def call_main(tmp_path, monkeypatch, quick_programs):
  """Calls what main.py calls, in this process and an empty folder; the text that it ends with."""
  del quick_programs
  monkeypatch.chdir(tmp_path)
  held = flagsaver.save_flag_values()

  def call(*arguments):
    argv = ["main.py", *arguments]
    monkeypatch.setattr("sys.argv", argv)  # where fields of a config are looked for
    with pytest.raises(SystemExit) as stop:
      main.main(main.parse_flags(argv))
    return stop.value.code

  yield call
  flagsaver.restore_flag_values(held)
  flags.FLAGS.unparse_flags()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "error: no --config given; the configs are in configs/, for example configs/digits.py"),
    ([A0, "--resume=must"], "error: runs/repvgg_a0 holds no checkpoint to continue from; is it"),
  ],
  ids=["none", "resume"],
)
def test_a_mistake_is_named_without_a_traceback_and_nothing_is_written(
  run_main, tmp_path, arguments, message
):
  ended = run_main(*arguments)
  assert ended.returncode == 1
  assert "Traceback" not in ended.stderr
  assert message in ended.stderr
  assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--config=configs/none.py"], "No such file or directory: 'configs/none.py"),
    ([A0, "--config.bach_size=64"], 'Did you mean "batch_size" instead of "bach_size"?'),
    ([A0, "stray"], "error: unexpected arguments ['stray']; fields are set as"),
    ([A0, "--config.dataset=imagnet2012"], "error: unknown data set 'imagnet2012'; did you mean"),
  ],
  ids=["file", "field", "stray", "value"],
)
def test_other_mistakes_end_in_one_paragraph_too(call_main, tmp_path, arguments, message):
  said = call_main(*arguments)
  assert message in said
  assert "\n" not in said
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
