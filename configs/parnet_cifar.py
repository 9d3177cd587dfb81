"""ParNet on CIFAR-10.

400 epochs with mirrored and shifted images are the author's (issue 11 of the authors' repository).
Batch 128, SGD 0.1 with Nesterov momentum and cosine to 0, weight decay 5e-4 are ours, usual ones
for CIFAR, and so are the network's widths: see repjax/models/parnet.py.

Paper: Goyal et al., Non-deep Networks, NeurIPS 2022, section 4. https://arxiv.org/abs/2110.07641
Expected: the paper's network has more than 96 % (on CIFAR-100 more than 81 %); its code was not
released, this one is not the same, and it was not trained here yet.

  repjax prepare-dataset --tfds cifar10
  python main.py --config configs/parnet_cifar.py

The others are --config.model=parnet_cifar_s and parnet_cifar_l; for CIFAR-100 take
--config.dataset=cifar100 --config.num_classes=100.
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """What is known of the paper's settings for CIFAR-10, and usual ones."""
  config = common.get_cifar_config()
  config.model = "parnet_cifar_m"
  config.num_epochs = 400.0
  config.learning_rate = 0.2  # 0.1 for a batch of 128
  config.nesterov = True
  config.weight_decay = 5e-4
  config.weight_decay_rule = "more_than_one_axis"
  return config
