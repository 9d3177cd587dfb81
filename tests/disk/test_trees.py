"""Trees of arrays on disk: they come back exactly, and clear errors for what is damaged."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax import disk, saving, signals
from repjax.disk import trees
from repjax.errors import InputError

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

TREE = {
  "a": jnp.arange(6.0).reshape(2, 3),
  "b": {"c": jnp.asarray(3), "d": jnp.ones(2, "bfloat16")},
}


def test_a_tree_comes_back_exactly(tmp_path):
  trees.write_tree(tmp_path / "tree", TREE)
  read = trees.read_tree(tmp_path / "tree", TREE)
  for value, expected in ((read["a"], TREE["a"]), *((read["b"][k], TREE["b"][k]) for k in "cd")):
    assert value.dtype == expected.dtype
    np.testing.assert_array_equal(value, expected)


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize(
  "like",
  [{**TREE, "a": jnp.zeros((3, 3))}, {**TREE, "e": jnp.zeros(2)}, {"a": TREE["a"]}],
  ids=["shape", "missing", "unexpected"],
)
def test_a_tree_of_another_model_is_refused(tmp_path, like):
  trees.write_tree(tmp_path / "tree", TREE)
  with pytest.raises(InputError, match="tree cannot be read: "):
    trees.read_tree(tmp_path / "tree", like)


PLAIN = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.asarray(3), "d": jnp.ones(2, "uint8")}}


def test_a_plain_tree_is_read_without_orbax(tmp_path, monkeypatch):
  trees.write_tree(tmp_path / "tree", PLAIN)
  monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PLAIN)
  read = trees.read_tree(tmp_path / "tree", like)
  assert jax.tree.structure(read) == jax.tree.structure(PLAIN)
  for value, expected in zip(jax.tree.leaves(read), jax.tree.leaves(PLAIN)):
    assert (value.dtype, value.devices()) == (expected.dtype, {jax.local_devices()[0]})
    np.testing.assert_array_equal(value, expected)


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("part", ["a/0.0", "a/.zarray", "b.d/0"])
@pytest.mark.parametrize("kept", [0, 3])
def test_a_plain_tree_that_is_damaged_is_left_to_orbax_which_refuses_it(tmp_path, part, kept):
  trees.write_tree(tmp_path / "tree", PLAIN)
  file = tmp_path / "tree" / part
  file.write_bytes((file.read_bytes() * 2)[:kept])
  with pytest.raises(InputError, match="tree cannot be read: "):
    trees.read_tree(tmp_path / "tree", PLAIN)


def test_a_tree_in_another_order_is_left_to_orbax(tmp_path):
  trees.write_tree(tmp_path / "tree", PLAIN)
  file = tmp_path / "tree" / "a" / ".zarray"
  file.write_text(file.read_text().replace('"order":"C"', '"order":"F"'))
  read = trees.read_tree(tmp_path / "tree", PLAIN)
  np.testing.assert_array_equal(read["a"], np.arange(6.0).reshape(3, 2).T)


def test_a_missing_tree_asks_about_the_folder(tmp_path):
  with pytest.raises(InputError, match=f"does not exist; is {tmp_path} the right folder?"):
    trees.read_tree(tmp_path / "tree", TREE)


def test_a_database_is_read_as_a_plain_tree_is(tmp_path):
  trees.write_tree(tmp_path / "tree", TREE, database=True)
  read = trees.read_tree(tmp_path / "tree", TREE)
  assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), read, TREE))


def test_numbers_that_are_not_finite_are_named_by_their_arrays(tmp_path):
  spoiled = {"a": jnp.asarray([1.0, jnp.nan]), "b": {"c": jnp.ones(2), "d": jnp.asarray(-jnp.inf)}}
  trees.write_tree(tmp_path / "tree", spoiled)
  with pytest.raises(InputError, match=r"tree holds numbers that are not finite .* in a, b/d"):
    trees.read_tree(tmp_path / "tree", spoiled, finite=True)
  assert trees.not_finite(trees.read_tree(tmp_path / "tree", spoiled)) == ["a", "b/d"]


def test_integers_are_not_taken_for_floats(tmp_path):
  trees.write_tree(tmp_path / "tree", PLAIN)
  file = tmp_path / "tree" / "a" / ".zarray"
  file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": "<i4"}))
  with pytest.raises(InputError, match="says that the numbers are <i4, and the model has float32"):
    trees.read_tree(tmp_path / "tree", PLAIN)


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("file", ["plain/a/0.0", "plain/b.d/.zarray", "database/_METADATA"])
def test_a_tree_is_compared_with_the_manifest_as_it_is_read(tmp_path, file):
  for name in ("plain", "database"):
    trees.write_tree(tmp_path / name, TREE, database=name == "database")
  disk.write_manifest(tmp_path)
  data = (tmp_path / file).read_bytes()
  (tmp_path / file).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
  with pytest.raises(InputError, match=f"{file} is damaged: its bytes are not those"):
    trees.read_tree(tmp_path / file.split("/")[0], TREE, disk.Snapshot(tmp_path))


@pytest.mark.parametrize("file", ["a/.zarray", "_METADATA", "_CHECKPOINT_METADATA"])
def test_json_that_is_nested_deep_does_not_end_the_process(tmp_path, file):
  # TensorStore parses by recursion, and would end the process by a segmentation fault.
  trees.write_tree(tmp_path / "tree", TREE)
  (tmp_path / "tree" / "a" / "0.0").unlink()  # so that Orbax would read the tree
  (tmp_path / "tree" / file).write_text("[" * 100_000 + "]" * 100_000)
  with pytest.raises(InputError, match=r"tree cannot be read: .*lists and tables are nested"):
    trees.read_tree(tmp_path / "tree", TREE)


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("method", ["restore", "save"])
def test_a_stop_is_no_damage_and_no_error_of_the_disk(tmp_path, monkeypatch, method):
  def stopped(*arguments, **options):
    try:
      raise signals.Preempted
    except BaseException as error:
      raise RuntimeError("Encountered error while reading array") from error  # as Orbax does

  trees.write_tree(tmp_path / "tree", TREE, database=True)
  monkeypatch.setattr(saving.orbax().Checkpointer, method, stopped)
  work = trees.read_tree if method == "restore" else trees.write_tree
  with pytest.raises(signals.Preempted):
    work(tmp_path / ("tree" if method == "restore" else "new"), TREE)
