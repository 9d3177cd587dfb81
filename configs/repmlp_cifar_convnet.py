"""The ConvNet on CIFAR-10 that the RepMLP paper compares with: 3x3 convolutions, twice as wide.

Recipe: that of configs/repmlp_cifar.py.
Paper: Ding et al., RepMLP, 2021, section 4.1. https://arxiv.org/abs/2105.01883
Expected: 91.99 % in the paper, for a network with 65.1 million multiply-accumulates. This network
has 64.1 million. Not trained yet.

  repjax train --config repmlp_cifar_convnet
"""

import ml_collections

from repjax.configs import repmlp_cifar


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of `repmlp_cifar` with convolutions in place of RepMLPs."""
  config = repmlp_cifar.get_config()
  config.model_overrides.mixer = "conv3x3"
  config.model_overrides.widths = (32, 64, 128)
  return config
