"""JSON files: whole or not at all, and clear errors for what is damaged."""

import errno
import json
import os

import pytest

import repjax
from repjax import cli, disk
from repjax.errors import InputError


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


def test_a_checkpoint_or_a_repository_in_place_of_a_folder_is_to_be_imported(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "a.pth").touch()
  with pytest.raises(InputError, match=r"a\.pth is a file.*import --from a\.pth --workdir"):
    repjax.load("a.pth")
  with pytest.raises(SystemExit, match=r"names published weights.*--from hf:timm/net --work"):
    cli.main(["convert", "--workdir", "hf:timm/net"])


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
  (tmp_path / "runs").touch()
  with pytest.raises(InputError, match=f"{tmp_path}/runs cannot be a folder"):
    disk.write_json(tmp_path / "runs" / "file.json", {})


def test_what_cannot_be_written_is_named_with_the_reason(tmp_path):
  with pytest.raises(InputError) as caught, disk.writing(tmp_path):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  assert f"{tmp_path} could not be written: No space left on device. What" in str(caught.value)
  with pytest.raises(InputError, match="as it is"), disk.writing(tmp_path):
    raise InputError("as it is")
