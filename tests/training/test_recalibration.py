"""Re-estimated statistics are those of all activations seen, and belong to one checkpoint."""

import itertools
import json
import math
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax import disk, runs, training, weights
from repjax.data import open_source, train_batches
from repjax.disk import trees
from repjax.errors import InputError
from repjax.layers import RepConv, RepNorm
from repjax.layers import base as rep_norm
from repjax.training import evaluation, finetune, optimizer, planning, recalibration
from repjax.training.state import create_state, restore_newest
from tests.helpers import (
  assert_close,
  leaves,
  random_variables,
  randomise,
  relative_error,
  shapes,
)
from tests.training import tiny
from tests.weights import cases

pytest_plugins = ["tests.training.fixtures"]

BATCHES, DEVICES = 3, 4


@pytest.fixture
def workdir(finished, tmp_path):
  """A copy of a finished run."""
  return shutil.copytree(finished[0], tmp_path / "run")


@pytest.fixture(scope="module")
def recalibrated(finished, digits_dir, cache_home, tmp_path_factory):
  """A copy of a finished run with re-estimated statistics, which no test may change; the record."""
  folder = shutil.copytree(finished[0], tmp_path_factory.mktemp("runs") / "recalibrated")
  with tiny.quick_programs(cache_home / "repjax" / "xla"):
    record = training.recalibrate(tiny.config(digits_dir), folder, num_batches=BATCHES)
  return folder, record


def own_variables(workdir):
  """Returns the variables of the best checkpoint, without re-estimated statistics."""
  like = {"variables": repjax.ModelSpec.read(workdir).variable_shapes()}
  return runs.read_checkpoint(workdir, like, best=True)[1]["variables"]


def training_batches(digits_dir, count):
  batches = train_batches(
    open_source("digits", "train", data_dir=str(digits_dir)).examples,
    batch_size=32,
    image_size=16,
    augment="pad_and_crop",
    interpolation="bilinear",
    seed=0,
  )
  return list(itertools.islice(batches, count))


def inputs_of_norms(spec, params):
  """Builds a function of images that returns the input of each batch norm in training mode."""
  model = spec.create_model(remat=False, statistics="outputs")
  stats = spec.variable_shapes()["batch_stats"]
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), stats)

  def run(images):
    seen = {}

    def keep(next_function, arguments, keywords, context):
      if isinstance(context.module, nn.BatchNorm) and context.method_name == "__call__":
        seen["/".join(context.module.path)] = arguments[0]
      return next_function(*arguments, **keywords)

    with nn.intercept_methods(keep):
      model.apply(
        {"params": params, "batch_stats": zeros},
        spec.preprocessing.normalize(images),
        train=True,
        mutable=["batch_stats"],
      )
    return seen

  return jax.jit(run)


def expected_statistics(spec, params, batches, parts):
  """Returns mean and variance, in float64, over all activations of batches cut into parts."""
  inputs, rows = inputs_of_norms(spec, params), {}
  for batch in batches:
    for images in np.split(batch["image"], parts):
      for path, x in inputs(images).items():
        rows.setdefault(path, []).append(np.asarray(x, np.float64).reshape(-1, x.shape[-1]))
  joined = {path: np.concatenate(values) for path, values in rows.items()}
  return {
    f"{path}/{name}": function(values, axis=0)
    for path, values in joined.items()
    for name, function in (("mean", np.mean), ("var", np.var))
  }


