"""A RepMLP without convolutions on CIFAR-10 by the paper's recipe.

100 epochs, batch 128, SGD 0.2 with cosine to 0, a random square of the image in a frame of 4 px,
flip. Weight decay is not said there: 1e-4. Nor is how many blocks there are: see
repjax/models/repmlp.py.

Paper: Ding et al., RepMLP, 2021, section 4.1. https://arxiv.org/abs/2105.01883
Expected: the paper's network has 91.11 % at 52.8 million multiply-accumulates; this one has 52.5
million and was not trained here yet.

  repjax prepare-dataset --tfds cifar10
  python main.py --config configs/repmlp_cifar.py

Its ablations, each with a --workdir of its own: --config.model_overrides.local_kernels='()'
(8.5 points less in the paper), --config.model_overrides.fc3=conv9x9 (3.5 less),
--config.model_overrides.mixer=conv9x9, --config.model_overrides.global_perceptron=False.
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """The paper's settings for CIFAR-10."""
  config = common.get_cifar_config()
  config.model = "repmlp_cifar"
  config.num_epochs = 100.0
  config.learning_rate = 0.4  # 0.2 for a batch of 128
  return config
