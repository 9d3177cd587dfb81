"""Checkpoints come back exactly, the newest and the best are kept, and damage is survived."""

import json
import math
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax import disk, runs
from repjax.errors import InputError
from repjax.runs import CheckpointWriter, read_bookmark
from repjax.training import optimizer, parallel
from repjax.training.state import create_state, restore_newest, to_items
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def make_state(step):
  """Returns a state in which every number depends on the step."""
  rng = np.random.default_rng(step)

  def draw(*shape):
    return jnp.asarray(rng.standard_normal(shape), jnp.float32)

  variables = {
    "params": {"stem": {"kernel": draw(3, 3, 4, 8), "bias": draw(8)}},
    "batch_stats": {"stem": {"bn": {"mean": draw(8)}}},
  }
  sgd = optimizer.sgd(lambda count: 0.1, momentum=0.9, nesterov=False, weight_decay=0.1)
  state = create_state(variables, sgd)
  momentum = jax.tree.map(lambda x: draw(*x.shape) if x.ndim else x + step, state.opt_state)
  return state.replace(step=jnp.asarray(step, jnp.int32), opt_state=momentum)


def save(workdir, accuracies):
  writer = CheckpointWriter(workdir)
  for step, accuracy in accuracies.items():
    writer.save(step, to_items(parallel.place(make_state(step))), accuracy)
  writer.close()