@pytest.mark.parametrize(
  ("overrides", "synchronised", "momentum"),
  [
    ({**tiny.OVERRIDES, "remat": True}, False, 0.9),
    (tiny.OVERRIDES, True, 0.5),
    (tiny.WITH_GATES_AND_HEADS, False, 0),
  ],
  ids=["devices alone", "synchronised", "gates and heads"],
)
def test_statistics_are_those_of_all_activations_whatever_the_momentum(
  digits_dir, monkeypatch, overrides, synchronised, momentum
):
  monkeypatch.setattr(rep_norm, "MOMENTUM", momentum)
  spec = repjax.ModelSpec(
    "repvgg_a0", 10, overrides, repjax.spec.Preprocessing(16, 16, "bilinear", (0.3,) * 3)
  )
  variables = randomise(spec.variable_shapes())
  batches = training_batches(digits_dir, BATCHES)
  result = recalibration.pooled_statistics(
    spec.create_model(axis_name="batch" if synchronised else None, running_variance="biased"),
    variables,
    spec.preprocessing,
    batches,
  )
  assert shapes(result) == shapes(variables["batch_stats"])
  parts = 1 if synchronised else DEVICES
  expected = expected_statistics(spec, variables["params"], batches, parts)
  assert leaves(result).keys() == expected.keys()
  for path, value in leaves(result).items():
    assert_close(value, expected[path], 2e-5)


class Noted(nn.Module):
  """Layers that write notes beside their statistics."""

  @nn.compact
  def __call__(self, x, train=False):
    biased = {"running_variance": "biased"}
    x = RepConv(4, ("conv3x3", "conv1x1"), epsilon=0.1, **biased)(x, train)
    return RepNorm(name="norm", **biased)(x, train)


def test_notes_of_layers_stay_as_they_are(digits_dir):
  variables = random_variables(Noted(), jnp.zeros((1, 16, 16, 3)))
  preprocessing = repjax.spec.Preprocessing(16, 16, "bilinear")
  batches = training_batches(digits_dir, 1)
  result = recalibration.pooled_statistics(Noted(), variables, preprocessing, batches)
  assert shapes(result) == shapes(variables["batch_stats"])
  assert result["RepConv_0"]["epsilon"] == variables["batch_stats"]["RepConv_0"]["epsilon"]
  assert result["norm"]["RepNorm"] == 1
  assert not np.array_equal(
    result["norm"]["bn"]["var"], variables["batch_stats"]["norm"]["bn"]["var"]
  )


def test_variances_of_samples_are_refused_because_their_mean_is_not_that_of_all(digits_dir):
  model = RepNorm()
  variables = random_variables(model, jnp.zeros((1, 16, 16, 3)))
  preprocessing = repjax.spec.Preprocessing(16, 16, "bilinear")
  with pytest.raises(ValueError, match="running_variance"):
    recalibration.pooled_statistics(
      model, variables, preprocessing, training_batches(digits_dir, 1)
    )


def test_pooled_moments_are_exact_where_means_lie_far_apart():
  rng = np.random.default_rng(0)
  values = rng.normal(rng.normal(0, 100, (6, 1, 5)), 1, (6, 50, 5))  # (batches, images, channels)
  share = 0.125
  sums = [
    recalibration._sum_of_moments(
      {"mean": share * part.mean(1), "var": share * part.var(1)},
      share,  # of three devices
    )
    for part in (values[:3], values[3:])
  ]
  moments = recalibration._from_moments(jax.tree.map(np.add, *sums), 6)
  flat = values.reshape(-1, 5)
  assert_close(moments["mean"], flat.mean(0), 1e-14)
  assert_close(moments["var"], flat.var(0), 1e-13)
  shares = {"mean": sums[0]["mean"], "second": sums[0]["mean"] ** 2 * (1 - 1e-16)}
  assert (recalibration._from_moments(shares, 1)["var"] >= 0).all()


def test_a_runs_statistics_are_those_of_its_first_batches(recalibrated, digits_dir):
  workdir, _ = recalibrated
  spec, variables = repjax.ModelSpec.read(workdir), own_variables(workdir)
  model = spec.create_model(running_variance="biased")
  expected = recalibration.pooled_statistics(
    model, variables, spec.preprocessing, training_batches(digits_dir, BATCHES)
  )
  loaded = repjax.load(workdir, deploy=False)[1]
  jax.tree.map(np.testing.assert_array_equal, loaded["batch_stats"], expected)
  jax.tree.map(np.testing.assert_array_equal, loaded["params"], variables["params"])
  differ = [
    relative_error(value, leaves(variables["batch_stats"])[path])
    for path, value in leaves(expected).items()
  ]
  assert min(differ) > 1e-3


