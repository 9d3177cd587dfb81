"""RepMLP-ResNet50 with bottlenecks of 8 groups and tiles of 10x10 on ImageNet at 320 px.

By the paper's recipe, with local kernels 1, 3, 5 and 7.

100 epochs, batch 256, SGD 0.1 with cosine to 0, weight decay 1e-4, AutoAugment, mixup, crop and
flip. Mixup's alpha and what decays are not said there: 0.2, and as in RepVGG's recipe.

Paper: Ding et al., RepMLP, 2021, section 4.2. https://arxiv.org/abs/2105.01883
Expected: no number is quoted, as the paper's tables were not at hand; not trained here yet.

  python main.py --config configs/repmlp_resnet50_bottleneck_g8_320.py
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """The paper's recipe with this model."""
  config = common.get_repmlp_config()
  config.model = "repmlp_resnet50_bottleneck_g8"
  config.model_overrides.tile = 10
  config.model_overrides.local_kernels = (1, 3, 5, 7)
  config.image_size = 320
  config.resize_size = 366  # 256 of 224, in proportion
  return config
