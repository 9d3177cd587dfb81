"""The facts of a run that follow from its config: model, data, steps, schedule, optimizer.

Every mistake in a config is reported before a file is written.
"""

import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_collections
import optax

from repjax import names, runs
from repjax.config import (
  ADAMW,
  BEFORE,
  EVALUATION_FIELDS,
  REPOPTIMIZERS,
  Config,
  check_config,
  default_of,
)
from repjax.data import Source, open_source, parse_augmentation
from repjax.deploy.canvases import canvas_of
from repjax.errors import InputError
from repjax.spec import ModelSpec, Preprocessing
from repjax.training import display, optimizer, parallel, repoptimizer, schedules
from repjax.training.multipliers import Scales

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
"""Values of `config.dtype` to types of the computation."""


class Part(NamedTuple):
  """A part of the training, with images of one size and one line of augmentations.

  Attributes:
    first_step: number of steps that are done when the part begins.
    image_size: side in pixels of its images.
    augment: its line of augmentations.
  """

  first_step: int
  image_size: int
  augment: str


class Plan(NamedTuple):
  """The facts of a run that follow from its config and its data.

  Attributes:
    spec: what model.json will say.
    train: the split to train on.
    eval: the split to evaluate on.
    steps_per_epoch: batches in the training split, not rounded.
    total_steps: length of the run.
    warmup_steps: length of the warm-up, at most that of the run.
    eval_every_steps: steps between two evaluations.
    parts: the parts of the training, in order. The first begins with the run.
    scale_shapes: shapes of the scales of RepOptimizer, by layer; None with other optimizers.
  """

  spec: ModelSpec
  train: Source
  eval: Source
  steps_per_epoch: float
  total_steps: int
  warmup_steps: int
  eval_every_steps: int
  parts: tuple[Part, ...]
  scale_shapes: Scales | None = None

  def evaluates(self, step: int) -> bool:
    """Returns whether an evaluation is due after a step."""
    return step % self.eval_every_steps == 0 or step == self.total_steps


def read_config(workdir: str | Path, **changes: Any) -> Config:
  """Reads the config of the run in a workdir, for a later evaluation or conversion.

  Args:
    workdir: folder of a run or an import.
    **changes: values that replace those of the file. A None replaces nothing.

  Raises:
    InputError: the folder holds no run, or its config.json is damaged.
  """
  # Fields of evaluation that are younger than the run have the value that the run used.
  older = {name: BEFORE[name] for name in EVALUATION_FIELDS if name in BEFORE}
  value = {**older, **runs.read_config_json(names.folder(workdir))}
  changed = {field: change for field, change in changes.items() if change is not None}
  return ml_collections.ConfigDict({**value, **changed}, convert_dict=True)


def make_plan(config: Config) -> Plan:
  """Checks a config and returns what follows from it.

  Raises:
    InputError: a value that no run could use.
  """
  check(config)
  mixing = config.mixup > 0 or config.cutmix > 0
  parallel.check_batch_size(config.batch_size, parts=config.accumulate_steps, mixing=mixing)
  spec = model_spec(config, ())
  scale_shapes = repoptimizer.scale_shapes(spec) if config.optimizer in REPOPTIMIZERS else None
  train, evaluation = (
    open_split(config, split, spec) for split in (config.train_split, config.eval_split)
  )
  spec = dataclasses.replace(spec, class_names=train.class_names, class_colors=train.colors)
  check_training_sizes(config, spec)
  check_batch_fits(config, train)
  steps_per_epoch = len(train.examples) / config.batch_size
  total_steps = _total_steps(config, steps_per_epoch)
  return Plan(
    spec=spec,
    train=train,
    eval=evaluation,
    steps_per_epoch=steps_per_epoch,
    total_steps=total_steps,
    warmup_steps=min(total_steps, round(config.warmup_epochs * steps_per_epoch)),
    eval_every_steps=max(1, math.ceil(config.eval_every_epochs * steps_per_epoch)),
    parts=make_parts(config, steps_per_epoch),
    scale_shapes=scale_shapes,
  )


