"""How commands end: by names that cannot be, by signals, and without a reader of their output."""

import os
import signal
import subprocess
import sys

import pytest

from repjax import cli, runs, signals
from repjax.cli import ending
from tests.cli.helpers import stop_of
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

FOLDERS = [
  ("train", "--config", "digits", "--workdir"),
  ("convert", "--workdir"),
  ("convert", "--workdir", "run", "--data-dir"),
  ("evaluate", "--workdir"),
  ("export", "--to", "new", "--workdir"),
  ("export", "--workdir", "run", "--to"),
  ("export-weights", "--to", "a.safetensors", "--workdir"),
  ("import", "--from", "a.pth", "--workdir"),
  ("predict", "a.jpg", "--workdir"),
  ("prepare-dataset", "--from-folder", "pets", "--name", "pets", "--data-dir"),
  ("prepare-dataset", "--from-tfrecord", "pets", "--to"),
  ("quantize", "--workdir"),
  ("quantize", "--workdir", "run", "--to"),
  ("recalibrate", "--undo", "--workdir"),
  ("report", "--workdir"),
  ("report", "--workdir", "run", "--compare"),
  ("summary", "--workdir"),
]
FILES = [
  ("export-weights", "--workdir", "run", "--to"),
  ("import", "--workdir", "new", "--from"),
  ("predict", "--workdir", "run"),
  ("predict", "--workdir", "run", "a.jpg", "--csv"),
  ("prepare-dataset", "--name", "pets", "--from-folder"),
  ("report", "--workdir", "run", "--output"),
]


@pytest.fixture
def refusal(run_command, tmp_path, monkeypatch):
  """Runs a command in an empty folder that must stay empty; returns its error."""
  monkeypatch.chdir(tmp_path)

  def run(*arguments):
    said = stop_of(run_command, *arguments)
    assert isinstance(said, str)
    assert said.startswith("error: ")
    assert said.isprintable()
    assert list(tmp_path.iterdir()) == []
    return said

  return run


@pytest.mark.parametrize("arguments", FOLDERS, ids=" ".join)
@pytest.mark.parametrize("name", ["", "-", "gs://bucket/run", "a\\b", "a\nb", "a\0b", "é" * 200])
def test_a_folder_that_cannot_be_is_refused_by_every_command(refusal, arguments, name):
  assert arguments[-1] in refusal(*arguments, name)


@pytest.mark.parametrize("arguments", FILES, ids=" ".join)
@pytest.mark.parametrize("name", ["", "gs://bucket/file", "a\0b", "é" * 200])
def test_a_file_that_cannot_be_is_refused_by_every_command(refusal, arguments, name):
  said = refusal(*arguments, name)
  assert any(words in said for words in ("is empty", "is a URL", "NUL", "255 bytes"))


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections' own
@pytest.mark.parametrize(("config", "field"), [("digits", "data_dir"), ("finetune", "init_from")])
@pytest.mark.parametrize("name", ["s3://bucket/sets", "a\\b", "é" * 200])
def test_a_folder_in_a_config_that_cannot_be_is_refused(refusal, config, field, name):
  said = refusal("train", "--config", config, "--config.dataset=digits", f"--config.{field}={name}")
  assert any(words in said for words in ("is a URL", "backslash", "255 bytes"))


@pytest.mark.parametrize("arguments", [each for each in FOLDERS if "--config" not in each])
def test_a_file_in_the_place_of_a_folder_is_one_paragraph(
  run_command, tmp_path, monkeypatch, arguments
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.pth").write_text("text")
  said = stop_of(run_command, *arguments, "a.pth")
  assert isinstance(said, str)
  assert said.startswith("error: ")
  assert "\n" not in said


@pytest.fixture
def start(tmp_path, cache_home):
  """Runs a Python program in a process of its own, with the streams that are given."""

  def run(*arguments, **streams):
    environment = {
      "HOME": str(tmp_path),
      "JAX_NUM_CPU_DEVICES": "4",
      "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
      "JAX_PLATFORMS": "cpu",
      "PATH": os.defpath,
      "PYTHONPATH": str(tiny.ROOT),
      "XDG_CACHE_HOME": str(cache_home),
      "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=tmp_path, env=environment, text=True, **streams)

  return run


# A signal comes when a package is looked for, which is in the middle of imports.
IMPORTING = """
import os, signal, sys
from repjax import cli

class Finder:
  def find_spec(self, name, path=None, target=None):
    if name == sys.argv[2]:
      os.kill(os.getpid(), getattr(signal, sys.argv[1]))

sys.meta_path.insert(0, Finder())
cli.program(sys.argv[3:])
"""


@pytest.mark.parametrize(
  ("number", "package", "command", "status"),
  [
    ("SIGINT", "numpy.linalg", ["summary", "repvgg_a0"], 130),
    pytest.param("SIGHUP", "jax", ["summary", "repvgg_a0"], 129, marks=pytest.mark.proof),
    pytest.param(
      *("SIGINT", "orbax", ["train", "--config", "digits"], 130), marks=pytest.mark.proof
    ),
    ("SIGUSR1", "flax", ["train", "--config", "digits"], 0),
  ],
  ids=str,
)
def test_a_signal_while_packages_are_imported_is_one_line(start, number, package, command, status):
  ended = start("-c", IMPORTING, number, package, *command, capture_output=True)
  assert ended.returncode == status, ended.stderr
  assert (ended.stderr + ended.stdout).count("stopped;") == 1
  assert "Traceback" not in ended.stderr
  assert len(ended.stderr.splitlines()) <= 1


@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT], ids=["out", "both"])
def test_a_command_whose_reader_has_gone_ends_quietly(start, stderr):
  reader, writer = os.pipe()
  os.close(reader)
  ended = start("-m", "repjax", "--help", stdout=writer, stderr=stderr)
  os.close(writer)
  assert ended.returncode == 141
  assert not ended.stderr


