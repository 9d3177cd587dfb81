"""Re-parameterizes a run's best checkpoint into its deploy folder, if both forms agree.

Both forms compute the logits of every image of the run's evaluation split. Imported weights are
compared on noise unless --dataset names images. Where the logits differ by more than the
tolerance, nothing is written.

Examples:
  repjax convert --workdir runs/digits
  repjax convert --workdir runs/a0 --dataset imagenet2012 --split validation
"""

from collections.abc import Sequence

from repjax.cli import flags
from repjax.errors import one_paragraph


def main(argv: Sequence[str]) -> None:
  """Converts the run that the flags name."""
  parser = flags.parser("convert", __doc__)
  flags.add(parser, "--workdir", "--dataset", "--split", "--data-dir", "--no-verify")
  parser.add_argument(
    "--tolerance",
    type=float,
    help="largest relative difference of the logits (default: the run's tolerance)",
  )
  arguments = parser.parse_args(argv)
  from repjax import runs, training
  from repjax.runs import lock
  from repjax.training.conversion import format_report

  with one_paragraph():
    config = flags.read_config(arguments, eval_split=arguments.split, tolerance=arguments.tolerance)
    flags.use_noise_for_import(config, arguments, arguments.split)
    with lock.hold(arguments.workdir):
      report = training.convert(config, arguments.workdir, verify=arguments.verify)
  print(format_report(report) + f"\nsaved: {runs.deploy_folder(arguments.workdir)}")
