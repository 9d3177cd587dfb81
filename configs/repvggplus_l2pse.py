"""RepVGGplus-L2pse on ImageNet by the authors' later script: trained at 256 px, evaluated at 320.

300 epochs, batch 256, SGD 0.1 with Nesterov momentum, 5 epochs of warm-up beneath a cosine, weight
decay 4e-5, RandAugment, crop and flip, label smoothing 0.1, mixup 0.2, auxiliary heads.

Source: https://github.com/DingXiaoH/RepVGG at eae7c52, README and main.py
Expected: 84.06 % top-1 at 320 px (resize 320, central crop), as given there;
not yet reproduced here.

  python main.py --config configs/repvggplus_l2pse.py

On GPUs of little memory: --config.model_overrides.remat=True, --config.accumulate_steps=2,
--config.dtype=bfloat16.
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """The script's settings for this model."""
  config = common.get_config()
  config.model = "repvggplus_l2pse"
  config.image_size = 256
  config.eval_image_size = 320
  config.resize_size = 320
  randomly = 'rand_augment(2, 15, noise="uniform", probability=1, cutout=True)'
  config.augment = f"random_resized_crop | flip | {randomly}"
  config.num_epochs = 300.0
  config.warmup_epochs = 5.0
  config.warmup_overlaps = True
  config.nesterov = True
  config.weight_decay = 4e-5
  config.weight_decay_rule = "more_than_one_axis"
  config.label_smoothing = 0.1
  config.mixup = 0.2
  return config
