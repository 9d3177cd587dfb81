"""Data sets open: the digits, TFDS folders, noise."""

import collections
import json
import pathlib
import pickle
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_data_source import ArrayRecordDataSource
from sklearn.datasets import load_digits
from tensorflow_datasets.core.example_serializer import ExampleSerializer

from repjax.data import open_source, storage
from repjax.data.decode import Picture
from repjax.data.digits import Digits
from repjax.errors import InputError

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture
def stored_as(digits_dir, tmp_path):
  """Makes a folder in which TFDS finds a set of its own that looks like the digits."""

  def make(full_name, version, file_format):
    folder = tmp_path / full_name / version
    name, _, variant = full_name.partition("/")
    shutil.copytree(digits_dir / "digits" / "1.0.0", folder)
    for path in folder.glob("digits-*"):
      path.rename(folder / path.name.replace("digits", name).replace("array_record", file_format))
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"name": name, "version": version, "fileFormat": file_format, "configName": variant}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(tmp_path)

  return make


def pixels_and_labels(examples):
  """Counts how often each image occurs with each label."""
  rows = (examples[index] for index in range(len(examples)))
  return collections.Counter((Picture(x["image"]).pixels().tobytes(), x["label"]) for x in rows)


@pytest.mark.parametrize(("split", "count"), [("train", 1437), ("test", 360)])
def test_digits_are_those_of_scikit_learn_with_every_fifth_in_the_test_split(
  digits_dir, split, count
):
  source = open_source("digits", split, data_dir=str(digits_dir))
  assert len(source.examples) == count
  assert source.class_names == tuple("0123456789")
  known = load_digits()
  grey = np.rint(known.images * 255 / 16).astype(np.uint8)
  chosen = [index for index in range(1797) if (index % 5 == 0) == (split == "test")]
  rgb = np.repeat(grey[chosen, :, :, None], 3, axis=-1)
  expected = zip((image.tobytes() for image in rgb), known.target[chosen])
  assert pixels_and_labels(source.examples) == collections.Counter(expected)


def test_digits_are_prepared_once(digits_dir, capsys):
  files = [path for path in digits_dir.rglob("*") if path.is_file()]
  before = {path: path.stat().st_mtime_ns for path in files}
  open_source("digits", "train", data_dir=str(digits_dir))
  assert {
    path: path.stat().st_mtime_ns for path in digits_dir.rglob("*") if path.is_file()
  } == before
  assert capsys.readouterr() == ("", "")


def test_the_first_use_says_where_the_digits_go(tmp_path, capfd):
  open_source("digits", "train", data_dir=str(tmp_path))
  printed = capfd.readouterr().out
  assert printed == f"preparing the digits data set in {tmp_path}/digits/1.0.0\n"


def test_a_second_process_may_prepare_the_digits_first(tmp_path, monkeypatch):
  prepare = Digits.download_and_prepare

  def beaten(builder):
    prepare(builder)
    raise FileExistsError(builder.data_path)

  monkeypatch.setattr(Digits, "download_and_prepare", beaten)
  source = open_source("digits", "test", data_dir=str(tmp_path))
  assert len(source.examples) == 360


def test_an_unknown_data_set_lists_close_ones(tmp_path):
  with pytest.raises(InputError, match=r"unknown data set 'cifr10'; did you mean cifar10 or "):
    open_source("cifr10", "train", data_dir=str(tmp_path))
  with pytest.raises(InputError, match=r"did you mean .*digits"):
    open_source("digit", "train", data_dir=str(tmp_path))


def test_sets_in_the_data_dir_are_among_the_close_ones(stored_as, digits_dir):
  folder = stored_as("own_pets", "1.0.0", "array_record")
  source = open_source("own_pets", "test", data_dir=folder)
  digits = open_source("digits", "test", data_dir=str(digits_dir))
  assert pixels_and_labels(source.examples) == pixels_and_labels(digits.examples)
  with pytest.raises(InputError, match=r"'own_pet'; did you mean own_pets") as caught:
    open_source("own_pet", "test", data_dir=folder)
  assert f"looked for in {folder}; make one from" in str(caught.value)
  assert "--from-folder FOLDER --name NAME" in str(caught.value)


def test_sets_are_looked_for_in_the_default_folder_too(stored_as, monkeypatch):
  monkeypatch.setattr(
    "tensorflow_datasets.core.constants.DATA_DIR", stored_as("own", "1.0.0", "array_record")
  )
  assert len(open_source("own", "test").examples) == 360


def test_damaged_metadata_is_an_input_error(stored_as):
  folder = stored_as("own_pets", "1.0.0", "array_record")
  path = pathlib.Path(folder, "own_pets/1.0.0/dataset_info.json")
  path.write_text(path.read_text()[:-20])
  with pytest.raises(InputError, match="TFDS cannot open 'own_pets'"):
    open_source("own_pets", "test", data_dir=folder)


