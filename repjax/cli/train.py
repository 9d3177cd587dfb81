"""Trains a model from a config, or continues the run that the workdir holds.

Examples:
  repjax train --config digits
  repjax train --config repvgg_a2 --workdir runs/a2 --config.batch_size=64
  repjax train --config my_config.py
  repjax train --config digits_ablation:plain

A config is a Python file with a function get_config(). After a colon follows an argument of this
function, for configs that take one. Every field of a config can be changed on the command line, as
in --config.batch_size=64; repjax/config.py documents the fields. When a run is stopped, the same
command continues the run from its last checkpoint.
"""

import argparse
import difflib
import functools
import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from repjax import configs, schema
from repjax.cli import flags
from repjax.config import FIELDS, OVERRIDES, RESUME
from repjax.errors import InputError, one_paragraph, printable, unknown

_FLAGS = ("--config", "--workdir", "--resume", "--distributed")
# Flags of tuples that may be None.
_OPTIONAL = {
  f"--config.{prefix}{field.name}"
  for prefix, table in (("", FIELDS), ("model_overrides.", OVERRIDES))
  for field in table
  if field.default is None and field.kind is tuple
}


def main(argv: Sequence[str]) -> None:
  """Trains, or continues, in the workdir that the flags name."""
  arguments, changes = parse(argv)
  with one_paragraph():
    train(arguments, changes)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
  """Returns the flags of this command, and the remaining arguments: changes to the config."""
  parser = flags.parser("train", __doc__)
  parser.allow_abbrev = False  # what is no flag here changes the config
  parser.add_argument(
    "--config", metavar="CONFIG", help="name of a config, such as repvgg_a2, or its file"
  )
  flags.add(
    parser,
    "--workdir",
    required=False,
    help="folder of the run (default: runs/ and the name of the config)",
  )
  parser.add_argument(
    "--resume",
    choices=RESUME,
    default="auto",
    help="auto continues the workdir's run if there is one; must requires a run; never refuses one "
    "(default: auto)",
  )
  parser.add_argument(
    "--distributed", action="store_true", help="join other processes that train the same run"
  )
  return parser.parse_known_args(argv)


def train(arguments: argparse.Namespace, changes: Sequence[str]) -> None:
  """Trains as the parsed flags say.

  Args:
    arguments: from `parse`.
    changes: arguments such as "--config.batch_size=64".

  Raises:
    InputError: there is no such config or field, or a value that no run could use.
  """
  if arguments.config is None:
    for change in changes:
      name = change.partition("=")[0]
      if name.startswith("--") and not name.startswith("--config."):
        raise unknown("flag", name, _FLAGS)
    raise InputError(
      "no --config given; name one of the configs, such as digits, or its file, such as "
      "configs/digits.py"
    )
  file = config_file(arguments.config)
  config = load_config(file, changes)
  workdir = arguments.workdir or default_workdir(file)
  from absl import logging

  from repjax import training
  from repjax.training import processes

  logging.set_verbosity(logging.WARNING)  # Orbax logs many lines about every save
  with processes.joined(arguments.distributed):
    training.train(config, workdir, resume=arguments.resume)


def default_workdir(file: str) -> str:
  """Returns runs/NAME for the config NAME, and runs/NAME_ARGUMENT if the config has an argument."""
  path, _, argument = file.partition(":")
  stem = Path(path).stem
  return f"runs/{stem}_{argument}" if argument else f"runs/{stem}"


def config_file(name: str) -> str:
  """Returns the path of a config's file.

  Args:
    name: a path, which is returned as it is, or the name of a config of `repjax.configs`. After a
      colon may follow an argument of `get_config`.

  Raises:
    InputError: no config has this name.
  """
  stem, colon, argument = name.partition(":")
  if not stem.isidentifier():
    return name
  known = _known_configs()
  if stem not in known:
    raise unknown("config", stem, known)
  return f"{known[stem]}{colon}{argument}"


def _known_configs() -> dict[str, str]:
  """Returns the name of each config of `repjax.configs`, and its file."""
  # The path of `repjax.configs` is the folder of the package, or in a checkout also configs/. A
  # file in an earlier folder wins, as in an import.
  folders = [Path(folder) for folder in reversed(configs.__path__)]
  files = [file for folder in folders for file in folder.glob("*.py")]
  return {file.stem: str(file) for file in files if file.stem not in ("__init__", "common")}


def load_config(file: str, changes: Sequence[str]) -> Any:
  """Returns the ConfigDict of a file, with the changes of the command line.

  Args:
    file: path of the config; after a colon may follow an argument of `get_config`.
    changes: arguments such as "--config.batch_size=64".

  Raises:
    InputError: the file does not exist or cannot be run, or a change names no field of the config
      or gives it a wrong value.
  """
  from absl import flags as absl_flags

  path = Path(file.partition(":")[0])
  if not path.is_file():
    raise _no_config(path)
  try:
    config, rest = _parsed(file, changes)
  except absl_flags.UnrecognizedFlagError as error:
    raise unknown("flag", f"--{error.flagname}", _FLAGS) from error
  except (AttributeError, KeyError, TypeError, OSError, absl_flags.Error) as error:
    _check_runs(file)
    raise _mistake(file, changes, error) from error
  if rest:
    raise InputError(f"unexpected arguments {rest}; fields are set as --config.batch_size=64")
  return config


