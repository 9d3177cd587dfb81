"""The fields of a run's config: one table with each default, its documentation and its check.

A recipe in `repjax.configs` starts from `default()` and sets what differs. On the command line,
`--config.NAME=VALUE` sets a field. The row of the field in FIELDS, or in OVERRIDES for
`--config.model_overrides.NAME`, says what the value means.

This module imports neither jax nor a subpackage of repjax. Some fields take names of things that a
subpackage implements. The table holds a copy of these names, and a test compares the copy with the
subpackage.
"""

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from repjax import schema
from repjax.errors import InputError
from repjax.schema import (
  Rule,
  attributes,
  boolean,
  identifier,
  items,
  number,
  optional,
  record,
  row,
  text,
  whole,
)

if TYPE_CHECKING:
  import ml_collections

Config: TypeAlias = Any
"""An ml_collections.ConfigDict with the fields of FIELDS; the fields have no static types."""

TASKS = ("classification", "segmentation")
SCORES = ("miou", "accuracy")
"""The scores by which checkpoints are compared; the first one that an evaluation has counts."""
DTYPES = ("float32", "bfloat16")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
SCHEDULES = ("cosine", "step", "poly")
REPOPTIMIZERS = ("repoptimizer", "repoptimizer_adamw")
"""The optimizers that multiply gradients by factors that follow from scales."""
ADAMW = ("adamw", "repoptimizer_adamw")
"""The optimizers that are AdamW; the others are SGD."""
OPTIMIZERS = ("sgd", "adamw", *REPOPTIMIZERS)
DECAY_RULES = (
  "kernels_and_fast_biases",
  "all_but_penalised_kernels",
  "more_than_one_axis",
  "no_vectors",
)
QAT_ACTIVATIONS = ("uint8", "int8")
RUNNING_VARIANCES = ("unbiased", "biased")

_ABOVE_0 = number(above=0)
_AT_LEAST_0 = number(0)
_NO_LIMIT = number(0, finite=False)
_COUNT = whole(0, 2**63 - 1)
_AT_LEAST_1 = whole(1)
_BELOW_1 = number(0, below=1)
_SIDE = whole(1, 8_192)  # of an image, in pixels
MEAN = items(number(-1_000_000, 1_000_000), length=3)
STD = items(number(1e-6, 1_000_000), length=3)
"""Rules of the mean and the standard deviation of pixels between 0 and 1.

Numbers beyond these bounds would make inputs that float32 does not hold.
"""
_RULES = {bool: boolean, int: whole(), float: number(), str: text(), tuple: items(attributes)}


class Field(NamedTuple):
  """A row of the table.

  Attributes:
    name: the field is `config.NAME`.
    default: the value in `default()`. The field takes values of its type only.
    text: the documentation.
    limits: the rule of the values that a run could use. None: every value of the type may pass.
    kind: the type of a field whose default is None.
    evaluates: evaluation and conversion read the field too, and check it.
    imported: the value in the config of imported weights. None: the default.
    free: no parameter depends on the field, so it may change when a run continues.
    before: the value that older runs used. None: unknown; such runs continue with any value.
    task: the one task that reads the field, see `check_task`. None: every task.
  """

  name: str
  default: Any
  text: str
  limits: Rule | None = None
  kind: type | None = None
  evaluates: bool = False
  imported: Any = None
  free: bool = False
  before: Any = None
  task: str | None = None

  @property
  def rule(self) -> Rule:
    """The rule of the field's values: its limits, or else its type. See `repjax.schema`."""
    return self.limits or _RULES.get(self.kind or type(self.default), attributes)


