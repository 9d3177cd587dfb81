"""RepVGG-D2se on ImageNet, trained at 224 px and evaluated at 320 px.

Recipe: the strong recipe of the paper. 200 epochs, batch 256, SGD 0.1 with 5 epochs of warm-up and
cosine, AutoAugment, crop and flip, label smoothing 0.1, mixup 0.2. The authors give only the epochs
and the sizes, so the rest is our choice.
Source: https://github.com/DingXiaoH/RepVGG, README
Expected: 83.55 % top-1 at 320 px (resize 320, central crop) and 81.82 % at 224 px, from that
README. Not confirmed here.

  repjax train --config repvgg_d2se
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the strong recipe for RepVGG-D2se, with a larger image size in evaluation."""
  config = common.get_strong_config()
  config.model = "repvgg_d2se"
  config.eval_image_size = 320
  config.resize_size = 320
  return config
