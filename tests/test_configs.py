"""The configs: every file builds, names what exists, and says what the paper says."""

import importlib
import math
import re
import runpy
import sys

import pytest
from absl import flags
from ml_collections import config_flags

import repjax
from repjax.configs import common
from repjax.data import open_source
from repjax.errors import InputError
from repjax.training import finetune, planning, repoptimizer
from tests import helpers
from tests.helpers import spread
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

NAMES = sorted(
  path.stem
  for path in (tiny.ROOT / "configs").glob("*.py")
  if path.stem not in ("__init__", "common")
)
SIMILAR = re.findall(r"repvgg_(?:a[12]|b[123]\w*)|parnet_[ml]|repmlpnet_[bdl]\w+", " ".join(NAMES))
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
# In the same table, by the same recipe: a network without branches.
BASELINES = {"resnet50": 76.31}
# Table 5: after 200 epochs of the strong recipe, the model and its top-1.
STRONG = {
  "repvgg_b2g4_strong": ("repvgg_b2g4", 79.38),
  "repvgg_b3": ("repvgg_b3", 80.52),
  "repvgg_b3g4": ("repvgg_b3g4", 80.21),
}
# README of the authors' repository, at 320 px.
AT_320 = {
  "repvgg_d2se": 83.55,
  "repvggplus_l2pse": 84.06,
  "repvggplus_l2pse_custom_l2": 84.16,
}
# RepMLP on ImageNet: the attributes that differ from the model's of that name.
REPMLP = {
  "repmlp_resnet50_light": {},
  "repmlp_resnet50_bottleneck_g4": {},
  "repmlp_resnet50_bottleneck_g8": {},
  "repmlp_resnet50_bottleneck_g8_320": {"tile": 10, "local_kernels": (1, 3, 5, 7)},
}
# README of its authors' repository, each at the size in its name.
REPMLPNET = {
  "repmlpnet_t224": 76.62,
  "repmlpnet_t256": 77.44,
  "repmlpnet_b224": 80.32,
  "repmlpnet_b256": 81.03,
  "repmlpnet_d256": 80.83,
  "repmlpnet_l256": 81.68,
}
# ParNet by its authors' script: how often an image is erased in part.
PARNET = {"parnet_s": 0.2, "parnet_m": 0.2, "parnet_l": 0.4, "parnet_xl": 0.4}
# README of the authors of RepOptimizer: RepOpt-VGG, and the hyper-search that comes first.
REPOPT = {"repoptvgg_b1": ("repvgg_b1", 78.62), "repoptvgg_b2": ("repvgg_b2", 79.68)}
SEARCHES = {"repoptvgg_b1_search": "repvgg_b1", "repoptvgg_b2_search": "repvgg_b2"}
DIGITS_REPOPT = {"digits_repopt", "digits_repopt_search"}
# And on smaller data.
SMALL_REPMLP = {"repmlp_cifar", "repmlp_cifar_convnet", "digits_repmlp"}
ABLATIONS = {"repvgg_b0_ablation", "digits_ablation"}
IN_8_BITS = {"digits_qat", "digits_repmlp_qat", "digits_parnet_qat"}
# One file for each family, whose argument is the end of the name of a model, and one to try.
MOBILE = {"mobileone", "repvit", "fastvit"}
DIGITS_MOBILE = {f"digits_{family}" for family in MOBILE}
OTHER_PARNET = {"parnet_xl_320", "parnet_cifar", "digits_parnet"}


# PSPNet on Cityscapes: the model and its attributes. The mIoU is from a copy of the paper's table.
PSPNET = {
  "pspnet_repvgg_b1g2_fast": ("pspnet", {"backbone": "repvgg_b1g2", "dilation": "fast"}, 78.88),
  "pspnet_repvgg_b2": ("pspnet", {"backbone": "repvgg_b2", "dilation": "full"}, 80.57),
  "pspnet_resnet50": ("pspnet", {"backbone": "resnet50", "dilation": "full"}, 77.17),
  "pspnet_repmlp": ("pspnet_repmlp", {}, 74.27),
}


