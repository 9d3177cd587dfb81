"""The one small classifier that tests of inference share."""

import repjax
from repjax.spec import Preprocessing
from tests.training import tiny

NAMES = tuple(f"digit {n}" for n in range(10))
SPEC = repjax.ModelSpec(
  "repvgg_a0",
  10,
  {name: list(v) if isinstance(v, tuple) else v for name, v in tiny.WITH_GATES_AND_HEADS.items()},
  # A small deviation makes large inputs, so that the images show in the logits.
  Preprocessing(16, 18, "bicubic", (0.3, 0.4, 0.5), (0.04, 0.03, 0.02)),
  NAMES,
)
