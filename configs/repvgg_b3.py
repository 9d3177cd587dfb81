"""RepVGG-B3 on ImageNet.

Recipe: the strong recipe of the paper. 200 epochs, batch 256, SGD 0.1 with 5 epochs of warm-up and
cosine, weight decay 1e-4, AutoAugment, crop and flip, label smoothing 0.1, mixup 0.2.
Paper: Ding et al., RepVGG, CVPR 2021, Table 5. https://arxiv.org/abs/2101.03697
Expected: 80.52 % top-1 at 224 px (resize 256, central crop), from that table. Not confirmed here.

  repjax train --config repvgg_b3
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the strong recipe for RepVGG-B3."""
  config = common.get_strong_config()
  config.model = "repvgg_b3"
  return config