def test_dropout_takes_no_part(recalibrated, finished, digits_dir, tmp_path):
  folder = shutil.copytree(finished[0], tmp_path / "run")
  value = json.loads((folder / "model.json").read_text())
  value["overrides"]["dropout"] = 0.5
  repjax.ModelSpec.from_json(value).write(folder)
  record = training.recalibrate(tiny.config(digits_dir), folder, num_batches=BATCHES)
  assert record == recalibrated[1]


def test_the_record_says_what_was_done_and_what_it_changed(finished, recalibrated, digits_dir):
  workdir, record = recalibrated
  config = tiny.config(digits_dir)
  before = training.evaluate(config, finished[0])
  after = training.evaluate(config, workdir)
  assert after.pop("recalibrated") == BATCHES
  assert before.keys() == after.keys()
  assert before["loss"] != after["loss"]
  assert record == json.loads((workdir / "recalibrated" / "recalibration.json").read_text())
  assert record == {
    "step": finished[1]["step"],
    "checkpoint": record["checkpoint"],
    "batches": BATCHES,
    "batch_size": 32,
    "images": BATCHES * 32,
    "dataset": "digits",
    "split": "train",
    "eval_split": "test",
    **{name: {"before": before[name], "after": after[name]} for name in ("accuracy", "loss")},
  }


def test_a_record_reads_as_two_lines():
  record = {
    "step": 1200,
    "batches": 1000,
    "batch_size": 256,
    "dataset": "imagenet2012",
    "split": "train",
    "eval_split": "validation",
    "accuracy": {"before": 0.72, "after": 0.7241},
    "loss": {"before": 1.25, "after": 1.2},
  }
  assert recalibration.format_recalibration(record).splitlines() == [
    "batch norms of step 1200 re-estimated over 1,000 batches of 256 images of imagenet2012's "
    "train split",
    "validation accuracy 72.00% -> 72.41%, loss 1.2500 -> 1.2000",
  ]


def test_recalibrating_changes_nothing_else_and_can_be_undone(
  recalibrated, finished, workdir, digits_dir
):
  before = tiny.contents(workdir)
  shutil.copytree(recalibrated[0] / "recalibrated", workdir / "recalibrated")
  after = tiny.contents(recalibrated[0])
  assert {path: data for path, data in after.items() if path in before} == before
  assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"recalibrated"}
  assert training.evaluate(tiny.config(digits_dir), workdir)["recalibrated"] == BATCHES
  assert runs.remove_recalibrated(workdir)
  assert tiny.contents(workdir) == before
  assert not list(workdir.glob("recalibrated*"))
  jax.tree.map(
    np.testing.assert_array_equal, repjax.load(workdir, deploy=False)[1], own_variables(workdir)
  )
  assert not runs.remove_recalibrated(workdir)


def test_an_undo_leaves_the_files_of_other_people(recalibrated, workdir):
  folder = workdir / "recalibrated"
  for has_manifest in (True, False):
    shutil.copytree(recalibrated[0] / "recalibrated", folder, dirs_exist_ok=True)
    (folder / "notes.txt").write_text("theirs")
    if not has_manifest:
      (folder / "manifest.json").unlink()
    assert runs.read_best(workdir, shapes_of(workdir))[2] is not None
    assert runs.remove_recalibrated(workdir)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    assert runs.read_best(workdir, shapes_of(workdir))[2] is None
    assert not runs.remove_recalibrated(workdir)


def test_an_undo_that_is_killed_has_undone_and_leaves_nothing(recalibrated, tmp_path, monkeypatch):
  workdir = shutil.copytree(recalibrated[0], tmp_path / "run")

  def killed(path, **settings):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
      runs.remove_recalibrated(workdir)
  assert runs.read_best(workdir, shapes_of(workdir))[2] is None
  runs.sweep(workdir)
  assert not [path for path in workdir.iterdir() if "recalibrated" in path.name]