def make_parts(config: Config, steps_per_epoch: float) -> tuple[Part, ...]:
  """Returns the parts of the training by `config.curriculum`; those without a step are left out."""
  begin, parts = 0, []
  for end_epoch, size, augment in config.curriculum:
    end = round(end_epoch * steps_per_epoch)
    if end > begin:
      parts.append(Part(begin, size, augment))
      begin = end
  return (*parts, Part(begin, config.image_size, config.augment))


def _total_steps(config: Config, steps_per_epoch: float) -> int:
  """Returns the number of steps of a run, at least 1."""
  total = config.num_steps
  if total is None:
    total = round(config.num_epochs * steps_per_epoch)
  if total < 1:
    field = "num_epochs" if config.num_steps is None else "num_steps"
    raise InputError(f"config.{field} = {config[field]} leaves no step to train")
  return total


def check(config: Config) -> None:
  """Raises InputError for a field that is missing, or a value that no run could use."""
  check_config(config)
  parse_augmentation(config.augment, config.task)
  for number, (_, _, augment) in enumerate(config.curriculum):
    try:
      parse_augmentation(augment, config.task)
    except InputError as error:
      raise InputError(f"config.curriculum[{number}][2]: {error}") from error
  if config.tensorboard:
    display.check_tensorboard()


def preprocessing(config: Config) -> Preprocessing:
  """Returns how images become inputs in evaluation and deployment.

  Raises:
    InputError: images would be resized to less than the central square.
  """
  field = "image_size" if config.eval_image_size is None else "eval_image_size"
  if config.resize_size < config[field]:
    raise InputError(
      f"config.resize_size = {config.resize_size} is below config.{field} = {config[field]}. In "
      "evaluation the square is cut out of the resized image, so it cannot be larger. Set "
      f"config.resize_size to {config[field]} or more"
    )
  return Preprocessing(
    image_size=config[field],
    resize_size=config.resize_size,
    interpolation=config.interpolation,
    mean=tuple(config.mean),
    std=tuple(config.std),
  )


def model_spec(config: Config, class_names: tuple[str, ...]) -> ModelSpec:
  """Returns what model.json will say.

  Raises:
    InputError: a model, an override or an image size that does not exist or does not fit.
  """
  spec = ModelSpec(
    name=config.model,
    num_classes=config.num_classes,
    overrides={k: v for k, v in config.model_overrides.to_dict().items() if v is not None},
    preprocessing=preprocessing(config),
    class_names=class_names,
  )
  check_same_task(config, spec)
  spec.variable_shapes()  # Tracing the model checks the overrides and the image size.
  return spec


def check_same_task(config: Config, spec: ModelSpec) -> None:
  """Raises InputError if a model is not for the task of a config."""
  if spec.task != config.task:
    raise InputError(
      f"config.model = {spec.name!r} is for {spec.task}, and config.task is {config.task!r}. Set "
      f"config.task = {spec.task!r}, or name a model for {config.task}"
    )


def check_training_sizes(config: Config, spec: ModelSpec) -> None:
  """Raises InputError if a model cannot be trained at one image size and used at a different one.

  Tracing the model also checks that it takes images of every size.
  """
  evaluated = spec.preprocessing.image_size
  sizes = {config.image_size: "leave config.eval_image_size unset"}
  sizes |= {size: "set config.curriculum to ()" for _, size, _ in config.curriculum}
  for size, way_out in sizes.items():
    if size == evaluated:
      continue
    training = Preprocessing(size, resize_size=size)
    shapes = dataclasses.replace(spec, preprocessing=training).variable_shapes()
    if shapes != spec.variable_shapes():
      raise InputError(
        f"the parameters of {config.model} depend on the image size, so it cannot be trained at "
        f"{size} px and evaluated at {evaluated}; {way_out}"
      )


