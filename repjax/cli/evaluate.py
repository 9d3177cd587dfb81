"""Evaluates a run's model over the whole evaluation split, reloaded from its folder.

repjax evaluate --workdir runs/digits --form deploy
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from repjax import runs, training
from repjax.errors import one_paragraph

FORMS = ("train", "deploy")


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax evaluate",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument("--dataset", help="a TFDS name instead of the run's own, or synthetic")
  parser.add_argument("--split", help="of the data set, instead of the run's own")
  parser.add_argument("--data-dir", help="where TFDS keeps the data set")
  parser.add_argument("--batch-size", type=int, help="instead of the run's own")
  parser.add_argument("--num-workers", type=int, help="processes that read images")
  parser.add_argument("--ten-crop", action="store_true", help="average ten crops of each image")
  parser.add_argument(
    "--form", choices=(*FORMS, "both"), help="which form (default: those in the folder)"
  )
  arguments = parser.parse_args(argv)
  with one_paragraph():
    if arguments.form in FORMS:
      forms = (arguments.form,)
    else:
      has_training_form = arguments.form == "both" or runs.checkpoints(arguments.workdir)
      forms = FORMS if has_training_form else ("deploy",)
    config = training.read_config(
      arguments.workdir,
      dataset=arguments.dataset,
      eval_split=arguments.split,
      data_dir=arguments.data_dir,
      batch_size=arguments.batch_size,
      num_workers=arguments.num_workers,
    )
    recalibrated = 0
    for form in forms:
      result = training.evaluate(
        config, arguments.workdir, deploy=form == "deploy", ten_crop=arguments.ten_crop
      )
      if form == forms[0]:
        print(f"{'form':<8}{'parameters':>14}{'accuracy':>12}{'loss':>10}")
      print(
        f"{form:<8}{result['parameters']:>14,}{result['accuracy']:>12.2%} {result['loss']:>9.4f}",
        flush=True,
      )
      recalibrated = result.get("recalibrated", recalibrated)
    if recalibrated:
      print(f"training form with batch norms re-estimated over {recalibrated} batches")
    crops = ", ten crops each" if arguments.ten_crop else ""
    what = ", which is noise" if config.dataset == "synthetic" else ", reloaded from disk"
    print(f"on every image of {config.dataset}'s {config.eval_split} split{crops}{what}")
