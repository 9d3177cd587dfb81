"""A small PSPNet on handwritten digits in front of photographs, for machines with two cores.

Data: 640 scenes of 96 to 128 px, made of the digits of scikit-learn and the photographs of
scikit-image. Each pixel is background or one of ten digits.
Recipe: crops of 97 px, SGD with poly 0.9 from scratch, random scale and flip off, since a mirrored
digit is no digit.

  repjax train --config scenes
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe for a narrow RepVGG of which the last layers dilate."""
  config = common.get_config()
  config.task = "segmentation"
  config.model = "pspnet"
  config.model_overrides.backbone = "repvgg_a0"
  config.model_overrides.backbone_overrides = {
    "stage_sizes": (1, 2, 4, 1),
    "width_multipliers": (0.5, 0.5, 0.5, 0.25),
    "strides": (2, 2, 2, 2, 2),
  }
  config.model_overrides.dilation = "fast"
  config.model_overrides.head_features = 128
  config.model_overrides.aux_features = 64
  config.num_classes = 11
  config.dataset = "scenes"
  config.eval_split = "test"
  config.image_size = 97
  config.resize_size = 97
  config.augment = "scale_and_crop(scale=(0.75, 1.5)) | color_jitter"
  config.batch_size = 16
  config.num_epochs = 20.0
  config.learning_rate = 1.6
  config.schedule = "poly"
  config.warmup_epochs = 1.0
  config.aux_weight = 0.4
  config.log_every_steps = 10
  config.eval_every_epochs = 5.0
  return config
