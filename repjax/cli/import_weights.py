"""Makes a workdir from a published checkpoint: a file, or a repository on the Hugging Face hub.

Examples:
  repjax import --from RepVGG-A0-train.pth --workdir runs/a0
  repjax import --from hf:timm/repvgg_a0.rvgg_in1k --workdir runs/a0
"""

import json
import resource
import time
from collections.abc import Mapping, Sequence
from typing import Any

from repjax import json_files
from repjax.cli import flags
from repjax.errors import InputError, listed, one_paragraph, printable
from repjax.schema import MisfitError, anything, shown, table


def parse_overrides(text: str) -> dict[str, Any]:
  """Returns the model attributes that the JSON text of --overrides sets.

  Raises:
    InputError: the text is not a JSON object.
  """
  try:
    return json_files.parse(text, table(anything))
  except MisfitError as misfit:
    raise InputError(
      f'--overrides takes JSON such as {{"stage_sizes": [1, 2, 2, 1]}}, got {text[:200]!r}: '
      f"{misfit.words(shown)}"
    ) from None


def main(argv: Sequence[str]) -> None:
  """Imports the checkpoint that the flags name."""
  start = time.perf_counter()
  parser = flags.parser("import", __doc__)
  parser.add_argument(
    "--from",
    dest="source",
    required=True,
    metavar="SOURCE",
    help="a file, or hf:OWNER/NAME[@REVISION][:FILE]",
  )
  flags.add(parser, "--workdir", help="folder to make")
  parser.add_argument(
    "--model", default="auto", help="name of the model (default: auto, recognized by tensor shapes)"
  )
  parser.add_argument(
    "--num-classes", type=int, metavar="N", help="number of classes (default: as in the file)"
  )
  parser.add_argument(
    "--drop-head", action="store_true", help="initialize a new classifier instead of the file's"
  )
  parser.add_argument(
    "--allow-half", action="store_true", help="widen half-precision weights to float32"
  )
  parser.add_argument(
    "--entry", help="state dict to read where a file holds several, such as state_dict_ema"
  )
  parser.add_argument(
    "--overrides", default="{}", metavar="JSON", help="attributes of the model to change, as JSON"
  )
  arguments = parser.parse_args(argv)
  from repjax import runs, weights

  with one_paragraph():
    record = weights.import_weights(
      arguments.source,
      arguments.workdir,
      model_name=None if arguments.model == "auto" else arguments.model,
      num_classes=arguments.num_classes,
      drop_head=arguments.drop_head,
      allow_half=arguments.allow_half,
      entry=arguments.entry,
      overrides=parse_overrides(arguments.overrides),
    )
    preprocessing = runs.read_spec(arguments.workdir)["preprocessing"]
  peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # from KiB
  print(
    describe(record, preprocessing)
    + f"saved: {arguments.workdir}, in {time.perf_counter() - start:.1f} s, with "
    f"{peak / 1e6:.0f} MB of memory at most"
  )


def describe(record: Mapping[str, Any], preprocessing: Mapping[str, Any]) -> str:
  """Returns lines that say what was recognized, and from which file.

  Args:
    record: from `repjax.weights.import_weights`.
    preprocessing: from model.json.
  """
  entry = f"entry: {printable(record['entry'])}" if record["entry"] else ""
  if record["other_entries"]:
    entry += f" (--entry takes {listed(record['other_entries'], between=' or ')} instead)"
  removed = listed(record["removed"])
  assumed = "".join(
    f"{name}: {value}, as the released weights need it (--overrides "
    f"'{json.dumps({name: '...'})}' for others)\n"
    for name, value in record["assumed"].items()
  )
  stated = printable(record["license"] or "not stated", 100)
  revision = f", revision {record['revision']}" if record["revision"] else ""
  return (
    f"recognized: {record['model']}, {record['naming']} names, {record['kind']} form, "
    f"{record['num_classes']} classes{' with a new classifier' if record['new_head'] else ''}\n"
    + (f"{entry}\n" if entry else "")
    + (f"names: read without {removed}\n" if removed else "")
    + assumed
    + f"parameters: {record['parameters']:,}, from {', '.join(record['dtypes'])}\n"
    f"images: shorter side to {preprocessing['resize_size']} px, "
    f"{preprocessing['interpolation']}, central {preprocessing['image_size']} px, "
    f"mean {preprocessing['mean']}, std {preprocessing['std']}\n"
    f"file: {record['bytes']:,} bytes, sha256 {record['sha256']}{revision}\n"
    + (f"license: {stated}\n" if record["revision"] else "")
  )
