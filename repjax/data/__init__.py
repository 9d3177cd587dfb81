"""Image classification data: TFDS as the source, Grain as the pipeline, uint8 batches.

Nothing here imports jax, so worker processes never touch an accelerator.
"""

from repjax.data.augment import parse as parse_augmentation
from repjax.data.pipeline import eval_batches, train_batches
from repjax.data.sources import Source, open_source
from repjax.data.transforms import read_image

__all__ = [
  "Source",
  "eval_batches",
  "open_source",
  "parse_augmentation",
  "read_image",
  "train_batches",
]
