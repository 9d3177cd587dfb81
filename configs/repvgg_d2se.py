"""RepVGG-D2se on ImageNet: trained at 224 px, evaluated at 320.

200 epochs, batch 256, SGD 0.1 with 5 epochs of warm-up and cosine, AutoAugment, crop and flip,
label smoothing 0.1, mixup 0.2: the paper's strong recipe. The authors give only the epochs and the
sizes, so the rest is our choice.

Source: https://github.com/DingXiaoH/RepVGG, README
Expected: 83.55 % top-1 at 320 px (resize 320, central crop), 81.82 % at 224 px, as given there;
not yet reproduced here.

  python main.py --config configs/repvgg_d2se.py
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """The strong recipe with this model and a larger size in evaluation."""
  config = common.get_strong_config()
  config.model = "repvgg_d2se"
  config.eval_image_size = 320
  config.resize_size = 320
  return config
