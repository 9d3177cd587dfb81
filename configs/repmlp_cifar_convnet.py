"""The wide ConvNet beside the RepMLP for CIFAR-10: 3x3 convolutions for RepMLPs, twice the width.

The recipe is that of repmlp_cifar.py.

Paper: Ding et al., RepMLP, 2021, section 4.1. https://arxiv.org/abs/2105.01883
Expected: the paper's network has 91.99 % at 65.1 million multiply-accumulates; this one has 64.1
million and was not trained here yet.

  python main.py --config configs/repmlp_cifar_convnet.py
"""

import ml_collections

from repjax.configs import repmlp_cifar


def get_config() -> ml_collections.ConfigDict:
  """The twin of that config's model."""
  config = repmlp_cifar.get_config()
  config.model_overrides.mixer = "conv3x3"
  config.model_overrides.widths = (32, 64, 128)
  return config
