"""Splits, classes and files are found in a folder, and everything that is wrong with it."""

import fractions
import itertools
import os
import shutil
import unicodedata

import pytest

from repjax.data.folder import prepare_folder
from repjax.data.layout import find_images
from tests.data.folders import classes_folder, refusal, stored, write_image


@pytest.mark.parametrize(
  ("inner_folders", "splits"),
  [
    (("train", "val"), ("train", "validation")),
    (("Training", "VALID"), ("train", "validation")),
    (("train", "validation"), ("train", "validation")),
    (("train", "test"), ("train", "validation")),
    (("train", "val", "test"), ("train", "validation", "test")),
  ],
)
def test_folders_of_splits_have_several_possible_names(tmp_path, inner_folders, splits):
  for inner, name in itertools.product(inner_folders, ("x", "y")):
    write_image(tmp_path / "folder" / inner / name / f"{inner}.png")
  made = prepare_folder(tmp_path / "folder", "named", data_dir=tmp_path)
  assert made.counts == {split: [1, 1] for split in splits}
  for inner, split in zip(inner_folders, splits):
    assert set(stored("named", split, tmp_path)) == {f"{inner}/{c}/{inner}.png" for c in "xy"}


def test_a_class_may_be_called_train(tmp_path):
  folder = classes_folder(tmp_path / "folder", train=3, tram=2)
  made = prepare_folder(folder, "vehicles", data_dir=tmp_path)
  assert made.class_names == ("train", "tram")
  assert made.counts == {"train": [2, 1], "validation": [1, 1]}


def test_hidden_files_are_no_images_and_links_are_followed_once(tmp_path):
  folder = classes_folder(tmp_path / "folder", a=2, b=0, c=2)
  for name in (".DS_Store", "._0.jpg", ".ipynb_checkpoints/0.jpg", "__MACOSX/0.jpg", "notes.txt"):
    (folder / "a" / name).parent.mkdir(exist_ok=True)
    (folder / "a" / name).write_text("no image")
  (folder / ".git").mkdir()
  (folder / "b").rmdir()
  (folder / "b").symlink_to(folder / "c")
  (folder / "a" / "loop").symlink_to(folder / "a")
  found = find_images(folder, None, 0)
  assert not found.problems
  together = {
    name: sorted([*found.splits["train"][name], *found.splits["validation"][name]])
    for name in "abc"
  }
  assert together == {name: [f"{name}/0.jpg", f"{name}/1.jpg"] for name in "abc"}


def test_files_with_other_endings_are_left_out_and_listed(photos, tmp_path):
  (photos / "train/cat/phone.heic").write_bytes(b"x")
  (photos / "val/dog/notes.txt").write_bytes(b"x")
  (photos / "val/dog/.hidden").write_bytes(b"x")
  made = prepare_folder(photos, "pets", data_dir=tmp_path, strict=True)
  assert made.others == ["train/cat/phone.heic", "val/dog/notes.txt"]
  assert not made.skipped
  assert (made.path / "skipped.txt").read_text().splitlines() == [
    f"{name}\tits ending is none of .jpg, .jpeg, .png, .webp, .bmp" for name in made.others
  ]


def test_the_parent_of_the_right_folder_is_noticed(photos, tmp_path):
  shutil.copytree(photos / "val", photos.parent / "other")
  text = refusal(photos.parent, "pets", data_dir=tmp_path / "sets")
  assert f"{photos} holds folders for training and validation, so it is no class" in text
  assert f"did you mean --from-folder {photos}?" in text


def test_images_with_masks_are_no_classes(photos, tmp_path):
  for split in ("train", "val"):
    (photos / split / "cat").rename(photos / split / "images")
    (photos / split / "dog").rename(photos / split / "masks")
  text = refusal(photos, "pets", data_dir=tmp_path)
  assert f"did you mean --from-mask-folder {photos}?" in text


def no_folder(folder):
  shutil.rmtree(folder)


def a_file(folder):
  shutil.rmtree(folder)
  folder.write_text("")


def no_classes(folder):
  for path in (folder / "train" / "cat").iterdir():
    path.rename(folder / path.name)
  shutil.rmtree(folder / "train")
  shutil.rmtree(folder / "val")


def flat_split(folder):
  for path in (folder / "val" / "cat").iterdir():
    path.rename(folder / "val" / path.name)


def one_class(folder):
  for split in ("train", "val"):
    shutil.rmtree(folder / split / "dog")


def empty_classes(folder):
  for name in ("train/ant", "train/bee", "val/ant", "val/bee"):
    (folder / name).mkdir()
  (folder / "val/bee/1.tiff").write_bytes(b"")


def missing_in_validation(folder):
  shutil.rmtree(folder / "val" / "dog")


def missing_in_training(folder):
  write_image(folder / "val" / "emu" / "1.jpg")


def no_validation(folder):
  shutil.rmtree(folder / "val")


def no_training(folder):
  shutil.rmtree(folder / "train")


def two_validations(folder):
  shutil.copytree(folder / "val", folder / "Validation")


def mixed(folder):
  write_image(folder / "emu" / "1.jpg")


