"""Measures a model's accuracy and loss on every image of a split, reloaded from its folder.

Examples:
  repjax evaluate --workdir runs/digits
  repjax evaluate --workdir runs/digits --form deploy --ten-crop
  repjax evaluate --workdir runs/a0 --dataset imagenet2012 --split validation
"""

from collections.abc import Sequence

from repjax.cli import flags
from repjax.errors import one_paragraph

FORMS = ("train", "deploy")


def main(argv: Sequence[str]) -> None:
  """Evaluates the forms that the flags name, and prints a row for each form."""
  parser = flags.parser("evaluate", __doc__)
  flags.add(
    parser, "--workdir", "--dataset", "--split", "--data-dir", "--batch-size", "--num-workers"
  )
  flags.add(parser, "--no-verify")
  parser.add_argument(
    "--ten-crop", action="store_true", help="average the predictions for ten crops of each image"
  )
  parser.add_argument(
    "--form", choices=(*FORMS, "both"), help="form to evaluate (default: every form in the folder)"
  )
  arguments = parser.parse_args(argv)
  from repjax import runs, training

  with one_paragraph():
    forms = (arguments.form,)
    if arguments.form not in FORMS:
      has_training_form = arguments.form == "both" or runs.checkpoints(arguments.workdir)
      forms = FORMS if has_training_form else ("deploy",)
    config = flags.read_config(arguments, eval_split=arguments.split)
    recalibrated = 0
    for form in forms:
      result = training.evaluate(
        config,
        arguments.workdir,
        deploy=form == "deploy",
        ten_crop=arguments.ten_crop,
        verify=arguments.verify,
      )
      if form == forms[0]:
        print(f"{'form':<8}{'parameters':>14}{'accuracy':>12}{'loss':>10}")
      print(
        f"{form:<8}{result['parameters']:>14,}{result['accuracy']:>12.2%} {result['loss']:>9.4f}",
        flush=True,
      )
      recalibrated = result.get("recalibrated", recalibrated)
    if "deploy" in forms and runs.find_deploy(arguments.workdir) is None:
      print(
        "deploy form converted in memory, since the folder holds none; repjax convert writes it"
      )
    if recalibrated:
      print(f"training form with batch norms re-estimated over {recalibrated} batches")
    crops = ", ten crops each" if arguments.ten_crop else ""
    source = ", which is noise" if config.dataset == "synthetic" else ", reloaded from disk"
    print(f"on every image of {config.dataset}'s {config.eval_split} split{crops}{source}")