NEVER_SET = {
  "data_dir",
  "init_from",
  "class_weights",
  "running_variance",
  "scales",
  "num_steps",
  "eval_image_size",
}  # None in the shared one too
LEFT_OPEN = {
  *("model", "num_classes", "dataset"),
  *("image_size", "resize_size", "interpolation", "mean", "std"),
}


def load(name):
  module = importlib.import_module(f"configs.{name}")
  return module.get_config(), " ".join(module.__doc__.split())


def test_there_is_a_config_for_each_result_and_one_to_try():
  assert {
    *(*PAPER, *BASELINES, *STRONG, *AT_320, *REPMLP, *SMALL_REPMLP, *REPMLPNET),
    *PARNET,
    *OTHER_PARNET,
    *("digits", "scenes", "finetune"),
    *PSPNET,
    *(*MOBILE, *DIGITS_MOBILE),
    *ABLATIONS,
    *IN_8_BITS,
    *(*REPOPT, *SEARCHES, *DIGITS_REPOPT),
  } == set(NAMES)


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


@pytest.mark.parametrize("name", spread(NAMES, [name for name in NAMES if name not in SIMILAR]))
def test_a_config_names_a_model_and_values_that_can_be_used(name, finished, digits_dir):
  config, _ = load(name)
  variant = all(value is None for value in config.model_overrides.to_dict().values())
  if name in PSPNET and name != "pspnet_repmlp":  # fewer blocks are traced sooner
    config.model_overrides.backbone_overrides = {"stage_sizes": (1, 1, 4, 1)}
  elif variant and name not in ("repmlp_cifar", "pspnet_repmlp"):
    stages = (1, 1, 2) if name.startswith("parnet") else (1, 1, 2, 1)
    config.model_overrides.stage_sizes = stages  # which is traced sooner
  if name == "finetune":
    config.update({"init_from": str(finished[0]), "dataset": "digits", "eval_split": "test"})
    config.data_dir = str(digits_dir)
    config = finetune.resolve(config)
  if name in IN_8_BITS:
    config.init_from = None  # of a run that is not there
  assert config.model in repjax.list_models()
  planning.check(config)
  assert planning.model_spec(config, ()).name == config.model
  assert finetune.resolve(config).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_config_gives_the_command_that_runs_it(name):
  assert re.search(rf"repjax train --config {name}( |$)", load(name)[1])


@pytest.mark.parametrize("name", [*PAPER, *BASELINES])
def test_a_config_of_the_paper_gives_its_number_and_is_the_shared_recipe(name):
  config, text = load(name)
  assert f"{(PAPER | BASELINES)[name]:.2f} %" in text
  base = common.get_config()
  base.model = name
  assert config.to_dict() == base.to_dict()


@pytest.mark.parametrize("ablation", common.ABLATIONS)
@pytest.mark.parametrize("name", sorted(ABLATIONS))
def test_an_ablation_changes_nothing_but_the_blocks(name, ablation):
  module = importlib.import_module(f"configs.{name}")
  config, full = module.get_config(ablation), module.get_config()
  changed = changes(full, config)
  assert changed.keys() <= {"model_overrides"}
  config.model_overrides.stage_sizes = (2, 2, 2, 1)  # which is traced sooner
  planning.check(config)
  model = planning.model_spec(config, ()).create_model()
  for attribute, value in common.ABLATIONS[ablation].items():
    assert getattr(model, attribute) == value
  assert f"`{ablation}`" in importlib.import_module("configs.repvgg_b0_ablation").__doc__


def test_ablations_of_b0_have_the_recipe_and_the_numbers_of_the_paper(monkeypatch):
  config, text = load("repvgg_b0_ablation")
  assert changes(load("repvgg_b0")[0], config) == {}
  monkeypatch.syspath_prepend(tiny.ROOT / "benchmarks")
  benchmark = runpy.run_path(str(tiny.ROOT / "benchmarks" / "ablation.py"))
  for name, (top1, is_checked) in benchmark["PAPER"].items():
    number = f"{top1:.2f}" if is_checked else rf"{top1:.2f} \?"
    assert re.search(rf"`{name}` \|[^|]*\| {number} \|", text), name


