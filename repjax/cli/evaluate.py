"""Measures a model's accuracy and loss on every image of a split, reloaded from its folder.

A model for segmentation is measured on every pixel that has a label: the mean IoU over the classes,
and the IoU of each class.

Examples:
  repjax evaluate --workdir runs/digits
  repjax evaluate --workdir runs/digits --form deploy --ten-crop
  repjax evaluate --workdir runs/a0 --dataset imagenet2012 --split validation
  repjax evaluate --workdir runs/city --form deploy --window 713 --flip
"""

import argparse
from collections.abc import Mapping, Sequence

from repjax.cli import flags
from repjax.config import SCORES
from repjax.errors import one_paragraph, printable

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
    "--window",
    type=int,
    metavar="PIXELS",
    help="slide windows of this side over the images of a segmentation; 0: whole images (default: "
    "the run's window)",
  )
  parser.add_argument(
    "--flip",
    action=argparse.BooleanOptionalAction,
    help="average the predictions for each image of a segmentation and its mirror image (default: "
    "as in the run)",
  )
  parser.add_argument(
    "--form", choices=(*FORMS, "both"), help="form to evaluate (default: every form in the folder)"
  )
  arguments = parser.parse_args(argv)
  from repjax import runs, training
  from repjax.training.display import title, views

  with one_paragraph():
    forms = (arguments.form,)
    if arguments.form not in FORMS:
      has_training_form = arguments.form == "both" or runs.checkpoints(arguments.workdir)
      forms = FORMS if has_training_form else ("deploy",)
    config = flags.read_config(
      arguments,
      eval_split=arguments.split,
      eval_window=arguments.window,
      eval_flip=arguments.flip,
    )
    recalibrated, results = 0, {}
    for form in forms:
      result = training.evaluate(
        config,
        arguments.workdir,
        deploy=form == "deploy",
        ten_crop=arguments.ten_crop,
        verify=arguments.verify,
      )
      scores = [name for name in SCORES if name in result]
      if form == forms[0]:
        titles = "".join(f"{title(name):>12}" for name in scores)
        print(f"{'form':<8}{'parameters':>14}{titles}{'loss':>10}")
      shares = "".join(f"{result[name]:>12.2%}" for name in scores)
      print(f"{form:<8}{result['parameters']:>14,}{shares} {result['loss']:>9.4f}", flush=True)
      recalibrated = result.get("recalibrated", recalibrated)
      results[form] = result
    if "iou" in results[forms[0]]:
      names = runs.read_spec(arguments.workdir, verify=arguments.verify).get("class_names", ())
      print(_table_of_classes(names, {form: found["iou"] for form, found in results.items()}))
    if "deploy" in forms and runs.find_deploy(arguments.workdir) is None:
      print(
        "deploy form converted in memory, since the folder holds none; repjax convert writes it"
      )
    if recalibrated:
      print(f"training form with batch norms re-estimated over {recalibrated} batches")
    how = (", ten crops each" if arguments.ten_crop else "") + views(config)
    source = ", which is noise" if config.dataset == "synthetic" else ", reloaded from disk"
    print(f"on every image of {config.dataset}'s {config.eval_split} split{how}{source}")


def _table_of_classes(names: Sequence[str], forms: Mapping[str, Sequence[float | None]]) -> str:
  """Returns a row for each class: its IoU in each form. A class that does not occur has none.

  Args:
    names: names of the classes; empty if unknown.
    forms: form to the IoU of each class.
  """
  rows = [f"{'class':<22}" + "".join(f"{f'IoU, {form}':>12}" for form in forms)]
  for number, values in enumerate(zip(*forms.values())):
    name = printable(names[number], 20) if names else str(number)
    shares = ["absent" if value is None else f"{value:.2%}" for value in values]
    rows.append(f"{name:<22}" + "".join(f"{share:>12}" for share in shares))
  return "\n".join(rows)