OVERRIDES = (
  Field("act", None, 'Activation: "relu", "silu" or "gelu".', kind=str),
  Field("dropout", None, "Rate of the dropout before the classifier.", kind=float),
  Field("remat", None, "Recompute each block in the backward pass, to save memory.", kind=bool),
  Field(
    "statistics",
    None,
    'How training finds the statistics of 1x1 branches: "auto", "covariance" or "outputs".',
    kind=str,
  ),
  Field("stage_sizes", None, "Blocks in each stage, or in each stream of ParNet.", kind=tuple),
  Field(
    "width_multipliers",
    None,
    "Factors on channels in RepVGG and MobileOne.",
    kind=tuple,
  ),
  Field("strides", None, "Strides of the stem and of each stage.", kind=tuple),
  Field("groups", None, "Groups of RepVGG's convolutions in every second block.", kind=int),
  Field("branches", None, "Names of the branches of RepVGG's blocks.", kind=tuple),
  Field(
    "norm",
    None,
    'Branches of RepVGG with a norm, and "after_sum" for one after the sum.',
    kind=tuple,
  ),
  Field("residual", None, "Build residual blocks of two layers in RepVGG.", kind=bool),
  Field("scaled", None, "Build RepVGG's branches with scales, for a hyper-search.", kind=bool),
  Field("se", None, 'Squeeze-and-excitation in RepVGG: "pre" or "post".', kind=str),
  Field("se_reduction", None, "Factor by which the hidden layer of SE is narrower.", kind=int),
  Field("aux_heads", None, "Build RepVGG's auxiliary heads.", kind=bool),
  Field("block", None, 'Block of ResNet: "basic" or "bottleneck".', kind=str),
  Field("widths", None, "Channels of each stage or stream.", kind=tuple),
  Field("stem_features", None, "Channels of ResNet's stem.", kind=int),
  Field("output_stride", None, "Ratio of the image size to the size of the last map.", kind=int),
  Field("dilated_blocks", None, "Last blocks of RepVGG and ResNet that dilate.", kind=int),
  Field("hidden", None, "Width of VGG's two hidden fully connected layers.", kind=int),
  Field("tile", None, "Height and width of RepMLP's tiles: a number or a tuple.", kind=object),
  Field("fc3_groups", None, "Groups of RepMLP's FC3: a number or a tuple.", kind=object),
  Field("local_kernels", None, "Kernel sizes of the local convolutions of RepMLP.", kind=tuple),
  Field(
    "reduction",
    None,
    "Factor by which Global Perceptrons are narrower inside: a number or a tuple.",
    kind=object,
  ),
  Field("global_perceptron", None, "Build the Global Perceptrons of RepMLP.", kind=bool),
  Field("fc3", None, 'FC3 of RepMLP: "dense", or a convolution such as "conv9x9".', kind=str),
  Field("mixer", None, 'Block of RepMLP: "repmlp", or a convolution such as "conv9x9".', kind=str),
  Field("repmlp_block", None, 'Block of RepMLP-ResNet: "bottleneck" or "light".', kind=str),
  Field("repmlp_stages", None, "Numbers of the stages of ResNet with RepMLP.", kind=tuple),
  Field("narrowing", None, "Factors by which RepMLP is narrower than bottlenecks.", kind=tuple),
  Field("tiles", None, "Tiles of each stage of RepMLPNet.", kind=tuple),
  Field("share_sets", None, "Weight sets that each stage of RepMLPNet shares.", kind=tuple),
  Field("patch_size", None, "Size and stride in pixels of RepMLPNet's embedding.", kind=int),
  Field("stem_blocks", None, "Stream blocks in ParNet's stem.", kind=int),
  Field("last_block", None, 'Last block of ParNet: "downsample" or "conv1x1".', kind=str),
  Field("copies", None, "Convolutions of the largest size in each block of MobileOne.", kind=int),
  Field("se_sizes", None, "Pairs of blocks with SE at the end of MobileOne's stages.", kind=tuple),
  Field("normed_branches", None, "Norms in the branches of RepViT, none after them.", kind=bool),
  Field("distilled", None, "Train two classifiers in RepViT, which are averaged.", kind=bool),
  Field("expansion", None, "Ratio of FastViT's hidden layers to their inputs.", kind=int),
  Field("attention_stages", None, "Stages with attention at the end of FastViT.", kind=int),
  Field(
    "head_features",
    None,
    "Channels of each head of attention in FastViT, and of the head of PSPNet and FCN.",
    kind=int,
  ),
  Field(
    "drop_path",
    None,
    "Rate at which training leaves out FastViT's last block for an image; lower in those before.",
    kind=float,
  ),
  Field("backbone", None, "Name of the classifier below PSPNet and FCN.", kind=str),
  Field("backbone_overrides", None, "Attributes of this classifier, by name.", kind=object),
  Field(
    "dilation",
    None,
    'Blocks of the backbone of PSPNet and FCN that dilate: "full", "fast", "last" or "none".',
    kind=str,
  ),
  Field("bins", None, "Rows and columns of the grids over which PSPNet averages.", kind=tuple),
  Field("aux", None, "Build the auxiliary head of PSPNet and FCN.", kind=bool),
  Field("aux_features", None, "Channels of this auxiliary head.", kind=int),
)
"""The fields of `config.model_overrides`: attributes of a model. None: as the variant has them.

The classes in `repjax.models` document each attribute in full.
"""

