"""From a config to what a run needs, with every mistake in it named before anything is written."""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import ml_collections

from repjax import disk, runs
from repjax.data import Source, open_source, parse_augmentation
from repjax.data.transforms import INTERPOLATIONS
from repjax.errors import InputError, unknown
from repjax.spec import ModelSpec, Preprocessing
from repjax.training import metrics, parallel, recipe

Config: TypeAlias = Any
"""An ml_collections.ConfigDict with the fields of configs/common.py; their types are its own."""

EVALUATION_FIELDS = (
  *("dataset", "data_dir", "eval_split", "batch_size", "num_workers", "tolerance"),
)
_FIELDS = (
  *("init_from", "recalibrate_batches"),
  *("model", "model_overrides", "num_classes", "dtype", "sync_batch_norm"),
  *("dataset", "data_dir", "train_split", "eval_split"),
  *("image_size", "eval_image_size", "resize_size", "interpolation", "mean", "std"),
  *("augment", "num_workers"),
  *recipe.FIELDS,
  *("seed", "log_every_steps", "eval_every_epochs", "tolerance", "tensorboard"),
  "save_every_minutes",
)

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


class Plan(NamedTuple):
  """The facts of a run that follow from its config and its data."""

  spec: ModelSpec
  train: Source
  eval: Source
  steps_per_epoch: float
  total_steps: int
  warmup_steps: int
  eval_every_steps: int

  def evaluates(self, step: int) -> bool:
    """Whether an evaluation is due behind a step."""
    return step % self.eval_every_steps == 0 or step == self.total_steps


def preprocessing(config: Config) -> Preprocessing:
  """How images become inputs in evaluation and in deployment."""
  size = config.image_size if config.eval_image_size is None else config.eval_image_size
  return Preprocessing(
    image_size=size,
    resize_size=max(config.resize_size, size),
    interpolation=config.interpolation,
    mean=tuple(config.mean),
    std=tuple(config.std),
  )


def model_spec(config: Config, class_names: tuple[str, ...]) -> ModelSpec:
  """What model.json will say.

  Raises:
    InputError: a model, override or image size that cannot be.
  """
  spec = ModelSpec(
    name=config.model,
    num_classes=config.num_classes,
    overrides={k: v for k, v in config.model_overrides.to_dict().items() if v is not None},
    preprocessing=preprocessing(config),
    class_names=class_names,
  )
  spec.variable_shapes()  # traces the model, which checks overrides and the image size
  return spec


def check_training_size(config: Config, spec: ModelSpec) -> None:
  """Raises InputError where a model cannot be trained at one image size and used at another."""
  training = dataclasses.replace(spec.preprocessing, image_size=config.image_size)
  if training == spec.preprocessing:
    return
  shapes = dataclasses.replace(spec, preprocessing=training).variable_shapes()
  if shapes != spec.variable_shapes():
    raise InputError(
      f"the parameters of {config.model} depend on the image size, so it cannot be trained at "
      f"{config.image_size} px and evaluated at {spec.preprocessing.image_size}; leave "
      "config.eval_image_size unset"
    )


def check_evaluation(config: Config) -> None:
  """Raises InputError for what no evaluation or conversion could use."""
  check_fields(config, EVALUATION_FIELDS)
  if config.dataset is None:
    raise InputError(
      "no data set is named: pass --dataset NAME --split SPLIT, a TFDS name such as imagenet2012 "
      "with the model's classes, or synthetic for noise"
    )
  if config.batch_size < 1:
    raise InputError(f"config.batch_size must be at least 1, got {config.batch_size}")
  if not config.tolerance > 0:
    raise InputError(f"config.tolerance must be above 0, got {config.tolerance}")
  if not config.num_workers >= 0:
    raise InputError(f"config.num_workers must be at least 0, got {config.num_workers}")


def check_fields(config: Config, fields: tuple[str, ...] | None = None) -> None:
  """Raises InputError for a field that is missing, of those of a whole run if not told others."""
  fields = _FIELDS if fields is None else fields
  missing = [field for field in fields if field not in config]
  if missing:
    raise InputError(
      f"the config lacks {', '.join(missing)}; a config starts from configs/common.py, and a "
      "config.json that lacks a field is damaged"
    )


