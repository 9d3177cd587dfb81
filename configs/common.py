"""What configs share: all fields with the RepVGG paper's simple recipe, and other recipes."""

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
    *(("block", str), ("widths", tuple), ("stem_features", int), ("output_stride", int)),
    *(("hidden", int),),
    *(("tile", object), ("fc3_groups", object)),  # a number or a tuple
    *(("local_kernels", tuple), ("reduction", int)),
    *(("global_perceptron", bool), ("fc3", str), ("mixer", str)),
    *(("repmlp_block", str), ("repmlp_stages", tuple), ("narrowing", tuple)),
    *(("tiles", tuple), ("share_sets", tuple), ("patch_size", int)),
    *(("stem_blocks", int), ("last_block", str)),
  ):
    config.model_overrides[override] = config_dict.placeholder(kind)  # None: the variant's own
  config.num_classes = 1000
  config.dtype = "float32"  # of the computation: "float32" or "bfloat16"; parameters are float32
  config.sync_batch_norm = False  # share batch statistics between devices

  # Data: a set made by repjax prepare-dataset, a TFDS name, "digits" or "synthetic".
  config.dataset = "imagenet2012"
  config.data_dir = config_dict.placeholder(str)  # None: TFDS's own default
  config.train_split = "train"
  config.eval_split = "validation"
  config.image_size = 224
  # In evaluation, in model.json and thus in deployment; None: as in training.
  config.eval_image_size = config_dict.placeholder(int)
  config.resize_size = 256  # of the shorter side in evaluation, before the central crop
  config.interpolation = "bilinear"
  config.mean = (0.485, 0.456, 0.406)
  config.std = (0.229, 0.224, 0.225)
  config.augment = "random_resized_crop | flip"  # steps, see repjax/data/augmentation
  config.num_workers = 0  # worker processes; 0: threads

  # Training length.
  config.batch_size = 256  # images an update, over all devices
  # Parts into which each device cuts its share of a batch to need less memory: their gradients are
  # averaged before the one update. A step remains an update; batch norms see a part at a time.
  config.accumulate_steps = 1
  config.num_epochs = 120.0
  config.num_steps = config_dict.placeholder(int)  # instead of num_epochs

  # Learning rate: warm-up, then "cosine", "step" or "poly", see repjax/training/schedules.py. All
  # rates are for a batch of 256 and are scaled linearly with batch_size.
  config.learning_rate = 0.1
  config.schedule = "cosine"
  config.warmup_epochs = 0.0
  config.warmup_rate = 0.0  # of the first step of a warm-up
  config.warmup_overlaps = False  # the curve begins with the run, not behind the warm-up
  config.final_rate = 0.0  # cosine and poly end there, and step goes no lower
  config.cooldown_epochs = 0.0  # at the end of num_epochs, at final_rate
  config.drop_epochs = 30.0  # "step": between two drops
  config.drop_factor = 0.1  # "step": of each drop
  config.poly_power = 0.9  # "poly": (1 - part done) to this power
  config.backbone_rate = 1.0  # factor on the rate of all but the classifier; 0 freezes it

  # Optimizer: "sgd" or "adamw".
  config.optimizer = "sgd"
  config.momentum = 0.9  # the first beta of AdamW
  config.nesterov = False
  config.weight_decay = 1e-4
  # What decays, and whether biases learn twice as fast: see repjax/training/decay.py.
  config.weight_decay_rule = "kernels_and_fast_biases"
  config.custom_l2 = 0.0  # weight of RepVGG's penalty, see repjax/training/custom_l2.py; 0: off
  config.clip_norm = 0.0  # largest norm of the gradient; 0: no limit
  # Decay an update of the average of parameters and statistics that is evaluated beside the model,
  # decides which checkpoint is the best and is what is deployed; a plain copy during the warm-up.
  config.ema_decay = 0.0  # 0: off

  # Quantization-aware training of what config.init_from has trained: the deploy form learns while
  # its layers' inputs and weights are rounded, see repjax/training/quantization.py.
  config.qat = False
  config.qat_activations = "uint8"  # or "int8", symmetric, for TensorRT
  config.qat_weight_bits = 7  # 8 is for CPUs with VNNI, and GPUs
  config.qat_images = 256  # of the training split, to calibrate with

  # Loss.
  config.label_smoothing = 0.0
  config.mixup = 0.0  # alpha of the Beta distribution that mixes two images; 0: off
  config.cutmix = 0.0  # the same for boxes of other images; with both, each step takes one of them
  config.aux_weight = 0.1  # of the loss of each auxiliary head, where the model has them

  # The run.
  config.seed = 0
  config.log_every_steps = 50
  config.eval_every_epochs = 1.0  # evaluation and checkpoint
  config.save_every_minutes = 10.0  # more checkpoints, without evaluation; 0: none
  config.tensorboard = False  # write event files into the run's folder, by tensorboardX
  # Batches to re-estimate batch norms over at the end; 0: none. A frozen backbone keeps its own.
  config.recalibrate_batches = 0
  config.tolerance = 1e-5  # largest relative difference between both forms' logits
  return config


