"""A small segmentation network for handwritten digits on photographs, for machines with two cores.

Data: 640 scenes of 96 to 128 px, made of the digits of scikit-learn and the photographs of
scikit-image. Each pixel is background or one of ten digits.
Recipe: a narrow RepVGG and an FCN head, from nothing. 20 epochs, batch 8, AdamW with poly 0.9,
crops of 97 px at random scales. No flip, since a mirrored digit is no digit.
Expected: about 69 % mIoU on the 128 test scenes, equal in both forms. Confirmed here, at 69.3 %.
The whole command takes 3:56 minutes on two cores that do nothing else.

  repjax train --config scenes
"""

import ml_collections

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns the recipe for a narrow RepVGG of which the last five layers dilate."""
  config = common.get_config()
  config.task = "segmentation"
  config.model = "fcn"
  config.model_overrides.backbone = "repvgg_a0"
  config.model_overrides.backbone_overrides = {
    "stage_sizes": (1, 2, 4, 1),
    "width_multipliers": (0.5, 0.5, 0.25, 0.25),
    "strides": (2, 2, 2, 1, 1),
    "output_stride": 4,
    "dilated_blocks": 5,
  }
  config.model_overrides.head_features = 64
  config.num_classes = 11
  config.dataset = "scenes"
  config.eval_split = "test"
  config.image_size = 97  # At 4 k + 1 px maps lie exactly under the logits.
  config.resize_size = 97
  config.class_weights = (0.3, *[1.0] * 10)  # Four fifths of the pixels are background.
  config.augment = "scale_and_crop(scale=(0.8, 1.25))"
  config.batch_size = 8
  config.num_epochs = 20.0
  config.optimizer = "adamw"
  config.learning_rate = 0.003 * 256 / 8
  config.weight_decay = 0.01
  config.schedule = "poly"
  config.warmup_epochs = 0.5
  config.log_every_steps = 10
  config.eval_every_epochs = 5.0
  return config
