"""ResNet-50 on ImageNet, the usual baseline.

Recipe: the simple recipe of the RepVGG paper. 120 epochs, batch 256, SGD 0.1 with cosine, weight
decay 1e-4, crop and flip, no label smoothing.
Paper: Ding et al., RepVGG, CVPR 2021, Table 4. https://arxiv.org/abs/2101.03697
Expected: 76.31 % top-1 at 224 px (resize 256, central crop), from that table, for a network with
3.9 billion multiply-accumulates. This network has its stride on the 3x3 convolution, and 4.1
billion. Not confirmed here.

  repjax train --config resnet50
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the simple recipe for ResNet-50."""
  config = common.get_config()
  config.model = "resnet50"
  return config