def test_the_conversion_folds_them_and_says_so(recalibrated, digits_dir, tmp_path):
  workdir = shutil.copytree(recalibrated[0], tmp_path / "run")
  report = training.convert(tiny.config(digits_dir), workdir)
  assert report["recalibrated"] == recalibrated[1]
  assert report["accuracy"]["train"] == recalibrated[1]["accuracy"]["after"]
  assert report["logits_difference"] <= 1e-5
  _, trained, _ = repjax.load(workdir, deploy=False)
  folded = leaves(jax.jit(repjax.reparameterize)(trained["params"], trained["batch_stats"]))
  deployed = leaves(repjax.load(workdir)[1]["params"])
  for path, value in deployed.items():
    assert_close(value, folded[path], 1e-5)
  own = own_variables(workdir)
  other = leaves(jax.jit(repjax.reparameterize)(own["params"], own["batch_stats"]))
  assert (
    relative_error(deployed["stem/RepConv_0/conv/kernel"], other["stem/RepConv_0/conv/kernel"])
    > 1e-3
  )
  shutil.rmtree(workdir / "deploy")
  for path, value in leaves(repjax.load(workdir)[1]["params"]).items():
    assert_close(value, folded[path], 1e-5)


def test_a_run_that_continues_does_not_see_them(recalibrated):
  workdir, _ = recalibrated
  spec = repjax.ModelSpec.read(workdir)
  sgd = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=0.0)
  shapes = jax.eval_shape(lambda values: create_state(values, sgd), spec.variable_shapes())
  state = restore_newest(workdir, shapes)
  own = runs.read_checkpoint(workdir, {"variables": spec.variable_shapes()})[1]["variables"]
  jax.tree.map(np.testing.assert_array_equal, state.batch_stats, own["batch_stats"])


def test_fine_tuning_starts_from_them(recalibrated):
  workdir, record = recalibrated
  spec = repjax.ModelSpec.read(workdir)
  drawn = randomise(spec.variable_shapes(), seed=5)
  variables, text = finetune.first_variables(
    workdir, spec, drawn, key=jax.random.key(0), images=None
  )
  assert text == (
    f"starting from {workdir}, step {record['step']}, statistics re-estimated over {BATCHES} "
    "batches; classifier kept"
  )
  expected = repjax.load(workdir, deploy=False)[1]
  jax.tree.map(np.testing.assert_array_equal, variables, expected)


def replace_checkpoint(workdir, step, accuracy=1.0):
  """Adds a checkpoint with different statistics that is better than all others."""
  variables = randomise(repjax.ModelSpec.read(workdir).variable_shapes(), seed=9)
  folder = workdir / "checkpoints" / str(step)
  shutil.rmtree(folder, ignore_errors=True)
  trees.write_tree(folder / "variables", variables)
  disk.write_json(runs.score_file(workdir, step), {"accuracy": accuracy})
  return variables


@pytest.mark.parametrize("later", [0, 8], ids=["of the same step", "of another step"])
def test_they_are_for_one_checkpoint_alone(recalibrated, tmp_path, later):
  workdir = shutil.copytree(recalibrated[0], tmp_path / "run")
  variables = replace_checkpoint(workdir, recalibrated[1]["step"] + later)
  step, loaded, record = runs.read_best(workdir, shapes_of(workdir))
  assert (step, record) == (recalibrated[1]["step"] + later, None)
  jax.tree.map(np.testing.assert_array_equal, loaded, variables)


def shapes_of(workdir):
  return repjax.ModelSpec.read(workdir).variable_shapes()


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize(
  "spoil",
  [
    lambda folder: (folder / "recalibration.json").write_text('{"step": '),
    lambda folder: (folder / "recalibration.json").write_text("[]"),
    lambda folder: shutil.rmtree(next((folder / "batch_stats").glob("stem*"))),
  ],
  ids=["half a record", "no record", "half the statistics"],
)
def test_damaged_statistics_are_named_with_the_way_out(recalibrated, tmp_path, spoil):
  workdir = shutil.copytree(recalibrated[0], tmp_path / "run")
  spoil(workdir / "recalibrated")
  with pytest.raises(InputError, match=r"is damaged|cannot be read") as caught:
    repjax.load(workdir, deploy=False)
  command = f"repjax recalibrate --workdir {workdir} --undo"
  assert str(caught.value).endswith(f"To use the checkpoint's own statistics again: {command}")
  runs.remove_recalibrated(workdir)
  repjax.load(workdir, deploy=False)


