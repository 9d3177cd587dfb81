"""Where examples come from: the digits, TFDS folders, noise."""

import collections
import json
import shutil

import numpy as np
import pytest
from sklearn.datasets import load_digits

from repjax.data import open_source
from repjax.data.digits import Digits
from repjax.data.transforms import decode
from repjax.errors import InputError

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture
def stored_as(digits_dir, tmp_path):
  """Makes a folder in which TFDS finds a set of its own that looks like the digits."""

  def make(name, version, file_format):
    folder = tmp_path / name / version
    shutil.copytree(digits_dir / "digits" / "1.0.0", folder)
    for path in folder.glob("digits-*"):
      path.rename(folder / path.name.replace("digits", name).replace("array_record", file_format))
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"name": name, "version": version, "fileFormat": file_format}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return str(tmp_path)

  return make


def pixels_and_labels(examples):
  """How often each image occurs with each label."""
  rows = (examples[index] for index in range(len(examples)))
  return collections.Counter((np.asarray(decode(x["image"])).tobytes(), x["label"]) for x in rows)


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


def test_another_process_may_be_faster_in_preparing_the_digits(tmp_path, monkeypatch):
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
  assert f"mnist is not in {tmp_path}/mnist/3.0.1; prepare it once with: python -c" in str(
    caught.value
  )
  assert (
    f"tfds.builder('mnist', data_dir='{tmp_path}', file_format='array_record')"
    ".download_and_prepare()" in str(caught.value)
  )


def test_a_prepared_set_of_tfds_opens(stored_as, digits_dir):
  stored = open_source("mnist", "test", data_dir=stored_as("mnist", "3.0.1", "array_record"))
  digits = open_source("digits", "test", data_dir=str(digits_dir))
  assert stored.class_names == digits.class_names
  assert pixels_and_labels(stored.examples) == pixels_and_labels(digits.examples)


def test_a_set_in_another_format_is_refused_with_the_way_out(stored_as):
  folder = stored_as("mnist", "3.0.1", "tfrecord")
  with pytest.raises(InputError, match="is stored as tfrecord") as caught:
    open_source("mnist", "test", data_dir=folder)
  assert "prepare it once more, in another data_dir, as array_record" in str(caught.value)


def test_a_set_without_labels_is_refused(stored_as):
  folder = stored_as("binarized_mnist", "1.0.0", "array_record")
  expected = r"binarized_mnist is not an image classification set: it has \['image'\]"
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
