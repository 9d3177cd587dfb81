"""Trains a model from a config: python main.py --config configs/digits.py"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from repjax import training
from repjax.errors import InputError, one_paragraph
from repjax.training import processes
from repjax.training.interruption import status_of

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's configuration.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; continues what it holds. Default: runs/<config name>."
)
_DISTRIBUTED = flags.DEFINE_bool(
  "distributed", False, "Be one of several processes that train together, see the README."
)
_RESUME = flags.DEFINE_enum(
  "resume",
  "auto",
  ["auto", "must", "never"],
  "Whether the workdir's run is continued: if there is one, there must be one, or must be none.",
)


def parse_flags(argv: list[str]) -> list[str]:
  """Parses the command line; a config file or field that does not exist is one paragraph."""
  with one_paragraph():
    try:
      rest = app.parse_flags_with_usage(argv)
      if _CONFIG.value is not None and len(rest) == 1:
        _ = _CONFIG.value.model  # a config file that failed to load says so only now
        return rest
    except OSError as error:
      text = " ".join(str(error).split()).rpartition("] ")[2]  # behind where it was looked for
      raise InputError(f"the config file cannot be loaded, look at its path: {text}") from error
    except (AttributeError, KeyError, TypeError) as error:  # ml_collections' kinds
      text = " ".join(str(error).replace("\\n", "; ").replace("\\'", "").split()).strip("'\"")
      raise InputError(f"unknown config field {text} (all fields: repjax.config)") from error
    raise InputError(
      f"unexpected arguments {rest[1:]}; fields are set as --config.batch_size=64"
      if rest[1:]
      else "no --config given; the configs are in configs/, for example configs/digits.py"
    )


def main(argv: Sequence[str]) -> None:
  """Trains, or continues, in the workdir."""
  try:
    app.run(_train, argv=["repjax train", *argv], flags_parser=parse_flags)
  except KeyboardInterrupt as stop:
    print("stopped; the same command continues from the last checkpoint, if there is one yet")
    sys.exit(status_of(stop))


def _train(argv: list[str]) -> None:
  """Runs what the parsed flags say."""
  del argv
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax tells much about every save
  config_file = config_flags.get_config_filename(flags.FLAGS["config"])
  with one_paragraph():
    workdir = _WORKDIR.value or f"runs/{Path(config_file).stem}"
    with processes.joined(_DISTRIBUTED.value):
      training.train(_CONFIG.value, workdir, resume=_RESUME.value)
