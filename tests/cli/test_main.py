"""Tests of `repjax train` and main.py."""

import json
import shutil
import subprocess
import sys

import pytest

from repjax import configs
from repjax.cli.train import config_file, default_workdir, load_config
from repjax.errors import InputError
from tests.cli.helpers import stop_of
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

A0 = f"--config={tiny.ROOT}/configs/repvgg_a0.py"


@pytest.fixture
def run_main(tmp_path, cache_home):
  """Runs main.py in an empty folder, in a new process."""

  def run(*arguments):
    return tiny.run_python(str(tiny.ROOT / "main.py"), *arguments, cwd=tmp_path, cache=cache_home)

  return run


@pytest.fixture
def train(run_command, tmp_path, monkeypatch, quick_programs):
  """Runs `repjax train` in an empty folder, while sys.argv holds unrelated arguments."""
  del quick_programs
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr("sys.argv", ["pytest", "--config.batch_size=7"])
  return lambda *arguments: run_command("train", *arguments)


def test_main_names_a_mistake_without_a_traceback_and_writes_nothing(run_main, tmp_path):
  ended = run_main(A0, "--resume=must")
  assert ended.returncode == 1
  assert "Traceback" not in ended.stderr
  assert "error: runs/repvgg_a0 holds no checkpoint to continue from; is it" in ended.stderr
  assert list(tmp_path.iterdir()) == []


PROGRAM = """
import importlib.util
from repjax import configs
from repjax.cli.train import config_file
print(*configs.__path__, config_file("digits"), importlib.util.find_spec("repjax.configs.foreign"))
"""


def test_a_folder_called_configs_beside_an_installed_package_is_not_read(tmp_path):
  package = tmp_path / "repjax"
  ignored = shutil.ignore_patterns("__pycache__")
  shutil.copytree(tiny.ROOT / "repjax", package, ignore=ignored)
  # As in a wheel, the recipes lie in the package.
  shutil.copytree(tiny.ROOT / "configs", package / "configs", ignore=ignored, dirs_exist_ok=True)
  (tmp_path / "configs").mkdir()
  for name in ("digits", "foreign"):
    (tmp_path / "configs" / f"{name}.py").write_text("raise SystemExit('foreign code')\n")
  ended = subprocess.run(
    [sys.executable, "-c", PROGRAM], cwd=tmp_path, env={}, capture_output=True, text=True
  )
  assert ended.returncode == 0, ended.stderr
  assert ended.stdout.split() == [
    *map(str, (package / "configs", package / "configs" / "digits.py", None))
  ]


def test_a_config_of_the_package_wins_over_one_of_a_later_folder(tmp_path, monkeypatch):
  (tmp_path / "digits.py").touch()
  monkeypatch.setattr(configs, "__path__", [*configs.__path__, str(tmp_path)])
  assert config_file("digits") == str(tiny.ROOT / "configs" / "digits.py")


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_a_config_may_have_an_argument():
  file = config_file("digits_ablation:plain")
  assert file == f"{tiny.ROOT / 'configs' / 'digits_ablation.py'}:plain"
  assert load_config(file, []).model_overrides.branches == ("conv3x3",)
  assert default_workdir(file) == "runs/digits_ablation_plain"
  assert default_workdir(config_file("digits_ablation")) == "runs/digits_ablation"


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
def test_a_tuple_that_may_be_none_can_be_set_to_none():
  names = ("class_weights", "model_overrides.strides")
  changes = [f"--config.{name}=None" for name in names]
  config = load_config(config_file("scenes"), ["--config.class_weights=(1,2)", *changes])
  assert config.class_weights is config.model_overrides.strides is None
  config = load_config(config_file("scenes"), [*changes, "--config.class_weights=(1.0,2.0)"])
  assert config.class_weights == (1.0, 2.0)


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
@pytest.mark.parametrize(
  ("name", "reason"),
  [
    ("digits_ablation:nonsense", "known: acb, "),
    ("digits:foo", "takes 0 .* Leave"),
  ],
)
def test_an_argument_that_a_config_does_not_take_is_named(name, reason):
  argument = name.partition(":")[2]
  with pytest.raises(InputError, match=f"does not take '{argument}' after the colon: .*{reason}"):
    load_config(config_file(name), [])


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ([], "error: no --config given"),
    (["--config=configs/none.py"], "the config file configs/none.py does not exist"),
    (["--config=configs/repvgg_a9.py"], "does not exist; did you mean "),
    (["--config=digits_ablation:plane"], "unknown ablation 'plane'; did you mean plain"),
    (["--config=digit_ablation:plain"], "unknown config 'digit_ablation'; did you mean"),
    (["--config=repvgg_a9"], "error: unknown config 'repvgg_a9'; did you mean repvgg_a"),
    ([A0, "--config.bach_size=64"], "unknown config field 'bach_size'; did you mean batch_size"),
    ([A0, "--config.lr=0.1"], "unknown config field 'lr'; did you mean learning_rate?"),
    ([A0, "--config.model_overrides.widthz=3"], "did you mean model_overrides.widths"),
    (
      [A0, "--config.batch_size=many"],
      "error: config.batch_size must be a whole number of at least 1, got 'many'",
    ),
    ([A0, "--config.num_steps", "abc"], "config.num_steps must be a whole number, got 'abc'"),
    ([A0, "--config.mixup=x: y"], "config.mixup must be a number of at least 0, got 'x: y'"),
    ([A0, "--config.qat=maybe"], "config.qat must be true or false, got 'maybe'"),
    ([A0, "--config.model_overrides.widths=(1,"], "config.model_overrides.widths must be a tuple"),
    ([A0, "--workdri=here"], "error: unknown flag '--workdri'; did you mean --workdir?"),
    ([A0, "stray"], "error: unexpected arguments ['stray']; fields are set as"),
    ([A0, "--config.dataset=imagnet2012"], "error: unknown data set 'imagnet2012'; did you mean"),
    (["--config=repvgg_a0", "--config.dataset", "imagnet2012"], "error: unknown data set"),
  ],
  ids=lambda value: None if isinstance(value, list) else value[:60],
)
def test_other_mistakes_end_in_one_paragraph_too(train, tmp_path, arguments, message):
  said = stop_of(train, *arguments)
  assert message in said
  assert "\n" not in said
  assert list(tmp_path.iterdir()) == []


def test_the_help_shows_four_flags_in_plain_words(train, capsys):
  assert stop_of(train, "--help") == 0
  text = capsys.readouterr().out
  for flag in ("--config CONFIG", "--workdir DIR", "--resume {auto,must,never}", "--distributed"):
    assert f"\n  {flag}" in text
  assert "absl" not in text


def test_a_run_goes_into_a_folder_called_like_its_config(run_main, finished, tmp_path, digits_dir):
  # The `finished` fixture has compiled this run's programs.
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


def test_a_misspelt_config_flag_is_named(train):
  assert "unknown flag '--confg'; did you mean --config?" in stop_of(train, "--confg", "digits")