def check(config: Config) -> None:
  """Raises InputError for a field that is missing, or a value that no run could use."""
  check_fields(config)
  check_evaluation(config)
  for field, choices in (
    ("dtype", DTYPES),
    ("interpolation", INTERPOLATIONS),
  ):
    if config[field] not in choices:
      raise unknown(f"value of config.{field}", config[field], choices)
  parse_augmentation(config.augment)
  if config.tensorboard:
    metrics.check_tensorboard()
  for field in (
    *("image_size", "eval_image_size", "num_classes", "log_every_steps", "accumulate_steps"),
  ):
    if config[field] is not None and config[field] < 1:
      raise InputError(f"config.{field} must be at least 1, got {config[field]}")
  if not config.eval_every_epochs > 0:
    raise InputError(f"config.eval_every_epochs must be above 0, got {config.eval_every_epochs}")
  for field in ("seed", "recalibrate_batches", "save_every_minutes"):
    if not config[field] >= 0:
      raise InputError(f"config.{field} must be at least 0, got {config[field]}")
  recipe.check(config)
  for field in ("mean", "std"):
    if len(config[field]) != 3 or (field == "std" and not min(config[field]) > 0):
      raise InputError(f"config.{field} takes three numbers, a std above 0, got {config[field]}")
  for override in ("axis_name", "deploy", "features_only"):
    if config.model_overrides.get(override):
      raise InputError(f"model_overrides.{override} is not for training; leave it out")


def open_split(config: Config, split: str, spec: ModelSpec) -> Source:
  """Opens a split of the config's data set for a model.

  Raises:
    InputError: it cannot be opened, or it has another number of classes than the model.
  """
  source = open_source(
    config.dataset,
    split,
    data_dir=config.data_dir,
    num_classes=spec.num_classes,
    image_size=spec.preprocessing.image_size,
  )
  if len(source.class_names) != spec.num_classes:
    raise InputError(
      f"{config.dataset} has {len(source.class_names)} classes, the model has {spec.num_classes}; "
      f"for those of {config.dataset} train one with "
      f"--config.num_classes={len(source.class_names)}, which with --config.init_from=FOLDER of "
      "this model keeps all but its classifier, or name another data set"
    )
  return source


def check_batch_fits(config: Config, train: Source) -> None:
  """Raises InputError where a split has less images than a batch."""
  images = len(train.examples)
  if config.batch_size > images:
    raise InputError(
      f"batch_size {config.batch_size} is more than the {images} images of {config.dataset}'s "
      f"{config.train_split} split; pass --config.batch_size={2 ** int(math.log2(images))} or less"
    )


def make_plan(config: Config) -> Plan:
  """Checks a config and works out what follows from it.

  Raises:
    InputError: a value that no run could use.
  """
  check(config)
  mixing = config.mixup > 0 or config.cutmix > 0
  parallel.check_batch_size(config.batch_size, parts=config.accumulate_steps, mixing=mixing)
  spec = model_spec(config, ())
  train, evaluation = (
    open_split(config, split, spec) for split in (config.train_split, config.eval_split)
  )
  spec = dataclasses.replace(spec, class_names=train.class_names)
  check_training_size(config, spec)
  check_batch_fits(config, train)
  steps_per_epoch = len(train.examples) / config.batch_size
  total = config.num_steps
  if total is None:
    total = round(config.num_epochs * steps_per_epoch)
  if total < 1:
    field = "num_epochs" if config.num_steps is None else "num_steps"
    raise InputError(f"config.{field} = {config[field]} leaves no step to train")
  return Plan(
    spec=spec,
    train=train,
    eval=evaluation,
    steps_per_epoch=steps_per_epoch,
    total_steps=total,
    warmup_steps=min(total, round(config.warmup_epochs * steps_per_epoch)),
    eval_every_steps=max(1, math.ceil(config.eval_every_epochs * steps_per_epoch)),
  )


def read_config(workdir: str | Path, **changes: Any) -> Config:
  """The config of the run in a workdir, for what is done to it later.

  Args:
    workdir: of a run or an import.
    **changes: values of fields that replace those of the file, where they are not None.

  Raises:
    InputError: the folder holds no run, or its config.json is damaged.
  """
  path = runs.config_file(Path(workdir))
  value = disk.read_json(path)
  if not isinstance(value, dict):
    raise InputError(f"{path} is damaged: it does not hold a config")
  changed = {field: change for field, change in changes.items() if change is not None}
  return ml_collections.ConfigDict({**value, **changed}, convert_dict=True)
