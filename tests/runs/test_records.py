"""Files of records, one JSON object a line."""

import json

import pytest

from repjax.runs import RecordsFile


def write(path, first_step, *steps):
  records = RecordsFile(path, first_step)
  for step in steps:
    records.write(step=step, loss=step / 2)
  records.close()


def steps_in(path):
  return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_record_is_a_line_of_json(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 1, 2)
  assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2, "loss": 1.0}\n'


def test_a_record_is_on_disk_as_soon_as_it_is_written(tmp_path):
  records = RecordsFile(tmp_path / "metrics.jsonl", 0)
  records.write(step=1)
  assert steps_in(tmp_path / "metrics.jsonl") == [1]
  records.close()


def test_records_after_the_step_at_which_a_run_continues_are_dropped(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 2, 4, 4, 5, 8)
  write(path, 4, 6)
  assert steps_in(path) == [2, 4, 4, 6]


def test_a_run_that_begins_again_drops_everything(tmp_path):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 2, 4)
  write(path, 0)
  assert path.read_text() == ""


@pytest.mark.parametrize("cut", ['{"step": 4, "lo', '{"step"', "4", "{}", "\x00\x00"])
def test_a_line_that_a_crash_cut_short_is_dropped(tmp_path, cut):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 2, 4)
  path.write_text(path.read_text() + cut)
  write(path, 4, 6)
  assert steps_in(path) == [2, 4, 6]


def test_as_many_records_of_a_step_are_kept_as_the_bookmark_counts(tmp_path, capsys):
  path = tmp_path / "metrics.jsonl"
  write(path, 0, 2, 4, 4)
  records = RecordsFile(path, 4, 2)
  assert records.count == 2
  records.write(step=4)
  assert records.count == 3
  records.close()
  assert steps_in(path) == [2, 4, 4]
  assert capsys.readouterr().out == ""
  RecordsFile(path, 4, 5).close()
  assert f"{path} lacks 2 records" in capsys.readouterr().out


def test_no_other_file_is_left(tmp_path):
  write(tmp_path / "metrics.jsonl", 0, 1)
  write(tmp_path / "metrics.jsonl", 1, 2)
  assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