def test_an_unknown_ablation_is_named():
  with pytest.raises(InputError, match="unknown ablation 'plane'; did you mean plain"):
    importlib.import_module("configs.digits_ablation").get_config("plane")


@pytest.mark.parametrize("name", STRONG)
def test_a_config_of_the_strong_recipe_gives_its_number_and_is_that_recipe(name):
  config, text = load(name)
  model, accuracy = STRONG[name]
  assert f"{accuracy:.2f} %" in text
  base = common.get_strong_config()
  base.model = model
  assert config.to_dict() == base.to_dict()


def test_the_strong_recipe_is_the_papers():
  config, simple = common.get_strong_config(), common.get_config()
  assert changes(simple, config) == {
    "num_epochs": 200,
    "warmup_epochs": 5,
    "augment": "random_resized_crop | flip | auto_augment",
    "label_smoothing": 0.1,
    "mixup": 0.2,
  }


def changes(base, config):
  """The fields in which a config differs from another, with its values."""
  held = base.to_dict()
  return {field: value for field, value in config.to_dict().items() if value != held[field]}


@pytest.mark.parametrize("name", AT_320)
def test_a_model_of_two_sizes_is_evaluated_and_deployed_at_the_second(name):
  config, text = load(name)
  assert f"{AT_320[name]:.2f} % top-1 at 320 px (resize 320" in text
  preprocessing = planning.preprocessing(config)
  assert (preprocessing.image_size, preprocessing.resize_size) == (320, 320)
  assert config.image_size == (224 if name == "repvgg_d2se" else 256)


def test_the_recipe_of_d2se_is_the_strong_one_but_for_the_size():
  config, strong = load("repvgg_d2se")[0], common.get_strong_config()
  assert changes(strong, config) == {
    "model": "repvgg_d2se",
    "eval_image_size": 320,
    "resize_size": 320,
  }


def test_the_recipe_of_l2pse_is_the_later_scripts():
  config = load("repvggplus_l2pse")[0]
  assert (config.num_epochs, config.warmup_epochs, config.batch_size) == (300, 5, 256)
  assert (config.optimizer, config.momentum, config.nesterov) == ("sgd", 0.9, True)
  assert (config.schedule, config.warmup_rate, config.final_rate) == ("cosine", 0, 0)
  assert (config.learning_rate, config.warmup_overlaps) == (0.1, True)
  assert (config.weight_decay, config.weight_decay_rule) == (4e-5, "more_than_one_axis")
  assert (config.label_smoothing, config.mixup, config.cutmix) == (0.1, 0.2, 0)
  assert (config.aux_weight, config.custom_l2, config.ema_decay, config.clip_norm) == (0.1, 0, 0, 0)
  assert config.augment == (
    'random_resized_crop | flip | rand_augment(2, 15, noise="uniform", probability=1, cutout=True)'
  )
  assert repjax.create_model(config.model).aux_heads
  twin = load("repvggplus_l2pse_custom_l2")[0]
  assert changes(config, twin) == {
    "weight_decay_rule": "all_but_penalised_kernels",
    "custom_l2": 4e-5,
  }


@pytest.mark.parametrize("name", REPMLP)
def test_repmlp_has_the_recipe_of_its_paper(name):
  config, base = load(name)[0], common.get_config()
  size, overrides = 320 if name.endswith("_320") else 224, REPMLP[name]
  changed = changes(base, config)
  assert {field: value for field, value in changed.pop("model_overrides", {}).items() if value} == (
    overrides
  )
  at_size = {"image_size": 320, "resize_size": 366} if size == 320 else {}
  assert changed == {
    "model": name.removesuffix("_320"),
    "num_epochs": 100,
    "augment": "random_resized_crop | flip | auto_augment",
    "mixup": 0.2,
    **at_size,
  }
  assert (base.learning_rate, base.weight_decay, base.batch_size) == (0.1, 1e-4, 256)
  assert repjax.create_model(config.model, **overrides).image_size == size


