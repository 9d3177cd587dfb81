"""Metadata of data sets are checked before TFDS imports or allocates what they name."""

import json
import os
import re
import shutil
import sys

import pytest
import tensorflow_datasets as tfds

from repjax.data import metadata, open_source
from repjax.errors import InputError

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture
def pets(digits_dir, tmp_path):
  """Makes a set called pets of the digits; returns the folder of its version."""
  folder = shutil.copytree(digits_dir / "digits" / "1.0.0", tmp_path / "sets" / "pets" / "1.0.0")
  for path in folder.glob("digits-*"):
    path.rename(folder / path.name.replace("digits", "pets"))
  edit(folder / "dataset_info.json", lambda info: info.update(name="pets"))
  return folder


def edit(path, change):
  content = json.loads(path.read_text())
  change(content)
  path.write_text(json.dumps(content))


def refusal(folder, name="pets", split="train"):
  with pytest.raises(InputError) as caught:
    open_source(name, split, data_dir=str(folder.parents[1]))
  assert "\x1b" not in str(caught.value)
  assert "\n" not in str(caught.value)
  return str(caught.value)


def test_a_copied_set_opens(pets):
  source = open_source("pets", "train", data_dir=str(pets.parents[1]))
  assert len(source.examples) == 1437
  assert len(open_source("pets:1.0.0", "test", data_dir=str(pets.parents[1])).examples) == 360


def evil(key):
  """Returns a change that puts a class outside of TFDS into features.json, in one of its forms."""
  name = "evil_features.Evil"

  def change(content):
    features = content["featuresDict"]["features"]
    features["more"] = {
      "plain": {"pythonClassName": name, "text": {}},
      "other case": {"python_class_name": name, "text": {}},
      "a string": {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps({"inner": {"type": name, "content": {}}})},
      },
      "a string in a string": {
        "pythonClassName": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
        "jsonFeature": {
          "json": json.dumps({"inner": {"type": "x", "content": json.dumps({"type": name})}})
        },
      },
    }[key]

  return change


@pytest.mark.parametrize("key", ["plain", "other case", "a string", "a string in a string"])
def test_no_code_of_a_data_folder_is_imported(pets, tmp_path, monkeypatch, key):
  for folder in (pets, pets.parent, pets.parents[1], tmp_path):
    (folder / "evil_features.py").write_text("raise SystemExit('code of a data set was run')")
    monkeypatch.syspath_prepend(str(folder))
  monkeypatch.chdir(pets)
  edit(pets / "features.json", evil(key))
  assert "is no feature of TFDS, and would be imported" in refusal(pets)
  assert "evil_features" not in sys.modules


def test_a_different_version_or_variant_may_not_name_code_either(pets):
  shutil.copytree(pets, pets.parent / "2.0.0")
  edit(pets.parent / "2.0.0" / "features.json", evil("plain"))
  assert "2.0.0/features.json cannot be used" in refusal(pets)


@pytest.mark.parametrize("name", ["../evil", "..", "a/b", "", 7])
def test_a_default_variant_stays_in_the_folder_of_its_set(pets, name):
  (pets.parent / ".config").mkdir()
  (pets.parent / ".config" / "metadata.json").write_text(json.dumps({"defaultConfigName": name}))
  if name == "":
    assert len(open_source("pets", "test", data_dir=str(pets.parents[1])).examples) == 360
  else:
    assert "is no name of a variant" in refusal(pets)


@pytest.mark.parametrize(
  "name",
  [
    "pets/..:1.0.0",
    "pets/.",
    "pets/a/b",
    "huggingface:pets",
    "pets/data_dir=x",
    "../pets",
    "",
    "a\n",
  ],
)
def test_a_name_is_a_name(pets, name):
  with pytest.raises(InputError, match=r"no name of a data set|unknown data set"):
    open_source(name, "train", data_dir=str(pets.parents[1]))


