"""FastViT on ImageNet at 256 px; the size of the network follows a colon.

Recipe: the authors' script, as far as it can be said in fields. 300 epochs and 10 of cool-down,
batch 1024, AdamW with cosine from 1e-3 to 1e-5 after 5 epochs of warm-up, weight decay 0.05.
Images: crop and flip, RandAugment of magnitude 9 with noise 0.5, random erasing 0.25, mixup 0.2
(0.8 for MA36), CutMix 1.0. Loss and weights: label smoothing 0.1, a moving average of parameters
(0.9995). Networks with attention have drop path: 0.1 for SA12 and SA24, 0.2 for SA36, and 0.35 for
MA36. One part of the script differs: the factors of channels decay there, because they have
three axes in PyTorch; here they do not.
What is confirmed: every number is in the authors' commands or in the defaults of their script.
Paper: Vasu et al., FastViT, ICCV 2023, section 4.1. https://arxiv.org/abs/2303.14189
Source: https://github.com/apple/ml-fastvit at 8af5928, README and train.py
Expected: the authors' top-1 at 256 px in the table, without and with a teacher. A teacher is not
built. None is confirmed here.

| after the colon | top-1 | with a teacher |
|-----------------|-------|----------------|
| `t8`            | 76.2  | 77.2           |
| `t12`           | 79.3  | 80.3           |
| `s12`           | 79.9  | 81.1           |
| `sa12`          | 80.9  | 81.9           |
| `sa24`          | 82.7  | 83.4           |
| `sa36`          | 83.6  | 84.2           |
| `ma36`          | 83.9  | 84.6           |

  repjax train --config fastvit
  repjax train --config fastvit:sa12
"""

import ml_collections

from repjax.configs import common

_DROP_PATH = {"sa12": 0.1, "sa24": 0.1, "sa36": 0.2, "ma36": 0.35}


def get_config(size: str = "t8") -> ml_collections.ConfigDict:
  """Returns the recipe of the authors for a FastViT, by the end of its name."""
  config = common.get_timm_config(batch_size=1024, rate=1e-3)
  config.model = common.variant("fastvit", size)
  config.image_size = 256
  config.resize_size = 269 if size == "ma36" else 284  # crops of 0.95 and 0.9 in evaluation
  config.num_epochs = 310.0  # 300 epochs and the cool-down.
  config.cooldown_epochs = 10.0
  config.weight_decay = 0.05
  config.mixup = 0.8 if size == "ma36" else 0.2
  config.ema_decay = 0.9995
  if size in _DROP_PATH:
    config.model_overrides.drop_path = _DROP_PATH[size]
  return config
