"""Image folders become sets: what is in them, what is left out, and what is refused."""

import fractions
import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from repjax.data import folder as folder_module
from repjax.data import open_source, storage
from repjax.data.folder import prepare_folder
from repjax.data.layout import find_images
from repjax.data.reading import in_order
from repjax.errors import InputError

ROOT = Path(__file__).parents[2]
MODES = {
  "1.png": ("1", "PNG", {}),
  "grey.png": ("L", "PNG", {}),
  "grey_alpha.png": ("LA", "PNG", {}),
  "grey_16.png": ("I;16", "PNG", {}),
  "palette.png": ("P", "PNG", {"transparency": 0}),
  "alpha.PNG": ("RGBA", "PNG", {}),
  "grey.jpg": ("L", "JPEG", {}),
  "rgb.JPEG": ("RGB", "JPEG", {}),
  "cmyk.jpeg": ("CMYK", "JPEG", {}),
  "progressive.Jpg": ("RGB", "JPEG", {"progressive": True}),
  "rotated.jpg": ("RGB", "JPEG", {"exif": {0x0112: 6}}),
  "webp.jpg": ("RGB", "WEBP", {}),
  "inner/deep/rgb.jpg": ("RGB", "JPEG", {}),
  "größe 1.jpg": ("RGB", "JPEG", {}),
}


