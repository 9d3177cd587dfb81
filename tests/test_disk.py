"""JSON files and trees on disk: whole or not at all, and clear errors for what is damaged."""

import errno
import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax import disk
from repjax.errors import InputError

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def test_json_comes_back(tmp_path):
  value = {"a": [1, 2.5, None, True], "b": {"c": "text"}}
  disk.write_json(tmp_path / "new" / "folder" / "file.json", value)
  assert disk.read_json(tmp_path / "new" / "folder" / "file.json") == value


def test_json_is_written_for_people_too(tmp_path):
  disk.write_json(tmp_path / "file.json", {"a": 1})
  assert (tmp_path / "file.json").read_text() == '{\n  "a": 1\n}\n'


@pytest.mark.parametrize("value", [{"a": 2}, {"a": object()}], ids=["a crash", "no JSON"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, value):
  path = tmp_path / "file.json"
  disk.write_json(path, {"a": 1})

  def crash(self, data):
    with self.open("w") as file:
      file.write(data[: len(data) // 2])
    raise OSError("the disk is full")

  monkeypatch.setattr(type(path), "write_text", crash)
  with pytest.raises((InputError, TypeError)):
    disk.write_json(path, value)
  assert json.loads(path.read_text()) == {"a": 1}


def test_writing_leaves_no_other_file(tmp_path):
  disk.write_json(tmp_path / "file.json", 1)
  disk.write_json(tmp_path / "file.json", 2)
  assert [path.name for path in tmp_path.iterdir()] == ["file.json"]


@pytest.mark.parametrize("damaged", [b'{"a": 1', b"", b"\xff\xfe\x00"])
def test_damaged_json_is_named(tmp_path, damaged):
  path = tmp_path / "file.json"
  path.write_bytes(damaged)
  with pytest.raises(InputError, match="is damaged") as caught:
    disk.read_json(path)
  assert str(path) in str(caught.value)
  assert path.read_bytes() == damaged


def test_missing_json_asks_about_the_folder(tmp_path):
  with pytest.raises(InputError, match=f"does not exist; is {tmp_path} the right folder"):
    disk.read_json(tmp_path / "file.json")
  with pytest.raises(InputError, match=f"the folder {tmp_path}/runs does not exist"):
    disk.read_json(tmp_path / "runs" / "file.json")


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
  (tmp_path / "runs").touch()
  with pytest.raises(InputError, match=f"{tmp_path}/runs cannot be a folder"):
    disk.write_json(tmp_path / "runs" / "file.json", {})


TREE = {
  "a": jnp.arange(6.0).reshape(2, 3),
  "b": {"c": jnp.asarray(3), "d": jnp.ones(2, "bfloat16")},
}


def test_a_tree_comes_back_exactly(tmp_path):
  disk.write_tree(tmp_path / "tree", TREE)
  read = disk.read_tree(tmp_path / "tree", TREE)
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
  disk.write_tree(tmp_path / "tree", TREE)
  with pytest.raises(InputError, match="tree cannot be read: "):
    disk.read_tree(tmp_path / "tree", like)


PLAIN = {"a": jnp.arange(6.0).reshape(2, 3), "b": {"c": jnp.asarray(3), "d": jnp.ones(2, "uint8")}}


def test_a_plain_tree_is_read_without_orbax(tmp_path, monkeypatch):
  disk.write_tree(tmp_path / "tree", PLAIN)
  monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PLAIN)
  read = disk.read_tree(tmp_path / "tree", like)
  assert jax.tree.structure(read) == jax.tree.structure(PLAIN)
  for value, expected in zip(jax.tree.leaves(read), jax.tree.leaves(PLAIN)):
    assert (value.dtype, value.devices()) == (expected.dtype, {jax.local_devices()[0]})
    np.testing.assert_array_equal(value, expected)


@pytest.mark.usefixtures("no_leftovers")
@pytest.mark.parametrize("part", ["a/0.0", "a/.zarray", "b.d/0"])
@pytest.mark.parametrize("kept", [0, 3])
def test_a_plain_tree_that_is_damaged_is_left_to_orbax_which_refuses_it(tmp_path, part, kept):
  disk.write_tree(tmp_path / "tree", PLAIN)
  file = tmp_path / "tree" / part
  file.write_bytes((file.read_bytes() * 2)[:kept])
  with pytest.raises(InputError, match="tree cannot be read: "):
    disk.read_tree(tmp_path / "tree", PLAIN)


def test_a_tree_in_another_order_is_left_to_orbax(tmp_path):
  disk.write_tree(tmp_path / "tree", PLAIN)
  file = tmp_path / "tree" / "a" / ".zarray"
  file.write_text(file.read_text().replace('"order":"C"', '"order":"F"'))
  read = disk.read_tree(tmp_path / "tree", PLAIN)
  np.testing.assert_array_equal(read["a"], np.arange(6.0).reshape(3, 2).T)


def test_a_missing_tree_asks_about_the_folder(tmp_path):
  with pytest.raises(InputError, match=f"does not exist; is {tmp_path} the right folder?"):
    disk.read_tree(tmp_path / "tree", TREE)


def folder_with(path, text):
  path.mkdir()
  (path / "file").write_text(text)
  return path


@pytest.mark.parametrize("exists", [False, True])
def test_a_finished_folder_takes_the_place_of_another(tmp_path, exists):
  draft, path = folder_with(tmp_path / "draft", "new"), tmp_path / "folder"
  if exists:
    folder_with(path, "old")
    (path / "more").touch()
  disk.replace_folder(draft, path)
  assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]
  assert [entry.name for entry in path.iterdir()] == ["file"]
  assert (path / "file").read_text() == "new"


def test_a_replacement_killed_half_way_leaves_the_old_folder_to_be_found(tmp_path, monkeypatch):
  draft, path = folder_with(tmp_path / "draft", "new"), folder_with(tmp_path / "folder", "old")
  replace = type(path).replace

  def killed_before_the_second(self, target):
    if self == draft:
      raise KeyboardInterrupt
    return replace(self, target)

  with monkeypatch.context() as patch:
    patch.setattr(type(path), "replace", killed_before_the_second)
    with pytest.raises(KeyboardInterrupt):
      disk.replace_folder(draft, path)
  assert (disk.current_folder(path) / "file").read_text() == "old"
  disk.replace_folder(draft, path)
  assert (disk.current_folder(path) / "file").read_text() == "new"
  assert [entry.name for entry in tmp_path.iterdir()] == ["folder"]


def test_what_cannot_be_written_is_named_with_the_reason(tmp_path):
  with pytest.raises(InputError) as caught, disk.writing(tmp_path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  assert f"{tmp_path} could not be written: No space left on device. What" in str(caught.value)
  with pytest.raises(InputError, match="as it is"), disk.writing(tmp_path):
    raise InputError("as it is")


def test_a_file_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
  (tmp_path / "draft" / "below").mkdir(parents=True)
  (tmp_path / "draft" / "below" / "file").write_text("x")
  fsync, synced = os.fsync, []

  def note(descriptor):
    synced.append((os.readlink(f"/proc/self/fd/{descriptor}"), (tmp_path / "name").exists()))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", note)
  disk.put(tmp_path / "draft", tmp_path / "name")
  draft = tmp_path / "draft"
  assert set(synced[:-1]) == {
    (str(p), False) for p in (draft, draft / "below", draft / "below/file")
  }
  assert synced[-1] == (str(tmp_path), True)