def test_a_command_that_cannot_print_for_lack_of_room_says_so(start):
  with open("/dev/full", "w") as full:
    ended = start("-m", "repjax", "--help", stdout=full, stderr=subprocess.PIPE)
  assert ended.returncode == 1
  assert ended.stderr.startswith("error: the output cannot be written: No space left")
  assert ended.stderr.count("\n") == 1


CLOSED = """
import os, sys
for number in map(int, sys.argv[1].split()):
  os.close(number)
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@pytest.mark.parametrize("closed", ["1", "2", "0 1 2"])
def test_a_command_without_streams_ends_as_always(start, closed, tmp_path):
  # The file must not get the number of a closed stream, into which libraries print.
  program = (
    "import os, sys\nfrom repjax.cli import ending, main\n"
    "with ending.session(ending.stop), open(sys.argv[1], 'w'):\n"
    "  for number in (1, 2): os.write(number, b'text')\n"
    "  main(sys.argv[2:])"
  )
  touched = tmp_path / "touched"
  ended = start("-c", CLOSED, closed, "-c", program, touched, "--version", capture_output=True)
  assert ended.returncode == 0
  assert touched.read_text() == ""


@pytest.mark.proof
def test_training_without_a_reader_goes_on_to_its_end(start, finished, digits_dir, tmp_path):
  del finished  # which has compiled this run's programs
  config = tmp_path / "small.py"
  config.write_text(
    "from tests.training import tiny\n"
    f"def get_config():\n  return tiny.config({str(digits_dir)!r})\n"
  )
  reader, writer = os.pipe()
  os.close(reader)
  ended = start(
    *("-m", "repjax", "train", "--config", config, "--workdir", "run"),
    stdout=writer,
    stderr=subprocess.PIPE,
  )
  os.close(writer)
  assert ended.returncode == 0, ended.stderr
  assert ended.stderr.count("training goes on") == 1
  assert "Traceback" not in ended.stderr
  assert max(runs.checkpoints(tmp_path / "run")) == tiny.STEPS
  assert (tmp_path / "run" / "deploy" / "model.json").exists()


def test_handlers_and_streams_are_put_back(run_command, monkeypatch):
  before = sys.stdout, sys.stderr, sys.excepthook, sys.unraisablehook
  run_command("--version")
  assert (sys.stdout, sys.stderr, sys.excepthook, sys.unraisablehook) == before


def test_ctrl_c_in_the_middle_of_a_command_is_one_line(monkeypatch, capsys):
  def interrupted(*arguments):
    raise KeyboardInterrupt

  monkeypatch.setattr("repjax.cli.summary.main", interrupted)
  assert stop_of(cli.main, ["summary", "repvgg_a0"]) == 130
  assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1])
def test_a_further_signal_does_not_interrupt_the_last_line(number):
  def stopped(first, saved):
    del saved
    os.kill(os.getpid(), number)
    sys.exit(first)

  with pytest.raises(SystemExit) as caught, ending.session(stopped):
    raise signals.error_of(signal.SIGTERM)
  assert caught.value.code == signal.SIGTERM


@pytest.mark.parametrize(
  ("saved", "said"),
  [("step 3/9", "from step 3/9"), ("", "from the last checkpoint, if")],
)
def test_the_last_line_of_training_agrees_with_what_is_saved(capsys, saved, said):
  error = signals.error_of(signal.SIGTERM)
  error.saved = saved
  with pytest.raises(SystemExit), ending.session(ending.stop_training):
    raise error
  assert said in capsys.readouterr().out
