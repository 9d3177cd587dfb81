"""Trains a model from a config: python main.py --config configs/digits.py"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from repjax import training
from repjax.errors import one_paragraph

_CONFIG = config_flags.DEFINE_config_file("config", None, "File with the run's configuration.")
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; continues what it holds. Default: runs/<config name>."
)


def main(argv: list[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  if flags.FLAGS["verbosity"].using_default_value:
    logging.set_verbosity(logging.WARNING)  # Orbax tells much about every save
  workdir = _WORKDIR.value
  if workdir is None:
    config_file = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = f"runs/{Path(config_file).stem}"
  with one_paragraph():
    training.train(_CONFIG.value, workdir)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  try:
    app.run(main)
  except KeyboardInterrupt:
    sys.exit("interrupted; the same command continues from the last checkpoint")