@pytest.mark.parametrize("name", ["write_tree", "write_json", "write_manifest"])
def test_a_crash_while_writing_leaves_what_there_was(
  recalibrated, digits_dir, tmp_path, monkeypatch, name
):
  workdir = shutil.copytree(recalibrated[0], tmp_path / "run")
  expected = runs.read_best(workdir, shapes_of(workdir))

  def crash(*arguments):
    raise OSError("the disk is full")

  with monkeypatch.context() as patch:
    patch.setattr(trees if name == "write_tree" else disk, name, crash)
    with pytest.raises(InputError, match="recalibrated could not be written: the disk is full"):
      runs.write_recalibrated(
        workdir, 4, expected[1]["batch_stats"], expected[1]["batch_stats"], {"batches": 9}
      )
  step, variables, record = runs.read_best(workdir, shapes_of(workdir))
  assert (step, record) == (expected[0], expected[2])
  jax.tree.map(np.testing.assert_array_equal, variables, expected[1])


@pytest.mark.parametrize("told_by", ["config.json", "rounding.json"])
def test_a_network_in_8_bits_keeps_its_statistics(workdir, run_command, digits_dir, told_by):
  if told_by == "config.json":
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"qat": True}))
  else:
    (workdir / "rounding.json").write_text("[]")
  before = tiny.contents(workdir)
  with pytest.raises(SystemExit, match="was trained in 8 bits") as stop:
    run_command("recalibrate", "--workdir", workdir, "--batches", 1)
  assert "\n" not in stop.value.code
  assert "init_from" in stop.value.code
  assert tiny.contents(workdir).items() >= before.items()


@pytest.mark.parametrize(
  ("changes", "batches", "said"),
  [
    ({}, 0, "statistics need at least 1 batch, got 0"),
    ({}, -3, "statistics need at least 1 batch, got -3"),
    ({"batch_size": 30}, 1, "batch_size 30 does not divide over 4 devices"),
    ({"batch_size": 1440}, 1, "batch_size 1440 is more than the 1437 images"),
    ({"dataset": "digit"}, 1, "unknown data set 'digit'; did you mean digits"),
    ({"dataset": None}, 1, "no data set is named"),
    ({"train_split": "trian"}, 1, "unknown split of digits 'trian'"),
    ({"eval_split": "tset"}, 1, "unknown split of digits 'tset'"),
  ],
  ids=str,
)
def test_what_cannot_be_recalibrated_is_named_and_nothing_is_written(
  workdir, digits_dir, changes, batches, said
):
  before = tiny.contents(workdir)
  with pytest.raises(InputError) as caught:
    training.recalibrate(tiny.config(digits_dir, **changes), workdir, num_batches=batches)
  assert said in str(caught.value)
  assert tiny.contents(workdir) == before


def named(*names):
  """Opens a source whose classes have different names."""

  def open_renamed(*arguments, **settings):
    return open_source(*arguments, **settings)._replace(class_names=names)

  return open_renamed


@pytest.mark.parametrize(
  ("names", "said"),
  [
    (("a", "b"), "digits has 2 classes, the model has 10"),
    (tuple("abcdefghij"), "than the model: a, b, c and 7 more instead of 0, 1, 2 and 7 more"),
  ],
  ids=["number", "names"],
)
def test_a_set_of_other_classes_is_refused(workdir, digits_dir, monkeypatch, names, said):
  monkeypatch.setattr(planning, "open_source", named(*names))
  with pytest.raises(InputError) as caught:
    training.recalibrate(tiny.config(digits_dir), workdir, num_batches=1)
  assert said in str(caught.value)
  assert not (workdir / "recalibrated").exists()


def test_a_run_whose_config_lacks_a_field_is_damaged(workdir, digits_dir):
  config = tiny.config(digits_dir)
  del config.augment
  with pytest.raises(InputError, match="the config lacks augment"):
    training.recalibrate(config, workdir, num_batches=1)


