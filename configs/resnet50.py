"""ResNet-50, the usual baseline, on ImageNet by the RepVGG paper's simple recipe.

120 epochs, batch 256, SGD 0.1 with cosine, crop and flip, no label smoothing.

Paper: Ding et al., RepVGG, CVPR 2021, Table 4. https://arxiv.org/abs/2101.03697
Expected: 76.31 % top-1 at 224 px (resize 256, central crop), as printed there, of a network of
3.9 billion multiply-accumulates; this one, whose stride is on the 3x3, has 4.1 billion.
Not yet reproduced here.

  python main.py --config configs/resnet50.py
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """The shared recipe with this model."""
  config = common.get_config()
  config.model = "resnet50"
  return config
