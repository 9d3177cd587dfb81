"""The command line: `repjax COMMAND`, or `python -m repjax COMMAND`."""

import importlib
import signal
import sys
from collections.abc import Sequence

import repjax
from repjax import extras
from repjax.cli.ending import session, stop, stop_training
from repjax.errors import one_paragraph, unknown

COMMANDS = {
  "train": "trains a model from a config, or continues a run",
  "convert": "re-parameterizes a run's best checkpoint into its deploy form",
  "evaluate": "measures a model's accuracy on a whole split",
  "predict": "prints the most probable labels of images",
  "export": "writes a model as StableHLO or ONNX",
  "quantize": "writes a model as an ONNX file in 8 bits",
  "import": "reads a published checkpoint into a new workdir",
  "export-weights": "writes a model's weights under the names of published checkpoints",
  "prepare-dataset": "makes a data set from a folder, from TFRecord files or with TFDS",
  "recalibrate": "re-estimates the batch norm statistics of a run",
  "summary": "prints the parameters, multiplications and depth of a model",
  "report": "draws the curves and branches of a run",
}
_EXTRAS = {
  **dict.fromkeys(("train", "convert", "evaluate", "prepare-dataset", "recalibrate"), "train"),
  "quantize": "train,onnx",
}
"""Commands to the extras of `pip install` that each needs as a whole."""

_MODULE_OF = {"import": "import_weights"}  # `import` cannot name a module

_ROWS = "\n".join(f"  {name:<17}{text}" for name, text in COMMANDS.items())
_HELP = f"""usage: repjax COMMAND ...

Structural re-parameterization: train with branches, ship the plain network.

commands:
{_ROWS}

repjax COMMAND --help describes a command and its flags.
repjax --version prints the version."""


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command.

  Args:
    argv: the command's name and arguments. None takes them from `sys.argv`.

  Raises:
    SystemExit: the command failed or was stopped, or no command has this name.
  """
  name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
  with session(stop_training if name == "train" else stop):
    _run(name, rest)


def program(argv: Sequence[str] | None = None) -> None:
  """Runs one command as the whole program, as `main`; Ctrl-C after its end shows no traceback."""
  try:
    main(argv)
  finally:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _run(name: str, rest: Sequence[str]) -> None:
  """Runs the command of a name with its arguments."""
  if name in ("-h", "--help"):
    print(_HELP)
  elif name == "--version":
    print(f"repjax {repjax.__version__}")
  else:
    with one_paragraph():
      if name not in COMMANDS:
        raise unknown("command", name, COMMANDS)
    module = _MODULE_OF.get(name, name.replace("-", "_"))
    try:
      with extras.explained(f"`repjax {name}`", _EXTRAS.get(name)):
        importlib.import_module(f"repjax.cli.{module}").main(rest)
    except extras.MissingPackageError as error:
      raise SystemExit(f"error: {error}") from None
