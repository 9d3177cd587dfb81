"""PSPNet over a ResNet-50 with RepMLP in c3 and c4 on Cityscapes.

Recipe: that of PSPNet. 200 epochs, batch 16, SGD 0.1 for the head and 0.01 for the backbone with
poly 0.9, weight decay 1e-4, crops of 713 px, random scale 0.5 to 2 and flip, auxiliary loss 0.4,
synchronised norms. Start from a backbone that was trained on ImageNet.
Paper: Ding et al., RepMLP, 2021. https://arxiv.org/abs/2105.01883
Expected: unknown. The paper states 74.27 % mIoU in its text, 2.21 points above its ResNet-50, for a
network of 46.56 million parameters. It leaves the tiles open, and this network has 160 million, see
`repjax.segmentation.PSPNet`. Not trained here.

  repjax train --config repmlp_resnet50_bottleneck_g8_320 --workdir runs/repmlp \
    --config.model_overrides.reduction="(4, 8)"
  repjax train --config pspnet_repmlp --config.init_from=runs/repmlp
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe for RepMLP, which trains longer."""
  config = common.get_pspnet_config()
  config.model = "pspnet_repmlp"
  config.num_epochs = 200.0
  config.eval_every_epochs = 10.0
  return config