def write_image(path, seed=0, mode="RGB", kind=None, exif=None, size=(24, 20), **options):
  """A random image, other for each seed and path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng([seed, *os.fsencode(path.name), *os.fsencode(path.parent.name)])
  if mode == "I;16":
    image = Image.fromarray(rng.integers(0, 65536, size[::-1], np.uint16))
  else:
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
  if exif:
    tags = Image.Exif()
    tags.update(exif)
    options["exif"] = tags
  image.save(path, kind or {".png": "PNG"}.get(path.suffix, "JPEG"), **options)
  return path


@pytest.fixture
def photos(tmp_path):
  """A folder with training and validation images of two classes."""
  folder = tmp_path / "photos"
  for split, count in (("train", 4), ("val", 2)):
    for name, number in itertools.product(("cat", "dog"), range(count)):
      write_image(folder / split / name / f"{split}{number}.jpg")
  return folder


def classes_folder(folder, **counts):
  """A folder of classes with so many images each."""
  for name, count in counts.items():
    (folder / name).mkdir(parents=True)
    for number in range(count):
      write_image(folder / name / f"{number}.jpg")
  return folder


def files_below(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def stored(name, split, data_dir):
  """Each file name of a split with its bytes and class."""
  source = open_source(name, split, data_dir=str(data_dir))
  rows = [source.examples[index] for index in range(len(source.examples))]
  return {row["file_name"]: (row["image"], source.class_names[row["label"]]) for row in rows}


def refusal(*arguments, **options):
  with pytest.raises(InputError) as caught:
    prepare_folder(*arguments, **options)
  return str(caught.value)


def test_images_of_every_mode_are_stored_byte_for_byte(tmp_path):
  folder = tmp_path / "folder"
  for split, name in itertools.product(("train", "val"), ("b", "a", "C")):
    for file, (mode, kind, options) in MODES.items():
      write_image(folder / split / name / file, mode=mode, kind=kind, **options)
  made = prepare_folder(folder, "modes", data_dir=tmp_path)
  assert made.class_names == ("C", "a", "b")
  assert not made.skipped
  for split, part in (("train", "train"), ("validation", "val")):
    expected = {
      str(path.relative_to(folder)): (path.read_bytes(), path.relative_to(folder).parts[1])
      for path in (folder / part).rglob("*")
      if path.is_file()
    }
    assert len(expected) == 3 * len(MODES)
    assert stored("modes", split, tmp_path) == expected
    assert made.counts[split] == [len(MODES)] * 3


def test_tfds_itself_opens_the_set(photos, tmp_path):
  prepare_folder(photos, "pets", data_dir=tmp_path)
  builder = tfds.builder("pets", data_dir=str(tmp_path))
  assert builder.info.splits["train"].num_examples == 8
  example = builder.as_data_source("validation")[0]
  assert example["image"].shape == (20, 24, 3)
  assert builder.info.features["label"].names == ["cat", "dog"]


@pytest.mark.parametrize(
  ("parts", "splits"),
  [
    (("train", "val"), ("train", "validation")),
    (("Training", "VALID"), ("train", "validation")),
    (("train", "validation"), ("train", "validation")),
    (("train", "test"), ("train", "validation")),
    (("train", "val", "test"), ("train", "validation", "test")),
  ],
)
def test_the_names_of_the_splits_folders(tmp_path, parts, splits):
  for part, name in itertools.product(parts, ("x", "y")):
    write_image(tmp_path / "folder" / part / name / f"{part}.png")
  made = prepare_folder(tmp_path / "folder", "parts", data_dir=tmp_path)
  assert made.counts == {split: [1, 1] for split in splits}
  for part, split in zip(parts, splits):
    assert set(stored("parts", split, tmp_path)) == {f"{part}/{c}/{part}.png" for c in "xy"}


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


def spoil(folder):
  """Puts files that cannot be read beside the images; their names with what the reason says."""
  whole = {
    "jpg": write_image(folder / "train" / "cat" / "whole.jpg", size=(90, 90)).read_bytes(),
    "png": write_image(folder / "train" / "cat" / "whole.png", size=(90, 90)).read_bytes(),
  }
  spoilt = {
    "train/cat/empty.jpg": (b"", "empty file"),
    "train/cat/text.png": (b"no image at all", "not an image of a known kind"),
    "train/cat/icon.jpg": (b"GIF89a" + bytes(40), "not an image of a known kind"),
    "train/dog/cut.jpg": (whole["jpg"][: len(whole["jpg"]) // 2], "truncated"),
    "train/dog/nearly.jpg": (whole["jpg"][:-200], "truncated"),
    "train/dog/header.jpg": (whole["jpg"][:50], ""),
    "val/dog/cut.png": (whole["png"][: len(whole["png"]) // 2], ""),
    "val/dog/flipped.png": (whole["png"][:500] + b"\1\2\3" + whole["png"][503:], ""),
  }
  for name, (data, _) in spoilt.items():
    (folder / name).write_bytes(data)
  (folder / "train/cat/gone.jpg").symlink_to("nowhere.jpg")
  reasons = {name: reason for name, (_, reason) in spoilt.items()}
  return reasons | {"train/cat/gone.jpg": "No such file or directory"}


def test_what_cannot_be_read_is_left_out_and_listed(photos, tmp_path):
  reasons = spoil(photos)
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  assert made.skipped.keys() == reasons.keys()
  for name, reason in reasons.items():
    assert made.skipped[name]
    assert reason in made.skipped[name]
  lines = (made.path / "skipped.txt").read_text().splitlines()
  assert lines == [f"{name}\t{made.skipped[name]}" for name in sorted(reasons)]
  assert made.counts == {"train": [6, 4], "validation": [2, 2]}
  kept = stored("pets", "train", tmp_path) | stored("pets", "validation", tmp_path)
  assert kept.keys() == {
    str(path.relative_to(photos)) for path in photos.rglob("*") if path.is_file()
  } - set(reasons)


def test_nothing_is_listed_where_everything_was_read(photos, tmp_path):
  assert not (prepare_folder(photos, "pets", data_dir=tmp_path).path / "skipped.txt").exists()


def test_strict_lists_every_unreadable_file_and_writes_nothing(photos, tmp_path):
  reasons = spoil(photos)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets", strict=True)
  assert text.startswith(f"nothing was written, since {len(reasons)} of the files cannot be")
  assert all(f"{name}: " in text for name in reasons)
  assert not list((tmp_path / "sets").iterdir())


def test_a_class_that_is_lost_altogether_is_an_error(photos, tmp_path):
  for path in (photos / "val" / "dog").iterdir():
    path.write_bytes(b"")
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert "dog in validation (2 of 2: val/dog/val0.jpg: empty file)" in text
  assert "cat" not in text
  assert not list((tmp_path / "sets").iterdir())


def test_images_in_both_splits_are_named(photos, tmp_path):
  assert prepare_folder(photos, "apart", data_dir=tmp_path).repeated == []
  shutil.copy(photos / "val/cat/val0.jpg", photos / "train/cat/again.jpg")
  shutil.copy(photos / "val/cat/val0.jpg", photos / "train/dog/other.jpg")
  shutil.copy(photos / "train/cat/train0.jpg", photos / "train/cat/twice.jpg")
  assert sorted(prepare_folder(photos, "pets", data_dir=tmp_path).repeated) == [
    "train/cat/again.jpg",
    "train/dog/other.jpg",
  ]


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


def test_a_folder_above_the_right_one_is_noticed(photos, tmp_path):
  shutil.copytree(photos / "val", photos.parent / "other")
  text = refusal(photos.parent, "pets", data_dir=tmp_path / "sets")
  assert f"{photos} holds folders for training and validation, so it is no class" in text
  assert f"did you mean --from-folder {photos}?" in text


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
def test_what_is_wrong_with_a_folder_is_said(photos, tmp_path, damage, said):
  damage(photos)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  for part in said:
    assert part in text
  assert not (tmp_path / "sets").exists()


def test_everything_that_is_wrong_is_said_at_once(photos, tmp_path):
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


@pytest.mark.parametrize(
  ("name", "proposed"),
  [
    ("my-photos", "my_photos"),
    ("MyPhotos", "my_photos"),
    ("2024 summer", "set_2024_summer"),
    ("../x", "x"),
    ("", "set"),
    ("größe", "gr_e"),
    ("cifar10", "my_cifar10"),
    ("CIFAR-10", "cifar_10"),
    ("Digits", "my_digits"),
    ("digits", "my_digits"),
    ("synthetic", "my_synthetic"),
  ],
)
def test_names_that_a_set_cannot_have(photos, tmp_path, name, proposed):
  text = refusal(photos, name, data_dir=tmp_path / "sets")
  assert text.endswith(f"; take {proposed}, for example")
  assert not (tmp_path / "sets").exists()
  assert folder_module.name_problems(proposed) == []


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


def test_another_image_hardly_changes_the_division(tmp_path):
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


def fingerprints(name, data_dir):
  return {
    split: open_source(name, split, data_dir=str(data_dir)).fingerprint
    for split in ("train", "validation")
  }


def test_the_same_folder_gives_the_same_files(photos, tmp_path):
  first, second = (
    prepare_folder(photos, "pets", data_dir=tmp_path / each, num_workers=workers).path
    for each, workers in (("one", 1), ("other", 7))
  )
  assert files_below(first) == files_below(second)
  prints = fingerprints("pets", tmp_path / "one")
  assert prints == json.loads(json.dumps(fingerprints("pets", tmp_path / "other")))
  assert prints["train"] != prints["validation"]


def changed_byte(path):
  data = bytearray(path.read_bytes())
  data[-40] ^= 1
  path.write_bytes(data)


def renamed(path):
  path.rename(path.with_name("renamed.jpg"))


def other_class(path):
  path.rename(path.parents[1] / "dog" / path.name)


@pytest.mark.parametrize("change", [changed_byte, renamed, other_class, Path.unlink])
def test_a_change_of_the_folder_changes_the_fingerprint_of_its_split(photos, tmp_path, change):
  prepare_folder(photos, "pets", data_dir=tmp_path)
  before = fingerprints("pets", tmp_path)
  change(photos / "train/cat/train1.jpg")
  prepare_folder(photos, "pets", data_dir=tmp_path, replace=True)
  after = fingerprints("pets", tmp_path)
  assert before["train"]["checksum"] != after["train"]["checksum"]
  assert before["validation"] == after["validation"]


def test_the_checksum_is_that_of_names_and_contents_in_their_order(photos, tmp_path):
  prepare_folder(photos, "pets", data_dir=tmp_path)
  expected = hashlib.sha256()
  for name, (data, _) in stored("pets", "train", tmp_path).items():
    expected.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
  assert fingerprints("pets", tmp_path)["train"]["checksum"] == expected.hexdigest()


def test_large_sets_have_several_shards(photos, tmp_path, monkeypatch):
  prepare_folder(photos, "pets", data_dir=tmp_path / "one")
  monkeypatch.setattr(storage, "SHARD_BYTES", 3000)
  made = prepare_folder(photos, "pets", data_dir=tmp_path / "many")
  shards = sorted(path.name for path in made.path.glob("pets-train*"))
  assert len(shards) > 2
  assert shards[1] == f"pets-train.array_record-00001-of-{len(shards):05}"
  assert fingerprints("pets", tmp_path / "many") == fingerprints("pets", tmp_path / "one")
  one, many = (stored("pets", "train", tmp_path / each) for each in ("one", "many"))
  assert list(one.items()) == list(many.items())


def test_a_name_that_is_taken_is_refused_until_it_is_to_be_replaced(photos, tmp_path):
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  before = files_below(made.path)
  (photos / "train/cat/train0.jpg").unlink()
  text = refusal(photos, "pets", data_dir=tmp_path)
  assert f"a set called pets exists already, in {made.path}" in text
  assert "--replace" in text
  assert files_below(made.path) == before
  prepare_folder(photos, "pets", data_dir=tmp_path, replace=True)
  assert len(stored("pets", "train", tmp_path)) == 7
  assert {path.name for path in tmp_path.iterdir()} == {"photos", "pets"}


def test_the_old_set_stays_where_its_successor_fails(photos, tmp_path):
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  before = files_below(made.path)
  (photos / "train/cat/train0.jpg").write_bytes(b"")
  refusal(photos, "pets", data_dir=tmp_path, replace=True, strict=True)
  assert files_below(made.path) == before
  assert {path.name for path in tmp_path.iterdir()} == {"photos", "pets"}


def test_the_old_set_comes_back_where_the_new_one_cannot_be_moved(photos, tmp_path, monkeypatch):
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  before, rename = files_below(made.path), Path.rename

  def fail(path, target):
    if path.name == ".pets.incomplete":
      raise OSError(5, "Input/output error")
    return rename(path, target)

  monkeypatch.setattr(Path, "rename", fail)
  (photos / "train/cat/train0.jpg").unlink()
  text = refusal(photos, "pets", data_dir=tmp_path, replace=True)
  assert "cannot be written (Input/output error); nothing was changed" in text
  assert files_below(made.path) == before
  assert {path.name for path in tmp_path.iterdir()} == {"photos", "pets"}


def test_images_are_stored_in_an_order_that_the_seed_fixes(photos, tmp_path):
  orders = []
  for seed in (0, 1):
    prepare_folder(photos, "pets", data_dir=tmp_path, seed=seed, replace=True)
    orders.append(list(stored("pets", "train", tmp_path)))
  assert orders[0] != orders[1]
  assert sorted(orders[0]) == sorted(orders[1])
  assert sorted(orders[0]) not in orders


def test_the_size_of_a_split_is_that_of_its_records(photos, tmp_path):
  prepare_folder(photos, "pets", data_dir=tmp_path)
  images = sum(path.stat().st_size for path in (photos / "train").rglob("*.jpg"))
  assert images < fingerprints("pets", tmp_path)["train"]["bytes"] < images + 8 * 200


def test_a_set_that_was_moved_aside_comes_back(photos, tmp_path):
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  before = files_below(made.path)
  made.path.rename(tmp_path / ".pets.replaced")  # as if killed between two renames
  (photos / "train/cat/train0.jpg").write_bytes(b"")
  refusal(photos, "pets", data_dir=tmp_path, replace=True, strict=True)
  assert files_below(made.path) == before


KILLED = """
import os, signal, sys
from repjax.data import folder
read, count = folder.read_image_file, 0
def deadly(*arguments):
  global count
  count += 1
  if count == 6:
    os.kill(os.getpid(), signal.SIGKILL)
  return read(*arguments)
