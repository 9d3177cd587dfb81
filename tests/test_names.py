"""Names of folders and files: what is refused, and what works."""

import os
from pathlib import Path

import numpy as np
import pytest

import repjax
from repjax import names, runs, weights
from repjax.deploy import Predictor, load_exported
from repjax.disk import trees
from repjax.errors import InputError
from repjax.report import write_report

REFUSED = {
  "levels": ("a/" * 300, "too deep"),
  "surrogate": ("a\ud800", "half a character"),
  "empty": ("", "empty"),
  "nul": ("a\0b", "NUL"),
  "bucket": ("gs://bucket/run", "URL"),
  "web": ("https://host/run", "Fetch the file"),
  "hub": ("https://huggingface.co/timm/net/tree/main", "named hf:timm/net"),
  "file": ("file:///tmp/run", "URL"),
  "part": ("a" * 256, "255 bytes"),
  "part in UTF-8": ("é" * 128, "255 bytes"),
  "path": ("/".join(["a" * 100] * 40), "3600"),
  "user": ("~nobody-of-this-name/run", "home folder"),
}
REFUSED_FOLDERS = {
  "backslash": ("a\\b", "backslash"),
  "above": ("a\\b/c", "backslash"),
  "star": ("a*b", "pattern"),
  "question": ("a?", "pattern"),
  "brackets": ("[a]/b", "pattern"),
  "newline": ("a\nb", "control character"),
  "escape": ("a\x1bb", "control character"),
  "bytes": (os.fsdecode(b"a\xff"), "UTF-8"),
  "scheme": ("gs:", "URL"),
}
WORKING = [
  *("a b", "a ", "a.", " a", "-a", "a$b$c", "a]", "a'b\"c", "a%20b", "a#b", "a|b", "a:b"),
  *("ä", "図", "..a", "a{b}", "!", "~", "~a", "a" * 200),
]


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_no_file_can_have_is_refused(name):
  text, words = REFUSED[name]
  for check in (names.file, names.folder):
    with pytest.raises(InputError) as caught:
      check(text)
    said = str(caught.value)
    assert words in said
    assert said.isprintable()
    assert len(said) < 400


@pytest.mark.parametrize("name", REFUSED_FOLDERS)
def test_a_folder_in_which_arrays_could_not_be_read_again_is_refused(name):
  text, words = REFUSED_FOLDERS[name]
  assert names.file(text) == Path(text)
  with pytest.raises(InputError) as caught:
    names.folder(text)
  assert words in str(caught.value)
  assert str(caught.value).isprintable()


def test_a_relative_name_below_such_a_folder_is_refused_too(tmp_path, monkeypatch):
  (tmp_path / "a\\b").mkdir()
  monkeypatch.chdir(tmp_path / "a\\b")
  with pytest.raises(InputError, match="backslash"):
    names.folder("run")


@pytest.mark.parametrize("name", WORKING)
def test_arrays_in_a_folder_of_any_other_name_are_read_again(tmp_path, name):
  folder = names.folder(tmp_path / name)
  assert folder == tmp_path / name
  tree = {"a": {"b": np.arange(3, dtype=np.float32)}}
  trees.write_tree(folder / "tree", tree)
  writer = runs.CheckpointWriter(folder)
  writer.save(1, {"variables": tree}, 0.5)
  writer.close()
  step, items = runs.read_checkpoint(folder, {"variables": tree})
  assert step == 1
  for found in (items["variables"], trees.read_tree(folder / "tree", tree)):
    np.testing.assert_array_equal(found["a"]["b"], tree["a"]["b"])


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  for check in (names.file, names.folder):
    assert check("~/run") == tmp_path / "run"
    assert check("~") == tmp_path
  assert names.folder("a/~") == Path("a/~")


def test_a_relative_name_stays_relative_unless_it_has_no_end(tmp_path, monkeypatch):
  (tmp_path / "a" / "b").mkdir(parents=True)
  monkeypatch.chdir(tmp_path / "a")
  assert names.folder("b") == Path("b")
  assert names.folder(".") == Path()
  assert names.folder("..") == tmp_path
  assert names.folder("b/..") == tmp_path / "a"


@pytest.mark.parametrize(
  "function",
  [repjax.load, load_exported, Predictor, write_report, weights.read],
  ids=lambda function: function.__name__,
)
@pytest.mark.parametrize("name", ["", "a\0b", "gs://bucket/run", "a" * 300])
def test_every_function_that_takes_a_folder_refuses_such_names(function, name):
  with pytest.raises(InputError, match=r"empty|NUL|URL|255 bytes"):
    function(name)