def assert_same(state, other):
  assert jax.tree.structure(state) == jax.tree.structure(other)
  for value, expected in zip(jax.tree.leaves(state), jax.tree.leaves(other)):
    assert (value.shape, value.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(value, expected)


def delete(path):
  path.unlink()


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garble(path):
  path.write_bytes(np.random.default_rng(0).bytes(path.stat().st_size))


def worsen(path):
  path.write_text(path.read_text().replace("0.", "0.0"))


def largest_file(folder):
  """Returns the largest file below a folder, which holds numbers."""
  files = [path for path in folder.rglob("*") if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A run whose best checkpoint is of step 4 and whose newest is of step 8."""
  folder = tmp_path_factory.mktemp("saved")
  save(folder, {2: 0.5, 4: 0.9, 6: 0.7, 8: 0.3})
  return folder


@pytest.fixture
def workdir(saved, tmp_path):
  """A copy of `saved`, which a test may change."""
  return shutil.copytree(saved, tmp_path / "run")


def test_only_numbered_folders_are_checkpoints(tmp_path):
  for name in ("3", "20", "020", ".20.repjax-0123abcd", "20.orbax-checkpoint-tmp-5", "notes"):
    (tmp_path / "checkpoints" / name / "metrics").mkdir(parents=True)
  (tmp_path / "checkpoints" / "3" / "metrics" / "metrics").write_text('{"accuracy": 0.5}')
  assert runs.checkpoints(tmp_path) == {3: 0.5, 20: math.nan}


def test_a_workdir_without_checkpoints_has_none(tmp_path):
  assert runs.checkpoints(tmp_path) == {}


def test_the_newest_and_the_best_are_kept_and_no_others(workdir):
  assert runs.checkpoints(workdir) == {4: 0.9, 8: 0.3}
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8"}


def test_one_checkpoint_can_be_both(tmp_path):
  save(tmp_path, {2: 0.5, 4: 0.6, 6: 0.7})
  assert runs.checkpoints(tmp_path) == {6: 0.7}


def test_keeping_goes_on_when_a_run_continues(workdir):
  save(workdir, {10: 0.8, 12: 0.2})
  assert runs.checkpoints(workdir) == {4: 0.9, 12: 0.2}
  save(workdir, {14: 0.95})
  assert runs.checkpoints(workdir) == {14: 0.95}


def test_the_newest_comes_back_exactly(workdir):
  assert_same(restore_newest(workdir, make_state(0)), make_state(8))


def test_the_best_comes_back_exactly(workdir):
  step, items = runs.read_checkpoint(workdir, to_items(make_state(0)), best=True)
  assert step == 4
  assert_same(items, to_items(make_state(4)))


def test_of_equally_good_ones_the_newest_is_the_best(tmp_path):
  save(tmp_path, {2: 0.5, 4: 0.5})
  assert runs.read_checkpoint(tmp_path, to_items(make_state(0)), best=True)[0] == 4


def test_variables_can_be_read_alone(workdir):
  like = {"variables": to_items(make_state(0))["variables"]}
  _, items = runs.read_checkpoint(workdir, like, best=True)
  assert_same(items, {"variables": to_items(make_state(4))["variables"]})


def test_a_saved_state_may_be_donated_at_once(tmp_path):
  writer = CheckpointWriter(tmp_path)
  state = parallel.place(make_state(2))
  writer.save(2, to_items(state), 0.5)
  jax.tree.map(lambda x: x.delete(), state)
  writer.close()
  assert_same(restore_newest(tmp_path, make_state(0)), make_state(2))


def test_without_checkpoints_there_is_nothing_to_restore(tmp_path):
  assert restore_newest(tmp_path, make_state(0)) is None
  with pytest.raises(InputError, match="no whole checkpoint"):
    runs.read_checkpoint(tmp_path, to_items(make_state(0)))


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("item", ["variables", "training"])
@pytest.mark.parametrize("damage", [delete, truncate, garble])
def test_a_damaged_newest_gives_way_to_the_one_before(workdir, capsys, item, damage):
  newest = workdir / "checkpoints" / "8"
  damage(largest_file(newest / item))
  held = tiny.contents(newest)
  assert_same(restore_newest(workdir, make_state(0)), make_state(4))
  (moved,) = (workdir / "damaged").iterdir()
  assert tiny.contents(moved) == held
  assert runs.checkpoints(workdir) == {4: 0.9}
  printed = capsys.readouterr().out
  assert f"checkpoint of step 8 is damaged, taking that of step 4: {newest / item}" in printed
  assert f"the damaged checkpoint of step 8 is now in {moved}\n" in printed


@pytest.mark.usefixtures("no_leftovers")
def test_a_damaged_best_gives_way_to_the_newest_and_stays_where_it_is(workdir, capsys):
  delete(largest_file(workdir / "checkpoints" / "4" / "variables"))
  before = tiny.contents(workdir)
  step, items = runs.read_checkpoint(workdir, to_items(make_state(0)), best=True)
  assert step == 8
  assert_same(items, to_items(make_state(8)))
  assert "checkpoint of step 4 is damaged" in capsys.readouterr().out
  assert tiny.contents(workdir) == before


@pytest.mark.usefixtures("no_leftovers")
def test_two_damaged_ones_of_the_same_step_are_both_set_aside(workdir):
  for _ in range(2):
    delete(largest_file(workdir / "checkpoints" / "8" / "training"))
    restore_newest(workdir, make_state(0))
    save(workdir, {8: 0.3})
  assert len(list((workdir / "damaged").iterdir())) == 2


@pytest.mark.usefixtures("no_leftovers")
def test_where_all_are_damaged_nothing_is_moved_and_all_are_named(workdir, capsys):
  for step in ("4", "8"):
    truncate(largest_file(workdir / "checkpoints" / step / "training"))
  before = tiny.contents(workdir)
  with pytest.raises(InputError, match="holds no whole checkpoint") as caught:
    restore_newest(workdir, make_state(0))
  for step in ("4", "8"):
    assert str(caught.value).count(f"{workdir / 'checkpoints' / step}/") == 1
  assert not capsys.readouterr().out  # what is in the error is not printed too
  assert tiny.contents(workdir) == before


@pytest.mark.parametrize("step", [4, 8])
@pytest.mark.parametrize("damage", [delete, truncate, garble, worsen])
def test_a_checkpoint_of_unknown_accuracy_is_kept(workdir, damage, step, capsys):
  damage(runs.score_file(workdir, step))
  assert runs.checkpoints(workdir) == {4: 0.9, 8: 0.3} | {step: math.nan}
  assert_same(restore_newest(workdir, make_state(0)), make_state(8))
  save(workdir, {10: 0.1, 12: 0.0})
  assert {4, 12, step} == runs.checkpoints(workdir).keys() - ({8} - {step})
  assert f"score of the checkpoint of step {step} is unknown" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["eval_accuracy", "eval_ema_accuracy"])
@pytest.mark.parametrize("damage", [delete, truncate, garble, worsen])
def test_an_accuracy_that_cannot_be_read_is_taken_from_the_records(workdir, damage, name):
  damage(runs.score_file(workdir, 4))
  lines = [{"step": 3, "loss": 0.1}, {"step": 4, "eval_accuracy": 0.2} | {name: 0.9}]
  runs.metrics_file(workdir).write_text("".join(f"{json.dumps(line)}\n" for line in lines))
  assert runs.checkpoints(workdir) == {4: 0.9, 8: 0.3}
  save(workdir, {10: 0.1})
  assert runs.checkpoints(workdir) == {4: 0.9, 10: 0.1}
  runs.metrics_file(workdir).unlink()
  assert runs.checkpoints(workdir) == {4: 0.9, 10: 0.1}  # mended in the checkpoint itself
  disk.Snapshot(workdir / "checkpoints" / "4").check()


def test_a_folder_that_was_never_finished_is_not_a_checkpoint(workdir):
  finished = workdir / "checkpoints" / "8"
  finished.rename(workdir / "checkpoints" / "8.orbax-checkpoint-tmp-1")
  assert runs.checkpoints(workdir) == {4: 0.9}
  assert_same(restore_newest(workdir, make_state(0)), make_state(4))
  save(workdir, {8: 0.3})
  assert runs.checkpoints(workdir) == {4: 0.9, 8: 0.3}


@pytest.mark.parametrize("step", [1, 10])
def test_a_numbered_folder_that_lacks_files_does_not_stop_a_run(workdir, step):
  (workdir / "checkpoints" / str(step) / "variables").mkdir(parents=True)
  assert_same(restore_newest(workdir, make_state(0)), make_state(8))
  save(workdir, {10: 0.4})
  assert {4, 10} <= runs.checkpoints(workdir).keys()


@pytest.mark.usefixtures("no_leftovers")
def test_a_checkpoint_of_another_model_is_not_read(workdir):
  state = make_state(0)
  wider = state.replace(params={"stem": {"kernel": jnp.zeros((3, 3, 4, 9)), "bias": jnp.zeros(9)}})
  with pytest.raises(InputError, match="holds no whole checkpoint"):
    restore_newest(workdir, wider)


def test_a_state_that_is_not_finite_is_not_saved_without_an_evaluation(tmp_path):
  state = make_state(3)
  spoiled = state.replace(params=jax.tree.map(lambda x: x * jnp.nan, state.params))
  writer = CheckpointWriter(tmp_path)
  with pytest.raises(InputError, match="not finite after step 3, which was therefore not saved"):
    writer.save(3, to_items(spoiled), None)
  writer.close()
  assert runs.checkpoints(tmp_path) == {}


def test_one_without_an_evaluation_is_never_the_best_beside_one_with(tmp_path):
  save(tmp_path, {2: None, 4: 0.0, 6: None, 8: None})
  assert runs.checkpoints(tmp_path) == {4: 0.0, 8: -1.0}
  assert runs.read_checkpoint(tmp_path, to_items(make_state(0)), best=True)[0] == 4
  CheckpointWriter(tmp_path).set_score(8, 0.5)
  assert runs.checkpoints(tmp_path) == {8: 0.5}
  save(tmp_path, {10: None})
  assert runs.checkpoints(tmp_path) == {8: 0.5, 10: -1.0}


def test_a_bookmark_comes_back_exactly(tmp_path):
  rows = [{"loss": 1 / 3, "accuracy": 0.1}, {"loss": 1e-300, "accuracy": 1.0}]
  writer = CheckpointWriter(tmp_path)
  writer.save(4, to_items(make_state(4)), 0.5, records=9)
  writer.save(6, to_items(make_state(6)), None, records=11, pending=rows)
  writer.close()
  assert read_bookmark(tmp_path, 4) == (9, [], True, 4)
  assert read_bookmark(tmp_path, 6) == (11, rows, False, 4)


def test_a_checkpoint_without_a_bookmark_is_an_older_one(workdir):
  shutil.rmtree(workdir / "checkpoints" / "8" / "bookmark")
  assert read_bookmark(workdir, 8) == (None, [], True, None)


def test_a_checkpoint_is_on_the_disk_before_an_older_one_is_removed(tmp_path, monkeypatch):
  seen = []
  real_sync, real_remove = disk.folders.sync, disk.remove

  def note_sync(path):
    seen.append(("synced", sorted(each.name for each in (tmp_path / "checkpoints").iterdir())[-1]))
    real_sync(path)

  def note_remove(path, own):
    seen.append(("removed", path.name))
    real_remove(path, own)

  monkeypatch.setattr(disk.folders, "sync", note_sync)
  monkeypatch.setattr(disk, "remove", note_remove)
  save(tmp_path, {2: 0.5})
  del seen[:]
  save(tmp_path, {4: 0.6})
  assert seen[-1] == ("removed", "2")
  assert ("removed", "2") not in seen[:-1]
  assert len(seen) > 1


def test_every_file_of_a_checkpoint_has_a_checksum(workdir):
  for folder in (workdir / "checkpoints").iterdir():
    disk.Snapshot(folder).check()
    listed = json.loads((folder / "manifest.json").read_text())["files"]
    assert {*listed, "manifest.json"} == {*tiny.contents(folder)}


@pytest.mark.parametrize("item", ["variables", "training", "bookmark"])
def test_every_flipped_byte_of_the_newest_is_noticed_when_a_run_continues(workdir, item, capsys):
  files = [path for path in (workdir / "checkpoints/8" / item).rglob("*") if path.is_file()]
  assert files
  for path in files:
    copy = shutil.copytree(workdir, workdir.with_name("copy"))
    flip(copy / path.relative_to(workdir))
    assert_same(restore_newest(copy, make_state(0)), make_state(4))
    assert f"{copy / path.relative_to(workdir)} is damaged: its bytes" in capsys.readouterr().out
    assert runs.newest_finished(copy) == 4
    shutil.rmtree(copy)


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def test_the_newest_checkpoint_that_was_finished_is_recorded(tmp_path):
  assert runs.newest_finished(tmp_path) is None
  save(tmp_path, {2: 0.5, 4: 0.1})
  assert runs.newest_finished(tmp_path) == 4
  for text in ("{", '{"step": 1.5}'):
    runs.newest_file(tmp_path).write_text(text)
    with pytest.raises(InputError, match=r"newest\.json is damaged: .* remove it if"):
      runs.newest_finished(tmp_path)


def test_a_checkpoint_too_many_is_removed_and_of_a_link_the_link_alone(workdir):
  for step in ("5", "6"):
    shutil.copytree(workdir / "checkpoints" / "8", workdir / "checkpoints" / step)
  shutil.move(workdir / "checkpoints" / "6", workdir / "elsewhere")
  (workdir / "checkpoints" / "6").symlink_to("../elsewhere")
  before = tiny.contents(workdir / "elsewhere")
  runs.remove_superseded(workdir)
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8"}
  assert tiny.contents(workdir / "elsewhere") == before
  runs.remove_superseded(workdir / "none")


def test_other_people_may_keep_files_in_a_checkpoint(workdir):
  theirs = workdir / "checkpoints" / "4" / "notes.txt"
  theirs.write_text("theirs")
  save(workdir, {9: 0.9})
  assert theirs.read_text() == "theirs"
  assert [path.name for path in theirs.parent.iterdir()] == ["notes.txt"]
  assert set(runs.checkpoints(workdir)) == {9}
  save(workdir, {4: 0.95})
  assert theirs.read_text() == "theirs"
  assert set(runs.checkpoints(workdir)) == {4, 9}


def test_checkpoints_may_be_a_link_to_a_different_folder(workdir):
  shutil.move(workdir / "checkpoints", workdir.parent / "other")
  (workdir / "checkpoints").symlink_to(workdir.parent / "other")
  save(workdir, {10: 0.8, 12: 0.2})
  assert (workdir / "checkpoints").is_symlink()
  assert {path.name for path in (workdir.parent / "other").iterdir()} == {"4", "12"}
  assert_same(restore_newest(workdir, make_state(0)), make_state(12))
  flip(largest_file(workdir / "checkpoints" / "12" / "variables"))
  assert_same(restore_newest(workdir, make_state(0)), make_state(4))


def test_a_reader_beside_a_run_that_saves_finds_a_whole_checkpoint(tmp_path):
  like = {"variables": to_items(make_state(0))["variables"]}
  save(tmp_path, {1: 0.0})
  steps, seen = iter(range(2, 8)), set()
  writer = threading.Thread(target=lambda: save(tmp_path, {step: step / 10 for step in steps}))
  writer.start()
  while writer.is_alive():
    step, items = runs.read_checkpoint(tmp_path, like, best=True)
    assert_same(items["variables"], make_state(step).variables)
    seen.add(step)
  assert len(seen) > 1


def test_a_step_that_is_a_link_to_nothing_is_a_damaged_one(workdir):
  (workdir / "checkpoints" / "12").symlink_to("gone")
  assert_same(restore_newest(workdir, make_state(0)), make_state(8))
  assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "8"}
