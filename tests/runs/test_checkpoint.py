"""Checkpoints come back exactly, the newest and the best are kept, and damage is survived."""

import shutil

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
  for name in ("3", "20", "20.orbax-checkpoint-tmp-5", "notes"):
    (tmp_path / "checkpoints" / name / "metrics").mkdir(parents=True)
  (tmp_path / "checkpoints" / "3" / "metrics" / "metrics").write_text('{"accuracy": 0.5}')
  assert runs.checkpoints(tmp_path) == {3: 0.5, 20: -1.0}


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
  assert f"checkpoint of step 8 is damaged, trying the next one: {newest / item} " in printed
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
def test_where_all_are_damaged_nothing_is_moved_and_all_are_named(workdir):
  for step in ("4", "8"):
    truncate(largest_file(workdir / "checkpoints" / step / "training"))
  before = tiny.contents(workdir)
  with pytest.raises(InputError, match="holds no whole checkpoint") as caught:
    restore_newest(workdir, make_state(0))
  for step in ("4", "8"):
    assert str(workdir / "checkpoints" / step) in str(caught.value)
  assert tiny.contents(workdir) == before


@pytest.mark.parametrize("damage", [delete, truncate, garble])
def test_a_damaged_accuracy_neither_stops_a_run_nor_costs_its_checkpoint(workdir, damage):
  damage(workdir / "checkpoints" / "8" / "metrics" / "metrics")
  assert runs.checkpoints(workdir) == {4: 0.9, 8: -1.0}
  assert_same(restore_newest(workdir, make_state(0)), make_state(8))
  save(workdir, {10: 0.1})
  assert {4, 10} <= runs.checkpoints(workdir).keys()


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
  CheckpointWriter(tmp_path).set_accuracy(8, 0.5)
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
  monkeypatch.setattr(disk, "sync", lambda path: seen.append(("synced", path.name)))
  monkeypatch.setattr(disk, "remove_folder", lambda path: seen.append(("removed", path.name)))
  save(tmp_path, {2: 0.5, 4: 0.6})
  assert [entry for entry in seen if entry[1].isdigit()] == [
    *(("synced", "2"), ("synced", "4"), ("removed", "2")),
  ]
