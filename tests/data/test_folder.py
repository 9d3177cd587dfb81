"""Image folders become sets: what is stored, what is left out, and what the fingerprint says."""

import _thread
import hashlib
import itertools
import json
import os
import shutil
import socket
import threading
import time
from pathlib import Path

import pytest
import tensorflow_datasets as tfds

from repjax.data import folder as folder_module
from repjax.data import preparation, reading
from repjax.data.folder import prepare_folder
from tests.data.folders import files_below, fingerprints, refusal, stored, write_image

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


def spoil(folder):
  """Adds files that cannot be read, and returns a part of the reason for each name."""
  whole = {
    "jpg": write_image(folder / "train" / "cat" / "whole.jpg", size=(90, 90)).read_bytes(),
    "png": write_image(folder / "train" / "cat" / "whole.png", size=(90, 90)).read_bytes(),
  }
  spoilt = {
    "train/cat/empty.jpg": (b"", "empty file"),
    "train/cat/text.png": (b"no image at all", "not an image of a known kind"),
    "train/cat/icon.jpg": (b"GIF89a" + bytes(40), "0 x 0 pixels"),
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


def test_unreadable_files_are_left_out_and_listed(photos, tmp_path):
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


def test_there_is_no_list_where_every_file_was_read(photos, tmp_path):
  assert not (prepare_folder(photos, "pets", data_dir=tmp_path).path / "skipped.txt").exists()


def test_strict_lists_unreadable_files_and_writes_nothing(photos, tmp_path):
  reasons = spoil(photos)
  text = refusal(photos, "pets", data_dir=tmp_path / "sets", strict=True)
  assert text.startswith(f"nothing was written, since {len(reasons)} of the files cannot be")
  assert all(f"{name}: " in text for name in reasons)
  assert not (tmp_path / "sets").exists()


@pytest.mark.parametrize("error", [TypeError("odd"), OverflowError("odd"), MemoryError("odd")])
def test_whatever_reading_one_file_raises_is_that_files_fault(tmp_path, monkeypatch, error):
  def fail(*_):
    raise error

  monkeypatch.setattr(reading.regular_files, "read", fail)
  read = reading.read_image_file(tmp_path / "a.jpg", "a.jpg", 3)
  assert read.fault in ("odd", "it needs more memory than there is")
  assert (read.name, read.label, read.data) == ("a.jpg", 3, b"")


def test_a_class_without_readable_images_is_an_error(photos, tmp_path):
  for path in (photos / "val" / "dog").iterdir():
    path.write_bytes(b"")
  text = refusal(photos, "pets", data_dir=tmp_path / "sets")
  assert "dog in validation (2 of 2: val/dog/val0.jpg: empty file)" in text
  assert "cat" not in text
  assert not (tmp_path / "sets").exists()


def test_images_in_both_splits_are_named(photos, tmp_path):
  assert prepare_folder(photos, "apart", data_dir=tmp_path).repeated == []
  shutil.copy(photos / "val/cat/val0.jpg", photos / "train/cat/again.jpg")
  shutil.copy(photos / "val/cat/val0.jpg", photos / "train/dog/other.jpg")
  shutil.copy(photos / "train/cat/train0.jpg", photos / "train/cat/twice.jpg")
  assert sorted(prepare_folder(photos, "pets", data_dir=tmp_path).repeated) == [
    "train/cat/again.jpg",
    "train/dog/other.jpg",
  ]


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
def test_an_impossible_name_is_refused_with_a_possible_one(photos, tmp_path, name, proposed):
  text = refusal(photos, name, data_dir=tmp_path / "sets")
  assert text.endswith(f"; take {proposed}, for example")
  assert not (tmp_path / "sets").exists()
  assert preparation.name_problems(proposed) == []


def test_the_number_of_threads_does_not_change_the_files(photos, tmp_path):
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


def test_the_checksum_covers_names_and_contents_in_their_order(photos, tmp_path):
  prepare_folder(photos, "pets", data_dir=tmp_path)
  expected = hashlib.sha256()
  for name, (data, _) in stored("pets", "train", tmp_path).items():
    expected.update(name.encode() + b"\0" + hashlib.sha256(data).digest())
  assert fingerprints("pets", tmp_path)["train"]["checksum"] == expected.hexdigest()


def test_images_are_stored_in_an_order_that_the_seed_fixes(photos, tmp_path):
  orders = []
  for seed in (0, 1):
    prepare_folder(photos, "pets", data_dir=tmp_path, seed=seed, replace=True)
    orders.append(list(stored("pets", "train", tmp_path)))
  assert orders[0] != orders[1]
  assert sorted(orders[0]) == sorted(orders[1])
  assert sorted(orders[0]) not in orders


def test_the_size_of_a_split_is_the_size_of_its_records(photos, tmp_path):
  prepare_folder(photos, "pets", data_dir=tmp_path)
  images = sum(path.stat().st_size for path in (photos / "train").rglob("*.jpg"))
  assert images < fingerprints("pets", tmp_path)["train"]["bytes"] < images + 8 * 200


def test_what_is_no_file_is_left_out_at_once(photos, tmp_path):
  os.mkfifo(photos / "train" / "cat" / "pipe.jpg")
  with socket.socket(socket.AF_UNIX) as unix:
    unix.bind(str(photos / "train" / "cat" / "unix.jpg"))
  (photos / "val" / "dog" / "device.jpg").symlink_to("/dev/zero")
  (photos / "val" / "dog" / "line\nbreak\x1b.jpg").write_bytes(b"")
  made = prepare_folder(photos, "pets", data_dir=tmp_path)
  assert made.counts == {"train": [4, 4], "validation": [2, 2]}
  assert {Path(name).stem.split("\n")[0] for name in made.skipped} == {
    "pipe",
    "unix",
    "device",
    "line",
  }
  lines = (made.path / "skipped.txt").read_text().splitlines()
  assert len(lines) == 4
  assert "train/cat/pipe.jpg\tit is no file but a pipe, a socket or a device" in lines
  assert r"val/dog/line\x0abreak\x1b.jpg" + "\tempty file" in lines


def test_no_thread_goes_on_after_a_signal(photos, tmp_path, monkeypatch):
  read, begun = folder_module.read_image_file, []

  def stopped(*arguments):
    begun.append(threading.current_thread())
    if len(begun) == 3:
      _thread.interrupt_main()
    time.sleep(0.05)
    return read(*arguments)

  monkeypatch.setattr(folder_module, "read_image_file", stopped)
  with pytest.raises(KeyboardInterrupt):
    prepare_folder(photos, "pets", data_dir=tmp_path / "sets", num_workers=2)
  assert not any(thread.is_alive() for thread in begun)
  assert len(begun) < 8
