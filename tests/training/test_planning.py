"""Every mistake in a config is named before anything is written."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.configs import common
from repjax.errors import InputError
from repjax.training import planning
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]


@pytest.mark.parametrize(
  ("changes", "fragment"),
  [
    ({"dtype": "float16"}, "config.dtype must be one of float32, bfloat16 (did you mean"),
    (
      {"augment": "pad_crop"},
      "unknown step of config.augment 'pad_crop'; did you mean pad_and_crop",
    ),
    (
      {"interpolation": "cubic"},
      "config.interpolation must be one of nearest, bilinear, bicubic (did you mean bicubic",
    ),
    ({"batch_size": 30}, "batch_size 30 does not divide over 4 devices; use 28 or 32"),
    (
      {"accumulate_steps": 0},
      "config.accumulate_steps must be a whole number of at least 1, got 0",
    ),
    (
      {"accumulate_steps": 3},
      "does not divide over 4 devices in config.accumulate_steps = 3 parts each; use 24 or 36",
    ),
    ({"accumulate_steps": 16}, "= 16 parts each; use 64"),
    (
      {"accumulate_steps": 8, "mixup": 0.2},
      "batch_size 32 over 4 devices in config.accumulate_steps = 8 parts each leaves it one; use",
    ),
    ({"batch_size": 0}, "config.batch_size must be a whole number of at least 1, got 0"),
    (
      {"batch_size": 1440},
      "1437 images in the train split of digits; pass --config.batch_size=1024 or",
    ),
    ({"eval_image_size": 0}, "config.eval_image_size must be a whole number from 1 to 8192, got 0"),
    ({"image_size": 4}, "H and W at least 8; got (1, 4, 4, 3)"),
    ({"model": "repvg_a0"}, "unknown model 'repvg_a0'; did you mean repvgg_a0"),
    ({"model_overrides": {"depth": 3}}, "unknown override of repvgg_a0 'depth'"),
    ({"model_overrides": {"act": "swish"}}, "unknown activation 'swish'; known: gelu, relu, silu"),
    ({"model_overrides": {"stage_sizes": (1, 1)}}, "stage_sizes takes 4 numbers"),
    ({"num_classes": 7}, "digits has 10 classes, the model has 7"),
    (
      {"curriculum": ((2, 16, "none"), (2, 16, "none"))},
      "config.curriculum end at the epochs 2, 2. Each number must be larger",
    ),
    ({"curriculum": ((2, 4, "none"),)}, "H and W at least 8; got (1, 4, 4, 3)"),
    ({"curriculum": ((2, 8),)}, "config.curriculum[0] must be a list of 3: a number above 0, a"),
    ({"curriculum": ((2, 8, "flip"),)}, "config.curriculum[0][2]: config.augment: flip may stand"),
    (
      {"curriculum": ((2, 8, "none"),), "qat": True},
      "config.qat fine-tunes at one image size, and config.curriculum has several",
    ),
    ({"num_steps": 0}, "config.num_steps = 0 leaves no step to train"),
    ({"num_epochs": 0.0}, "config.num_epochs must be a number above 0, got 0.0"),
    ({"eval_every_epochs": -1.0}, "config.eval_every_epochs must be a number above 0, got -1.0"),
    ({"batch_size": 4, "mixup": 0.2}, "batch_size 4 over 4 devices leaves it one; use at least 8"),
    ({"batch_size": 4, "cutmix": 1.0}, "batch_size 4 over 4 devices leaves it one; use at least 8"),
    ({"learning_rate": float("nan")}, "config.learning_rate must be a number above 0, got nan"),
    ({"tolerance": 0.0}, "config.tolerance must be a number above 0, got 0.0"),
    ({"log_every_steps": 0}, "config.log_every_steps must be a whole number of at least 1, got 0"),
    ({"optimizer": "adam"}, "(did you mean adamw?), got 'adam'"),
    ({"schedule": "cosin"}, "(did you mean cosine?), got 'cosin'"),
    ({"weight_decay_rule": "more_than_one"}, "did you mean more_than_one_axis"),
    (
      {"warmup_rate": 0.5},
      "config.warmup_rate = 0.5 is above the peak, config.learning_rate",
    ),
    ({"final_rate": 0.5}, "config.final_rate = 0.5 is above the peak, config.learning_rate"),
    ({"optimizer": "adamw", "nesterov": True}, "config.nesterov is for SGD only"),
    (
      {"optimizer": "adamw", "momentum": 1.0},
      "first beta of AdamW and must be below 1",
    ),
    ({"custom_l2": 1e-4}, "set it to 'all_but_penalised_kernels', or config.custom_l2 to 0"),
    ({"dataset": "digit"}, "unknown data set 'digit'; did you mean digits"),
    ({"train_split": "trian"}, "unknown split of digits 'trian'; did you mean train?"),
    ({"eval_split": "validation"}, "unknown split of digits 'validation'"),
  ],
  ids=str,
)
def test_a_value_that_cannot_be_used_is_named(digits_dir, changes, fragment):
  with pytest.raises(InputError) as caught:
    planning.make_plan(tiny.config(digits_dir, **changes))
  assert fragment in str(caught.value)


@pytest.mark.parametrize(
  ("overrides", "fragment"),
  [
    ({"se": "pre"}, "8 channels reduced 16 times"),
    ({"groups": 3}, "3 groups"),
    ({"width_multipliers": (0.001,) * 4}, "width_multipliers"),
    ({"features_only": True}, "features_only"),
    ({"deploy": True}, "deploy"),
  ],
  ids=str,
)
def test_an_override_that_no_run_can_use_is_named(digits_dir, overrides, fragment):
  with pytest.raises(InputError, match=fragment):
    planning.make_plan(tiny.config(digits_dir, model_overrides=overrides))


@pytest.mark.parametrize(
  "changes",
  [
    {"mean": (0.3,)},
    {"std": (0.0, 0.0, 0.0)},
    {"label_smoothing": 2.0},
    {"mixup": -0.2},
    {"cutmix": float("nan")},
    {"warmup_epochs": -1.0},
    {"seed": -1},
    {"num_workers": -1},
    {"backbone_rate": -0.1},
    {"warmup_rate": -0.1},
    {"final_rate": float("nan")},
    {"drop_epochs": 0.0},
    {"drop_factor": 0.0},
    {"poly_power": 0.0},
    {"custom_l2": -1.0, "weight_decay_rule": "all_but_penalised_kernels"},
    {"clip_norm": -1.0},
    {"adaptive_clip": -0.1},
    {"augment_repeats": 0},
    {"ema_decay": 1.0},
    {"ema_decay": -0.1},
    {"recalibrate_batches": -1},
    {"model_overrides": {"dropout": 2.0}},
  ],
  ids=str,
)
def test_a_value_out_of_range_is_named(digits_dir, changes):
  name = next(iter(changes.get("model_overrides", changes)))
  with pytest.raises(InputError, match=name):
    planning.make_plan(tiny.config(digits_dir, **changes))


def test_a_run_too_short_for_a_step_names_the_field_that_was_set(digits_dir):
  with pytest.raises(InputError, match="num_epochs"):
    planning.make_plan(tiny.config(digits_dir, num_steps=None, num_epochs=1e-5))


def test_a_plan_follows_from_config_and_data(digits_dir):
  plan = planning.make_plan(tiny.config(digits_dir))
  assert plan.spec.name == "repvgg_a0"
  assert plan.spec.num_classes == 10
  assert plan.spec.class_names == tuple("0123456789")
  assert plan.spec.overrides == tiny.OVERRIDES  # fields that are None are the variant's own
  assert plan.spec.preprocessing == repjax.spec.Preprocessing(
    16, 16, "bilinear", (0.3, 0.3, 0.3), (0.35, 0.35, 0.35)
  )
  assert len(plan.train.examples) == 1437
  assert len(plan.eval.examples) == 360
  parts = (planning.Part(0, 16, "pad_and_crop"),)
  assert plan[3:] == (pytest.approx(1437 / 32), 12, 3, 4, parts, None)


def test_epochs_give_the_number_of_steps_where_none_is_set(digits_dir):
  config = tiny.config(digits_dir, num_steps=None, num_epochs=3.0, eval_every_epochs=1.0)
  plan = planning.make_plan(config)
  assert plan.total_steps == round(3 * 1437 / 32)
  assert plan.eval_every_steps == np.ceil(1437 / 32)


def test_a_warm_up_is_never_longer_than_the_run(digits_dir):
  plan = planning.make_plan(tiny.config(digits_dir, warmup_epochs=100.0))
  assert plan.warmup_steps == plan.total_steps == 12


def test_every_field_of_a_recipe_reaches_its_schedule(digits_dir):
  config = tiny.config(
    digits_dir, num_steps=40, schedule="step", drop_epochs=10 * 32 / 1437, drop_factor=0.5
  )
  config.update({"warmup_rate": 0.08, "final_rate": 0.12})
  schedule = planning.make_schedule(config, planning.make_plan(config))
  rates = [float(schedule(step)) * 8 for step in (0, 3, 9, 10, 19, 20, 39)]  # a batch of 32
  assert rates == pytest.approx([0.08, 0.4, 0.4, 0.2, 0.2, 0.12, 0.12])
  config.update({"schedule": "poly", "poly_power": 2.0, "warmup_overlaps": True})
  schedule = planning.make_schedule(config, planning.make_plan(config))
  assert float(schedule(20)) * 8 == pytest.approx(0.12 + 0.28 / 4)
  config.update({"schedule": "cosine", "warmup_overlaps": False, "warmup_epochs": 0.0})
  schedule = planning.make_schedule(config, planning.make_plan(config))
  assert float(schedule(20)) * 8 == pytest.approx(0.12 + 0.28 / 2)


@pytest.mark.parametrize(
  "changes",
  [
    {"momentum": 0.5},
    {"nesterov": True},
    {"weight_decay": 0.5},
    {"final_decay_factor": 0.0},
    {"weight_decay_rule": "more_than_one_axis"},
    {"clip_norm": 0.1},
    {"adaptive_clip": 0.1},
    {"backbone_rate": 0.5},
    {"optimizer": "adamw"},
  ],
  ids=str,
)
def test_every_field_of_a_recipe_reaches_its_optimizer(changes):
  params = {"stem": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}

  def second_update(changes):
    config = common.get_config()
    config.update(changes)
    plan = types.SimpleNamespace(total_steps=2, steps_per_epoch=1.0)
    ours = planning.make_optimizer(config, plan, lambda step: 0.1)
    state = ours.init(params)
    for gradients in (params, jax.tree.map(lambda x: 2 * x, params)):
      updates, state = ours.update(gradients, state, params)
    return jax.tree.leaves(updates)

  ours, plain = second_update(changes), second_update({})
  assert any(np.any(a != b) for a, b in zip(ours, plain))


def test_parts_of_a_curriculum_follow_each_other_and_have_a_step():
  config = common.get_config()
  config.update({"image_size": 224, "augment": "none | flip"})
  assert planning.make_parts(config, 10.0) == ((0, 224, "none | flip"),)
  config.curriculum = ((0.01, 96, "none"), (2.5, 128, "none"), (4, 160, "none"))
  assert planning.make_parts(config, 10.0) == (
    (0, 128, "none"),
    (25, 160, "none"),
    (40, 224, "none | flip"),
  )


def test_models_see_another_size_in_evaluation_where_one_is_set(digits_dir):
  plan = planning.make_plan(tiny.config(digits_dir, eval_image_size=24, resize_size=24))
  assert plan.spec.preprocessing.image_size == 24


@pytest.mark.parametrize("sizes", [(4, 16), (16, 4)])
def test_both_sizes_must_be_large_enough(digits_dir, sizes):
  config = tiny.config(digits_dir, image_size=sizes[0], eval_image_size=sizes[1])
  with pytest.raises(InputError, match=r"H and W at least 8; got \(1, 4, 4, 3\)"):
    planning.make_plan(config)


def test_a_model_whose_parameters_depend_on_the_size_has_one_size(digits_dir, monkeypatch):
  def shapes(spec, *, deploy=False):
    del deploy
    return {"params": spec.preprocessing.image_size}

  monkeypatch.setattr(planning.ModelSpec, "variable_shapes", shapes)
  planning.make_plan(tiny.config(digits_dir, eval_image_size=16))
  with pytest.raises(InputError, match="cannot be trained at 16 px and evaluated at 24"):
    planning.make_plan(tiny.config(digits_dir, eval_image_size=24, resize_size=24))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"resize_size": 8}, r"resize_size = 8 is below config\.image_size = 16.*to 16 or more"),
    ({"eval_image_size": 24}, r"resize_size = 16 is below config\.eval_image_size = 24"),
  ],
)
def test_evaluation_cannot_resize_to_less_than_the_image_size(digits_dir, changes, said):
  with pytest.raises(InputError, match=said):
    planning.make_plan(tiny.config(digits_dir, **changes))


@pytest.mark.parametrize("field", common.get_config())
def test_a_config_that_lacks_a_field_is_refused(field):
  config = common.get_config()
  del config[field]
  with pytest.raises(InputError, match=rf"the config lacks {field}\."):
    planning.check(config)


@pytest.mark.parametrize("damaged", ["[1, 2]", "3", '{"model": '])
def test_a_damaged_config_is_named(tmp_path, damaged):
  (tmp_path / "config.json").write_text(damaged)
  with pytest.raises(InputError, match=r"config\.json is damaged"):
    planning.read_config(tmp_path)


def test_a_folder_without_a_run_has_no_config(tmp_path):
  with pytest.raises(InputError, match=r"config.json does not exist; is .* the right folder\?"):
    planning.read_config(tmp_path)


def test_another_number_of_classes_names_both_ways_out(digits_dir):
  with pytest.raises(InputError, match="digits has 10 classes, the model has 7") as caught:
    planning.make_plan(tiny.config(digits_dir, num_classes=7))
  for way in ("--config.num_classes=10", "--config.init_from=FOLDER"):
    assert way in str(caught.value)
