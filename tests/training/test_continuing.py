"""A workdir belongs to one model, one data set and one way to learn: nothing else may continue."""

import json
import re
import shutil

import pytest

import repjax
from repjax import disk, runs, training
from repjax.config import BEFORE, FIELDS, FREE
from repjax.errors import InputError
from repjax.training import continuing, planning
from tests.helpers import spread
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

DATA = {
  "train": {"name": "flowers", "images": 120, "classes": {"count": 3, "names": "5a1f"}},
  "eval": {"name": "flowers", "images": 30, "classes": {"count": 3, "names": "5a1f"}},
}


@pytest.fixture
def claimed(digits_dir, tmp_path):
  """A workdir that belongs to a run of the tiny model, and a function that claims it again."""

  def claim(**changes):
    config = tiny.config(digits_dir, **changes)
    spec = planning.make_plan(config).spec
    continuing.check_workdir(tmp_path, spec)
    config = continuing.keep_variance(config, tmp_path)
    continuing.write_start_files(tmp_path, config, spec, DATA)

  claim()
  return tmp_path, claim


def test_a_claimed_workdir_holds_config_and_model(claimed, digits_dir):
  workdir, _ = claimed
  config = tiny.config(digits_dir, running_variance="unbiased")
  assert sorted(tiny.contents(workdir)) == [
    "config.json",
    "data.json",
    "manifest.json",
    "model.json",
  ]
  assert json.loads((workdir / "data.json").read_text()) == DATA
  read = planning.read_config(workdir)
  assert json.dumps(read.to_dict()) == json.dumps(config.to_dict())  # lists and tuples are one
  assert planning.make_plan(read)[3:] == planning.make_plan(config)[3:]
  assert repjax.ModelSpec.read(workdir).class_names == tuple("0123456789")


def test_claiming_again_says_and_changes_nothing(claimed, capsys):
  workdir, claim = claimed
  before = tiny.contents(workdir)
  claim()
  assert tiny.contents(workdir) == before
  assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
  ("changes", "difference"),
  [
    ({"model": "repvgg_b0"}, "name repvgg_a0 -> repvgg_b0"),
    ({"image_size": 24, "resize_size": 24}, "preprocessing.image_size 16 -> 24"),
    ({"model_overrides": {"act": "silu"}}, "overrides.act None -> silu"),
    ({"model_overrides": {"stage_sizes": (1, 2, 1, 1)}}, "overrides.stage_sizes.1 1 -> 2"),
  ],
  ids=str,
)
def test_a_workdir_of_another_model_is_refused_and_left_alone(claimed, changes, difference):
  workdir, claim = claimed
  before = tiny.contents(workdir)
  with pytest.raises(InputError, match="different model") as caught:
    claim(**changes)
  assert difference in str(caught.value)
  assert "Nothing was changed" in str(caught.value)
  assert tiny.contents(workdir) == before


def test_other_changes_are_printed_and_kept(claimed, capsys):
  workdir, claim = claimed
  claim(learning_rate=0.25, num_steps=20)
  expected = "config changed since this run began: learning_rate 0.4 -> 0.25, num_steps 12 -> 20\n"
  assert capsys.readouterr().out == expected
  assert planning.read_config(workdir).num_steps == 20


def test_checkpoints_without_a_model_json_are_not_taken_for_this_models(claimed):
  workdir, claim = claimed
  (workdir / "checkpoints" / "4").mkdir(parents=True)
  (workdir / "model.json").unlink()
  before = tiny.contents(workdir)
  with pytest.raises(InputError, match=r"no model\.json"):
    claim()
  assert tiny.contents(workdir) == before


def with_checkpoint(workdir):
  (workdir / "checkpoints" / "4").mkdir(parents=True)
  return workdir


def changed(part, **facts):
  return {**DATA, part: {**DATA[part], **facts}}


@pytest.mark.parametrize(
  ("data", "difference"),
  [
    (changed("train", images=130), "train.images 120 -> 130"),
    (changed("eval", name="fruit"), "data: eval.name flowers -> fruit"),
    (
      changed("train", classes={"count": 4, "names": "77e0"}),
      "train.classes.count 3 -> 4, train.classes.names 5a1f -> 77e0",
    ),
  ],
  ids=["images", "name", "classes"],
)
def test_a_run_does_not_continue_on_other_images(claimed, data, difference):
  workdir, _ = claimed
  continuing.check_data(workdir, data)  # there is no checkpoint yet that would be continued
  before = tiny.contents(with_checkpoint(workdir))
  continuing.check_data(workdir, DATA)
  with pytest.raises(InputError) as caught:
    continuing.check_data(workdir, data)
  assert str(workdir) in str(caught.value)
  assert difference in str(caught.value)
  assert f"--config.init_from={workdir}" in str(caught.value)
  assert tiny.contents(workdir) == before


def test_an_older_workdir_and_facts_that_one_side_lacks_are_accepted(claimed):
  workdir = with_checkpoint(claimed[0])
  continuing.check_data(workdir, changed("train", checksum="c0ffee"))
  continuing.check_data(workdir, {**DATA, "eval": {}})
  (workdir / "data.json").unlink()
  continuing.check_data(workdir, changed("train", images=130))


