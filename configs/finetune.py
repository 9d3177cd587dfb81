"""Fine-tuning of a trained model, with a new classifier, on a data set of your own.

Model and preprocessing are those of the folder to start from, which is a run or an import. A deploy
form alone is expanded, see docs/guides/expand.md. The number of classes is that of the data set.
Values on the command line win.

  repjax import --from hf:timm/repvgg_a0.rvgg_in1k --workdir runs/a0
  repjax train --config finetune --workdir runs/mine --config.init_from=runs/a0 \
    --config.dataset=mine

With a few dozen images, take more epochs. --config.backbone_rate=0 trains the classifier alone, in
less time. To train the whole network afterwards, start a second run from the first: --workdir
runs/mine2 --config.init_from=runs/mine.
"""

import ml_collections
from ml_collections import config_dict

from repjax.configs import common


def get_config() -> ml_collections.ConfigDict:
  """Returns a short schedule with a low rate. Fields with None are filled in at the start."""
  config = common.get_config()
  config.model = config_dict.placeholder(str)
  config.num_classes = config_dict.placeholder(int)
  config.dataset = config_dict.placeholder(str)
  for field in ("image_size", "resize_size"):
    config[field] = config_dict.placeholder(int)
  config.interpolation = config_dict.placeholder(str)
  for field in ("mean", "std"):
    config[field] = config_dict.placeholder(tuple)

  config.augment = "random_resized_crop(area=(0.35, 1)) | flip"
  config.batch_size = 32
  config.num_epochs = 20.0
  config.warmup_epochs = 1.0
  config.learning_rate = 0.08  # 0.01 for a batch of 32.
  config.backbone_rate = 0.3
  config.recalibrate_batches = 50
  config.log_every_steps = 10
  return config
