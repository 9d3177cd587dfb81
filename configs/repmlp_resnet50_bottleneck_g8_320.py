"""RepMLP-ResNet50 with bottlenecks of 8 groups on ImageNet at 320 px.

The tiles have 10x10 pixels. The local kernels have the sizes 1, 3, 5 and 7.

Recipe: that of the paper. 100 epochs, batch 256, SGD 0.1 with cosine to 0, weight decay 1e-4,
AutoAugment, mixup, crop and flip. The paper gives neither the alpha of Mixup nor what decays. They
are 0.2, and as in RepVGG's recipe.
Paper: Ding et al., RepMLP, 2021, section 4.2. https://arxiv.org/abs/2105.01883
Expected: no number is known here, since the tables of the paper were not at hand. Not trained yet.

  repjax train --config repmlp_resnet50_bottleneck_g8_320
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of the paper for this model at 320 px."""
  config = common.get_repmlp_config()
  config.model = "repmlp_resnet50_bottleneck_g8"
  config.model_overrides.tile = 10
  config.model_overrides.local_kernels = (1, 3, 5, 7)
  config.image_size = 320
  config.resize_size = 366  # The ratio of 256 to 224.
  return config
