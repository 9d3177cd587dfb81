"""ParNet-XL, twelve layers deep, on ImageNet at 224 px.

Recipe: the authors' script. 120 epochs and 10 of cool-down, batch 1024, SGD with Nesterov momentum,
cosine from 0.4 to 1e-5, weight decay 1e-4 on kernels. Images: crop and flip, RandAugment of
magnitude 9 with noise 0.5, random erasing 0.4. Loss and weights: label smoothing 0.1, a moving
average of parameters (0.9999), dropout 0.1. The script has the learning rate 0.001;
`get_parnet_config` in common.py says why this is not used.
Activation: SiLU, as in the paper. The authors' script asks for SiLU and gets ReLU, so their
released weights need --config.model_overrides.act=relu.
Paper: Goyal et al., Non-deep Networks, NeurIPS 2022. https://arxiv.org/abs/2110.07641
Source: https://github.com/imankgoyal/NonDeepNetworks at 777b286, imagenet
Expected: 94.13 % top-5, from the paper. Other sources quote 78.55 % top-1. Neither is confirmed
here. For the authors' longer training of 200 epochs, add --config.num_epochs=210.
configs/parnet_xl_320.py continues from this run at 320 px.

  repjax train --config parnet_xl
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of the authors for ParNet-XL."""
  config = common.get_parnet_config(erasing=0.4)
  config.model = "parnet_xl"
  return config