def test_an_unknown_split_lists_close_ones(digits_dir):
  with pytest.raises(InputError, match=r"unknown split of digits 'tests'; did you mean test\?"):
    open_source("digits", "tests", data_dir=str(digits_dir))


@pytest.mark.parametrize("name", ["cifar10:1.0.0", "mnist/upside_down"])
def test_an_unknown_version_or_variant_of_a_known_set_is_an_input_error(name, tmp_path):
  with pytest.raises(InputError, match=name.split("/")[0].split(":")[0]):
    open_source(name, "train", data_dir=str(tmp_path))


def test_a_set_that_is_not_on_disk_says_how_to_prepare_it(tmp_path):
  with pytest.raises(InputError) as caught:
    open_source("mnist", "train", data_dir=str(tmp_path))
  text = str(caught.value)
  assert text.startswith(f"mnist is not in {tmp_path}/mnist/3.0.1")
  assert text.endswith(f"repjax prepare-dataset --tfds mnist --data-dir {tmp_path}")


def test_a_prepared_set_of_tfds_opens(stored_as, digits_dir):
  stored = open_source("mnist", "test", data_dir=stored_as("mnist", "3.0.1", "array_record"))
  digits = open_source("digits", "test", data_dir=str(digits_dir))
  assert stored.class_names == digits.class_names
  assert pixels_and_labels(stored.examples) == pixels_and_labels(digits.examples)


def test_a_set_in_another_format_is_refused_with_the_way_out(stored_as):
  folder = stored_as("mnist", "3.0.1", "tfrecord")
  with pytest.raises(InputError, match="is stored as tfrecord") as caught:
    open_source("mnist", "test", data_dir=folder)
  assert str(caught.value).endswith(
    f"repjax prepare-dataset --from-tfrecord mnist --data-dir {folder}"
  )


def test_a_set_without_labels_is_refused(stored_as):
  folder = stored_as("binarized_mnist", "1.0.0", "array_record")
  expected = r"not an image classification set: its features are \['image'\]"
  with pytest.raises(InputError, match=expected):
    open_source("binarized_mnist", "train", data_dir=folder)


def test_synthetic_examples_are_always_the_same_and_differ_from_one_another():
  first, second = (
    open_source("synthetic", "train", num_classes=7, image_size=5).examples for _ in range(2)
  )
  for index in (0, 1, len(first) - 1):
    np.testing.assert_array_equal(first[index]["image"], second[index]["image"])
    assert first[index]["label"] == second[index]["label"]
    assert first[index]["image"].shape == (5, 5, 3)
    assert first[index]["image"].dtype == np.uint8
  assert not np.array_equal(first[0]["image"], first[1]["image"])
  assert {first[index]["label"] for index in range(100)} == set(range(7))


def test_synthetic_splits_differ():
  names = ("train", "validation", "test", "eval")
  sources = [open_source("synthetic", name, image_size=5) for name in names]
  assert {source.class_names for source in sources} == {tuple(map(str, range(1000)))}
  assert len({source.examples[0]["image"].tobytes() for source in sources}) == len(names)
  assert len(sources[0].examples) > len(sources[1].examples)


def test_examples_know_their_index_and_survive_pickling(digits_dir):
  source = open_source("digits", "test", data_dir=str(digits_dir))
  again = pickle.loads(pickle.dumps(source.examples))
  for index in (0, 7, 359):
    assert source.examples[index]["index"] == index
    assert again[np.int64(index)] == source.examples[index]
    assert source.examples[index]["name"] == f"image {index} of the test split of digits"
  for index in (-1, 360):
    with pytest.raises(IndexError):
      source.examples[index]
  assert open_source("synthetic", "train").examples[np.int64(3)]["index"] == 3


@pytest.mark.parametrize("key", ["file_name", "image/filename", "filename"])
def test_the_names_of_files_are_told_where_the_set_has_them(tmp_path, key):
  features = tfds.features.FeaturesDict(
    {
      "image": tfds.features.Image(),
      "label": tfds.features.ClassLabel(names=["a", "b"]),
      key: tfds.features.Text(),
    }
  )
  folder = tmp_path / "named" / "1.0.0"
  folder.mkdir(parents=True)
  serializer = ExampleSerializer(features.get_serialized_info())
  writer = storage.ShardWriter(folder, "named", "train")
  for name, label in ((b"a/1.jpg", 0), ("b/gr\u00f6\u00dfe".encode() + b"\xff.jpg", 1)):
    example = {"image": b"bytes", "label": label, key: name}
    writer.write(serializer.serialize_example(features.encode_example(example)))
  splits = {"train": writer.finish()}
  storage.write_info(
    folder, "named", "1.0.0", features=features, splits=splits, description="", metadata={}
  )
  source = open_source("named", "train", data_dir=str(tmp_path))
  assert source.examples[0]["name"] == "image 0 of the train split of named (a/1.jpg)"
  file_name = "b/gr\u00f6\u00dfe\ufffd.jpg"
  assert source.examples[1] == {
    "image": b"bytes",
    "label": 1,
    "index": 1,
    "file_name": file_name,
    "name": f"image 1 of the train split of named ({file_name})",
  }
  assert "checksum" not in source.fingerprint


