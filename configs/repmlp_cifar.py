"""A RepMLP without convolutions on CIFAR-10.

Recipe: that of the paper. 100 epochs, batch 128, SGD 0.2 with cosine to 0, a random square of the
image in a frame of 4 px, flip. The paper does not give the weight decay, 1e-4 here. It does not
give the number of blocks either, see repjax/models/repmlp.py.
Paper: Ding et al., RepMLP, 2021, section 4.1. https://arxiv.org/abs/2105.01883
Expected: 91.11 % in the paper, for a network with 52.8 million multiply-accumulates. This network
has 52.5 million. Not trained yet.

  repjax prepare-dataset --tfds cifar10
  repjax train --config repmlp_cifar

For the ablations of the paper, add one of these and a new --workdir:
--config.model_overrides.local_kernels='()' (8.5 points less in the paper),
--config.model_overrides.fc3=conv9x9 (3.5 points less), --config.model_overrides.mixer=conv9x9,
--config.model_overrides.global_perceptron=False.
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of the paper for CIFAR-10."""
  config = common.get_cifar_config()
  config.model = "repmlp_cifar"
  config.num_epochs = 100.0
  config.learning_rate = 0.4  # 0.2 for a batch of 128.
  return config
