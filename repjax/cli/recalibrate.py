"""Re-estimates the batch norms of a run's best checkpoint, and converts it again.

The statistics of the first batches of the training split, under the trained weights, replace the
moving averages of training in everything but a run that continues. The checkpoint stays as it is.

repjax recalibrate --workdir runs/digits --batches 100
repjax recalibrate --workdir runs/digits --undo
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from repjax import runs, training
from repjax.errors import one_paragraph
from repjax.runs import lock
from repjax.training.conversion import format_report
from repjax.training.recalibration import format_recalibration


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax recalibrate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  what = parser.add_mutually_exclusive_group(required=True)
  what.add_argument("--batches", type=int, help="how many training batches to look at")
  what.add_argument("--undo", action="store_true", help="use the checkpoint's own again")
  parser.add_argument("--dataset", help="a TFDS name instead of the run's own, or synthetic")
  parser.add_argument("--split", help="to take statistics from, instead of the run's train_split")
  parser.add_argument("--eval-split", help="to measure on, instead of the run's own")
  parser.add_argument("--data-dir", help="where TFDS keeps the data set")
  parser.add_argument("--batch-size", type=int, help="instead of the run's own")
  arguments = parser.parse_args(argv)
  with one_paragraph():
    config = training.read_config(
      arguments.workdir,
      dataset=arguments.dataset,
      train_split=arguments.split,
      eval_split=arguments.eval_split,
      data_dir=arguments.data_dir,
      batch_size=arguments.batch_size,
    )
    with lock.hold(arguments.workdir):
      if arguments.undo:
        runs.remove_recalibrated(arguments.workdir)
        print("the checkpoint's own statistics are in use again", flush=True)
        if arguments.dataset is None and runs.import_file(arguments.workdir).exists():
          config.dataset, config.eval_split = "synthetic", "sample"
      else:
        record = training.recalibrate(config, arguments.workdir, num_batches=arguments.batches)
        print(format_recalibration(record), flush=True)
      report = training.convert(config, arguments.workdir)
  print(format_report(report) + f"\nsaved: {runs.deploy_folder(arguments.workdir)}")