@pytest.mark.parametrize("damaged", ["[]", '{"train": 3}', '{"train": '])
def test_a_damaged_data_json_is_named(claimed, damaged):
  workdir = with_checkpoint(claimed[0])
  (workdir / "data.json").write_text(damaged)
  with pytest.raises(InputError, match=r"data\.json is damaged"):
    continuing.check_data(workdir, DATA)


@pytest.mark.parametrize(
  ("changes", "difference"),
  [
    ({"learning_rate": 0.25, "seed": 1}, "learning_rate 0.4 -> 0.25, seed 0 -> 1"),
    ({"num_steps": 20}, "num_steps 12 -> 20"),
    ({"num_epochs": 4.0}, "num_epochs 20.0 -> 4.0"),
    ({"batch_size": 64}, "batch_size 32 -> 64"),
    ({"backbone_rate": 0.0}, "backbone_rate 1.0 -> 0.0"),
    ({"std": (0.3, 0.3, 0.35)}, "std.0 0.35 -> 0.3, std.1 0.35 -> 0.3"),
  ],
  ids=str,
)
def test_a_run_does_not_continue_in_another_way_than_it_began(
  claimed, digits_dir, changes, difference
):
  workdir, _ = claimed
  config = tiny.config(digits_dir, **changes)
  continuing.check_continuing(workdir, config)  # no step was taken
  before = tiny.contents(with_checkpoint(workdir))
  with pytest.raises(InputError) as caught:
    continuing.check_continuing(workdir, config)
  assert f"config: {difference}. " in str(caught.value)
  assert f"--config.init_from={workdir} " in str(caught.value)
  assert "--resume=never" in str(caught.value)
  assert "may change: data_dir, eval_every_epochs, init_from," in str(caught.value)
  assert tiny.contents(workdir) == before


def test_fields_that_no_parameter_depends_on_may_change(claimed, digits_dir):
  workdir = with_checkpoint(claimed[0])
  changes = {
    "data_dir": "elsewhere",
    "eval_every_epochs": 3.0,
    "init_from": "folder",
    "log_every_steps": 1,
    "num_workers": 1,
    "recalibrate_batches": 1,
    "save_every_minutes": 0.5,
    "scales": "elsewhere",
    "tolerance": 1e-3,
  }
  assert changes.keys() | {"tensorboard"} == FREE
  config = tiny.config(digits_dir)
  with config.ignore_type():
    config.update(changes)
  continuing.check_continuing(workdir, config)


def without(workdir, *fields):
  """Makes config.json of a workdir one of a run that is older than some fields."""
  held = json.loads((workdir / "config.json").read_text())
  for field in fields:
    del held[field]
  (workdir / "config.json").write_text(json.dumps(held))


@pytest.mark.parametrize(
  ("field", "value", "difference"),
  [
    ("backbone_rate", 0.0, r"backbone_rate 1\.0 -> 0\.0"),
    ("cooldown_epochs", 1.0, r"cooldown_epochs 0\.0 -> 1\.0"),
    ("ema_decay", 0.5, r"ema_decay 0\.0 -> 0\.5"),
    ("qat", True, "qat False -> True"),
    ("running_variance", "unbiased", "running_variance biased -> unbiased"),
  ],
)
def test_a_run_older_than_a_field_continues_as_it_did(
  claimed, digits_dir, field, value, difference
):
  workdir = with_checkpoint(claimed[0])
  without(workdir, *BEFORE)
  config = continuing.keep_variance(tiny.config(digits_dir), workdir)
  assert config.running_variance == "biased"
  continuing.check_continuing(workdir, config)
  with pytest.raises(InputError, match=difference):
    continuing.check_continuing(workdir, tiny.config(digits_dir, **{field: value}))


@pytest.mark.parametrize("kind", ["biased", "unbiased"])
def test_a_run_keeps_its_kind_of_running_variance(claimed, digits_dir, kind):
  workdir, claim = claimed
  claim(running_variance=kind)
  config = continuing.keep_variance(tiny.config(digits_dir), with_checkpoint(workdir))
  assert config.running_variance == kind
  continuing.check_continuing(workdir, config)


def test_a_field_of_which_nothing_is_known_stops_no_older_run(claimed, digits_dir):
  workdir = with_checkpoint(claimed[0])
  fields = {field.name for field in FIELDS} - BEFORE.keys()
  without(workdir, *fields)
  continuing.check_continuing(workdir, tiny.config(digits_dir, mixup=0.5, seed=3))


def test_resume_says_whether_there_may_or_must_be_a_run(claimed, tmp_path):
  workdir, empty = claimed[0], tmp_path / "empty"
  for resume, folder in (("auto", workdir), ("auto", empty), ("never", empty)):
    continuing.check_resume(folder, resume)
  with pytest.raises(InputError, match=r"already holds config\.json, model\.json"):
    continuing.check_resume(workdir, "never")
  for folder in (empty, workdir):
    with pytest.raises(InputError, match=f"{folder} holds no checkpoint to continue from"):
      continuing.check_resume(folder, "must")
  continuing.check_resume(with_checkpoint(workdir), "must")
  with pytest.raises(InputError, match="unknown value of resume 'maybe'"):
    continuing.check_resume(workdir, "maybe")