def _parsed(file: str, changes: Sequence[str]) -> tuple[Any, list[str]]:
  """Returns the config of a file with some changes, and the arguments that change nothing."""
  from absl import flags as absl_flags
  from ml_collections import config_flags

  # The class of tuples reads "None" as a tuple that holds None, so such changes are made here.
  last = {change.partition("=")[0]: change for change in changes}
  unset = {name for name, change in last.items() if change == f"{name}=None"} & _OPTIONAL
  without = unset | {f"{name}=None" for name in _OPTIONAL}
  kept = [each for each in changes if not {each, each.partition("=")[0]} & without]
  argv = ["repjax train", f"--config={file}", *kept]
  # Flags of this call alone: the global ones would keep the config of an earlier call.
  values = absl_flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  rest = values(argv)[1:]
  config = holder.value
  _ = rest or config.model  # A file that failed to load says so only now.
  for flag in unset:
    *path, name = flag.split(".")[1:]
    table = functools.reduce(operator.getitem, path, config)
    with table.ignore_type():
      table[name] = None
  return config, rest


def _no_config(path: Path) -> InputError:
  """Returns the error for a config file that does not exist, with files of similar names."""
  files = {file.stem: str(file) for file in path.parent.glob("*.py")} | _known_configs()
  close = difflib.get_close_matches(path.stem, files, n=3, cutoff=0.5)
  hint = (
    f"did you mean {' or '.join(files[name] for name in close)}?"
    if close
    else ("give the name of a config, such as digits, or the path of a file")
  )
  kind = "is a folder" if path.is_dir() else "does not exist"
  return InputError(f"the config file {path} {kind}; {hint}")


def _check_runs(file: str) -> None:
  """Raises InputError if a config file cannot be run even without changes."""
  try:
    _parsed(file, [])
  except Exception as error:  # The file is a program, which may raise anything.
    name, colon, argument = file.partition(":")
    if colon and _runs(name):
      raise InputError(
        f"the config {name} does not take {printable(repr(argument), 60)} after the colon: "
        f"{_reason(error)}. Leave the colon out, or look at the first lines of the file"
      ) from error
    text = str(error).strip().splitlines()[-1] if str(error).strip() else ""
    raise InputError(
      f"the config {file} cannot be run: {type(error).__name__}: {text}. Its function get_config() "
      "must return a config that starts from repjax.config.default()"
    ) from error


def _runs(file: str) -> bool:
  """Tells if a config file can be run without changes."""
  try:
    _parsed(file, [])
  except Exception:  # The file is a program, which may raise anything.
    return False
  return True


def _reason(error: BaseException) -> str:
  """Returns the text of the error that a config file raised.

  ml_collections raises this error again, once or twice, with the traceback in its text.
  """
  while error.__context__ is not None:
    error = error.__context__
  return str(error)


def _mistake(file: str, changes: Sequence[str], error: Exception) -> InputError:
  """Returns the error for changes that a config does not take.

  Args:
    file: path of the config.
    changes: arguments such as "--config.batch_size=64".
    error: exception of ml_collections.
  """
  config, _ = _parsed(file, [])
  for name, value in _assignments(changes):
    held, path = config, ""
    for part in name.split("."):
      known = list(held) if hasattr(held, "keys") else []
      if part not in known:
        return unknown("config field", f"{path}{part}", [f"{path}{each}" for each in known])
      held, path = held[part], f"{path}{part}."
    # Each error about a value begins with the flag as it was given.
    if f"--config.{name}={value}:" in str(error):
      wanted, got = _wanted(name), schema.shown(value)
      return InputError(f"config.{name} {wanted}, got {got}")
  return InputError(" ".join(str(error).split()))


def _assignments(changes: Sequence[str]) -> Iterator[tuple[str, str]]:
  """Yields the name and the text of each change."""
  for change, after in zip(changes, (*changes[1:], "")):
    name, is_assigned, value = change.partition("=")
    if name.startswith("--config."):
      yield name.removeprefix("--config."), value if is_assigned else after


def _wanted(name: str) -> str:
  """Returns the values in words that a field takes."""
  rows = {field.name: field for field in FIELDS}
  rows |= {f"model_overrides.{field.name}": field for field in OVERRIDES}
  if name not in rows:
    return "does not take this value"
  field = rows[name]
  is_tuple = (field.kind or type(field.default)) is tuple
  return "must be a tuple such as (1, 2)" if is_tuple else f"must be {field.rule.wanted}"