FIELDS = (
  # Start.
  Field(
    "init_from",
    None,
    "Folder of a run or an import to take weights from. None: weights are drawn. With a folder, "
    "`model`, `model_overrides` and the preprocessing may be None, which means as in the folder.",
    kind=str,
    free=True,  # A run that has begun does not read it again.
  ),
  # Model.
  Field(
    "task",
    "classification",
    'What the model learns: "classification", one label for each image, or "segmentation", one for '
    "each pixel.",
    text(*TASKS),
    before="classification",
  ),
  Field("model", "repvgg_a0", "A name from `repjax.list_models()`."),
  Field("model_overrides", None, "Attributes that replace those of the variant, see OVERRIDES."),
  Field(
    "num_classes",
    1000,
    "Outputs of the classifier. None: as many as the data set has classes.",
    whole(1, 1_000_000),
  ),
  Field(
    "dtype",
    "float32",
    'Type of the computation: "float32" or "bfloat16". Parameters are always float32.',
    text(*DTYPES),
  ),
  Field("sync_batch_norm", False, "Share the statistics of batch norms between devices."),
  Field(
    "running_variance",
    None,
    'Variance of a batch that running variances average: "unbiased" as PyTorch, "biased" as Flax. '
    'None: as the run began; "unbiased" in a new run.',
    text(*RUNNING_VARIANCES),
    kind=str,
    before="biased",
  ),
  # Data.
  Field(
    "dataset",
    "imagenet2012",
    'A data set of `repjax prepare-dataset`, a TFDS name, "digits" or "synthetic".',
    evaluates=True,
  ),
  Field(
    "data_dir",
    None,
    "Folder of the data sets. None: the default of TFDS.",
    kind=str,
    evaluates=True,
    free=True,  # A fingerprint tells whether the images are the same.
  ),
  Field("train_split", "train", "Split of the data set to train on."),
  Field("eval_split", "validation", "Split of the data set to evaluate on.", evaluates=True),
  Field("image_size", 224, "Side in pixels of the square images in training.", _SIDE),
  Field(
    "eval_image_size",
    None,
    "Side in pixels in evaluation and deployment. None: as in training.",
    _SIDE,
    kind=int,
  ),
  Field(
    "resize_size",
    256,
    "Length in pixels of the shorter side, before evaluation's central crop: its side or more.",
  ),
  Field(
    "interpolation",
    "bilinear",
    'Method of resizing: "nearest", "bilinear" or "bicubic".',
    text(*INTERPOLATIONS),
  ),
  Field(
    "mean",
    (0.485, 0.456, 0.406),
    "Mean of each channel, subtracted from values in 0 ... 1.",
    MEAN,
  ),
  Field(
    "std",
    (0.229, 0.224, 0.225),
    "Standard deviation of each channel, by which the difference is divided.",
    STD,
  ),
  Field(
    "augment",
    "random_resized_crop | flip",
    "Steps of the augmentation, with | between them, see repjax/data/augmentation/parser.py.",
  ),
  Field(
    "augment_repeats",
    1,
    "Times that an epoch shows an image, each time augmented differently. The epoch keeps its "
    "number of steps, so that it shows a part of the images only. 1: all images once.",
    _AT_LEAST_1,
    before=1,
  ),
  Field(
    "curriculum",
    (),
    "Earlier parts of the training, each as (epoch at which it ends, `image_size`, `augment`). The "
    "fields `image_size` and `augment` are for the rest of the training.",
    items(row(_ABOVE_0, _SIDE, text())),
    before=(),
  ),
  Field(
    "num_workers",
    0,
    "Processes that read and augment images. 0: threads of this process.",
    _COUNT,
    evaluates=True,
    free=True,
  ),
  Field(
    "eval_multiple",
    0,
    "Images of a segmentation lie, in evaluation, on a canvas whose height and width this number "
    "divides. 0: on the smallest canvas at which the maps of the network lie exactly under the "
    "logits. With a total stride of s, its sides are s k + 1 pixels. With `eval_window`, the "
    "network sees windows, and this field has no effect.",
    whole(0, 8_192),
    evaluates=True,
    before=0,
    task="segmentation",
  ),
  Field(
    "eval_window",
    0,
    "Side in pixels of the windows that evaluation slides over an image. 0: the whole image.",
    whole(0, 8_192),
    evaluates=True,
    before=0,
    task="segmentation",
  ),
  Field(
    "eval_flip",
    False,
    "Average, in evaluation, the probabilities of each image and of its mirror image.",
    evaluates=True,
    before=False,
    task="segmentation",
  ),
  # Length of the training.
  Field(
    "batch_size",
    256,
    "Images in an update, over all devices.",
    _AT_LEAST_1,
    evaluates=True,
    imported=64,
  ),
  Field(
    "accumulate_steps",
    1,
    "Parts into which each device cuts its share of a batch, to need less memory. The gradients of "
    "all parts are averaged before the one update. Batch norms see one part at a time.",
    _AT_LEAST_1,
  ),
  Field("num_epochs", 120.0, "Passes over the training split.", _ABOVE_0),
  Field("num_steps", None, "Number of updates, in place of `num_epochs`.", kind=int),
  # Learning rate. Rates are for a batch of 256 and are scaled linearly with `batch_size`.
  Field("learning_rate", 0.1, "Peak of the learning rate, for a batch of 256.", _ABOVE_0),
  Field(
    "schedule",
    "cosine",
    'Curve after the warm-up: "cosine", "step" or "poly", see repjax/training/schedules.py.',
    text(*SCHEDULES),
  ),
  Field("warmup_epochs", 0.0, "Epochs of linear warm-up to the peak.", _AT_LEAST_0),
  Field(
    "warmup_rate", 0.0, "Rate of the first step of a warm-up, for a batch of 256.", _AT_LEAST_0
  ),
  Field(
    "warmup_overlaps", False, "The curve begins with the run. False: it begins after the warm-up."
  ),
  Field(
    "final_rate",
    0.0,
    'Rate at which "cosine" and "poly" end and below which "step" does not fall, for a batch of '
    "256.",
    _AT_LEAST_0,
  ),
  Field(
    "cooldown_epochs",
    0.0,
    "Epochs at `final_rate` that end the run, counted in `num_epochs`.",
    _AT_LEAST_0,
    before=0.0,
  ),
  Field("drop_epochs", 30.0, 'Epochs between two drops of "step".', _ABOVE_0),
  Field("drop_factor", 0.1, 'Factor of each drop of "step".', _ABOVE_0),
  Field("poly_power", 0.9, 'Power p of "poly": the rate follows (1 - part done)^p.', _ABOVE_0),
  Field(
    "backbone_rate",
    1.0,
    "Factor on the rate of all parameters except the classifier's; in a segmentation, on that of "
    "the backbone's. 0: they are frozen, and run as in evaluation.",
    _AT_LEAST_0,
    before=1.0,
  ),
  # Optimizer.
  Field(
    "optimizer",
    "sgd",
    'Optimizer: "sgd" or "adamw"; "repoptimizer" or "repoptimizer_adamw" for plain networks, see '
    "repjax/training/multipliers.py.",
    text(*OPTIMIZERS),
  ),
  Field(
    "scales",
    None,
    "Folder of the run of a hyper-search, or a file of scales, for RepOptimizer.",
    kind=str,
    free=True,  # A run that has begun does not read it again.
  ),
  Field("momentum", 0.9, "Momentum of SGD, or the first beta of AdamW.", _AT_LEAST_0),
  Field("nesterov", False, "Use Nesterov momentum, in SGD only."),
  Field("weight_decay", 1e-4, "Factor of the weight decay.", _AT_LEAST_0),
  Field(
    "final_decay_factor",
    1.0,
    "Factor on `weight_decay` at the end of the run, reached along a cosine. 1: it is constant.",
    _AT_LEAST_0,
    before=1.0,
  ),
  Field(
    "weight_decay_rule",
    "kernels_and_fast_biases",
    "The parameters that decay, and the rate of biases, see repjax/training/optimizer.py.",
    text(*DECAY_RULES),
  ),
  Field(
    "custom_l2",
    0.0,
    "Weight of RepVGG's custom L2 penalty, see repjax/training/custom_l2.py. 0: off.",
    _AT_LEAST_0,
  ),
  Field("clip_norm", 0.0, "Largest norm of the whole gradient. 0: no limit.", _NO_LIMIT),
  Field(
    "adaptive_clip",
    0.0,
    "Largest norm of the gradient of each output of a layer, as a part of the norm of its weights, "
    "see repjax/training/clipping.py. 0: no limit.",
    _AT_LEAST_0,
    before=0.0,
  ),
  Field(
    "ema_decay",
    0.0,
    "Decay, in each update, of a moving average of parameters and statistics. The average is also "
    "evaluated, decides which checkpoint is the best, and is deployed. During the warm-up it is a "
    "copy. 0: off.",
    _BELOW_1,
    before=0.0,
  ),
  # Quantization-aware training, see repjax/training/quantization.py.
  Field(
    "qat",
    False,
    "Fine-tune the network of `init_from` while its layers are rounded to 8 bits.",
    before=False,
    task="classification",
  ),
  Field(
    "qat_activations",
    "uint8",
    'Type of rounded activations: "uint8", or "int8", which is symmetric, for TensorRT.',
    text(*QAT_ACTIVATIONS),
  ),
  Field(
    "qat_weight_bits",
    7,
    "Bits of rounded weights. 8 is for CPUs with VNNI and for GPUs.",
    whole(7, 8),
  ),
  Field("qat_images", 256, "Images of the training split to calibrate with.", _AT_LEAST_1),
  # Loss.
  Field(
    "label_smoothing",
    0.0,
    "Share of a target that all classes divide equally.",
    _BELOW_1,
    task="classification",
  ),
  Field(
    "mixup",
    0.0,
    "Alpha of Mixup's Beta distribution. 0: off.",
    _AT_LEAST_0,
    task="classification",
  ),
  Field(
    "cutmix",
    0.0,
    "Alpha of CutMix's Beta distribution. 0: off. With Mixup on too, each step takes one of both.",
    _AT_LEAST_0,
    task="classification",
  ),
  Field(
    "class_weights",
    None,
    "Weight of each class in the loss of segmentation, in the order of the labels. None: all are "
    "1.",
    items(_AT_LEAST_0),
    kind=tuple,
    task="segmentation",
  ),
  Field(
    "aux_weight", 0.1, "Weight of the loss of each auxiliary head that the model has.", _AT_LEAST_0
  ),
  # The run.
  Field("seed", 0, "Seed of initialization, data order, augmentation and dropout.", _COUNT),
  Field("log_every_steps", 50, "Steps between two lines of the log.", _AT_LEAST_1, free=True),
  Field(
    "eval_every_epochs",
    1.0,
    "Epochs between two evaluations, each with a checkpoint.",
    _ABOVE_0,
    free=True,
  ),
  Field(
    "save_every_minutes",
    10.0,
    "Minutes between two checkpoints without evaluation. 0: none.",
    _NO_LIMIT,
    free=True,
  ),
  Field("tensorboard", False, "Write event files for TensorBoard, with tensorboardX.", free=True),
  Field(
    "recalibrate_batches",
    0,
    "Batches over which batch norms are re-estimated at the end. 0: none. A frozen backbone keeps "
    "its statistics.",
    _COUNT,
    free=True,
  ),
  Field(
    "tolerance",
    1e-5,
    "Largest relative difference between the logits of training form and deploy form.",
    number(above=0, finite=False),
    evaluates=True,
    free=True,
  ),
)
"""Every field of a config."""

