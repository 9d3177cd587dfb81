"""Sweeping a workdir after processes that were killed."""

import itertools
import shutil

from repjax import runs


def test_what_writers_that_were_killed_left_is_swept_and_nothing_else(tmp_path):
  kept = [
    *("config.json", "notes.draft", "my.json.draft", "deploy/params", "recalibrated.old/file"),
    *("checkpoints/4/metrics/metrics", "checkpoints/notes", "damaged/4-x/file"),
  ]
  left = [
    *("config.json.17.draft", "metrics.draft", "deploy.draft/params", "recalibrated.draft/file"),
    *("deploy.old/params", "checkpoints/2.draft/variables/d"),
    *("checkpoints/8.orbax-checkpoint-tmp/variables/d", "checkpoints/4/metrics/metrics.9.draft"),
  ]
  for name in (*kept, *left):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  runs.sweep(tmp_path)
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert sorted(str(path.relative_to(tmp_path)) for path in files) == sorted(kept)
  folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
  assert folders == {"deploy", "recalibrated.old", "checkpoints", "damaged"}
  runs.sweep(tmp_path / "none")


def test_what_a_save_that_failed_still_writes_to_is_swept_when_it_has_ended(tmp_path, monkeypatch):
  folder = tmp_path / "checkpoints" / "8.orbax-checkpoint-tmp"
  folder.mkdir(parents=True)
  rmtree, late = shutil.rmtree, iter(["first", "second"])

  def beside_a_writer(path, **settings):
    for name in itertools.islice(late, 1):
      (folder / name).touch()
      return
    rmtree(path, **settings)

  monkeypatch.setattr(shutil, "rmtree", beside_a_writer)
  runs.sweep(tmp_path)
  assert list((tmp_path / "checkpoints").iterdir()) == []