def test_imported_weights_are_started_from_not_trained_on(claimed):
  workdir, claim = claimed
  (workdir / "import.json").touch()
  with pytest.raises(InputError, match=f"--config.init_from={workdir} to start from them"):
    claim()


RECORD = '{"step": 3, "loss": 1.0}\n'


def lost_checkpoint(workdir):
  shutil.rmtree(workdir / "checkpoints" / str(tiny.STEPS))


def lost_folder_of_an_older_run(workdir):
  shutil.rmtree(workdir / "checkpoints")
  (workdir / "newest.json").unlink()


def emptied_folder_of_an_older_run(workdir):
  lost_folder_of_an_older_run(workdir)
  (workdir / "checkpoints").mkdir()


def dangling_link(workdir):
  shutil.rmtree(workdir / "checkpoints")
  (workdir / "checkpoints").symlink_to("/no/such/disk")


@pytest.mark.parametrize(
  ("lose", "said"),
  [
    (lambda workdir: shutil.rmtree(workdir / "checkpoints"), "step 12, is not in"),
    (lost_checkpoint, "step 12, is not in"),
    (lost_folder_of_an_older_run, "does not exist, though metrics.jsonl has records"),
    (emptied_folder_of_an_older_run, "holds no checkpoint, though deploy was made from one"),
    (dangling_link, "checkpoints is a link to /no/such/disk, which does not exist"),
  ],
)
@pytest.mark.parametrize("resume", ["auto", "must"])
def test_a_run_whose_newest_checkpoint_is_gone_is_refused_and_left_as_it_is(
  finished, digits_dir, tmp_path, lose, said, resume
):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  lose(workdir)
  before = tiny.contents(workdir)
  with pytest.raises(InputError, match=said if resume == "auto" else "."):
    training.train(tiny.config(digits_dir), workdir, resume=resume)
  assert tiny.contents(workdir) == before


@pytest.mark.parametrize("older", [False, True], ids=["begins again", "continues"])
def test_what_is_to_be_moved_away_is_named_and_is_enough(finished, tmp_path, older):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  (workdir / "checkpoints" / str(tiny.STEPS)).rename(workdir / "checkpoints" / "4")
  if not older:
    shutil.rmtree(workdir / "checkpoints")
  with pytest.raises(InputError, match=r"on purpose, move .* away first") as caught:
    continuing.check_resume(workdir, "auto")
  (names,) = re.findall("on purpose, move (.*) away first", str(caught.value))
  assert names == ("newest.json" if older else "newest.json, metrics.jsonl, deploy")
  for name in names.split(", "):
    (workdir / name).rename(tmp_path / name)
  continuing.check_resume(workdir, "auto")


@pytest.mark.parametrize("records", ["", RECORD])
def test_a_run_that_was_killed_before_its_first_checkpoint_begins_again(tmp_path, records):
  (tmp_path / "config.json").write_text("{}")
  (tmp_path / "metrics.jsonl").write_text(records)
  (tmp_path / "checkpoints").mkdir()
  continuing.check_resume(tmp_path, "auto")


def test_a_run_that_was_killed_before_its_first_record_begins_again(tmp_path):
  (tmp_path / "config.json").write_text("{}")
  continuing.check_resume(tmp_path, "auto")


@pytest.mark.parametrize("linked", spread(["checkpoints", "deploy", "."], ["."]))
def test_a_run_whose_folders_are_links_continues(finished, digits_dir, tmp_path, linked):
  workdir, elsewhere = shutil.copytree(finished[0], tmp_path / "run"), tmp_path / "disk"
  shutil.move(workdir / linked if linked != "." else workdir, elsewhere)
  (workdir / linked if linked != "." else workdir).symlink_to(elsewhere)
  (tmp_path / "disk" / "notes").write_text("theirs")
  assert training.train(tiny.config(digits_dir), workdir) == finished[1]
  assert (workdir / linked if linked != "." else workdir).is_symlink()
  assert (tmp_path / "disk" / "notes").read_text() == "theirs"
  assert {path.name for path in tmp_path.iterdir()} == {"run", "disk"}


def test_a_run_that_continues_removes_a_checkpoint_that_a_kill_left_too_many(
  finished, digits_dir, tmp_path
):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  before = runs.checkpoints(workdir)
  shutil.copytree(workdir / "checkpoints" / "12", workdir / "checkpoints" / "3")
  disk.write_json(runs.score_file(workdir, 3), {"accuracy": -1.0})
  disk.update_manifest(workdir / "checkpoints" / "3", runs.score_file(workdir, 3))
  training.train(tiny.config(digits_dir), workdir)
  assert runs.checkpoints(workdir) == before