@pytest.mark.parametrize(
  ("key", "value", "said"),
  [
    ("shardLengths", ["-4", "5"], "shardLengths of train is "),
    ("shardLengths", [-4], "-4, and must be a whole number"),
    ("shardLengths", [1e9], "1000000000.0, and must be"),
    ("shardLengths", [float("nan")], "NaN"),
    ("shardLengths", [float("inf")], "Infinity"),
    ("shardLengths", [True], "true"),
    ("shardLengths", ["1" * 400], "must be a whole number"),
    ("shardLengths", ["1000000000"], "has .* bytes, and the metadata .* 1,000,000,000 images"),
    ("shardLengths", {"a": 1}, "shardLengths is .*, and must be a list"),
    ("shardLengths", ["1437", "0"], "incomplete: 2 of its 2 train files are missing"),
    ("numBytes", "-1", "numBytes of train is"),
    ("filepathTemplate", "../{DATASET}-{SPLIT}", "no template"),
    ("filepathTemplate", "{DATASET.__class__}-{SPLIT}", "no template"),
    ("filepathTemplate", "{DATASET}-{SPLIT:>1000000000}", "no template"),
    ("filepathTemplate", "{DATASET", "no template"),
    ("name", "../train", "no name of a split"),
    ("name", "\x1b[2J\n", "unknown split"),
  ],
)
def test_numbers_and_names_of_splits_are_checked(pets, key, value, said):
  def change(info):
    split = next(each for each in info["splits"] if each["name"] == "train")
    split[key] = value

  edit(pets / "dataset_info.json", change)
  assert re.search(said, refusal(pets))


@pytest.mark.parametrize(
  ("name", "content", "said"),
  [
    ("dataset_info.json", "", "it is empty"),
    ("dataset_info.json", "[]", "must be a table"),
    ("dataset_info.json", "[" * 100_000, "nested more than"),
    ("dataset_info.json", '{"splits": 1}', "must be a list"),
    ("dataset_info.json", '{"splits": [1]}', "must be a table"),
    ("dataset_info.json", '{"version": "../1"}', "version is"),
    ("dataset_info.json", '{"name": "../x"}', "name is"),
    ("dataset_info.json", '{"version": "\\u001b[2J"}', "version is"),
    ("dataset_info.json", "{}", "TFDS cannot open 'pets'"),
    ("features.json", "[]", "TFDS cannot open 'pets'"),
    ("features.json", "nope", "no JSON"),
    ("features.json", "\xff", "not encoded as UTF-8"),
    ("metadata.json", '{"checksum": [1]}', "checksum must be a table"),
    ("metadata.json", "3", "3 must be a table"),
    ("label.labels.txt", "\n", "it is empty"),
    ("label.labels.txt", "\xef\xbb\xbfa\nb\n", "byte order mark"),
    ("label.labels.txt", "a\0\nb\n", "zero bytes"),
    ("label.labels.txt", "\xff", "not encoded as UTF-8"),
    ("label.labels.txt", "a\n" * (metadata.MOST_CLASSES + 1), "more than 1,000,000 names"),
    ("label.labels.txt", "a\na\n", "has 10 classes, and its file of labels has 2 names, 1 of them"),
  ],
)
def test_files_of_metadata_are_checked(pets, name, content, said):
  (pets / name).write_bytes(content.encode("latin-1"))
  assert said in refusal(pets)


@pytest.mark.parametrize("value", ["1000000000000", -1, 1e9, float("nan"), 2**63])
def test_the_number_of_classes_is_bounded(pets, value):
  def change(content):
    content["featuresDict"]["features"]["label"]["classLabel"]["numClasses"] = value

  edit(pets / "features.json", change)
  (pets / "label.labels.txt").unlink()
  assert "numClasses " in refusal(pets)


def test_no_file_outside_of_a_set_is_named(pets):
  label = {
    "type": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
    "content": {"names_file": "/etc/passwd"},
  }
  content = {
    "type": "tensorflow_datasets.core.features.features_dict.FeaturesDict",
    "content": {"label": label},
  }
  (pets / "features.json").write_text(json.dumps(content))
  assert "names a file outside of the set" in refusal(pets)


@pytest.mark.parametrize(
  "name", ["dataset_info.json", "features.json", "metadata.json", "label.labels.txt"]
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(pets, name):
  (pets / name).unlink(missing_ok=True)
  os.mkfifo(pets / name)
  assert "no file but a pipe" in refusal(pets)


def test_a_pipe_in_place_of_images_is_not_waited_for(pets):
  (file,) = pets.glob("*train*")
  file.unlink()
  os.mkfifo(file)
  assert "incomplete: 1 of its 1 train files are missing" in refusal(pets)


def test_labels_that_are_no_names_are_no_classes(pets):
  def change(content):
    content["featuresDict"]["features"]["label"] = {
      "pythonClassName": "tensorflow_datasets.core.features.class_label_feature.ClassLabel",
      "classLabel": {},
    }

  edit(pets / "features.json", change)
  (pets / "label.labels.txt").unlink()
  assert "not an image classification set" in refusal(pets)


def test_the_features_of_tfds_are_known():
  known = metadata.known_features()
  for feature in (tfds.features.Image, tfds.features.ClassLabel, tfds.features.FeaturesDict):
    assert f"{feature.__module__}.{feature.__name__}" in known
  assert all(name.startswith("tensorflow_datasets.core.features.") for name in known)