EVALUATION_FIELDS = tuple(field.name for field in FIELDS if field.evaluates)
"""The fields that evaluation and conversion read."""

FREE = frozenset(field.name for field in FIELDS if field.free)
"""The fields that may change when a run continues."""

BEFORE = {field.name: field.before for field in FIELDS if field.before is not None}
"""The value that older runs used, for each field that they did not have."""

_MODEL_OVERRIDES = record(
  {field.name: optional(field.rule) for field in OVERRIDES}, others=attributes, name=identifier
)
CONFIG_JSON = record(
  {field.name: optional(field.rule) for field in FIELDS}
  | {"model_overrides": optional(_MODEL_OVERRIDES)},
  others=attributes,
  name=identifier,
)
"""The rule of config.json. A config of one's own may have more fields."""

RESUME = ("auto", "must", "never")
"""The values of `resume`: a run may be continued, must be continued, or must not exist yet."""


def default() -> "ml_collections.ConfigDict":
  """Returns a new config with every field at its default: the RepVGG paper's simple recipe."""
  config = _at_defaults(field for field in FIELDS if field.name != "model_overrides")
  config.model_overrides = _at_defaults(OVERRIDES)
  return config


def default_of(name: str) -> Any:
  """Returns the default of a field."""
  return next(field.default for field in FIELDS if field.name == name)


