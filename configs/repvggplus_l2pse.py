"""RepVGGplus-L2pse on ImageNet, trained at 256 px and evaluated at 320 px.

Recipe: the authors' later script. 300 epochs, batch 256, SGD 0.1 with Nesterov momentum, a cosine
whose start is hidden by 5 epochs of warm-up, weight decay 4e-5. Images: RandAugment, crop and flip,
label smoothing 0.1, mixup 0.2. Loss: also from auxiliary heads.
Source: https://github.com/DingXiaoH/RepVGG at eae7c52, README and main.py
Expected: 84.06 % top-1 at 320 px (resize 320, central crop), from that README. Not confirmed here.

  repjax train --config repvggplus_l2pse

On GPUs with little memory, add --config.model_overrides.remat=True, --config.accumulate_steps=2 or
--config.dtype=bfloat16.
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe of the authors' later script for RepVGGplus-L2pse."""
  config = common.get_config()
  config.model = "repvggplus_l2pse"
  config.image_size = 256
  config.eval_image_size = 320
  config.resize_size = 320
  rand_augment = 'rand_augment(2, 15, noise="uniform", probability=1, cutout=True)'
  config.augment = f"random_resized_crop | flip | {rand_augment}"
  config.num_epochs = 300.0
  config.warmup_epochs = 5.0
  config.warmup_overlaps = True
  config.nesterov = True
  config.weight_decay = 4e-5
  config.weight_decay_rule = "more_than_one_axis"
  config.label_smoothing = 0.1
  config.mixup = 0.2
  return config