def test_a_split_without_labels_is_refused(tmp_path):
  features = tfds.features.FeaturesDict(
    {"image": tfds.features.Image(), "label": tfds.features.ClassLabel(names=["a", "b"])}
  )
  folder = tmp_path / "blind" / "1.0.0"
  folder.mkdir(parents=True)
  serializer = ExampleSerializer(features.get_serialized_info())
  writer = storage.ShardWriter(folder, "blind", "test")
  writer.write(serializer.serialize_example({"image": b"bytes", "label": -1}))
  storage.write_info(
    folder,
    "blind",
    "1.0.0",
    features=features,
    splits={"test": writer.finish()},
    description="",
    metadata={},
  )
  source = open_source("blind", "test", data_dir=str(tmp_path))
  with pytest.raises(InputError, match=r"image 0 .* of blind has the label -1"):
    source.examples[0]


def test_a_damaged_record_names_the_set_the_split_and_the_index(stored_as):
  folder = stored_as("own_pets", "1.0.0", "array_record")
  path = next(pathlib.Path(folder).rglob("own_pets-test.array_record*"))
  whole = open_source("own_pets", "test", data_dir=folder)
  expected = [whole.examples[index] for index in range(360)]
  data = bytearray(path.read_bytes())
  place = data.index(expected[100]["image"][-12:])  # of some record: small ones recur
  data[place - 30 : place] = bytes(30)
  path.write_bytes(data)
  source = open_source("own_pets", "test", data_dir=folder)
  failed = {}
  for index in range(360):
    try:
      assert source.examples[index] == expected[index]
    except InputError as error:
      failed[index] = str(error)
  [(index, text)] = failed.items()
  assert text.startswith(f"image {index} of the test split of own_pets cannot be read")


def test_a_record_that_is_no_example_is_named(stored_as):
  folder = pathlib.Path(stored_as("own_pets", "1.0.0", "array_record"))
  version = folder / "own_pets" / "1.0.0"
  shard = storage.ShardWriter(folder, "own_pets", "test")
  for number in range(360):
    shard.write(b"\xff no example" if number == 3 else b"")
  shard.finish()
  next(folder.glob("own_pets-test*")).replace(next(version.glob("own_pets-test*")))
  source = open_source("own_pets", "test", data_dir=str(folder))
  for index in (3, 4):
    with pytest.raises(InputError, match=f"image {index} of the test split .* cannot be read"):
      source.examples[index]


def test_a_set_without_all_its_files_is_refused(stored_as):
  folder = stored_as("own_pets", "1.0.0", "array_record")
  next(pathlib.Path(folder).rglob("own_pets-train*")).unlink()
  with pytest.raises(InputError, match=r"incomplete: 1 of its 1 train files .* own_pets-train"):
    open_source("own_pets", "train", data_dir=folder)
  assert len(open_source("own_pets", "test", data_dir=folder).examples) == 360


def test_opening_reads_no_example(digits_dir, monkeypatch):
  def fail(*arguments):
    raise AssertionError("an example was read")

  monkeypatch.setattr(ArrayRecordDataSource, "__getitem__", fail)
  source = open_source("digits", "train", data_dir=str(digits_dir))
  assert len(source.examples) == 1437
  with pytest.raises(InputError, match="an example was read"):
    source.examples[0]


def test_fingerprints_are_equal_for_the_same_split_only(digits_dir, stored_as):
  def opened(name, split, folder=None, **options):
    return open_source(name, split, data_dir=folder, **options).fingerprint

  own = stored_as("own_pets", "1.0.0", "array_record")
  calls = [
    ("digits", "train", str(digits_dir)),
    ("digits", "test", str(digits_dir)),
    ("own_pets", "train", own),
    ("synthetic", "train"),
    ("synthetic", "validation"),
  ]
  prints = [opened(*call) for call in calls]
  prints += [
    opened("synthetic", "train", num_classes=5),
    opened("synthetic", "train", image_size=9),
  ]
  assert prints[: len(calls)] == [opened(*call) for call in calls]
  assert len({json.dumps(each) for each in prints}) == len(prints)
  assert [each["images"] for each in prints[:4]] == [1437, 360, 1437, 1024]
  assert [each["version"] for each in prints] == ["1.0.0"] * len(prints)
  labels = pathlib.Path(own, "own_pets/1.0.0/label.labels.txt")
  labels.write_text(labels.read_text().replace("9", "nine"))
  assert opened("own_pets", "train", own)["classes"] != prints[2]["classes"]


def test_the_fingerprint_names_the_variant(stored_as):
  folder = stored_as("own_pets/small", "1.0.0", "array_record")
  assert open_source("own_pets/small", "test", data_dir=folder).fingerprint["name"] == (
    "own_pets/small"
  )