def for_import(model: str, num_classes: int) -> dict[str, Any]:
  """Returns the config of imported weights, which has the fields that evaluation reads.

  Args:
    model: name of the model.
    num_classes: number of classes of the model. The default data set is named only if the model has
      the default number of classes; otherwise `dataset` is None.
  """
  config = {
    field.name: field.default if field.imported is None else field.imported
    for field in FIELDS
    if field.evaluates
  }
  if num_classes != default_of("num_classes"):
    config["dataset"] = None
  return {"model": model, **config}


def _at_defaults(fields: Iterable[Field]) -> "ml_collections.ConfigDict":
  # Imported here, so that the command line can show its help without loading more packages.
  import ml_collections
  from ml_collections import config_dict

  config = ml_collections.ConfigDict()
  for field in fields:
    value = field.default if field.kind is None else config_dict.placeholder(field.kind)
    config[field.name] = value
  return config


def check_fields(config: Config, names: Iterable[str] | None = None) -> None:
  """Raises InputError if a field is missing. Without `names`, checks all fields."""
  names = [field.name for field in FIELDS] if names is None else names
  missing = [name for name in names if name not in config]
  if missing:
    raise InputError(
      f"the config lacks {', '.join(missing)}. A config starts from repjax.config.default(); a "
      "config.json that lacks a field is damaged"
    )


