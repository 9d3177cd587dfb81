"""Image classification data: TFDS as the source, Grain as the pipeline, uint8 batches.

Nothing here imports jax, so worker processes never touch an accelerator.
"""

from repjax.data.pipeline import eval_batches, train_batches
from repjax.data.sources import Source, open_source
from repjax.data.transforms import AUGMENTATIONS

__all__ = ["AUGMENTATIONS", "Source", "eval_batches", "open_source", "train_batches"]
