"""What a config says about how a model learns: its checks, its schedule and its optimizer."""

from typing import Any

import optax

from repjax.errors import InputError, unknown
from repjax.quantization.runtime import ACTIVATIONS
from repjax.training import optimizer, schedules
from repjax.training.decay import DECAY_RULES

FIELDS = (
  *("batch_size", "accumulate_steps", "num_epochs", "num_steps"),
  *("learning_rate", "schedule", "warmup_epochs", "warmup_rate", "warmup_overlaps", "final_rate"),
  *("cooldown_epochs", "drop_epochs", "drop_factor", "poly_power"),
  *("optimizer", "momentum", "nesterov", "weight_decay", "weight_decay_rule", "custom_l2"),
  *("clip_norm", "ema_decay", "label_smoothing", "mixup", "cutmix", "aux_weight", "backbone_rate"),
  *("qat", "qat_activations", "qat_weight_bits", "qat_images"),
)
_ABOVE_ZERO = ("num_epochs", "learning_rate", "drop_epochs", "drop_factor", "poly_power")
_AT_LEAST_ZERO = (
  *("warmup_epochs", "warmup_rate", "final_rate", "momentum", "weight_decay", "custom_l2"),
  *("clip_norm", "ema_decay", "aux_weight", "mixup", "cutmix", "backbone_rate", "cooldown_epochs"),
)


def check(config: Any) -> None:
  """Raises InputError for a value of FIELDS that no run could use."""
  for field, choices in (
    ("optimizer", optimizer.OPTIMIZERS),
    ("schedule", schedules.CURVES),
    ("weight_decay_rule", DECAY_RULES),
    ("qat_activations", ACTIVATIONS),
  ):
    if config[field] not in choices:
      raise unknown(f"value of config.{field}", config[field], choices)
  for field in _ABOVE_ZERO:
    if not config[field] > 0:
      raise InputError(f"config.{field} must be above 0, got {config[field]}")
  for field in _AT_LEAST_ZERO:
    if not config[field] >= 0:
      raise InputError(f"config.{field} must be at least 0, got {config[field]}")
  for field in ("label_smoothing", "ema_decay"):
    if not 0 <= config[field] < 1:
      raise InputError(f"config.{field} is at least 0 and below 1, got {config[field]}")
  for field in ("warmup_rate", "final_rate"):
    if not config[field] <= config.learning_rate:
      raise InputError(
        f"config.{field} = {config[field]} is above the peak, config.learning_rate = "
        f"{config.learning_rate}"
      )
  if config.qat_weight_bits not in (7, 8):
    raise InputError(f"config.qat_weight_bits is 7 or 8, got {config.qat_weight_bits}")
  if not config.qat_images >= 1:
    raise InputError(f"config.qat_images must be at least 1, got {config.qat_images}")
  _check_combinations(config)


def _check_combinations(config: Any) -> None:
  """Raises InputError for values that do not go together."""
  if config.optimizer == "adamw" and config.nesterov:
    raise InputError("config.nesterov is of SGD; with config.optimizer = 'adamw' leave it False")
  if config.optimizer == "adamw" and not config.momentum < 1:
    raise InputError(f"config.momentum, AdamW's first beta, is below 1; got {config.momentum}")
  if config.qat and config.custom_l2:
    raise InputError(
      f"config.custom_l2 = {config.custom_l2} reads statistics of the batch, and with config.qat "
      "batch norms keep those that they have; set it to 0"
    )
  if config.custom_l2 and not DECAY_RULES[config.weight_decay_rule].spares_penalised:
    raise InputError(
      f"config.custom_l2 = {config.custom_l2} takes the place of weight decay on the kernels that "
      f"it penalises, and config.weight_decay_rule = {config.weight_decay_rule!r} would decay them "
      "as well; set it to 'all_but_penalised_kernels', or config.custom_l2 to 0"
    )
  if config.qat and config.dtype != "float32":
    raise InputError(
      "config.qat computes in float32 and rounds to 8 bits, got config.dtype = "
      f"{config.dtype!r}; set it to 'float32'"
    )


def make_schedule(config: Any, plan: Any) -> optax.Schedule:
  """The learning rate at an update, counted from 0.

  Args:
    config: with FIELDS.
    plan: the `settings.Plan` that follows from it.
  """
  return schedules.learning_rate_schedule(
    config.learning_rate,
    config.batch_size,
    plan.warmup_steps,
    plan.total_steps - round(config.cooldown_epochs * plan.steps_per_epoch),
    curve=config.schedule,
    warmup_rate=config.warmup_rate,
    warmup_overlaps=config.warmup_overlaps,
    final_rate=config.final_rate,
    drop_steps=max(1, round(config.drop_epochs * plan.steps_per_epoch)),
    drop_factor=config.drop_factor,
    power=config.poly_power,
  )


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
  """The optimizer of a config."""
  settings = {
    "momentum": config.momentum,
    "weight_decay": config.weight_decay,
    "weight_decay_rule": config.weight_decay_rule,
    "clip_norm": config.clip_norm,
    "backbone_rate": config.backbone_rate,
  }
  if config.optimizer == "adamw":
    return optimizer.adamw(schedule, **settings)
  return optimizer.sgd(schedule, nesterov=config.nesterov, **settings)