def check_evaluation(config: Config) -> None:
  """Raises InputError for a missing or wrong field among those that evaluation reads."""
  check_fields(config, EVALUATION_FIELDS)
  if config.dataset is None:
    raise InputError(
      "no data set is named. Pass --dataset NAME --split SPLIT: a TFDS name such as imagenet2012 "
      "with the classes of the model, or synthetic for noise"
    )
  for field in FIELDS:
    if field.evaluates:
      _check_value(config, field)


def check_config(config: Config) -> None:
  """Raises InputError for a missing field, a wrong value, or values that exclude each other.

  Some values can be judged by a subpackage only, such as names of models. They are checked where
  they are used.
  """
  check_fields(config)
  check_evaluation(config)
  for field in FIELDS:
    _check_value(config, field)
  check_task(config, config.task)
  check_classes(config)
  check_curriculum(config)
  check_rates(config)
  check_optimizer(config)
  check_custom_l2(config)
  check_qat(config)
  check_overrides(config)


def _check_value(config: Config, field: Field) -> None:
  """Applies the rule of a field; a field whose default is None may be None."""
  value = config[field.name]
  if field.name != "model_overrides" and not (value is None and field.default is None):
    schema.check(value, field.rule, f"config.{field.name}")


def check_task(config: Config, task: str, names: Iterable[str] | None = None) -> None:
  """Raises InputError for a field that a task does not read, where its value asks for something.

  Args:
    config: config.
    task: the task.
    names: fields to check; None: all fields.
  """
  for field in FIELDS:
    if field.task in (None, task) or (names is not None and field.name not in names):
      continue
    if (value := config[field.name]) != field.default:
      raise InputError(
        f"config.{field.name} = {schema.shown(value)} is for {field.task}, and this is a "
        f"{task}. Leave it at {field.default}, or take a model and config.task for {field.task}"
      )


def check_classes(config: Config) -> None:
  """Raises InputError if a segmentation has more classes than masks have values, or few weights."""
  if config.task == "segmentation" and config.num_classes > 255:
    raise InputError(
      f"config.num_classes = {config.num_classes}, and the masks of a segmentation hold classes 0 "
      "to 254, with 255 for pixels without a class; use at most 255 classes"
    )
  weights = config.class_weights
  if weights is not None and (len(weights) != config.num_classes or not any(weights)):
    raise InputError(
      f"config.class_weights has {len(weights)} weights with the sum {sum(weights):g} for "
      f"{config.num_classes} classes. Give a weight for each class, one of them above 0, or None"
    )


