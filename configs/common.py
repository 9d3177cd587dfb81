"""Recipes that several configs share. `repjax.config` documents every field."""

import types
from collections.abc import Mapping
from typing import Any

import ml_collections

from repjax.config import default
from repjax.errors import unknown

_ACNET = ("conv3x3", "conv1x3", "conv3x1")
_BARE = ("conv3x3", "conv1x1", "skip")
_DIVERSE = ("conv3x3", "conv1x1", "conv1x1_conv3x3", "conv1x1_avg3x3")
_RELU = ("conv3x3_relu", "conv1x1_relu", "identity_relu")
ABLATIONS: Mapping[str, Mapping[str, Any]] = types.MappingProxyType(
  {
    "full": {},
    "plain": {"branches": ("conv3x3",)},
    "only_1x1": {"branches": ("conv3x3", "conv1x1")},
    "only_identity": {"branches": ("conv3x3", "identity")},
    "identity_without_norm": {"branches": _BARE},
    "norm_after_sum": {"branches": _BARE, "norm": ("after_sum",)},
    "relu_in_branches": {"branches": _RELU},
    "diracnet": {"branches": ("dirac3x3",)},
    "trivial": {"branches": ("conv3x3", "skip"), "norm": ("after_sum",)},
    "acb": {"branches": _ACNET},
    "residual_reorg": {"branches": ("conv3x3",), "residual": True},
    "dbb": {"branches": _DIVERSE},
    "qarepvgg": {"branches": _BARE, "norm": ("conv3x3", "after_sum")},
  }
)
"""Name of an ablation of RepVGG to its overrides of the network.

The names are those of Tables 6 and 7 of the RepVGG paper, and of two later blocks. The paper does
not say where the norm of DiracNet is; here one norm follows the convolution. A ReLU in the branches
cannot be converted.

References:
  Ding et al., RepVGG, CVPR 2021, section 4.2. https://arxiv.org/abs/2101.03697
  Ding et al., Diverse Branch Block, CVPR 2021. https://arxiv.org/abs/2103.13425
  Chu et al., Make RepVGG Greater Again (QARepVGG), AAAI 2024. https://arxiv.org/abs/2212.01593
"""


SIZES: Mapping[str, tuple[str, ...]] = types.MappingProxyType(
  {
    "mobileone": ("s0", "s1", "s2", "s3", "s4"),
    "repvit": ("m0_9", "m1_0", "m1_1", "m1_5", "m2_3", "m1", "m2", "m3"),
    "fastvit": ("t8", "t12", "s12", "sa12", "sa24", "sa36", "ma36"),
  }
)
"""Family to the ends of the names of its models, which configs take after a colon."""


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults of all fields: the simple recipe of the RepVGG paper on ImageNet."""
  return default()


def set_ablation(config: ml_collections.ConfigDict, name: str) -> None:
  """Sets the overrides of an ablation of RepVGG in a config.

  Raises:
    InputError: there is no such ablation.
  """
  if name not in ABLATIONS:
    raise unknown("ablation", name, ABLATIONS)
  config.model_overrides.update(ABLATIONS[name])


def get_strong_config() -> ml_collections.ConfigDict:
  """Returns the strong recipe of the RepVGG paper.

  The paper does not give the alpha of Mixup. It is taken from mmpretrain's config of RepVGG-B3.
  """
  config = get_config()
  config.num_epochs = 200.0
  config.warmup_epochs = 5.0
  config.augment = "random_resized_crop | flip | auto_augment"
  config.label_smoothing = 0.1
  config.mixup = 0.2
  return config


def get_cifar_config() -> ml_collections.ConfigDict:
  """Returns the usual preprocessing of CIFAR-10, in batches of 128; a config adds the recipe."""
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
  """Returns the ImageNet recipe of the RepMLP paper.

  The paper does not give the alpha of Mixup. It is the one of RepVGG's strong recipe.
  """
  config = get_config()
  config.num_epochs = 100.0
  config.augment = "random_resized_crop | flip | auto_augment"
  config.mixup = 0.2
  return config


def get_repmlpnet_config() -> ml_collections.ConfigDict:
  """Returns the recipe of RepMLPNet's authors; a config adds the model and its image size."""
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
  rand_augment = 'rand_augment(2, 15, noise="uniform", probability=1, cutout=True)'
  config.augment = f"random_resized_crop | flip | {rand_augment}"
  config.label_smoothing = 0.1
  config.mixup = 0.4
  config.cutmix = 1.0
  return config