folder.read_image_file = deadly
folder.prepare_folder(sys.argv[1], "pets", data_dir=sys.argv[2], num_workers=1)
"""


def test_a_kill_in_the_middle_leaves_nothing_that_opens(photos, tmp_path):
  ended = subprocess.run(
    [sys.executable, "-c", KILLED, photos, tmp_path],
    cwd=ROOT,
    env={**os.environ, "PYTHONPATH": "."},
  )
  assert ended.returncode == -signal.SIGKILL
  assert (tmp_path / ".pets.incomplete").exists()
  with pytest.raises(InputError, match="unknown data set 'pets'"):
    open_source("pets", "train", data_dir=str(tmp_path))
  (tmp_path / ".pets.incomplete" / "more").mkdir()
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  assert {path.name for path in tmp_path.iterdir()} == {"photos", "pets"}
  fresh = prepare_folder(photos, "pets", data_dir=tmp_path / "fresh")
  assert files_below(made.path) == files_below(fresh.path)
  assert {path.name for path in made.path.iterdir()} == {path.name for path in fresh.path.iterdir()}


def test_two_processes_do_not_write_one_set(photos, tmp_path):
  with storage.draft_folder(tmp_path / ".pets.incomplete") as draft:
    (draft / "theirs").touch()
    text = refusal(photos, "pets", data_dir=tmp_path)
    assert f"another process is writing {draft} right now" in text
    assert (draft / "theirs").exists()
  prepare_folder(photos, "pets", data_dir=tmp_path)


def test_a_full_disk_is_one_paragraph_and_leaves_nothing(photos, tmp_path, monkeypatch):
  class Full:
    def __init__(self, *arguments):
      pass

    def write(self, record):
      raise RuntimeError("write() failed: No space left on device; writing x; at byte 7")

  monkeypatch.setattr(storage.array_record_module, "ArrayRecordWriter", Full)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert "cannot be written (No space left on device); nothing was changed" in text
  assert not list((tmp_path / "sets").iterdir())


def test_a_data_dir_that_cannot_be_made_is_one_paragraph(photos, tmp_path):
  (tmp_path / "file").write_text("")
  text = refusal(photos, "pets", data_dir=tmp_path / "file")
  assert text.startswith(f"{tmp_path}/file")
  assert "cannot be written (Not a directory)" in text


@pytest.mark.parametrize("method", ["iterdir", "is_dir"])
def test_folders_that_may_not_be_read_are_named(photos, tmp_path, monkeypatch, method):
  original = getattr(Path, method)

  def refuse(path):
    if path == photos / "val":
      raise PermissionError(13, "Permission denied", str(path))
    return original(path)

  monkeypatch.setattr(Path, method, refuse)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert f"{photos}/val cannot be read: Permission denied" in text.splitlines()


def test_inner_folders_that_may_not_be_read_are_named(photos, tmp_path, monkeypatch):
  scandir = os.scandir

  def refuse(path):
    if str(path).endswith("/val/dog"):
      raise PermissionError(13, "Permission denied", str(path))
    return scandir(path)

  monkeypatch.setattr(os, "scandir", refuse)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert text.splitlines()[0] == f"{photos}/val/dog cannot be read: Permission denied"


def test_a_data_dir_that_may_not_be_read_is_one_paragraph(photos, tmp_path, monkeypatch):
  exists = Path.exists

  def refuse(path):
    if "sets" in path.parts:
      raise PermissionError(13, "Permission denied", str(path))
    return exists(path)

  monkeypatch.setattr(Path, "exists", refuse)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert text.startswith(f"{tmp_path}/sets/pets/1.0.0 cannot be written (Permission denied)")


def test_few_images_are_in_memory_at_a_time():
  started = []

  def read(number):
    started.append(number)
    return number

  for consumed, number in enumerate(in_order(read, zip(range(500)), 2)):
    assert number == consumed
    assert len(started) <= consumed + 8
  assert len(started) == 500