def get_strong_config() -> ml_collections.ConfigDict:
  """The RepVGG paper's strong recipe; its mixup's alpha is that of mmpretrain's config of B3."""
  config = get_config()
  config.num_epochs = 200.0
  config.warmup_epochs = 5.0
  config.augment = "random_resized_crop | flip | auto_augment"
  config.label_smoothing = 0.1
  config.mixup = 0.2
  return config


def get_cifar_config() -> ml_collections.ConfigDict:
  """CIFAR-10 as it is usually read, in batches of 128; what it leaves open is the recipe."""
  config = get_config()
  config.num_classes = 10
  config.dataset = "cifar10"
  config.eval_split = "test"
  config.image_size = 32
  config.resize_size = 32
  config.mean, config.std = (0.4914, 0.4822, 0.4465), (0.247, 0.2435, 0.2616)
  config.augment = "pad_and_crop | flip"
  config.batch_size = 128
  return config


def get_repmlp_config() -> ml_collections.ConfigDict:
  """The RepMLP paper's recipe on ImageNet; mixup's alpha, which it does not give, is as above."""
  config = get_config()
  config.num_epochs = 100.0
  config.augment = "random_resized_crop | flip | auto_augment"
  config.mixup = 0.2
  return config


def get_repmlpnet_config() -> ml_collections.ConfigDict:
  """The recipe of RepMLPNet's authors; what it leaves to each model is the image size."""
  config = get_config()
  config.num_epochs = 100.0
  config.warmup_epochs = 10.0
  config.warmup_rate = 5e-7
  config.warmup_overlaps = True
  config.optimizer = "adamw"
  config.learning_rate = 0.001
  config.weight_decay = 0.1
  config.weight_decay_rule = "more_than_one_axis"
  config.clip_norm = 5.0
  randomly = 'rand_augment(2, 15, noise="uniform", probability=1, cutout=True)'
  config.augment = f"random_resized_crop | flip | {randomly}"
  config.label_smoothing = 0.1
  config.mixup = 0.4
  config.cutmix = 1.0
  return config


def get_parnet_config(erasing: float) -> ml_collections.ConfigDict:
  """The recipe of ParNet's authors, but for the learning rate; large models erase more often.

  Their script gives the rate 0.001 for a batch of 1024, which is some hundred times less than is
  usual for SGD there. The paper's text gives 0.8 for 2048, to be reduced in proportion, as we read
  it second hand: 0.1 for 256, as everywhere here. Cosine and cool-down are the script's.
  """
  config = get_config()
  config.dtype = "bfloat16"  # they train in mixed precision
  config.batch_size = 1024
  config.num_epochs = 130.0  # 120 and the cool-down
  config.cooldown_epochs = 10.0
  config.final_rate = 2.5e-6  # 1e-5 for a batch of 1024
  config.nesterov = True
  config.weight_decay_rule = "more_than_one_axis"
  randomly = f"rand_augment(2, 9, noise=0.5) | random_erasing({erasing})"
  config.augment = f"random_resized_crop | flip | {randomly}"
  config.label_smoothing = 0.1
  config.ema_decay = 0.9999
  return config
