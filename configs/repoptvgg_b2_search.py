"""The hyper-search for RepOpt-VGG-B2 on CIFAR-100. Its result is the scales of its branches.

Model: RepVGG-B2 whose branches have scales in place of batch norms.
Recipe: the authors' page. 240 epochs, batch 256, SGD 0.1 with Nesterov momentum, a cosine whose
start is hidden by 10 epochs of warm-up, weight decay 4e-5, gradients limited to a norm of 5, label
smoothing 0.1. Images: shifted by up to 4 pixels and mirrored.
Paper: Ding et al., Re-parameterizing Your Optimizers rather than Architectures, ICLR 2023.
https://arxiv.org/abs/2205.15242
Source: https://github.com/DingXiaoH/RepOptimizers at 26b023f, README and main_repopt.py
Expected: no accuracy was published, since only the scales are of use. Not trained yet.

  repjax prepare-dataset --tfds cifar100
  repjax train --config repoptvgg_b2_search
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the hyper-search of RepOptimizer's authors for RepOpt-VGG-B2."""
  config = common.get_repopt_search_config()
  config.model = "repvgg_b2"
  return config
