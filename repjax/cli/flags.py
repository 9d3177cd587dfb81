"""The flags that several commands share: one help text each, and what they change in a config.

JAX loads only after a command has parsed its flags, so that `repjax COMMAND --help` is fast.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from repjax import names
from repjax.errors import InputError, sentences, unknown


def file(text: str) -> Path:
  """Returns the file or folder that a flag names; the type of such flags."""
  return _named(names.file, text)


def folder(text: str) -> Path:
  """Returns the folder of a run, an import or an export that a flag names."""
  return _named(names.folder, text)


def source(text: str) -> Path | str:
  """Returns what `repjax.load` takes: a folder, or the name of published weights."""
  return text if text.startswith("hf:") else folder(text)


def _named(check: Callable[[str], Path], text: str) -> Path:
  """Returns a checked name, or raises the error that argparse shows."""
  if text == "-":
    raise argparse.ArgumentTypeError(
      '"-" is a stream in other programs, and this flag names a file or folder; write ./- for one '
      "of that name"
    )
  try:
    return check(text)
  except InputError as error:
    raise argparse.ArgumentTypeError(str(error)) from error


_SHARED: dict[str, dict[str, Any]] = {
  "--workdir": {
    "required": True,
    "type": folder,
    "metavar": "DIR",
    "help": "folder of a run, or of imported weights",
  },
  "--to": {"type": folder, "metavar": "DIR", "help": "folder to make"},
  "--dataset": {
    "metavar": "NAME",
    "help": "TFDS data set, or synthetic for noise (default: the run's data set)",
  },
  "--split": {"help": "split to evaluate on (default: the run's evaluation split)"},
  "--data-dir": {
    "type": folder,
    "metavar": "DIR",
    "help": "folder where TFDS keeps data sets (default: the run's folder, or TFDS's default)",
  },
  "--batch-size": {
    "type": int,
    "metavar": "N",
    "help": "images in a batch (default: the run's batch size)",
  },
  "--num-workers": {
    "type": int,
    "metavar": "N",
    "help": "processes that read images; 0 reads in threads (default: the run's number)",
  },
  "--dtype": {
    "default": "float32",
    "help": "float32, bfloat16 or float16: the type to compute in (default: float32)",
  },
  "--no-verify": {
    "dest": "verify",
    "action": "store_false",
    "help": "read the folder without comparing its files with their checksums",
  },
}
SOURCE: dict[str, Any] = {
  "type": source,
  "help": "folder of a run, an import or an export; or published weights, hf:OWNER/NAME",
}
"""Changes of --workdir for commands that need a model alone, and nothing else from its folder."""
_FIELDS = ("dataset", "data_dir", "batch_size", "num_workers")


def parser(command: str, description: str | None) -> argparse.ArgumentParser:
  """Returns the parser of a command, without flags.

  Args:
    command: name of the command.
    description: text of the help, usually the docstring of the command's module.
  """
  return _Parser(
    prog=f"repjax {command}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )


class _Parser(argparse.ArgumentParser):
  """A parser that answers every mistake with one paragraph and the exit status 1."""

  # The type stubs overload this method, which one plain signature cannot repeat.
  def parse_args(  # pyright: ignore[reportIncompatibleMethodOverride]
    self, args: Any = None, namespace: Any = None
  ) -> Any:
    """Parses flags. An unknown flag is named first, since it may be a required one misspelt."""
    args = sys.argv[1:] if args is None else list(args)
    for name in _flags_in(args):
      # Python takes the beginning of a flag for the flag.
      if not any(known.startswith(name) for known in self._option_string_actions):
        self.error(str(unknown(f"flag of {self.prog}:", name, self._option_string_actions)))
    return super().parse_args(args, namespace)

  def error(self, message: str) -> NoReturn:
    """Ends the program with the message."""
    sys.exit(f"error: {sentences(message, f'`{self.prog} --help` describes all flags')}")


def _flags_in(args: Sequence[str]) -> list[str]:
  """Returns the names of long flags, up to a "--" that ends them."""
  until = args.index("--") if "--" in args else len(args)
  return [arg.partition("=")[0] for arg in args[:until] if arg.startswith("--")]


def add(parser: argparse.ArgumentParser, *names: str, **changes: Any) -> None:
  """Adds shared flags to a parser.

  Args:
    parser: parser of a command.
    *names: names of the flags.
    **changes: arguments of `add_argument` that differ in this command, such as `help`.
  """
  for name in names:
    parser.add_argument(name, **_SHARED[name] | changes)


def config_changes(arguments: argparse.Namespace) -> dict[str, Any]:
  """Returns the config fields that shared flags change; None keeps the run's value."""
  found = {field: getattr(arguments, field, None) for field in _FIELDS}
  # Configs hold JSON, which has no paths.
  return {field: str(each) if isinstance(each, Path) else each for field, each in found.items()}


def read_config(arguments: argparse.Namespace, **changes: Any) -> Any:
  """Returns the config of the run in --workdir, with the changes that the flags ask for.

  Args:
    arguments: parsed flags, among them `workdir`.
    **changes: more fields and their values; None keeps the run's value.

  Raises:
    InputError: the folder holds no run.
  """
  from repjax import training

  return training.read_config(arguments.workdir, **config_changes(arguments), **changes)


def use_noise_for_import(config: Any, arguments: argparse.Namespace, split: str | None) -> None:
  """Points the config of imported weights at synthetic noise, unless a flag names images.

  Imported weights come without a data set. Noise is enough to compare the two forms of a model.

  Args:
    config: from `read_config`; changed in place.
    arguments: parsed flags, among them `workdir` and `dataset`.
    split: the evaluation split that a flag names.
  """
  from repjax import runs

  is_import = runs.import_file(arguments.workdir).exists()
  if is_import and arguments.dataset is None and split is None:
    config.dataset, config.eval_split = "synthetic", "sample"
