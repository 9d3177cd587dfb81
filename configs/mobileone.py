"""MobileOne on ImageNet at 224 px; the size of the network follows a colon.

Recipe: the paper's. 300 epochs, batch 256, SGD 0.1 with cosine, weight decay that falls from 1e-4
to 1e-5 along a cosine and spares norms, label smoothing 0.1, a moving average of parameters
(0.9995). Images: crop and flip, of 160 px until epoch 37, of 192 px until epoch 112, and of 224 px
from there on. For S2 to S4 there is also RandAugment of magnitude 7 with noise 0.5, at 0.3, 0.7 and
1 times this magnitude in the three parts.
What is confirmed: the part of the weight decay that is left, 0.1, is in the script that the same
authors published with FastViT. It spares norms there, and in mmpretrain's configs. Sizes, epochs
and magnitudes of the three parts are those of mmpretrain's configs. The paper says that S2 to S4
are trained with AutoAugment of growing strength; mmpretrain takes RandAugment for it. What the
authors themselves ran could not be checked.
Paper: Vasu et al., MobileOne, CVPR 2023, section 4.1. https://arxiv.org/abs/2206.04040
Source: https://github.com/open-mmlab/mmpretrain, configs/mobileone/mobileone-s*_8xb32_in1k.py, S0
to S3 at 383666f and S4 at 2bc689c; https://github.com/apple/ml-fastvit at 8af5928, train.py
Expected: the paper's top-1 at 224 px in the table. None is confirmed here.

| after the colon | top-1 |
|-----------------|-------|
| `s0`            | 71.4  |
| `s1`            | 75.9  |
| `s2`            | 77.4  |
| `s3`            | 78.1  |
| `s4`            | 79.4  |

  repjax train --config mobileone
  repjax train --config mobileone:s1
"""

import ml_collections

from repjax.configs import common

_CURRICULUM = ((37.0, 160, 0.3), (112.0, 192, 0.7))
"""Epoch at which a part ends, image size, and factor on the magnitude of RandAugment."""


def get_config(size: str = "s0") -> ml_collections.ConfigDict:
  """Returns the recipe of the paper for a MobileOne, by the end of its name."""
  config = common.get_config()
  config.model = common.variant("mobileone", size)
  config.num_epochs = 300.0
  config.label_smoothing = 0.1
  config.ema_decay = 0.9995
  config.weight_decay_rule = "no_vectors"
  config.final_decay_factor = 0.1
  config.curriculum = tuple((end, side, _augment(size, part)) for end, side, part in _CURRICULUM)
  config.augment = _augment(size, 1.0)
  if size != "s0":
    config.resize_size = 248  # as timm evaluates the published weights
  return config


def _augment(size: str, part: float) -> str:
  """Returns the augmentations of a part of the training; large networks have stronger ones."""
  plain = "random_resized_crop | flip"
  if size in ("s0", "s1"):
    return plain
  return f"{plain} | rand_augment(2, {round(7 * part, 1)}, noise=0.5, increasing=True)"