def open_split(config: Config, split: str, spec: ModelSpec) -> Source:
  """Opens a split of the config's data set for a model.

  Raises:
    InputError: the split cannot be opened, or has more or fewer classes than the model.
  """
  source = open_source(
    config.dataset,
    split,
    data_dir=config.data_dir,
    num_classes=spec.num_classes,
    image_size=spec.preprocessing.image_size,
    task=spec.task,
  )
  classes = len(source.class_names)
  if classes != spec.num_classes:
    raise InputError(
      f"{config.dataset} has {classes} classes, the model has {spec.num_classes}. Name a different "
      f"data set, or train a model of {classes} classes with --config.num_classes={classes}; "
      "--config.init_from=FOLDER of this model then keeps all but its classifier"
    )
  return source


def canvas(config: Config, source: Source, spec: ModelSpec) -> tuple[int, int] | None:
  """Returns the (height, width) on which evaluation lays the images of a split.

  Args:
    config: a config. Fields of the canvas that it lacks have their defaults.
    source: the split.
    spec: describes the model.

  Returns:
    The canvas of a segmentation, see `repjax.deploy.canvases.canvas_of`; None for classification.

  Raises:
    InputError: the canvas would have too many pixels, or the model takes none.
  """
  window, multiple = (
    config.get(name, default_of(name)) for name in ("eval_window", "eval_multiple")
  )
  model = spec.create_model()
  return source.canvas(lambda size: canvas_of(model, size, window=window, multiple=multiple))


def check_batch_fits(config: Config, train: Source) -> None:
  """Raises InputError if a split has fewer images than a batch."""
  images = len(train.examples)
  if config.batch_size > images:
    raise InputError(
      f"batch_size {config.batch_size} is more than the {images} images in the "
      f"{config.train_split} split of {config.dataset}; pass "
      f"--config.batch_size={2 ** int(math.log2(images))} or less"
    )


def make_schedule(config: Config, plan: Plan) -> optax.Schedule:
  """Returns the function from an update, counted from 0, to its learning rate."""
  return schedules.learning_rate_schedule(
    config.learning_rate,
    config.batch_size,
    plan.warmup_steps,
    _curve_steps(config, plan),
    curve=config.schedule,
    warmup_rate=config.warmup_rate,
    warmup_overlaps=config.warmup_overlaps,
    final_rate=config.final_rate,
    drop_steps=max(1, round(config.drop_epochs * plan.steps_per_epoch)),
    drop_factor=config.drop_factor,
    power=config.poly_power,
  )


def make_weight_decay(config: Config, plan: Plan) -> optax.ScalarOrSchedule:
  """Returns the weight decay: a number, or a function from an update, counted from 0."""
  if config.final_decay_factor == 1:
    return config.weight_decay
  return schedules.weight_decay_schedule(
    config.weight_decay, config.final_decay_factor, _curve_steps(config, plan)
  )


def _curve_steps(config: Config, plan: Plan) -> int:
  """Returns the number of steps before the cool-down."""
  return plan.total_steps - round(config.cooldown_epochs * plan.steps_per_epoch)


def make_optimizer(
  config: Config, plan: Plan, schedule: optax.Schedule, scales: Scales | None = None
) -> optax.GradientTransformation:
  """Returns the optimizer that a config describes.

  Args:
    config: config.
    plan: the plan that follows from it.
    schedule: update to learning rate.
    scales: scales of RepOptimizer, or their shapes; None for other optimizers.
  """
  arguments = {
    "momentum": config.momentum,
    "weight_decay": make_weight_decay(config, plan),
    "weight_decay_rule": config.weight_decay_rule,
    "clip_norm": config.clip_norm,
    "adaptive_clip": config.adaptive_clip,
    "backbone_rate": config.backbone_rate,
    "scales": scales,
  }
  if config.optimizer in ADAMW:
    return optimizer.adamw(schedule, **arguments)
  return optimizer.sgd(schedule, nesterov=config.nesterov, **arguments)
