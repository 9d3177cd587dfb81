"""Re-estimates the batch norm statistics of a run's best checkpoint, and converts the run again.

The trained weights see the first batches of the training split. The mean and variance of these
batches replace the moving averages of training in evaluation, conversion and export. A run that
continues still uses the checkpoint, which stays as it is.

Examples:
  repjax recalibrate --workdir runs/digits --batches 100
  repjax recalibrate --workdir runs/digits --undo
"""

from collections.abc import Sequence

from repjax.cli import flags
from repjax.errors import one_paragraph


def main(argv: Sequence[str]) -> None:
  """Re-estimates the statistics of a run, or removes the estimates."""
  parser = flags.parser("recalibrate", __doc__)
  flags.add(parser, "--workdir")
  action = parser.add_mutually_exclusive_group(required=True)
  action.add_argument("--batches", type=int, metavar="N", help="number of training batches to use")
  action.add_argument(
    "--undo", action="store_true", help="remove the estimates and use the checkpoint's statistics"
  )
  flags.add(parser, "--dataset", "--data-dir", "--batch-size", "--no-verify")
  flags.add(parser, "--split", help="split to estimate on (default: the run's training split)")
  parser.add_argument(
    "--eval-split", help="split to evaluate on (default: the run's evaluation split)"
  )
  arguments = parser.parse_args(argv)
  from repjax import runs, training
  from repjax.runs import lock
  from repjax.training.conversion import format_report
  from repjax.training.recalibration import format_recalibration

  with one_paragraph():
    config = flags.read_config(
      arguments, train_split=arguments.split, eval_split=arguments.eval_split
    )
    with lock.hold(arguments.workdir):
      if arguments.undo:
        # A command that was stopped after this has not converted yet, so this one always does.
        removed = runs.remove_recalibrated(arguments.workdir)
        print(f"the checkpoint's own statistics are in use{' again' * removed}", flush=True)
        flags.use_noise_for_import(config, arguments, split=None)
      else:
        record = training.recalibrate(
          config, arguments.workdir, num_batches=arguments.batches, verify=arguments.verify
        )
        print(format_recalibration(record), flush=True)
      report = training.convert(config, arguments.workdir, verify=arguments.verify)
  print(format_report(report) + f"\nsaved: {runs.deploy_folder(arguments.workdir)}")
