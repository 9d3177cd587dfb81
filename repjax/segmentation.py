"""Networks that classify every pixel: `PSPNet`, `FCN`, their heads, and the resizing of logits.

`repjax.create_model("pspnet", backbone="repvgg_b1g2", num_classes=19)` builds one.
"""

from repjax.layers.resampling import pool_bins, resize_aligned
from repjax.models.segmentation import FCN, FCNHead, PSPNet, PyramidPooling, Segmenter

__all__ = [
  "FCN",
  "FCNHead",
  "PSPNet",
  "PyramidPooling",
  "Segmenter",
  "pool_bins",
  "resize_aligned",
]
