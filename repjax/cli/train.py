"""Trains a model from a config, or continues the run that the workdir holds.

Examples:
  repjax train --config digits
  repjax train --config repvgg_a2 --workdir runs/a2 --config.batch_size=64
  repjax train --config my_config.py

A config is a Python file with a function get_config(). Every field of a config can be changed on
the command line, as in --config.batch_size=64; repjax/config.py documents the fields. When a run is
stopped, the same command continues the run from its last checkpoint.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repjax import configs
from repjax.cli import flags
from repjax.config import RESUME
from repjax.errors import InputError, one_paragraph, unknown


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
    raise InputError(
      "no --config given; name one of the configs, such as digits, or its file, such as "
      "configs/digits.py"
    )
  file = config_file(arguments.config)
  config = load_config(file, changes)
  workdir = arguments.workdir or f"runs/{Path(file.partition(':')[0]).stem}"
  from absl import logging

  from repjax import training
  from repjax.training import processes

  logging.set_verbosity(logging.WARNING)  # Orbax logs many lines about every save
  with processes.joined(arguments.distributed):
    training.train(config, workdir, resume=arguments.resume)


def config_file(name: str) -> str:
  """Returns the path of a config's file.

  Args:
    name: a path, which is returned as it is, or the name of a config of `repjax.configs`.

  Raises:
    InputError: no config has this name.
  """
  if not name.isidentifier():
    return name
  # The path of `repjax.configs` is the folder of the package, or in a checkout also configs/. A
  # file in an earlier folder wins, as in an import.
  folders = [Path(folder) for folder in reversed(configs.__path__)]
  files = [file for folder in folders for file in folder.glob("*.py")]
  known = {file.stem: str(file) for file in files if file.stem not in ("__init__", "common")}
  if name not in known:
    raise unknown("config", name, known)
  return known[name]


def load_config(file: str, changes: Sequence[str]) -> Any:
  """Returns the ConfigDict of a file, with the changes of the command line.

  Args:
    file: path of the config.
    changes: arguments such as "--config.batch_size=64".

  Raises:
    InputError: the file cannot be read, or a change names no field of the config.
  """
  from absl import flags as absl_flags
  from ml_collections import config_flags

  argv = ["repjax train", f"--config={file}", *changes]
  # Flags of this call alone: the global ones would keep the config of an earlier call.
  values = absl_flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
  try:
    rest = values(argv)[1:]
    if not rest:
      _ = holder.value.model  # a file that failed to load says so only now
      return holder.value
  except OSError as error:
    text = " ".join(str(error).split()).rpartition("] ")[2]  # leaves out where it was looked for
    raise InputError(f"the config file cannot be loaded, look at its path: {text}") from error
  except (AttributeError, KeyError, TypeError) as error:  # raised by ml_collections
    text = " ".join(str(error).replace("\\n", "; ").replace("\\'", "").split()).strip("'\"")
    raise InputError(f"unknown config field {text} (all fields: repjax/config.py)") from error
  except absl_flags.UnrecognizedFlagError as error:
    known = ("--config", "--workdir", "--resume", "--distributed")
    raise unknown("flag", f"--{error.flagname}", known) from error
  except absl_flags.Error as error:
    raise InputError(str(error)) from error
  raise InputError(f"unexpected arguments {rest}; fields are set as --config.batch_size=64")
