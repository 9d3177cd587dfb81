"""RepOpt-VGG-B1 on ImageNet: the plain network of RepVGG-B1, trained with RepOptimizer.

Recipe: the authors' page. 120 epochs, batch 256, SGD 0.1 with Nesterov momentum, a cosine whose
start is hidden by 5 epochs of warm-up, weight decay 4e-5. Images: RandAugment, crop and flip, label
smoothing 0.1.
Paper: Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023.
https://arxiv.org/abs/2205.15242
Source: https://github.com/DingXiaoH/RepOptimizers at 26b023f, README and main_repopt.py
Expected: 78.62 % top-1 at 224 px (resize 224, central crop), from that README. Not confirmed here.

  repjax train --config repoptvgg_b1_search
  repjax train --config repoptvgg_b1

The authors' own scales take the place of the first command:
--config.scales=RepOpt-VGG-B1-scales.pth, a file of their repository.
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of RepOptimizer's authors for RepOpt-VGG-B1."""
  config = common.get_repopt_config()
  config.model = "repvgg_b1"
  config.scales = "runs/repoptvgg_b1_search"
  return config
