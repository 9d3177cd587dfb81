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


MISTAKES = {
  "none": (
    [],
    "error: no --config given; the configs are in configs/, for example configs/digits.py",
  ),
  "file": (["--config=configs/none.py"], "No such file or directory: 'configs/none.py"),
  "field": ([A0, "--config.bach_size=64"], 'Did you mean "batch_size" instead of "bach_size"?'),
  "value": (
    [A0, "--config.dataset=imagnet2012"],
    "error: unknown data set 'imagnet2012'; did you mean",
  ),
  "resume": (
    [A0, "--resume=must"],
    "error: runs/repvgg_a0 holds no checkpoint to continue from; is it",
  ),
}
# Imports once what main.py imports, and runs it in a child for each command line.
EACH = """
import json, os, runpy, sys
from absl import app
from ml_collections import config_flags
from repjax import training

main_py, called = sys.argv[1], json.loads(sys.argv[2])
for name, arguments in called.items():
  child = os.fork()
  if not child:
    os.mkdir(name)
    os.dup2(os.open(f"{name}.err", os.O_WRONLY | os.O_CREAT), 2)
    os.chdir(name)
    sys.argv = [main_py, *arguments]
    runpy.run_path(main_py, run_name="__main__")
    sys.exit()
  print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory, cache_home):
  """Where main.py was run with each of MISTAKES, and the statuses that it ended with."""
  home = tmp_path_factory.mktemp("mistakes")
  called = json.dumps({name: arguments for name, (arguments, _) in MISTAKES.items()})
  main = str(tiny.ROOT / "main.py")
  ended = tiny.run_python("-c", EACH, main, called, cwd=home, cache=cache_home)
  return home, dict(line.split() for line in ended.stdout.splitlines())


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named_without_a_traceback_and_nothing_is_written(mistakes, name):
  home, statuses = mistakes
  said = (home / f"{name}.err").read_text()
  assert statuses[name] == "1"
  assert "Traceback" not in said
  assert MISTAKES[name][1] in said
  assert list((home / name).iterdir()) == []


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
