"""PSPNet over a ResNet-50 on Cityscapes, the baseline of the RepVGG paper.

Recipe: that of PSPNet. 40 epochs, batch 16, SGD 0.1 for the head and 0.01 for the backbone with
poly 0.9, weight decay 1e-4, crops of 713 px, random scale 0.5 to 2 and flip, auxiliary loss 0.4,
synchronised norms. Start from a backbone that was trained on ImageNet.
Paper: Ding et al., RepVGG, CVPR 2021. https://arxiv.org/abs/2101.03697
Expected: 77.17 % mIoU on the validation images, from a copy of the paper's table that could not be
checked. The stem here is one 7x7 convolution, where PSPNet's code has three 3x3. Not trained here.

  repjax import --from hf:timm/resnet50.tv_in1k --workdir runs/r50
  repjax train --config pspnet_resnet50 --config.init_from=runs/r50
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe for ResNet-50."""
  config = common.get_pspnet_config()
  config.model_overrides.backbone = "resnet50"
  config.model_overrides.dilation = "full"
  return config
