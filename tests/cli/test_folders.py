"""Commands keep other people's files, and name places where nothing can be written."""

import errno
import os
import shutil

import pytest

from repjax import cli, disk
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]


@pytest.fixture
def read_only(monkeypatch):
  """A disk on which nothing can be made, as after a file system error."""

  def refuse(*arguments, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  def refused():
    for name in ("mkdir", "rename", "replace"):
      monkeypatch.setattr(os, name, refuse)

  return refused


def test_an_export_leaves_what_others_call_old_or_draft(run_command, small_folder, tmp_path):
  arguments = ("export", "--workdir", small_folder, "--to", tmp_path / "a0")
  run_command(*arguments)
  (tmp_path / "a0").rename(tmp_path / "a0.old")
  for name in ("a0.draft", ".a0.draft", ".a0.tmp", ".a0.repjax-0123abcd"):
    shutil.copytree(tmp_path / "a0.old", tmp_path / name)
  before = tiny.contents(tmp_path)
  run_command(*arguments)
  after = tiny.contents(tmp_path)
  assert {name: data for name, data in after.items() if not name.startswith("a0/")} == before
  assert (tmp_path / "a0" / "model.stablehlo").exists()


@pytest.mark.parametrize(
  "arguments",
  [
    ("export", "--to", "{}/out"),
    ("export-weights", "--to", "{}/out.safetensors"),
    ("report", "--output", "{}/out.png"),
    ("predict", "--csv", "{}/out.csv", "{}/image.png"),
    ("convert",),
    ("recalibrate", "--batches", "1"),
  ],
  ids=lambda arguments: arguments[0],
)
def test_a_read_only_disk_is_one_paragraph(finished, tmp_path, read_only, arguments):
  workdir = shutil.copytree(finished[0], tmp_path / "run")
  write_image(tmp_path / "image.png")
  before = tiny.contents(tmp_path)
  read_only()
  filled = [argument.format(tmp_path) for argument in arguments]
  with pytest.raises(SystemExit, match=r"^error: .*Read-only file system"):
    cli.main([filled[0], "--workdir", str(workdir), *filled[1:]])
  assert tiny.contents(tmp_path) == before


def write_image(path):
  from PIL import Image

  Image.new("RGB", (20, 20)).save(path)


def test_left_overs_of_a_killed_export_are_swept_by_the_next(run_command, small_folder, tmp_path):
  left = tmp_path / ".a0.repjax-0123abcd"
  (left / "new" / "params").mkdir(parents=True)
  (left / "owner.json").write_bytes(disk.new_holder(target="a0"))
  run_command("export", "--workdir", small_folder, "--to", tmp_path / "a0")
  assert [path.name for path in tmp_path.iterdir()] == ["a0"]