def test_statistics_that_are_not_finite_are_not_written(workdir, digits_dir):
  step = max(runs.checkpoints(workdir))
  variables = replace_checkpoint(workdir, step)
  variables["params"]["stem"]["RepConv_0"]["conv3x3"]["conv"]["kernel"] *= math.nan
  shutil.rmtree(workdir / "checkpoints" / str(step) / "variables")
  trees.write_tree(workdir / "checkpoints" / str(step) / "variables", variables)
  with pytest.raises(InputError, match=f"of step {step} are not finite, so nothing was written"):
    training.recalibrate(tiny.config(digits_dir), workdir, num_batches=1)
  assert not (workdir / "recalibrated").exists()


def test_a_run_re_estimates_at_its_end_and_says_so(finished, workdir, digits_dir, capsys):
  config = tiny.config(digits_dir, recalibrate_batches=BATCHES)
  report = training.train(config, workdir)
  record = report["recalibrated"]
  printed = capsys.readouterr().out
  assert recalibration.format_recalibration(record) in printed
  assert f"statistics re-estimated over {BATCHES} batches" in printed
  assert record["accuracy"]["before"] == finished[1]["accuracy"]["train"]
  assert record["accuracy"]["after"] == report["accuracy"]["train"]


@pytest.fixture
def imported(tmp_path):
  """An import of a small network with random weights in one form."""

  def build(kind):
    path, folder = tmp_path / "a0.npz", tmp_path / "imported"
    np.savez(path, **cases.random_state("repvgg_a0", kind, "timm", **cases.TINY))
    weights.import_weights(str(path), folder, overrides=cases.TINY)
    return folder

  return build


def test_an_import_is_recalibrated_on_the_images_that_are_named(imported, monkeypatch):
  folder = imported("train")
  config = planning.read_config(
    folder, dataset="synthetic", train_split="sample", eval_split="sample", batch_size=8
  )
  seen = []

  def recorded(examples, **settings):
    seen.append(settings)
    return train_batches(examples, **settings)

  monkeypatch.setattr(recalibration, "train_batches", recorded)
  record = training.recalibrate(config, folder, num_batches=2)
  assert (record["step"], record["images"], record["split"]) == (0, 16, "sample")
  assert (seen[0]["augment"], seen[0]["seed"]) == ("random_resized_crop | flip", 0)
  assert runs.read_best(folder, shapes_of(folder))[2] == record
  with pytest.raises(InputError, match="no data set"):
    training.recalibrate(planning.read_config(folder), folder, num_batches=1)


def test_an_import_of_the_deploy_form_has_no_statistics(imported):
  folder = imported("deploy")
  config = planning.read_config(
    folder, dataset="synthetic", train_split="sample", eval_split="sample", batch_size=8
  )
  with pytest.raises(InputError, match="holds a deploy form only"):
    training.recalibrate(config, folder, num_batches=1)


def test_the_evaluation_before_ignores_statistics_of_an_earlier_time(
  recalibrated, digits_dir, tmp_path
):
  workdir = shutil.copytree(recalibrated[0], tmp_path / "run")
  again = training.recalibrate(tiny.config(digits_dir), workdir, num_batches=1)
  for value in ("accuracy", "loss"):
    assert again[value]["before"] == recalibrated[1][value]["before"]
  assert runs.read_best(workdir, shapes_of(workdir))[2] == again
  assert evaluation.evaluate(tiny.config(digits_dir), workdir)["recalibrated"] == 1


@pytest.mark.parametrize("trained", [24, None])
def test_statistics_are_of_images_of_the_size_that_was_trained_at(digits_dir, trained):
  config = tiny.config(digits_dir, image_size=24, eval_image_size=16)
  if trained is None:
    del config["image_size"]  # as in the config of an import
  source = open_source("digits", "train", data_dir=str(digits_dir))
  batches = recalibration._training_batches(config, source, planning.Preprocessing(16, 16))
  assert next(batches)["image"].shape[1:3] == (trained or 16,) * 2
  batches.close()
