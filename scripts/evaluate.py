"""Evaluates a run's model over the whole evaluation split, reloaded from its folder.

python scripts/evaluate.py --workdir runs/digits --form deploy
"""

import argparse

from repjax import training
from repjax.errors import one_paragraph

FORMS = ("train", "deploy")


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--workdir", required=True, help="folder of the run")
  parser.add_argument(
    "--form", choices=(*FORMS, "both"), default="both", help="which form (default: both)"
  )
  arguments = parser.parse_args()
  forms = FORMS if arguments.form == "both" else (arguments.form,)
  with one_paragraph():
    config = training.read_config(arguments.workdir)
    for form in forms:
      result = training.evaluate(config, arguments.workdir, deploy=form == "deploy")
      if form == forms[0]:
        print(f"{'form':<8}{'parameters':>14}{'accuracy':>12}{'loss':>10}")
      print(
        f"{form:<8}{result['parameters']:>14,}{result['accuracy']:>12.2%}{result['loss']:>10.4f}",
        flush=True,
      )
    print(f"on every image of {config.dataset}'s {config.eval_split} split, reloaded from disk")


if __name__ == "__main__":
  main()