def check_curriculum(config: Config) -> None:
  """Raises InputError if a part of the curriculum does not end after the one before it."""
  ends = [end for end, _, _ in config.curriculum]
  if any(after <= before for before, after in itertools.pairwise(ends)):
    raise InputError(
      f"the parts of config.curriculum end at the epochs {', '.join(map(str, ends))}. Each number "
      "must be larger than the one before it"
    )
  if ends and config.qat:
    raise InputError(
      "config.qat fine-tunes at one image size, and config.curriculum has several. Set "
      "config.curriculum to ()"
    )


def check_rates(config: Config) -> None:
  """Raises InputError if the schedule's ends are above its peak."""
  for name in ("warmup_rate", "final_rate"):
    if config[name] > config.learning_rate:
      raise InputError(
        f"config.{name} = {config[name]} is above the peak, config.learning_rate = "
        f"{config.learning_rate}"
      )


def check_optimizer(config: Config) -> None:
  """Raises InputError for fields that the optimizer does not take, or lacks."""
  check_repoptimizer(config)
  if config.clip_norm and config.adaptive_clip:
    raise InputError(
      f"config.clip_norm = {config.clip_norm} and config.adaptive_clip = {config.adaptive_clip} "
      "limit the same gradient. Set one of them to 0"
    )
  if config.optimizer not in ADAMW:
    return
  if config.nesterov:
    raise InputError(
      f"config.nesterov is for SGD only; with config.optimizer = {config.optimizer!r} leave it "
      "False"
    )
  if config.momentum >= 1:
    raise InputError(
      f"config.momentum is the first beta of AdamW and must be below 1, got {config.momentum}"
    )


def check_repoptimizer(config: Config) -> None:
  """Raises InputError if RepOptimizer lacks its scales, or would not do what branches do."""
  if config.optimizer not in REPOPTIMIZERS:
    if config.scales is not None:
      raise InputError(
        f"config.scales is for RepOptimizer only, got config.optimizer = {config.optimizer!r}. "
        "Leave scales out, or set config.optimizer to 'repoptimizer'"
      )
    return
  chosen = f"config.optimizer = {config.optimizer!r}"
  if not config.scales:
    raise InputError(
      f"{chosen} needs config.scales: the folder of the run of a hyper-search, or a file of "
      "scales. Train the hyper-search first, for example by repjax train --config "
      "digits_repopt_search"
    )
  for name in ("clip_norm", "adaptive_clip"):
    if config[name]:
      raise InputError(
        f"{chosen} takes no config.{name}, got {config[name]}: the gradient of the branches that "
        "it stands for has a different norm. Set it to 0"
      )
  if config.init_from or config.qat:
    raise InputError(
      f"{chosen} begins with kernels that follow from the scales, so it cannot start from trained "
      "weights. Leave out config.init_from and config.qat, or fine-tune with 'sgd' or 'adamw'"
    )


def check_custom_l2(config: Config) -> None:
  """Raises InputError if penalised kernels would decay too, or have no statistics of a batch."""
  if not config.custom_l2:
    return
  if config.qat:
    raise InputError(
      f"config.custom_l2 = {config.custom_l2} needs statistics of the batch, but with config.qat "
      "batch norms keep their running statistics; set it to 0"
    )
  if config.weight_decay_rule != "all_but_penalised_kernels":
    raise InputError(
      f"config.custom_l2 = {config.custom_l2} replaces weight decay on the kernels that it "
      f"penalises, but config.weight_decay_rule = {config.weight_decay_rule!r} would decay them "
      "too; set it to 'all_but_penalised_kernels', or config.custom_l2 to 0"
    )


def check_qat(config: Config) -> None:
  """Raises InputError if quantization-aware training would not compute in float32."""
  if config.qat and config.dtype != "float32":
    raise InputError(
      f"config.qat computes in float32 and rounds to 8 bits, but config.dtype = {config.dtype!r}; "
      "set it to 'float32'"
    )


def check_overrides(config: Config) -> None:
  """Raises InputError for attributes of a model that training sets itself."""
  overrides = config.model_overrides or {}
  for name in ("axis_name", "deploy", "features_only"):
    if overrides.get(name):
      raise InputError(f"model_overrides.{name} is not for training; leave it out")
  if overrides.get("running_variance"):
    raise InputError(
      "model_overrides.running_variance is no override of a run; set config.running_variance"
    )
