"""The table of config fields: its documentation, its checks, and the names that rooms implement."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_collections
import pytest

from repjax import config as table
from repjax import schema
from repjax.data.transforms import INTERPOLATIONS
from repjax.errors import InputError
from repjax.layers import batch_norm
from repjax.models import create_model, list_models
from repjax.quantization import runtime
from repjax.training import optimizer, planning, schedules, tasks
from tests.training import tiny

ROWS = [*table.FIELDS, *table.OVERRIDES]
CHECKED = [field for field in table.FIELDS if field.name != "model_overrides"]
NAN = float("nan")
WRONG = {
  str: (3, ["cosine"], "a\0b"),
  bool: (1, "yes", [True]),
  int: (1.5, True, "3", NAN, (3,)),
  float: (NAN, "3", True, (3,)),
  tuple: ((0.5, 0.5, "0.5"), (0.5, 0.5, None), (0.5, 0.5, NAN), 0.5),
}


def wrong_values(field):
  """Values that the field refuses, those of a wrong type first."""
  kind = field.kind or type(field.default)
  limited = {str: ("cosin",), int: (-1,), float: (-1.0,)}.get(kind, ()) if field.limits else ()
  too_short = ((0.5, 0.5),) if kind is tuple and field.default is not None else ()
  return (*WRONG[kind], *too_short, *limited, *(() if field.default is None else (None,)))


@pytest.mark.parametrize("field", ROWS, ids=lambda field: field.name)
def test_every_field_has_a_sentence(field):
  assert field.text[0].isupper()
  assert field.text.endswith(".")
  assert len(field.text) >= 20


def test_no_field_has_two_rows():
  for rows in (table.FIELDS, table.OVERRIDES):
    names = [field.name for field in rows]
    assert len(set(names)) == len(names)


def test_the_defaults_are_the_rows_of_the_table_and_pass_every_check():
  config = table.default()
  assert set(config) == {field.name for field in table.FIELDS}
  assert set(config.model_overrides) == {field.name for field in table.OVERRIDES}
  for rows, values in ((table.FIELDS, config), (table.OVERRIDES, config.model_overrides)):
    for field in rows:
      if field.name != "model_overrides":
        assert values[field.name] == field.default
        assert values.get_type(field.name) is (field.kind or type(field.default))
  table.check_config(config)
  config.seed = 5
  assert table.default().seed == 0


def test_a_field_without_a_default_takes_values_of_its_type_only():
  config = table.default()
  config.num_steps = 3
  with pytest.raises(TypeError):
    config.num_steps = "three"


@pytest.mark.parametrize("field", CHECKED, ids=lambda field: field.name)
def test_every_check_refuses_wrong_values_and_names_the_field(field):
  if field.default is not None:
    schema.check(field.default, field.rule, f"config.{field.name}")
  for value in wrong_values(field):
    with pytest.raises(InputError, match=rf"^config\.{field.name}\b.*must be.*, got "):
      schema.check(value, field.rule, f"config.{field.name}")


@pytest.mark.parametrize("field", CHECKED, ids=lambda field: field.name)
def test_a_config_with_a_wrong_value_is_refused_by_its_field(field):
  config = ml_collections.ConfigDict(table.default().to_dict())
  with config.ignore_type():
    config[field.name] = wrong_values(field)[0]
  with pytest.raises(InputError, match=rf"config\.{field.name}\b"):
    table.check_config(config)
  if field.evaluates:
    with pytest.raises(InputError, match=rf"config\.{field.name}\b"):
      table.check_evaluation(config)
  else:
    table.check_evaluation(config)


def test_only_a_field_whose_default_is_none_may_be_none():
  config = ml_collections.ConfigDict(table.default().to_dict())
  table.check_config(config)
  with config.ignore_type():
    config.num_classes = None
  with pytest.raises(InputError, match=r"config\.num_classes"):
    table.check_config(config)


def test_the_page_on_training_lists_the_fields_that_may_change():
  page = Path(__file__).parents[1] / "docs" / "guides" / "training.md"
  fields = {field.name for field in table.FIELDS}
  paragraphs = page.read_text().split("\n\n")
  named = [{*re.findall(r"`(\w+)`", paragraph)} & fields for paragraph in paragraphs]
  assert max(named, key=lambda names: len(names & table.FREE)) == table.FREE


def test_the_config_of_imported_weights_has_the_fields_of_evaluation():
  config = table.for_import("repvgg_a0", 1000)
  assert config == {
    "model": "repvgg_a0",
    "dataset": "imagenet2012",
    "data_dir": None,
    "eval_split": "validation",
    "batch_size": 64,
    "num_workers": 0,
    "tolerance": 1e-5,
    "eval_multiple": 0,
    "eval_window": 0,
    "eval_flip": False,
  }
  table.check_evaluation(ml_collections.ConfigDict(config))
  assert table.for_import("repvgg_a0", 10) == {**config, "dataset": None}


def test_evaluation_needs_its_own_fields_only():
  held = table.default().to_dict()
  few = ml_collections.ConfigDict({name: held[name] for name in table.EVALUATION_FIELDS})
  table.check_evaluation(few)
  with pytest.raises(InputError, match="the config lacks"):
    table.check_config(few)


@pytest.mark.parametrize(
  ("names", "implemented"),
  [
    (table.TASKS, tasks.TASKS),
    (table.DTYPES, planning.DTYPES),
    (table.INTERPOLATIONS, INTERPOLATIONS),
    (table.SCHEDULES, schedules.CURVES),
    (table.OPTIMIZERS, optimizer.OPTIMIZERS),
    (table.DECAY_RULES, optimizer.DECAY_RULES),
    (table.QAT_ACTIVATIONS, runtime.ACTIVATIONS),
  ],
  ids=[
    "task",
    "dtype",
    "interpolation",
    "schedule",
    "optimizer",
    "weight_decay_rule",
    "qat_activations",
  ],
)
def test_the_names_of_the_table_are_those_that_rooms_implement(names, implemented):
  assert set(names) == set(implemented)
  assert len(set(names)) == len(names)


def test_types_of_the_computation_are_those_of_their_names():
  assert {name: jnp.dtype(value).name for name, value in planning.DTYPES.items()} == {
    name: name for name in table.DTYPES
  }


def test_the_rules_that_spare_penalised_kernels_are_those_that_custom_l2_takes():
  for rule, row in optimizer.DECAY_RULES.items():
    config = table.default()
    config.update({"custom_l2": 1e-4, "weight_decay_rule": rule})
    if row.spares_penalised:
      table.check_custom_l2(config)
    else:
      with pytest.raises(InputError, match=r"config\.weight_decay_rule"):
        table.check_custom_l2(config)


@pytest.mark.parametrize("name", table.REPOPTIMIZERS)
@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"scales": None}, r"needs config\.scales: the folder .*hyper-search"),
    ({"clip_norm": 5.0}, r"takes no config\.clip_norm, got 5\.0"),
    ({"adaptive_clip": 0.02}, r"takes no config\.adaptive_clip, got 0\.02"),
    ({"init_from": "runs/digits"}, r"cannot start from trained weights"),
    ({"init_from": "runs/digits", "qat": True}, r"cannot start from trained weights"),
  ],
  ids=str,
)
def test_repoptimizer_is_refused_where_it_is_not_what_branches_do(name, changes, said):
  config = table.default()
  config.update({"optimizer": name, "scales": "runs/search"})
  table.check_config(config)
  config.update(changes)
  with pytest.raises(InputError, match=said):
    table.check_config(config)


def test_a_gradient_has_one_limit():
  config = table.default()
  config.update({"clip_norm": 5.0, "adaptive_clip": 0.02})
  with pytest.raises(InputError, match=r"clip_norm = 5\.0 .*adaptive_clip = 0\.02.*to 0"):
    table.check_config(config)


def test_fields_of_other_optimizers_are_refused():
  config = table.default()
  config.scales = "runs/search"
  with pytest.raises(InputError, match=r"config\.scales is for RepOptimizer only"):
    table.check_config(config)
  for name in table.ADAMW:
    config.update({"optimizer": name, "nesterov": True})
    config.scales = "runs/search" if name in table.REPOPTIMIZERS else None
    with pytest.raises(InputError, match=rf"nesterov is for SGD only.*{name}"):
      table.check_config(config)


@pytest.mark.parametrize(
  ("task", "changes", "said"),
  [
    ("segmentation", {"mixup": 0.2}, r"config\.mixup = 0\.2 is for classification"),
    ("segmentation", {"cutmix": 1.0}, r"config\.cutmix = 1\.0 is for classification"),
    ("segmentation", {"label_smoothing": 0.1}, r"config\.label_smoothing .* classification"),
    ("segmentation", {"qat": True, "init_from": "runs/a"}, r"config\.qat .* is for classification"),
    ("classification", {"eval_window": 713}, r"config\.eval_window = 713 is for segmentation"),
    ("classification", {"eval_flip": True}, r"config\.eval_flip = True is for segmentation"),
    ("classification", {"eval_multiple": 8}, r"config\.eval_multiple = 8 is for segmentation"),
    ("classification", {"class_weights": (1.0,)}, r"config\.class_weights .* is for segmentation"),
    ("segmentation", {"num_classes": 256}, "use at most 255 classes"),
    ("segmentation", {"class_weights": (1.0, 2.0)}, "has 2 weights .* for 3 classes"),
    ("segmentation", {"class_weights": (0.0,) * 3}, "one of them above 0"),
  ],
  ids=str,
)
def test_fields_without_a_meaning_for_the_task_are_refused(task, changes, said):
  config = table.default()
  config.update({"task": task, "num_classes": 3})
  table.check_config(config)
  config.update(changes)
  with pytest.raises(InputError, match=said):
    table.check_config(config)


def test_the_overrides_are_the_attributes_of_the_models():
  # A config sets these outside of model_overrides, or training sets them.
  apart = {"num_classes", "dtype", "param_dtype", "axis_name", "deploy", "features_only"}
  apart |= {"running_variance", "frozen_backbone"}
  models = {type(model): model for model in map(create_model, list_models())}.values()
  attributes = {field.name for model in models for field in dataclasses.fields(model)}
  assert {field.name for field in table.OVERRIDES} == attributes - apart - {"parent", "name"}


def test_runs_older_than_a_field_did_what_its_default_does_or_leaves_open():
  held = table.default()
  assert table.BEFORE == {
    "adaptive_clip": 0.0,
    "augment_repeats": 1,
    "backbone_rate": 1.0,
    "cooldown_epochs": 0.0,
    "curriculum": (),
    "ema_decay": 0.0,
    "eval_flip": False,
    "eval_multiple": 0,
    "eval_window": 0,
    "final_decay_factor": 1.0,
    "qat": False,
    "running_variance": "biased",
    "task": "classification",
  }
  assert all(held[name] in (value, None) for name, value in table.BEFORE.items())


def test_running_variances_are_those_of_the_layers():
  assert table.RUNNING_VARIANCES == batch_norm.RUNNING_VARIANCES


def test_importing_repjax_loads_no_config():
  program = "import repjax, sys; print({'repjax.config', 'ml_collections'} & {*sys.modules})"
  shown = subprocess.run(
    [sys.executable, "-c", program], cwd=tiny.ROOT, capture_output=True, text=True, check=True
  )
  assert shown.stdout == "set()\n"
