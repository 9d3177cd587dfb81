"""RepVGG-B2g4 on ImageNet.

Recipe: the simple recipe of the paper. 120 epochs, batch 256, SGD 0.1 with cosine, weight decay
1e-4, crop and flip, no label smoothing.
Paper: Ding et al., RepVGG, CVPR 2021, Table 4. https://arxiv.org/abs/2101.03697
Expected: 78.50 % top-1 at 224 px (resize 256, central crop), from that table. Not confirmed here.

  repjax train --config repvgg_b2g4
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the simple recipe for RepVGG-B2g4."""
  config = common.get_config()
  config.model = "repvgg_b2g4"
  return config
