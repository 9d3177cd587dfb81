"""The rules of the JSON files in the folder of a run: which fields each has, and their values.

Some files hold facts that only people read. Such facts may be any values, so that folders of
earlier and later versions can be read.
"""

from repjax.config import INTERPOLATIONS, MEAN, SCORES, STD
from repjax.schema import (
  anything,
  boolean,
  either,
  items,
  number,
  optional,
  overrides,
  record,
  table,
  text,
  whole,
)

MOST_CLASSES = 1_000_000
MOST_PIXELS = 8_192
_COUNT = whole(0, 2**53)
_ANY_NUMBER = number(finite=False)  # a loss that has diverged is recorded too

PREPROCESSING = record(
  {
    "image_size": whole(1, MOST_PIXELS),
    "resize_size": whole(1, 8 * MOST_PIXELS),
    "interpolation": text(*INTERPOLATIONS),
    "mean": MEAN,
    "std": STD,
  }
)
"""The preprocessing in model.json."""

MODEL = record(
  {
    "name": text(),
    "num_classes": whole(1, MOST_CLASSES),
    "overrides": overrides,
    "preprocessing": PREPROCESSING,
    "class_names": items(text(), most=MOST_CLASSES),
    "class_colors": items(items(whole(0, 255), length=3), most=MOST_CLASSES),
  },
  required=("name",),
)
"""model.json. `repjax.models` has the rules of the overrides."""

# The facts are compared with others and never used, so their types do not matter.
_FACTS = record(
  dict.fromkeys(("name", "version", "split", "images", "bytes", "classes", "checksum"), anything),
  others=anything,
)

DATA = record({"train": _FACTS, "eval": _FACTS}, others=_FACTS)
"""data.json: the fingerprint of each split."""

ROUNDINGS = record(
  {
    "activations": text("uint8", "int8"),
    "weight_bits": whole(7, 8),
    "tensors": table(items(number(), length=2)),
    "weights": table(boolean),
    "biases": items(text()),
  },
  required=("activations", "weight_bits", "tensors", "weights"),
)
"""rounding.json: the fields of `repjax.quantization.Roundings`."""

REPORT = record(
  {
    "step": _COUNT,
    "images": _COUNT,
    **dict.fromkeys(
      SCORES, record({"train": number(0, 1), "deploy": number(0, 1)}, required=("deploy",))
    ),
  },
  required=("accuracy",),
  others=anything,
)
"""report.json: the comparison of both forms."""

EXPORT = record(
  {
    "format": text("stablehlo", "onnx", "web"),
    "image_size": either(whole(1, MOST_PIXELS), items(whole(1, MOST_PIXELS), length=2)),
    "summed_axes": table(whole(0, 1)),
  },
  required=("image_size",),
  others=anything,
)
"""export.json: what an exported program takes and returns."""

RECALIBRATION = record(
  {
    "step": _COUNT,
    "checkpoint": whole(0, 2**32 - 1),
    "batches": whole(1),
    **dict.fromkeys((*SCORES, "loss"), table(_ANY_NUMBER)),
  },
  required=("step", "checkpoint", "batches"),
  others=anything,
)
"""recalibration.json: how batch statistics were re-estimated."""

BOOKMARK = record(
  {
    "records": optional(_COUNT),
    "pending": items(
      record(
        dict.fromkeys(("loss", "accuracy"), _ANY_NUMBER),
        required=("loss", "accuracy"),
        others=_ANY_NUMBER,
      )
    ),
    "evaluated": boolean,
    "devices": optional(whole(1)),
  },
  required=("records", "pending", "evaluated"),
)
"""The bookmark of a checkpoint: the fields of `repjax.runs.Bookmark`."""

SCORE = record(dict.fromkeys(SCORES, number(-1, 1)), others=anything)
"""The score of a checkpoint by its name; -1 where it was not evaluated."""

NEWEST = record({"step": _COUNT}, required=("step",), others=anything)
"""newest.json: the newest checkpoint that was finished."""

RECORD = record({"step": _COUNT}, required=("step",), others=number())
"""A line of metrics.jsonl or timing.jsonl."""

STEP = record({"step": _COUNT}, required=("step",), others=_ANY_NUMBER)
"""The same line, of a run that may have diverged."""