def get_pspnet_config() -> ml_collections.ConfigDict:
  """Returns the recipe of PSPNet's authors on Cityscapes; a config adds the model.

  The backbone starts from `config.init_from`. The head learns ten times as fast. Evaluation slides
  windows of the size of the crops over whole images. The authors also rotate and blur images, which
  is left out here. The papers of RepVGG and RepMLP do not say what decays: it is what decays in
  their recipes on ImageNet.

  References:
    Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, section 5.
      https://arxiv.org/abs/1612.01105
  """
  config = get_config()
  config.task = "segmentation"
  config.model = "pspnet"
  config.num_classes = 19
  config.dataset = "cityscapes"
  config.sync_batch_norm = True
  config.image_size = 713
  config.resize_size = 713  # Evaluation does not resize.
  config.eval_window = 713
  config.augment = "scale_and_crop(scale=(0.5, 2)) | flip"
  config.batch_size = 16
  config.num_epochs = 40.0
  config.learning_rate = 0.1 * 256 / 16  # 0.1 for a batch of 16, and 0.01 for the backbone.
  config.backbone_rate = 0.1
  config.schedule = "poly"
  config.poly_power = 0.9
  config.aux_weight = 0.4
  config.eval_every_epochs = 4.0
  return config


def get_timm_config(batch_size: int, rate: float) -> ml_collections.ConfigDict:
  """Returns what the scripts of RepViT and FastViT, both made from timm's, have in common.

  Args:
    batch_size: images in an update.
    rate: peak of the learning rate for such a batch.
  """
  config = get_config()
  config.batch_size = batch_size
  config.num_epochs = 300.0
  config.optimizer = "adamw"
  config.weight_decay_rule = "no_vectors"
  # Fields hold rates for a batch of 256.
  config.learning_rate = rate * 256 / batch_size
  config.final_rate = 1e-5 * 256 / batch_size
  config.warmup_epochs = 5.0
  config.warmup_rate = 1e-6 * 256 / batch_size
  config.warmup_overlaps = True
  config.interpolation = "bicubic"
  config.augment = (
    # "rand-m9-mstd0.5-inc1" of timm.
    "random_resized_crop | flip | rand_augment(2, 9, noise=0.5, increasing=True)"
    " | random_erasing(0.25)"
  )
  config.label_smoothing = 0.1
  config.cutmix = 1.0
  return config


def variant(family: str, size: str) -> str:
  """Returns the name of a model from its family and the end of its name.

  Raises:
    InputError: there is no such size.
  """
  if size not in SIZES[family]:
    raise unknown(f"size of {family}", size, SIZES[family])
  return f"{family}_{size}"


def get_repopt_config() -> ml_collections.ConfigDict:
  """Returns the recipe of RepOptimizer's authors on ImageNet; a config adds model and scales."""
  config = get_config()
  config.model_overrides.branches = ("conv3x3",)
  config.resize_size = 224
  config.optimizer = "repoptimizer"
  rand_augment = 'rand_augment(2, 15, noise="uniform", probability=1, cutout=True)'
  config.augment = f"random_resized_crop | flip | {rand_augment}"
  config.warmup_epochs = 5.0
  config.warmup_overlaps = True
  config.nesterov = True
  config.weight_decay = 4e-5
  config.weight_decay_rule = "more_than_one_axis"
  config.label_smoothing = 0.1
  return config


def get_repopt_search_config() -> ml_collections.ConfigDict:
  """Returns the hyper-search of RepOptimizer's authors on CIFAR-100; a config adds the model."""
  config = get_cifar_config()
  config.model_overrides.scaled = True
  config.num_classes = 100
  config.dataset = "cifar100"
  config.mean, config.std = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)
  config.batch_size = 256
  config.num_epochs = 240.0
  config.warmup_epochs = 10.0
  config.warmup_overlaps = True
  config.nesterov = True
  config.weight_decay = 4e-5
  config.weight_decay_rule = "more_than_one_axis"
  config.clip_norm = 5.0
  config.label_smoothing = 0.1
  return config


def get_parnet_config(erasing: float) -> ml_collections.ConfigDict:
  """Returns the recipe of ParNet's authors, with the learning rate of their paper.

  Their script gives the rate 0.001 for a batch of 1024, about a hundred times less than is usual
  for SGD. The paper gives 0.8 for a batch of 2048, to be scaled with the batch. We know the text of
  the paper from a secondary source only. The rate is thus 0.1 for a batch of 256, as in the other
  recipes. The cosine and the cool-down are those of the script.

  Args:
    erasing: probability of random erasing, higher for large models.
  """
  config = get_config()
  config.dtype = "bfloat16"  # The authors train in mixed precision.
  config.batch_size = 1024
  config.num_epochs = 130.0  # 120 epochs and the cool-down.
  config.cooldown_epochs = 10.0
  config.final_rate = 2.5e-6  # 1e-5 for a batch of 1024.
  config.nesterov = True
  config.weight_decay_rule = "more_than_one_axis"
  rand_augment = f"rand_augment(2, 9, noise=0.5) | random_erasing({erasing})"
  config.augment = f"random_resized_crop | flip | {rand_augment}"
  config.label_smoothing = 0.1
  config.ema_decay = 0.9999
  return config
