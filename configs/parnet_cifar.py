"""ParNet on CIFAR-10.

Recipe: 400 epochs with mirrored and shifted images, from the first author (issue 11 of the authors'
repository). Batch 128, SGD 0.1 with Nesterov momentum and cosine to 0, and weight decay 5e-4 are
our choice, as usual for CIFAR. The widths of the network are our choice too, see
repjax/models/parnet.py.
Paper: Goyal et al., Non-deep Networks, NeurIPS 2022, section 4. https://arxiv.org/abs/2110.07641
Expected: in the paper, more than 96 % (more than 81 % on CIFAR-100), for a network whose code was
not released and which differs from this one. Not trained yet.

  repjax prepare-dataset --tfds cifar10
  repjax train --config parnet_cifar

For the other sizes, add --config.model=parnet_cifar_s or --config.model=parnet_cifar_l. For
CIFAR-100, add --config.dataset=cifar100 --config.num_classes=100.
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns what is known of the paper's recipe for CIFAR-10, completed by usual values."""
  config = common.get_cifar_config()
  config.model = "parnet_cifar_m"
  config.num_epochs = 400.0
  config.learning_rate = 0.2  # 0.1 for a batch of 128.
  config.nesterov = True
  config.weight_decay = 5e-4
  config.weight_decay_rule = "more_than_one_axis"
  return config
