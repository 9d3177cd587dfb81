"""RepMLPNet-B256 on ImageNet at 256 px.

Recipe: the authors' script. 100 epochs, batch 256, AdamW 0.001 with a cosine whose start is hidden
by 10 epochs of warm-up, weight decay 0.1, gradients clipped to 5.0. Images: RandAugment of
magnitude 15, crop and flip, label smoothing 0.1, mixup 0.4 or cutmix 1.0.
Paper: Ding et al., RepMLPNet, CVPR 2022. https://arxiv.org/abs/2112.11081
Source: https://github.com/DingXiaoH/RepMLP at 3eff13f, README and config.py
Expected: 81.03 % top-1 at 256 px (resize 256, central crop), from that README. Not confirmed here.

  repjax train --config repmlpnet_b256
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of the authors for this model."""
  config = common.get_repmlpnet_config()
  config.model = "repmlpnet_b256"
  config.image_size = 256
  config.resize_size = 256
  return config
