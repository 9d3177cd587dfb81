"""Tests of scripts/example_folder.py."""

import collections
import io
import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from repjax.data import open_source
from tests.cli.helpers import stop_of
from tests.data.test_folder import files_below
from tests.training.tiny import ROOT

pytest_plugins = ["tests.training.fixtures"]


def test_photographs_are_cropped_apart(run_script, tmp_path):
  options = ("--train-per-class", "5", "--classes", "brick", "cat", "page")
  folders = [tmp_path / name for name in ("one", "again", "other")]
  for folder, seed in zip(folders, (0, 0, 1)):
    run_script("scripts/example_folder.py", "photographs", "--to", folder, *options, "--seed", seed)
  one, again, other = map(files_below, folders)
  assert one == again
  assert one.keys() == other.keys()
  assert not set(one.values()) & set(other.values())
  counts = collections.Counter(str(Path(name).parent) for name in one)
  assert counts == {
    f"{split}/{name}": count
    for split, count in (("train", 5), ("val", 1))
    for name in ("brick", "cat", "page")
  }
  for name in one:
    with Image.open(folders[0] / name) as image:
      assert (image.format, image.mode, min(image.size)) == ("JPEG", "RGB", 160)


@pytest.mark.parametrize("size", [(300, 200), (200, 300), (150, 150)])
def test_parts_of_a_photograph_do_not_overlap(size):
  halves = runpy.run_path(str(ROOT / "scripts" / "example_folder.py"))["halves"]
  places = np.arange(size[0] * size[1], dtype=np.int32).reshape(size[::-1])
  train, validation = (set(np.asarray(part).ravel()) for part in halves(Image.fromarray(places)))
  assert not train & validation
  assert train | validation == set(places.ravel())
  assert len(validation) == pytest.approx(0.3 * places.size)


def test_every_photograph_is_inside_scikit_image(run_script, tmp_path):
  printed = run_script(
    "scripts/example_folder.py", "photographs", "--to", tmp_path, "--train-per-class", "1"
  )
  count = len(list((tmp_path / "train").iterdir()))
  assert count >= 10
  assert printed == f"{tmp_path}\ntrain: {count} images of {count} classes\n" + (
    f"val: {count} images of {count} classes\n"
  )


def test_digits_have_the_projects_own_test_images(run_script, run_command, tmp_path, monkeypatch):
  monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest keeps its handlers
  options = ("--classes", "1", "0", "3", "--train-per-class", "7")
  run_script("scripts/example_folder.py", "digits", "--to", tmp_path / "few", *options)
  run_command(
    "prepare-dataset", "--from-folder", tmp_path / "few", "--name", "few", "--data-dir", tmp_path
  )
  known = load_digits()
  pixels = np.rint(known.images * 255 / 16).astype(np.uint8)
  split = np.arange(1797) % 5 == 0
  expected = {"train": [], "validation": []}
  for digit in (0, 1, 3):
    mine = known.target == digit
    expected["train"] += [(str(digit), each.tobytes()) for each in pixels[mine & ~split][:7]]
    expected["validation"] += [(str(digit), each.tobytes()) for each in pixels[mine & split]]
  for name, rows in expected.items():
    source = open_source("few", name, data_dir=str(tmp_path))
    found = [source.examples[index] for index in range(len(source.examples))]
    assert sorted(rows) == sorted(
      (source.class_names[row["label"]], Image.open(io.BytesIO(row["image"])).tobytes())
      for row in found
    )


@pytest.mark.parametrize(
  ("arguments", "said"),
  [
    (("digits", "--classes", "10"), "unknown class of the digits '10'; did you mean"),
    (("photographs", "--classes", "dog"), "unknown class of the photographs 'dog'"),
    (("digits", "--train-per-class", "0"), "--train-per-class is at least 1; got 0"),
    (("scenes", "--classes", "1"), "scenes are a whole data set; leave out --classes"),
  ],
)
def test_example_folders_that_cannot_be(run_script, tmp_path, arguments, said):
  text = stop_of(run_script, "scripts/example_folder.py", *arguments, "--to", tmp_path / "new")
  assert text.startswith(f"error: {said}")
  assert not (tmp_path / "new").exists()


def test_only_an_empty_folder_is_filled(run_script, tmp_path):
  (tmp_path / "file").write_text("mine")
  for path in (tmp_path, tmp_path / "file"):
    text = stop_of(run_script, "scripts/example_folder.py", "digits", "--to", path)
    assert text == f"error: {path} is not an empty folder; give another path, or remove it first"
  assert files_below(tmp_path) == {"file": b"mine"}


@pytest.mark.parametrize(
  ("kind", "name"), [("photographs", "scikit-image"), ("digits", "scikit-learn")]
)
def test_a_missing_package_is_named(run_script, tmp_path, monkeypatch, kind, name):
  monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
  text = stop_of(run_script, "scripts/example_folder.py", kind, "--to", tmp_path / "new")
  assert text.endswith(f"the package {name} must be installed: pip install 'repjax[{kind}]'")
  assert not (tmp_path / "new").exists()