@pytest.mark.parametrize("name", PSPNET)
def test_pspnet_has_the_recipe_of_its_authors_at_their_rates(name):
  config, text = load(name)
  model, overrides, miou = PSPNET[name]
  assert f"{miou:.2f} % mIoU" in text
  assert re.search("Not trained here", text)
  changed = changes(common.get_config(), config)
  assert {k: v for k, v in changed.pop("model_overrides", {}).items() if v} == overrides
  longer = {"num_epochs": 200, "eval_every_epochs": 10}
  assert changed == {
    "task": "segmentation",
    "model": model,
    "num_classes": 19,
    "dataset": "cityscapes",
    "sync_batch_norm": True,
    "image_size": 713,
    "resize_size": 713,
    "eval_window": 713,
    "augment": "scale_and_crop(scale=(0.5, 2)) | flip",
    "batch_size": 16,
    "num_epochs": 40,
    "learning_rate": pytest.approx(0.1 * 16),
    "backbone_rate": 0.1,
    "schedule": "poly",
    "aux_weight": 0.4,
    "eval_every_epochs": 4,
    **(longer if name == "pspnet_repmlp" else {}),
  }
  assert (config.poly_power, config.weight_decay) == (0.9, 1e-4)


@pytest.mark.parametrize("name", REPMLPNET)
def test_repmlpnet_has_the_recipe_and_the_size_of_its_authors(name):
  config, text = load(name)
  size = int(name[-3:])
  assert f"{REPMLPNET[name]:.2f} % top-1 at {size} px (resize {size}, central crop)" in text
  assert changes(common.get_config(), config) == {
    "model": name,
    **({"image_size": 256} if size == 256 else {"resize_size": 224}),
    "num_epochs": 100,
    "warmup_epochs": 10,
    "warmup_rate": 5e-7,
    "warmup_overlaps": True,
    "optimizer": "adamw",
    "learning_rate": 0.001,
    "weight_decay": 0.1,
    "weight_decay_rule": "more_than_one_axis",
    "clip_norm": 5,
    "augment": load("repvggplus_l2pse")[0].augment,
    "label_smoothing": 0.1,
    "mixup": 0.4,
    "cutmix": 1,
  }
  assert (config.batch_size, config.interpolation, config.ema_decay) == (256, "bilinear", 0)
  assert repjax.create_model(config.model).image_size == config.resize_size == size


@pytest.mark.parametrize("name", PARNET)
def test_parnet_has_the_recipe_of_its_authors_with_the_rate_of_the_paper(name):
  config, base = load(name)[0], common.get_config()
  assert changes(base, config) == {
    "model": name,
    "dtype": "bfloat16",
    "batch_size": 1024,
    "num_epochs": 130,
    "cooldown_epochs": 10,
    "final_rate": pytest.approx(1e-5 / 4),
    "nesterov": True,
    "weight_decay_rule": "more_than_one_axis",
    "augment": (
      f"random_resized_crop | flip | rand_augment(2, 9, noise=0.5) | random_erasing({PARNET[name]})"
    ),
    "label_smoothing": 0.1,
    "ema_decay": 0.9999,
  }
  # 0.8 for a batch of 2048; cosine, and crops of 0.875 in evaluation.
  assert base.learning_rate * 2048 / 256 == 0.8
  assert (base.schedule, base.image_size / base.resize_size) == ("cosine", 0.875)


