"""Sets appear whole or not at all: names that are taken, kills, full disks, two processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from repjax import disk
from repjax.data import builders, open_source, storage
from repjax.data.folder import prepare_folder
from repjax.errors import InputError
from tests.data.folders import files_below, fingerprints, refusal, stored

ROOT = Path(__file__).parents[2]


def test_large_sets_have_several_shards(photos, tmp_path, monkeypatch):
  prepare_folder(photos, "pets", data_dir=tmp_path / "one")
  monkeypatch.setattr(storage, "SHARD_BYTES", 3000)
  made = prepare_folder(photos, "pets", data_dir=tmp_path / "many")
  shards = sorted(path.name for path in made.path.glob("pets-train*"))
  assert len(shards) > 2
  assert shards[1] == f"pets-train.array_record-00001-of-{len(shards):05}"
  assert fingerprints("pets", tmp_path / "many") == fingerprints("pets", tmp_path / "one")
  one, many = (stored("pets", "train", tmp_path / each) for each in ("one", "many"))
  assert list(one.items()) == list(many.items())


def test_a_name_that_is_taken_is_refused_without_replace(photos, tmp_path):
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  before = files_below(made.path)
  (photos / "train/cat/train0.jpg").unlink()
  text = refusal(photos, "pets", data_dir=tmp_path)
  assert f"a set called pets exists already, in {made.path}" in text
  assert "--replace" in text
  assert files_below(made.path) == before
  prepare_folder(photos, "pets", data_dir=tmp_path, replace=True)
  assert len(stored("pets", "train", tmp_path)) == 7
  assert {path.name for path in tmp_path.iterdir()} == {"photos", "pets"}


def test_the_old_set_stays_where_the_new_one_fails(photos, tmp_path):
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  before = files_below(made.path)
  (photos / "train/cat/train0.jpg").write_bytes(b"")
  refusal(photos, "pets", data_dir=tmp_path, replace=True, strict=True)
  assert files_below(made.path) == before
  assert {path.name for path in tmp_path.iterdir()} == {"photos", "pets"}


def test_the_old_set_stays_where_the_new_one_cannot_be_moved(photos, tmp_path, monkeypatch):
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  before = files_below(made.path)

  def fail(*_):
    raise OSError(5, "Input/output error")

  monkeypatch.setattr(disk.folders, "_renamed", fail)
  (photos / "train/cat/train0.jpg").unlink()
  text = refusal(photos, "pets", data_dir=tmp_path, replace=True)
  assert "1.0.0 could not be written: Input/output error" in text
  assert files_below(made.path) == before
  assert {path.name for path in tmp_path.rglob("*") if path.is_dir()} >= {"photos", "pets"}
  assert [path.name for path in (tmp_path / "pets").iterdir()] == ["1.0.0"]


def test_a_folder_that_is_no_set_is_not_replaced(photos, tmp_path):
  (tmp_path / "pets" / "1.0.0").mkdir(parents=True)
  (tmp_path / "pets" / "1.0.0" / "thesis").touch()
  text = refusal(photos, "pets", data_dir=tmp_path, replace=True)
  assert "holds files that repjax did not write" in text
  assert (tmp_path / "pets" / "1.0.0" / "thesis").exists()


def test_a_set_opens_beside_its_unfinished_successor(photos, tmp_path):
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  draft = made.path.parent / ".1.0.0.repjax-0123abcd" / "new"
  draft.mkdir(parents=True)
  (draft / "features.json").touch()
  assert builders.builder_of("pets", str(tmp_path)).version == "1.0.0"
  (made.path / "features.json").write_text("")  # the check itself is still there
  with pytest.raises(InputError, match=r"features\.json"):
    builders.builder_of("pets", str(tmp_path))


KILLED = """
import os, signal, sys
from repjax.data import folder
read, count = folder.read_image_file, 0
def deadly(*arguments):
  global count
  count += 1
  if count == 6:
    os.kill(os.getpid(), signal.SIGKILL)
  return read(*arguments)
folder.read_image_file = deadly
folder.prepare_folder(sys.argv[1], "pets", data_dir=sys.argv[2], num_workers=1)
"""


def test_a_kill_in_the_middle_leaves_nothing_that_opens(photos, tmp_path):
  ended = subprocess.run(
    [sys.executable, "-c", KILLED, photos, tmp_path],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": "."},
  )
  assert ended.returncode == -signal.SIGKILL
  (left,) = (tmp_path / "pets").iterdir()
  assert left.name.startswith(".1.0.0.repjax-")
  with pytest.raises(InputError, match="unknown data set 'pets'"):
    open_source("pets", "train", data_dir=str(tmp_path))
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {"photos", "pets"}
  assert [path.name for path in (tmp_path / "pets").iterdir()] == ["1.0.0"]
  fresh = prepare_folder(photos, "pets", data_dir=tmp_path / "fresh")
  assert files_below(made.path) == files_below(fresh.path)
  assert {path.name for path in made.path.iterdir()} == {path.name for path in fresh.path.iterdir()}


def test_two_processes_do_not_write_one_set(photos, tmp_path):
  with disk.replacing(tmp_path / "pets" / "1.0.0") as draft:
    (draft / "theirs").touch()
    text = refusal(photos, "pets", data_dir=tmp_path)
    assert f"another process is writing {tmp_path}/pets/1.0.0 right now" in text
    assert (draft / "theirs").exists()
  prepare_folder(photos, "pets", data_dir=tmp_path / "sets")


def test_a_full_disk_is_one_paragraph_and_leaves_nothing(photos, tmp_path, monkeypatch):
  class Full:
    def __init__(self, *arguments):
      pass

    def write(self, record):
      raise RuntimeError("write() failed: No space left on device; writing x; at byte 7")

  monkeypatch.setattr(storage.array_record_module, "ArrayRecordWriter", Full)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert "1.0.0 could not be written: No space left on device" in text
  assert not (tmp_path / "sets").exists()


def test_a_data_dir_that_cannot_be_made_is_one_paragraph(photos, tmp_path):
  (tmp_path / "file").write_text("")
  text = refusal(photos, "pets", data_dir=tmp_path / "file")
  assert f"{tmp_path}/file cannot be a folder" in text


def test_a_data_dir_that_may_not_be_read_is_one_paragraph(photos, tmp_path, monkeypatch):
  exists = Path.exists

  def refuse(path):
    if "sets" in path.parts:
      raise PermissionError(13, "Permission denied", str(path))
    return exists(path)

  monkeypatch.setattr(Path, "exists", refuse)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert f"{tmp_path}/sets/pets/1.0.0 could not be written: Permission denied" in text