def blanks(folder):
  for split in ("train", "val"):
    (folder / split / "dog").rename(folder / split / " dog")


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (no_folder, ["photos does not exist; give a folder with one folder per class"]),
    (a_file, ["photos is a file; give a folder"]),
    (
      no_classes,
      [
        "4 images lie directly in",
        "(train0.jpg, train1.jpg, train2.jpg and 1 more)",
        "at least two are needed, got none",
      ],
    ),
    (flat_split, ["2 images lie directly in", "photos/val (val0.jpg, val1.jpg)"]),
    (one_class, ["at least two are needed, got only one, cat"]),
    (
      empty_classes,
      ["train/ant (no files); train/bee (no files)", "val/ant (no files); val/bee (1 x .tiff)"],
    ),
    (missing_in_validation, ["in train but have no folder in validation: dog"]),
    (missing_in_training, ["in validation but have no folder in train: emu"]),
    (no_validation, ["has no validation images", "--validation-ratio 0.2"]),
    (no_training, ["has no folder called train beside val"]),
    (two_validations, ["photos/Validation and", "photos/val would both be the validation split"]),
    (mixed, ["holds folders of splits (train, val) and others (emu)"]),
    (blanks, ["class names with surrounding blanks", "' dog'"]),
  ],
)
def test_a_problem_of_a_folder_is_named(photos, tmp_path, damage, said):
  damage(photos)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  for part in said:
    assert part in text
  assert not (tmp_path / "sets").exists()


def test_all_problems_of_a_folder_are_named_at_once(photos, tmp_path):
  missing_in_validation(photos)
  (photos / "train" / "ant").mkdir()
  text = refusal(photos, "cifar10", data_dir=tmp_path / "sets", validation_ratio=1.5)
  paragraphs = text.splitlines()
  for start in (
    "the name cifar10 belongs to a data set",
    "--validation-ratio is a share",
    f"{photos} has a validation split already",
    f"class folders in {photos} without any .jpg",
    "classes that are in train but have no folder in validation: ant, dog",
  ):
    assert sum(line.startswith(start) for line in paragraphs) == 1
  assert len(paragraphs) == 5


@pytest.mark.parametrize("ratio", [0, 1, -0.1, 20, float("nan")])
def test_the_ratio_is_a_share(tmp_path, ratio):
  folder = classes_folder(tmp_path / "folder", a=2, b=2)
  text = refusal(folder, "pets", data_dir=tmp_path, validation_ratio=ratio)
  assert text == f"--validation-ratio is a share between 0 and 1, such as 0.2; got {ratio}"


def test_classes_of_one_image_cannot_be_divided(tmp_path):
  folder = classes_folder(tmp_path / "folder", a=1, b=2, c=1)
  text = refusal(folder, "pets", data_dir=tmp_path)
  assert text == "classes with a single image, which cannot be in both splits: a, c"


@pytest.mark.parametrize("ratio", [0.001, 0.2, 0.5, 0.999])
def test_a_ratio_divides_each_class(tmp_path, ratio):
  counts = {"a": 2, "b": 3, "c": 10, "d": 101}
  for name, count in counts.items():
    (tmp_path / name).mkdir()
    for number in range(count):
      (tmp_path / name / f"{number}.jpg").write_bytes(b"")
  found = find_images(tmp_path, ratio, 0)
  assert not found.problems
  for name, count in counts.items():
    train, validation = (found.splits[split][name] for split in ("train", "validation"))
    assert sorted([*train, *validation]) == sorted(f"{name}/{n}.jpg" for n in range(count))
    wanted = fractions.Fraction(ratio) * count
    assert min(abs(len(validation) - wanted), len(validation) - 1, len(train) - 1) <= 0.5
    assert len(train) >= 1
    assert len(validation) >= 1
  assert find_images(tmp_path, ratio, 0) == found
  assert find_images(tmp_path, ratio, 1) != found


def test_an_additional_image_hardly_changes_the_division(tmp_path):
  (tmp_path / "a").mkdir()
  (tmp_path / "b").mkdir()
  for name, number in itertools.product("ab", range(40)):
    (tmp_path / name / f"{number}.jpg").write_bytes(b"")
  before = {
    name: set(paths) for name, paths in find_images(tmp_path, 0.3, 0).splits["train"].items()
  }
  (tmp_path / "a" / "new.jpg").write_bytes(b"")
  after = find_images(tmp_path, 0.3, 0).splits["train"]
  assert len(before["a"] ^ set(after["a"])) <= 2
  assert before["b"] == set(after["b"])


def test_training_images_alone_are_divided_on_request(photos, tmp_path):
  no_validation(photos)
  made = prepare_folder(photos, "pets", data_dir=tmp_path, validation_ratio=0.5)
  assert made.counts == {"train": [2, 2], "validation": [2, 2]}


@pytest.mark.parametrize("inner", ["val", "val/dog"])
def test_folders_that_may_not_be_read_are_named(photos, tmp_path, monkeypatch, inner):
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith(f"/{inner}"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert f"{photos}/{inner} cannot be read: Permission denied" in text.splitlines()


def test_an_accent_in_one_or_two_code_points_is_the_same_class(photos, tmp_path):
  for split, form in (("train", "NFC"), ("val", "NFD")):
    (photos / split / "dog").rename(photos / split / unicodedata.normalize(form, "école"))
    write_image(photos / split / "zebra" / "1.jpg")
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  assert made.class_names == ("cat", "zebra", "école")
  assert made.counts == {"train": [4, 1, 4], "validation": [2, 1, 2]}
  names = {label for _, label in stored("pets", "validation", tmp_path).values()}
  assert names == set(made.class_names)


def test_two_folders_of_one_class_are_named(photos, tmp_path):
  for form in ("NFC", "NFD"):
    write_image(photos / "train" / unicodedata.normalize(form, "é") / "1.jpg")
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert "has two folders for the class é, whose names differ only in how accents are" in text


def test_what_is_printed_of_names_is_one_line_without_control_characters(photos, tmp_path):
  (photos / "train" / "a\x1b[2J\nb").mkdir()
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert r"a\x1b[2J\nb" in text
  assert "\x1b" not in text