@pytest.mark.parametrize("name", REPOPT)
def test_repopt_has_the_recipe_of_its_authors(name):
  config, text = load(name)
  model, accuracy = REPOPT[name]
  assert f"{accuracy:.2f} % top-1 at 224 px (resize 224, central crop)" in text
  changed = changes(common.get_config(), config)
  own = {field: value for field, value in changed.pop("model_overrides").items() if value}
  assert own == {"branches": ("conv3x3",)}
  assert changed == {
    "model": model,
    "optimizer": "repoptimizer",
    "scales": f"runs/{name}_search",
    "resize_size": 224,
    "augment": load("repvggplus_l2pse")[0].augment,
    "warmup_epochs": 5,
    "warmup_overlaps": True,
    "nesterov": True,
    "weight_decay": 4e-5,
    "weight_decay_rule": "more_than_one_axis",
    "label_smoothing": 0.1,
  }
  assert (config.num_epochs, config.learning_rate, config.batch_size) == (120, 0.1, 256)


@pytest.mark.parametrize("name", SEARCHES)
def test_the_search_of_repopt_is_that_of_its_authors(name):
  config = load(name)[0]
  changed = changes(common.get_config(), config)
  own = {field: value for field, value in changed.pop("model_overrides").items() if value}
  assert own == {"scaled": True}
  assert changed == {
    "model": SEARCHES[name],
    "num_classes": 100,
    "dataset": "cifar100",
    "eval_split": "test",
    "image_size": 32,
    "resize_size": 32,
    # The numbers of the authors' script, to four digits.
    "mean": pytest.approx((0.50707516, 0.48654887, 0.44091784), abs=5e-5),
    "std": pytest.approx((0.26733429, 0.25643846, 0.27615047), abs=5e-5),
    "augment": "pad_and_crop | flip",
    "num_epochs": 240,
    "warmup_epochs": 10,
    "warmup_overlaps": True,
    "nesterov": True,
    "weight_decay": 4e-5,
    "weight_decay_rule": "more_than_one_axis",
    "clip_norm": 5,
    "label_smoothing": 0.1,
  }
  assert config.batch_size == 256
  # The search finds the scales that the plain network of the second config needs.
  plain = planning.model_spec(load(name.removesuffix("_search"))[0], ())
  searched = planning.model_spec(config, ()).variable_shapes()["params"]
  assert repoptimizer.scale_shapes(plain) == repoptimizer.scales_in(searched)


def test_the_digits_of_repopt_are_those_of_the_first_config():
  digits = load("digits")[0]
  search, plain = (load(name)[0] for name in ("digits_repopt_search", "digits_repopt"))
  assert changes(digits, search).keys() == {"model_overrides"}
  assert changes(digits, plain).keys() == {"model_overrides", "optimizer", "scales"}
  assert plain.scales == "runs/digits_repopt_search"
  searched = planning.model_spec(search, ()).variable_shapes()["params"]
  assert repoptimizer.scale_shapes(planning.model_spec(plain, ())) == repoptimizer.scales_in(
    searched
  )


def test_fine_tuning_parnet_is_short_at_320_pixels_and_tested_at_352():
  config, before = load("parnet_xl_320")[0], load("parnet_xl")[0]
  changed = changes(before, config)
  assert changed.pop("augment") == before.augment.replace("(0.4)", "(0.6)").replace(
    "random_resized_crop", "random_resized_crop(area=(0.5, 1))"
  )
  assert changed == {
    "image_size": 320,
    "eval_image_size": 352,
    "resize_size": round(352 / 0.875),
    "batch_size": 256,
    "num_epochs": 16,
    "cooldown_epochs": 0,
    "mixup": 0.1,
    "learning_rate": 0.001,
    "final_rate": 0,
  }


def test_parnet_on_cifar_learns_as_long_as_the_author_says_from_mirrored_and_shifted_images():
  config = load("parnet_cifar")[0]
  assert (config.num_epochs, config.augment) == (400, "pad_and_crop | flip")
  assert config.learning_rate * config.batch_size / 256 == pytest.approx(0.1)
  assert repjax.create_model(config.model, num_classes=10).image_size == config.image_size == 32


