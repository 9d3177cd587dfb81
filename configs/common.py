"""What all configs share: the RepVGG paper's simple recipe on ImageNet. The others override it."""

import ml_collections
from ml_collections import config_dict


def get_config() -> ml_collections.ConfigDict:
  """Every field there is, with its default."""
  config = ml_collections.ConfigDict()

  # Start: folder of a run or of an import to take weights from; None: they are drawn. With it,
  # model, overrides and preprocessing below may be None: as in that folder. num_classes may always
  # be: as many as the data set has.
  config.init_from = config_dict.placeholder(str)

  # Model: a name of repjax.list_models() and attributes that replace those of its variant.
  config.model = "repvgg_a0"
  config.model_overrides = ml_collections.ConfigDict()
  for override, kind in (
    *(("act", str), ("dropout", float), ("remat", bool)),
    *(("stage_sizes", tuple), ("width_multipliers", tuple), ("strides", tuple)),
    *(("groups", int), ("se", str), ("se_reduction", int), ("aux_heads", bool)),
  ):
    config.model_overrides[override] = config_dict.placeholder(kind)  # None: the variant's own
  config.num_classes = 1000
  config.dtype = "float32"  # of the computation: "float32" or "bfloat16"; parameters are float32
  config.sync_batch_norm = False  # share batch statistics between devices

  # Data: a TFDS name, "digits" or "synthetic".
  config.dataset = "imagenet2012"
  config.data_dir = config_dict.placeholder(str)  # None: TFDS's own default
  config.train_split = "train"
  config.eval_split = "validation"
  config.image_size = 224
  config.resize_size = 256  # of the shorter side in evaluation, before the central crop
  config.interpolation = "bilinear"
  config.mean = (0.485, 0.456, 0.406)
  config.std = (0.229, 0.224, 0.225)
  config.augment = "random_resized_crop | flip"  # steps, see repjax/data/augment.py
  config.num_workers = 0  # worker processes; 0: threads

  # Training length.
  config.batch_size = 256  # over all devices
  config.num_epochs = 120.0
  config.num_steps = config_dict.placeholder(int)  # instead of num_epochs

  # Optimizer: SGD with momentum, linear warm-up from zero, then cosine to zero.
  config.learning_rate = 0.1  # for a batch of 256, scaled linearly with batch_size
  config.warmup_epochs = 0.0
  config.momentum = 0.9
  config.nesterov = False
  config.weight_decay = 1e-4
  config.label_smoothing = 0.0
  config.mixup = 0.0  # alpha of the Beta distribution that mixes two images; 0: off
  config.cutmix = 0.0  # the same for boxes of other images; with both, each step takes one of them
  config.backbone_rate = 1.0  # factor on the rate of all but the classifier; 0 freezes it
  config.aux_weight = 0.1  # of the loss of each auxiliary head, where the model has them

  # The run.
  config.seed = 0
  config.log_every_steps = 50
  config.eval_every_epochs = 1.0  # evaluation and checkpoint
  config.save_every_minutes = 10.0  # more checkpoints, without evaluation; 0: none
  # Batches to re-estimate batch norms over at the end; 0: none. A frozen backbone keeps its own.
  config.recalibrate_batches = 0
  config.tolerance = 1e-5  # largest relative difference between both forms' logits
  return config
