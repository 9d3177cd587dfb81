"""Tests of `repjax` without a command, of --help and --version, and of mistyped commands."""

import subprocess
import sys

import pytest

import repjax
from repjax.cli import COMMANDS, main
from repjax.deploy.export import FORMATS, PLATFORMS
from repjax.inference import DTYPES
from repjax.quantization.equalization import EQUALIZATIONS
from repjax.quantization.runtime import ACTIVATIONS, CALIBRATIONS
from tests.cli.helpers import stop_of
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)], ids=str)
def test_the_help_lists_every_command(run_command, arguments):
  lines = run_command(*arguments).splitlines()
  for name, text in COMMANDS.items():
    assert f"  {name:<17}{text}" in lines


def test_the_version(run_command):
  assert run_command("--version") == f"repjax {repjax.__version__}\n"


@pytest.mark.parametrize(
  ("name", "close"),
  [
    ("trian", "train"),
    ("prepare_dataset", "prepare-dataset"),
    ("exprot-weights", "export-"),
  ],
)
def test_a_mistyped_command_names_the_closest(name, close):
  text = stop_of(main, [name])
  assert text.startswith(f"error: unknown command '{name}'; did you mean ")
  assert close in text


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_help_with_an_example(name, capsys):
  assert stop_of(main, [name, "--help"]) == 0
  text = capsys.readouterr().out
  assert text.startswith(f"usage: repjax {name} ")
  assert f"\n  repjax {name} " in text


@pytest.mark.parametrize(
  ("name", "choices"),
  [
    ("export", (FORMATS, PLATFORMS, DTYPES)),
    ("predict", (DTYPES,)),
    ("quantize", (ACTIVATIONS, CALIBRATIONS, EQUALIZATIONS)),
  ],
)
def test_the_help_names_every_choice(name, choices, capsys):
  assert stop_of(main, [name, "--help"]) == 0
  text = capsys.readouterr().out
  for choice in (each for kind in choices for each in kind):
    assert choice in text


PROGRAM = """
import sys
from repjax import cli
for name in ["", *cli.COMMANDS]:
  try:
    cli.main([name, "--help"] if name else ["--help"])
  except SystemExit as stop:
    assert stop.code == 0
heavy = {"jax", "numpy", "flax", "orbax", "tensorflow_datasets", "absl"} & {*sys.modules}
assert not heavy, heavy
"""


def test_no_help_loads_jax():
  ended = subprocess.run(
    [sys.executable, "-c", PROGRAM], cwd=tiny.ROOT, capture_output=True, text=True
  )
  assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (
      ["evaluate", "--workdr", "runs/a"],
      ["unknown flag", "'--workdr'", "mean --workdir? `repjax"],
    ),
    (["convert"], ["--workdir", "`repjax convert --help`"]),
    (["evaluate", "--workdir", "x", "--form", "deplyo"], ["'deplyo'", "'deploy'"]),
    (["evaluate", "--workdir", "nowhere"], ["nowhere does not exist. Give the folder of a run"]),
  ],
  ids=["misspelt", "missing", "choice", "folder"],
)
def test_a_mistake_in_the_flags_is_one_paragraph(
  run_command, tmp_path, monkeypatch, arguments, said
):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(SystemExit) as stop:
    run_command(*arguments)
  assert stop.value.code.startswith("error: ")
  assert all(words in stop.value.code for words in said), stop.value.code