def test_tiles_and_groups_are_numbers_or_tuples_on_the_command_line_too(monkeypatch):
  config = load("repmlp_resnet50_bottleneck_g8_320")[0]
  config.model_overrides.update({"stage_sizes": (1, 2, 2, 1), "widths": (8, 64, 256, 8)})
  fields = ("fc3_groups=(8, 16)", "tile=(10, 5)", "reduction=2")
  arguments = ["", *(f"--config.model_overrides.{field}" for field in fields)]
  monkeypatch.setattr(sys, "argv", arguments)  # which decides what flags there are
  parsed = flags.FlagValues()
  config_flags.DEFINE_config_dict("config", config, flag_values=parsed)
  parsed(arguments)
  spec = planning.model_spec(config, ())
  model, stages = spec.create_model(), spec.variable_shapes()["params"]
  assert (model.fc3_groups, model.tile, model.reduction) == ((8, 16), (10, 5), 2)
  blocks = (stages[name]["block1"]["btnk_repmlp"] for name in ("stage2", "stage3"))
  assert [block["RepDense_0"]["fc"]["dense"]["kernel"].shape for block in blocks] == [
    (8, 10, 5, 1, 10, 5, 1),
    (16, 10, 5, 1, 10, 5, 1),
  ]
  config.model_overrides.update({"tile": 10, "fc3_groups": 8, "widths": (8, 64, 512, 8)})
  assert planning.model_spec(config, ()).create_model().fc3_groups == 8
  config.model_overrides.tile = "ten"
  with pytest.raises(InputError, match="tile must be a whole number or a list"):
    planning.model_spec(config, ())


def test_the_recipe_of_repmlp_on_cifar_is_the_papers():
  config = load("repmlp_cifar")[0]
  plan = (config.batch_size, config.num_epochs, config.schedule, config.final_rate)
  assert plan == (128, 100, "cosine", 0)
  assert config.learning_rate * config.batch_size / 256 == pytest.approx(0.2)
  assert (config.image_size, config.augment) == (32, "pad_and_crop | flip")
  assert repjax.create_model(config.model, num_classes=10).image_size == 32
  twin = load("repmlp_cifar_convnet")[0]
  changed = changes(config, twin)
  own = {field: value for field, value in changed.pop("model_overrides").items() if value}
  assert (own, changed) == ({"mixer": "conv3x3", "widths": (32, 64, 128)}, {})


@pytest.mark.parametrize("name", ["digits_repmlp", "digits_parnet"])
def test_digits_with_another_network_are_the_digits_of_the_first_config(name):
  config = load(name)[0]
  assert changes(load("digits")[0], config).keys() == {"model", "model_overrides"}
  model = planning.model_spec(config, ()).create_model()
  assert name != "digits_repmlp" or model.image_size == config.image_size


@pytest.mark.parametrize("name", sorted(DIGITS_MOBILE))
def test_digits_with_a_mobile_network_are_those_of_the_first_config_but_for_the_size(name):
  changed = changes(load("digits")[0], load(name)[0]).keys()
  assert changed - {"image_size", "resize_size"} == {"model", "model_overrides"}


def test_every_mobile_network_has_a_recipe_and_its_number_or_says_that_there_is_none():
  models = set()
  for family in sorted(MOBILE):
    module = importlib.import_module(f"configs.{family}")
    for size in common.SIZES[family]:
      config = module.get_config(size)
      models.add(config.model)
      assert config.model == f"{family}_{size}"
      stated = helpers.mobile_goldens()["counts"][config.model]
      assert config.resize_size == math.floor(stated["input"] / stated["crop_pct"])
      assert (config.image_size, config.interpolation) == (stated["input"], stated["interpolation"])
      assert re.search(rf"\| `{size}` +\| \d\d\.\d ", module.__doc__)
  assert models == helpers.mobile_goldens()["counts"].keys()
  with pytest.raises(InputError, match=r"unknown size of repvit 'm0\.9'; did you mean m0_9"):
    importlib.import_module("configs.repvit").get_config("m0.9")


