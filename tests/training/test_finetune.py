"""Starting from other weights: what is taken over, what is drawn anew, what is refused."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import repjax
from repjax import disk, training, weights
from repjax.configs import finetune as finetune_config
from repjax.disk import trees
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.training import finetune, loop, optimizer, planning, run
from tests import helpers
from tests.helpers import assert_close, leaves, randomise
from tests.training import tiny
from tests.weights import cases

pytest_plugins = ["tests.training.fixtures"]

NOISE = {"dataset": "synthetic", "eval_split": "sample"}


def open_config(digits_dir, **changes):
  """The config for fine-tuning, on the digits and with few steps."""
  config = finetune_config.get_config()
  config.update({"dataset": "digits", "data_dir": str(digits_dir), "eval_split": "test"})
  config.update(
    {"batch_size": 32, "augment": "pad_and_crop", "num_steps": 2, "recalibrate_batches": 0}
  )
  config.model_overrides.update(changes.pop("model_overrides", {}))
  config.update(changes)
  return config


@pytest.fixture
def source(finished, tmp_path):
  """A copy of the finished run, to start from."""
  return shutil.copytree(finished[0], tmp_path / "source")


def start(folder, spec, fresh):
  """Returns what a run starts from, and a sentence about it; no images are read."""
  return finetune.first_variables(folder, spec, fresh, key=jax.random.key(0), images=None)


def held_by(folder):
  return repjax.load(folder, deploy=False)[1]


def test_what_a_config_leaves_open_is_as_in_the_folder_and_as_in_the_data_set(finished, digits_dir):
  full = finetune.resolve(open_config(digits_dir, init_from=str(finished[0])))
  assert planning.make_plan(full).spec == repjax.ModelSpec.read(finished[0])
  assert finetune.resolve(full).to_dict() == full.to_dict()
  config = tiny.config(digits_dir)
  assert finetune.resolve(config).to_dict() == config.to_dict()


def test_what_a_config_gives_wins(finished, digits_dir):
  given = {
    "init_from": str(finished[0]),
    "num_classes": 7,
    "model_overrides": {"act": "gelu", "stage_sizes": (1, 2, 1, 1)},
    "image_size": 24,
    "resize_size": 32,
    "interpolation": "bicubic",
    "mean": (0.1, 0.2, 0.3),
  }
  spec = planning.model_spec(finetune.resolve(open_config(digits_dir, **given)), ())
  assert (spec.name, spec.num_classes) == ("repvgg_a0", 7)
  assert settings_of(spec) == {**tiny.OVERRIDES, "act": "gelu", "stage_sizes": (1, 2, 1, 1)}
  assert spec.preprocessing == Preprocessing(24, 32, "bicubic", (0.1, 0.2, 0.3), (0.35,) * 3)


def settings_of(spec):
  return {k: tuple(v) if isinstance(v, list) else v for k, v in spec.overrides.items()}


@pytest.mark.parametrize(("size", "resize"), [(16, 24), (32, 48), (20, 30)])
def test_an_image_size_alone_keeps_its_ratio_to_the_resize_size(source, digits_dir, size, resize):
  spec = repjax.ModelSpec.read(source)
  wide = dataclasses.replace(spec.preprocessing, resize_size=24)
  dataclasses.replace(spec, preprocessing=wide).write(source)
  full = finetune.resolve(open_config(digits_dir, init_from=str(source), image_size=size))
  assert (full.image_size, full.resize_size) == (size, resize)


def test_resolving_leaves_the_config_alone(finished, digits_dir):
  config = open_config(digits_dir, init_from=str(finished[0]))
  before = config.to_dict()
  finetune.resolve(config)
  assert config.to_dict() == before
  config.image_size = 8
  with pytest.raises(TypeError):
    config.image_size = "8"


def test_overrides_may_be_open_as_a_whole(finished, digits_dir):
  config = open_config(digits_dir, init_from=str(finished[0]))
  config.model_overrides = None
  spec = planning.model_spec(finetune.resolve(config), ())
  assert settings_of(spec) == tiny.OVERRIDES


def test_groups_by_block_come_through(source, digits_dir):
  spec = repjax.ModelSpec.read(source)
  dataclasses.replace(spec, overrides={**spec.overrides, "groups": {2: 2}}).write(source)
  full = finetune.resolve(open_config(digits_dir, init_from=str(source)))
  model = planning.model_spec(full, ()).create_model()
  assert [model.groups_of(block) for block in (1, 2, 3)] == [1, 2, 1]


def test_classes_are_counted_without_a_folder_to_start_from(digits_dir):
  assert finetune.resolve(tiny.config(digits_dir, num_classes=None)).num_classes == 10


def test_noise_has_the_classes_of_the_folder(finished, digits_dir):
  config = open_config(digits_dir, init_from=str(finished[0]), **NOISE)
  assert finetune.resolve(config).num_classes == 10
  with pytest.raises(InputError, match=r"config\.num_classes is not set.*synthetic"):
    finetune.resolve(tiny.config(digits_dir, num_classes=None, **NOISE))


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"init_from": None}, "config.model is not set, and config.init_from names no folder"),
    ({"init_from": None, "model": "repvgg_a0"}, "or set image_size, resize_size, interpolation, m"),
    ({"eval_image_size": 24}, "config.eval_image_size = 24 needs config.image_size, the size to"),
    ({"dataset": None}, "config.dataset is not set; pass --config.dataset=NAME"),
  ],
  ids=str,
)
def test_what_nothing_says_is_named(finished, digits_dir, changes, said):
  with pytest.raises(InputError) as caught:
    finetune.resolve(open_config(digits_dir, **{"init_from": str(finished[0]), **changes}))
  assert said in str(caught.value)


@pytest.mark.parametrize(
  "name", ["RepVGG-A0-train.pth", "none/a0.safetensors", "hf:timm/repvgg_a0"]
)
def test_a_file_of_weights_gets_the_command_that_imports_it(
  digits_dir, tmp_path, monkeypatch, name
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "RepVGG-A0-train.pth").touch()
  with pytest.raises(InputError) as caught:
    finetune.resolve(open_config(digits_dir, init_from=name))
  called = name.rpartition("/")[2].partition(".")[0]
  command = f"repjax import --from {name} --workdir runs/{called}, and then "
  assert f"{command}--config.init_from=runs/{called}" in str(caught.value)


def spoil_model_json(folder):
  (folder / "model.json").write_text('{"name": ')


def spoil_checkpoints(folder):
  for path in folder.glob("checkpoints/*/variables"):
    shutil.rmtree(path)


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize(
  ("spoil", "said"),
  [
    (shutil.rmtree, "source does not exist; give the folder of a run or import"),
    (
      lambda folder: (folder / "model.json").unlink(),
      "source has no model.json",
    ),
    (spoil_model_json, "model.json is damaged"),
    (
      lambda folder: [shutil.rmtree(folder / name) for name in ("checkpoints", "deploy")],
      "source has no checkpoint and no deploy form; give the folder of a run",
    ),
    (spoil_checkpoints, "holds no whole checkpoint"),
  ],
  ids=["gone", "no model.json", "model.json", "nothing", "checkpoints"],
)
def test_a_folder_that_cannot_be_started_from_is_named_and_nothing_is_written(
  source, digits_dir, tmp_path, spoil, said
):
  full = finetune.resolve(open_config(digits_dir, init_from=str(source)))
  spoil(source)
  with pytest.raises(InputError) as caught:
    training.train(full, tmp_path / "run")  # a config that leaves nothing open is checked as well
  assert said in str(caught.value)
  assert not (tmp_path / "run").exists()


@pytest.fixture
def plain(finished, tmp_path):
  """The deploy folder of the finished run alone, to start from."""
  return shutil.copytree(finished[0] / "deploy", tmp_path / "plain")


def first_state(config, workdir):
  """Returns the plan and the variables of the state that a run would start from."""
  plan = planning.make_plan(config)
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=0.0)
  return plan, run._first_state(config, plan, sgd, workdir)[0].variables


class TestDeployFormsAreExpanded:
  @pytest.mark.proof
  def test_the_start_computes_the_same_in_both_modes(self, plain, digits_dir, tmp_path, capsys):
    full = finetune.resolve(open_config(digits_dir, init_from=str(plain)))
    plan, variables = first_state(full, tmp_path / "run")
    printed = capsys.readouterr().out
    told = f"starting from {plain}, its deploy form expanded on 32 images of training; classifier k"
    assert told in printed
    deploy, params, _ = repjax.load(plain)
    batch = next(loop.training_batches(full, plan))
    images = plan.spec.preprocessing.normalize(batch["image"])
    expected = deploy.apply(params, images)
    model = plan.spec.create_model()
    assert_close(model.apply(variables, images), expected, 1e-4)
    trained, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
    assert_close(trained, expected, 1e-4)

  def test_a_run_starts_with_new_classes_and_continues_without_the_folder(
    self, plain, digits_dir, tmp_path, capsys
  ):
    config = open_config(digits_dir, init_from=str(plain), num_classes=5, **NOISE)
    report = training.train(config, tmp_path / "run")
    assert "new classifier: 10 -> 5 classes" in capsys.readouterr().out
    assert report["logits_difference"] <= report["tolerance"]
    shutil.rmtree(plain)
    assert training.train(config, tmp_path / "run") == report

  def test_an_import_of_a_deploy_file(self, digits_dir, tmp_path):
    path, folder = tmp_path / "a0.npz", tmp_path / "imported"
    np.savez(path, **cases.random_state("repvgg_a0", "deploy", "timm", **cases.TINY))
    weights.import_weights(str(path), folder, overrides=cases.TINY)
    full = finetune.resolve(open_config(digits_dir, init_from=str(folder), **NOISE))
    _, variables = first_state(full, tmp_path / "run")
    held = repjax.load(folder)[1]["params"]
    back = repjax.reparameterize(variables["params"], variables["batch_stats"])
    jax.tree.map(lambda a, b: assert_close(a, b, 1e-5), back, held)

  def test_branches_may_differ_and_nothing_else(self, plain, digits_dir, tmp_path):
    changes = {"model_overrides": {"branches": ("conv3x3", "conv3x3_1")}}
    full = finetune.resolve(open_config(digits_dir, init_from=str(plain), **changes))
    _, variables = first_state(full, tmp_path / "run")
    assert variables["params"]["stem"]["RepConv_0"].keys() == {"conv3x3", "conv3x3_1"}
    changes = {"model_overrides": {"act": "silu"}}
    full = finetune.resolve(open_config(digits_dir, init_from=str(plain), **changes))
    with pytest.raises(InputError, match="differs from the config's: act relu -> silu"):
      first_state(full, tmp_path / "run")

  def test_a_whole_run_keeps_its_training_form(self, finished, digits_dir):
    spec = repjax.ModelSpec.read(finished[0])
    variables, text = start(finished[0], spec, randomise(spec.variable_shapes()))
    assert "expanded" not in text
    jax.tree.map(np.testing.assert_array_equal, variables, held_by(finished[0]))


def test_a_run_does_not_start_from_itself(source, digits_dir):
  before = tiny.contents(source)
  config = open_config(digits_dir, init_from=f"{source}/../source")
  with pytest.raises(InputError, match=r"names the workdir itself.*leave it out to continue"):
    training.train(config, source)
  assert tiny.contents(source) == before


@pytest.mark.parametrize("name", ["repvgg_b0", "resnet18"])  # a ResNet has no `strides`
@pytest.mark.parametrize("form", ["run", "deploy form"])
def test_a_folder_of_another_model_is_named(finished, plain, digits_dir, tmp_path, name, form):
  folder = finished[0] if form == "run" else plain
  config = open_config(digits_dir, init_from=str(folder), model=name)
  said = f"holds the model repvgg_a0, but the config builds {name}.*--config.model=repvgg_a0"
  with pytest.raises(InputError, match=said) as caught:
    training.train(config, tmp_path / "run")
  helpers.assert_one_paragraph(caught.value)
  assert str(folder) in str(caught.value)
  assert not (tmp_path / "run").exists()


def test_a_run_is_not_continued_as_another_model(source, digits_dir):
  config = open_config(digits_dir, model="resnet18", image_size=32)
  with pytest.raises(InputError, match=r"different model: .*name repvgg_a0 -> resnet18"):
    training.train(config, source)


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"model_overrides": {"act": "silu"}}, "config's: act relu -> silu. Set these"),
    ({"model_overrides": {"strides": (1, 1, 1, 2, 2)}}, "config's: strides.2 2 -> 1. Set"),
    (
      {"model_overrides": {"stage_sizes": (1, 1, 3, 1), "se": "pre", "se_reduction": 4}},
      "config's: se None -> pre, se_reduction 16 -> 4, stage_sizes.2 1 -> 3. Set",
    ),
  ],
  ids=str,
)
def test_another_model_is_refused_with_its_differences(
  finished, digits_dir, tmp_path, changes, said
):
  config = open_config(digits_dir, init_from=str(finished[0]), **changes)
  with pytest.raises(InputError) as caught:
    training.train(config, tmp_path / "run")
  assert f"the model in {finished[0]} differs from the {said}" in str(caught.value)
  assert not (tmp_path / "run").exists()


def test_what_leaves_the_trained_network_alone_may_differ_and_so_may_the_size(finished, digits_dir):
  changes = {"model_overrides": {"dropout": 0.2, "remat": True}, "image_size": 24}
  full = finetune.resolve(open_config(digits_dir, init_from=str(finished[0]), **changes))
  spec = planning.make_plan(full).spec
  variables, _ = start(finished[0], spec, randomise(spec.variable_shapes()))
  jax.tree.map(np.testing.assert_array_equal, variables, held_by(finished[0]))


def with_heads(folder, class_names):
  """An import-like folder of a model with auxiliary heads and random variables."""
  spec = repjax.ModelSpec(
    "repvgg_a0", 3, tiny.WITH_GATES_AND_HEADS, Preprocessing(16, 16), class_names
  )
  variables = randomise(spec.variable_shapes(), seed=3)
  trees.write_tree(folder / "checkpoints" / "0" / "variables", variables)
  spec.write(folder)
  return spec, variables


@pytest.mark.parametrize(
  ("theirs", "ours", "classes", "said"),
  [
    (("a", "b", "c"), ("a", "b", "c"), 3, "classifier kept"),
    ((), ("a", "b", "c"), 3, "classifier kept"),
    (("a", "b", "c"), (), 3, "classifier kept"),
    (("a", "b", "c"), ("c", "b", "a"), 3, "new classifier: 3 classes of other names"),
    (("a", "b", "c"), tuple("abcde"), 5, "new classifier: 3 -> 5 classes"),
    ((), (), 2, "new classifier: 3 -> 2 classes"),
  ],
  ids=str,
)
def test_classifiers_alone_are_drawn_anew_and_only_for_other_classes(
  tmp_path, theirs, ours, classes, said
):
  held, source = with_heads(tmp_path, theirs)
  spec = dataclasses.replace(held, num_classes=classes, class_names=ours)
  drawn = randomise(spec.variable_shapes(), seed=4)
  variables, text = start(tmp_path, spec, drawn)
  assert text == f"starting from {tmp_path}, step 0; {said}"
  taken, fresh = leaves(source), leaves(drawn)
  assert leaves(variables).keys() == fresh.keys()
  for path, value in leaves(variables).items():
    anew = said.startswith("new") and "/head/" in path
    np.testing.assert_array_equal(value, (fresh if anew else taken)[path], err_msg=path)


def test_a_classifier_keeps_random_values_that_follow_the_seed(finished, digits_dir, tmp_path):
  plans = []
  for seed in (0, 0, 1):
    config = finetune.resolve(
      open_config(digits_dir, init_from=str(finished[0]), num_classes=5, seed=seed, **NOISE)
    )
    plan = planning.make_plan(config)
    sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=0.0)
    plans.append(leaves(run._first_state(config, plan, sgd, tmp_path)[0].params))
  first, again, other = plans
  assert first["head/kernel"].shape[1] == 5
  for path, value in first.items():
    np.testing.assert_array_equal(value, again[path])
    assert path.startswith("head/") == (not np.array_equal(value, other[path]))


def test_a_frozen_backbone_is_deployed_as_it_came_with_a_classifier_that_learned(
  finished, digits_dir, tmp_path, capsys
):
  workdir = tmp_path / "run"
  config = open_config(
    digits_dir, init_from=str(finished[0]), num_classes=5, backbone_rate=0.0, **NOISE
  )
  config.recalibrate_batches = 1
  report = training.train(config, workdir)
  printed = capsys.readouterr().out.splitlines()
  step = finished[1]["step"]
  assert f"starting from {finished[0]}, step {step}; new classifier: 10 -> 5 classes" in printed
  assert any(line.endswith("all else is frozen and runs as in evaluation") for line in printed)
  assert "the frozen backbone keeps its statistics; they are not re-estimated" in printed
  assert report["recalibrated"] is None
  ours, theirs = leaves(held_by(workdir)), leaves(held_by(finished[0]))
  assert ours.keys() == theirs.keys()
  for path, value in ours.items():
    if path.startswith("params/head/"):
      assert value.shape[-1] == 5
    else:
      assert np.asarray(value).tobytes() == np.asarray(theirs[path]).tobytes(), path
  recorded = json.loads((workdir / "config.json").read_text())
  assert recorded["model"] == "repvgg_a0"
  assert recorded["model_overrides"]["width_multipliers"] == [0.125] * 4
  assert (recorded["image_size"], recorded["mean"]) == (16, [0.3] * 3)
  assert repjax.ModelSpec.read(workdir).class_names == tuple("01234")


def test_nothing_but_given_weights_is_frozen(digits_dir, tmp_path):
  with pytest.raises(InputError, match="would freeze weights that nothing has trained"):
    training.train(tiny.config(digits_dir, backbone_rate=0.0), tmp_path / "run")
  assert not (tmp_path / "run").exists()


def test_a_run_continues_without_the_folder_that_it_began_from(
  finished, digits_dir, tmp_path, capsys
):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  config = tiny.config(digits_dir, init_from=str(tmp_path / "gone"))
  training.train(config, workdir)
  before = tiny.contents(workdir / "checkpoints")
  full = json.loads((workdir / "config.json").read_text())
  config.update(dict.fromkeys(("model", "num_classes", "image_size", "interpolation", "mean")))
  config.model_overrides.update(dict.fromkeys(tiny.OVERRIDES))
  capsys.readouterr()
  assert training.train(config, workdir) == finished[1]
  printed = capsys.readouterr().out
  assert "continuing from the checkpoint of step 12; config.init_from is not read again" in printed
  assert "config changed" not in printed
  assert tiny.contents(workdir / "checkpoints") == before
  assert json.loads((workdir / "config.json").read_text()) == full


def test_what_continues_is_as_in_its_own_folder_not_as_in_another(finished, source, digits_dir):
  spec = repjax.ModelSpec.read(source)
  dataclasses.replace(spec, name="repvgg_b0").write(source)
  config = open_config(digits_dir, init_from=str(source))
  assert finetune.resolve(config, finished[0]).model == "repvgg_a0"
  assert finetune.resolve(config, finished[0] / "nothing").model == "repvgg_b0"


def test_an_import_is_started_from(digits_dir, tmp_path):
  path, folder = tmp_path / "a0.npz", tmp_path / "imported"
  np.savez(path, **cases.random_state("repvgg_a0", "train", "timm", **cases.TINY))
  weights.import_weights(str(path), folder, overrides=cases.TINY)
  full = finetune.resolve(open_config(digits_dir, init_from=str(folder)))
  spec = planning.model_spec(full, ())
  held = repjax.ModelSpec.read(folder)
  assert settings_of(spec) == settings_of(held)
  assert spec.preprocessing == held.preprocessing
  variables, text = start(folder, spec, randomise(spec.variable_shapes()))
  assert text == f"starting from {folder}, step 0; classifier kept"
  jax.tree.map(np.testing.assert_array_equal, variables, held_by(folder))


def test_a_changed_data_set_stops_a_run_that_would_continue(
  finished, digits_dir, tmp_path, monkeypatch
):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  opened = planning.open_source

  def grown(*arguments, **changes):
    return opened(*arguments, **changes)._replace(fingerprint={"images": 1500})

  disk.write_json(workdir / "data.json", {"train": {"images": 1437}, "eval": {}})
  before = tiny.contents(workdir)
  monkeypatch.setattr(planning, "open_source", grown)
  with pytest.raises(InputError, match=r"has changed since .* began: train.images 1437 -> 1500\."):
    training.train(tiny.config(digits_dir, num_steps=20), workdir)
  assert tiny.contents(workdir) == before


def test_a_run_that_would_freeze_its_backbone_half_way_is_stopped(finished, digits_dir, tmp_path):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  before = tiny.contents(workdir)
  with pytest.raises(InputError, match=r"config: backbone_rate 1\.0 -> 0\.0"):
    training.train(tiny.config(digits_dir, num_steps=20, backbone_rate=0.0), workdir)
  assert tiny.contents(workdir) == before
