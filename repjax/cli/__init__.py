"""The command line: `repjax COMMAND`, or `python -m repjax COMMAND`."""

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
  "train": "trains a model from a config, or continues a run",
  "convert": "re-parameterizes a run's best checkpoint into its deploy form",
  "evaluate": "evaluates a model on a whole split",
  "predict": "classifies pictures",
  "export": "writes StableHLO or ONNX files",
  "quantize": "writes an ONNX file in 8 bits",
  "import": "imports weights of others",
  "export-weights": "writes weights in the names of others",
  "prepare-dataset": "makes a data set from a folder, TFRecord files or TFDS",
  "recalibrate": "re-estimates batch norms",
  "summary": "counts parameters and multiplications of a model",
  "report": "draws a run",
}
_MODULES = {"import": "import_weights"}


def main(argv: Sequence[str] | None = None) -> None:
  """Runs one command.

  Args:
    argv: its name and its arguments; None: those of this process.
  """
  argv = sys.argv[1:] if argv is None else argv
  if not argv or argv[0] not in COMMANDS:
    rows = "\n".join(f"  {name:<18}{text}" for name, text in COMMANDS.items())
    sys.exit(f"usage: repjax COMMAND ...\n\n{rows}")
  name, *rest = argv
  module = _MODULES.get(name, name.replace("-", "_"))
  importlib.import_module(f"repjax.cli.{module}").main(rest)
