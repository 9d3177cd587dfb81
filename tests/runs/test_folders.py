"""Sweeping a workdir after processes that were killed."""

from repjax import runs


def test_what_writers_that_were_killed_left_is_swept_and_nothing_else(tmp_path):
  kept = [
    *("config.json", "notes.draft", "my.json.draft", "deploy/params", "deploy.old/file"),
    *("checkpoints/4/metrics/metrics", "checkpoints/notes", "damaged/4-x/file", "deploy.draft/x"),
    *("checkpoints/8.old/file", ".deploy.repjax-0123abcd/new/no owner"),
  ]
  left = [
    *(".config.json.repjax-0123abcd/owner.json", ".deploy.repjax-1123abcd/owner.json"),
    *(".deploy.repjax-1123abcd/new/params", "checkpoints/.8.repjax-0123abcd/owner.json"),
    *("checkpoints/8.orbax-checkpoint-tmp/variables/d", "checkpoints/8.orbax-checkpoint-tmp-5/d"),
    *("checkpoints/4/metrics/.metrics.repjax-0123abcd/owner.json",),
    *("checkpoints/4/.manifest.json.repjax-0123abcd/owner.json",),
  ]
  for name in (*kept, *left):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  runs.sweep(tmp_path)
  files = [path for path in tmp_path.rglob("*") if path.is_file()]
  assert sorted(str(path.relative_to(tmp_path)) for path in files) == sorted(kept)
  runs.sweep(tmp_path / "none")