def test_the_recipes_of_mobile_networks_are_those_of_their_authors():
  mobileone, base = load("mobileone")[0], common.get_config()
  own = {"model": "mobileone_s0", "num_epochs": 300, "label_smoothing": 0.1, "ema_decay": 0.9995}
  own["weight_decay_rule"] = "no_vectors"
  crop = "random_resized_crop | flip"
  parts = ((37, 160, crop), (112, 192, crop))
  assert changes(base, mobileone) == {**own, "final_decay_factor": 0.1, "curriculum": parts}
  large = importlib.import_module("configs.mobileone").get_config("s2")
  lines = [*(augment for *_, augment in large.curriculum), large.augment]
  assert [float(re.findall(r"rand_augment\(2, ([\d.]+)", line)[0]) for line in lines] == [
    *(2.1, 4.9, 7.0)
  ]
  images = f"{crop} | rand_augment(2, 9, noise=0.5, increasing=True) | random_erasing(0.25)"
  shared = {
    "optimizer": "adamw",
    "weight_decay_rule": "no_vectors",
    "warmup_epochs": 5,
    "warmup_overlaps": True,
    "interpolation": "bicubic",
    "augment": images,
    "label_smoothing": 0.1,
    "cutmix": 1,
  }
  repvit = {"num_epochs": 300, "resize_size": 235, "adaptive_clip": 0.02, "augment_repeats": 3}
  fastvit = {"num_epochs": 310, "cooldown_epochs": 10, "image_size": 256, "resize_size": 284}
  for name, batch, rate, own in (
    ("repvit", 2048, 4e-3, {**repvit, "mixup": 0.8}),
    ("fastvit", 1024, 1e-3, {**fastvit, "mixup": 0.2}),
  ):
    changed = changes(base, load(name)[0])
    rates = {key: changed.pop(key) for key in ("learning_rate", "final_rate", "warmup_rate")}
    assert list(rates.values()) == pytest.approx([x * 256 / batch for x in (rate, 1e-5, 1e-6)])
    assert changed.pop("batch_size") == batch
    assert (changed.pop("ema_decay"), changed.pop("weight_decay")) == (
      (0.99996, 0.025) if name == "repvit" else (0.9995, 0.05)
    )
    assert changed == {"model": load(name)[0].model, **shared, **own}
  rates = {}
  for size in common.SIZES["fastvit"]:
    config = importlib.import_module("configs.fastvit").get_config(size)
    rates[size] = config.model_overrides.drop_path
  assert rates == {
    **dict.fromkeys(("t8", "t12", "s12")),
    "sa12": 0.1,
    "sa24": 0.1,
    "sa36": 0.2,
    "ma36": 0.35,
  }


@pytest.mark.parametrize("name", sorted(IN_8_BITS))
def test_in_8_bits_a_recipe_is_that_of_the_run_that_it_starts_from(name):
  trained = name.removesuffix("_qat")
  config = load(name)[0]
  assert config.init_from == f"runs/{trained}"
  changed = changes(load(trained)[0], config).keys()
  assert changed == {"init_from", "qat", "num_epochs", "learning_rate"}


def test_the_shared_recipe_is_the_papers():
  config = common.get_config()
  assert (config.num_epochs, config.batch_size, config.learning_rate) == (120, 256, 0.1)
  assert (config.momentum, config.nesterov, config.weight_decay) == (0.9, False, 1e-4)
  assert (config.warmup_epochs, config.label_smoothing) == (0, 0)
  assert (config.optimizer, config.schedule, config.warmup_rate) == ("sgd", "cosine", 0)
  assert config.weight_decay_rule == "kernels_and_fast_biases"
  assert (config.custom_l2, config.clip_norm, config.ema_decay) == (0, 0, 0)
  assert (config.accumulate_steps, config.mixup, config.cutmix) == (1, 0, 0)
  assert (config.image_size, config.resize_size, config.interpolation) == (224, 256, "bilinear")
  assert config.augment == "random_resized_crop | flip"
  assert config.mean == (0.485, 0.456, 0.406)
  assert config.std == (0.229, 0.224, 0.225)
  assert set(config.model_overrides.to_dict().values()) == {None}


def test_the_digits_config_runs_on_the_digits(digits_dir):
  config, _ = load("digits")
  config.data_dir = str(digits_dir)
  plan = planning.make_plan(config)
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
