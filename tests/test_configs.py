"""The configs: every file builds, names what exists, and says what the paper says."""

import importlib
import math

import pytest

import repjax
from configs import common
from repjax.data import open_source
from repjax.training import finetune, settings
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

NAMES = sorted(
  path.stem
  for path in (tiny.ROOT / "configs").glob("*.py")
  if path.stem not in ("__init__", "common")
)
# Ding et al., RepVGG, CVPR 2021, Table 4: top-1 after 120 epochs of the simple recipe.
PAPER = {
  "repvgg_a0": 72.41,
  "repvgg_a1": 74.46,
  "repvgg_a2": 76.48,
  "repvgg_b0": 75.14,
  "repvgg_b1": 78.37,
  "repvgg_b1g2": 77.78,
  "repvgg_b1g4": 77.58,
  "repvgg_b2": 78.78,
  "repvgg_b2g4": 78.50,
}


NEVER_SET = {"data_dir", "init_from", "num_steps"}  # None in the shared config too
LEFT_OPEN = {
  *("model", "num_classes", "dataset"),
  *("image_size", "resize_size", "interpolation", "mean", "std"),
}


def load(name):
  module = importlib.import_module(f"configs.{name}")
  return module.get_config(), module.__doc__


def test_there_is_a_config_for_each_result_of_the_simple_recipe_and_one_to_try():
  assert {*PAPER, "digits", "finetune"} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_sets_only_fields_that_there_are_and_keeps_their_types(name):
  config, base = load(name)[0].to_dict(), common.get_config().to_dict()
  assert config.keys() == base.keys()
  open_fields = {field for field, value in config.items() if value is None} - NEVER_SET
  assert open_fields == (LEFT_OPEN if name == "finetune" else set())
  for field, value in base.items():
    if value is not None and field not in {"model_overrides", *open_fields}:
      assert type(config[field]) is type(value), field


@pytest.mark.parametrize("field", sorted(LEFT_OPEN))
def test_a_field_that_is_left_open_takes_values_of_the_shared_configs_type_only(field):
  config, base = load("finetune")[0], common.get_config()
  config[field] = base[field]
  assert config[field] == base[field]
  with pytest.raises(TypeError):
    config[field] = {"of another": "type"}


@pytest.mark.parametrize("name", NAMES)
def test_a_config_names_a_model_and_values_that_can_be_used(name, finished, digits_dir):
  config, _ = load(name)
  if name == "finetune":
    config.update({"init_from": str(finished[0]), "dataset": "digits", "eval_split": "test"})
    config.data_dir = str(digits_dir)
    config = finetune.resolve(config)
  assert config.model in repjax.list_models()
  settings.check(config)
  assert settings.model_spec(config, ()).name == config.model
  assert finetune.resolve(config).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_gives_the_command_that_runs_it(name):
  assert f"python main.py --config configs/{name}.py" in load(name)[1]


@pytest.mark.parametrize("name", PAPER)
def test_a_config_of_the_paper_gives_its_number_and_is_the_shared_recipe(name):
  config, text = load(name)
  assert f"{PAPER[name]:.2f} %" in text
  base = common.get_config()
  base.model = name
  assert config.to_dict() == base.to_dict()


def test_the_shared_recipe_is_the_papers():
  config = common.get_config()
  assert (config.num_epochs, config.batch_size, config.learning_rate) == (120, 256, 0.1)
  assert (config.momentum, config.nesterov, config.weight_decay) == (0.9, False, 1e-4)
  assert (config.warmup_epochs, config.label_smoothing) == (0, 0)
  assert (config.image_size, config.resize_size, config.interpolation) == (224, 256, "bilinear")
  assert config.augment == "random_resized_crop | flip"
  assert config.mean == (0.485, 0.456, 0.406)
  assert config.std == (0.229, 0.224, 0.225)
  assert set(config.model_overrides.to_dict().values()) == {None}


def test_the_digits_config_runs_on_the_digits(digits_dir):
  config, _ = load("digits")
  config.data_dir = str(digits_dir)
  plan = settings.make_plan(config)
  assert plan.spec.num_classes == len(plan.spec.class_names) == 10
  assert plan.total_steps == round(20 * 1437 / 64)
  assert 0 < plan.warmup_steps < plan.eval_every_steps == math.ceil(2 * 1437 / 64)
  evaluation = open_source(config.dataset, config.eval_split, data_dir=config.data_dir)
  assert len(evaluation.examples) == 360


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
@pytest.mark.parametrize("name", NAMES)
def test_batches_divide_over_the_usual_numbers_of_devices(name, devices):
  assert load(name)[0].batch_size % devices == 0


def test_fine_tuning_is_short_and_gentle_and_ends_with_recalibration():
  config, base = load("finetune")[0], common.get_config()
  assert config.num_epochs < base.num_epochs
  assert config.learning_rate < base.learning_rate
  assert 0 < config.warmup_epochs < config.num_epochs
  assert 0 < config.backbone_rate < 1
  assert config.recalibrate_batches > 0
  assert config.eval_every_epochs == 1
  assert (config.train_split, config.eval_split) == ("train", "validation")
