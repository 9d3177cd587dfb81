"""Folders of images and masks become sets; each file that cannot be used is named."""

import json
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from PIL import Image

from repjax.data import open_source
from repjax.data.mask_folder import prepare_mask_folder
from repjax.data.masks import IGNORED
from repjax.data.pairs import pair_of
from repjax.errors import InputError
from tests.data.folders import files_below
from tests.data.images import encoded, noise, rotated
from tests.data.pairs import COLORS, classes_of, pairs_folder, with_palette, write_pair, write_table


def stored(name, data_dir):
  """Returns the classes of each image, the bytes of each image, and the source of each split."""
  classes, images, sources = {}, {}, {}
  for split in ("train", "validation"):
    source = sources[split] = open_source(name, split, data_dir=str(data_dir))
    for index in range(len(source.examples)):
      example = source.examples[index]
      classes[example["file_name"]] = pair_of(example, (0, 0, 0)).classes
      images[example["file_name"]] = example["image"]
  return classes, images, sources


def assert_same(found, expected):
  assert found.keys() == expected.keys()
  for name, classes in expected.items():
    np.testing.assert_array_equal(found[name], classes)


def refusal(*arguments, **options):
  with pytest.raises(InputError) as caught:
    prepare_mask_folder(*arguments, **options)
  return str(caught.value)


def test_a_folder_of_splits_is_stored_pair_by_pair(tmp_path):
  expected = pairs_folder(tmp_path / "folder", train=3, val=2)
  made = prepare_mask_folder(tmp_path / "folder", "own", data_dir=tmp_path)
  classes, images, sources = stored("own", tmp_path)
  assert_same(classes, expected)
  for name, data in images.items():
    assert data == (tmp_path / "folder" / name).read_bytes()
  assert made.counts == {"train": 3, "validation": 2}
  assert made.class_names == ("0", "1", "2")  # no classes.json: numbers up to the largest
  assert sources["train"].class_names == made.class_names
  assert sources["train"].canvas() == (16, 20)
  for split, part in (("train", "train"), ("validation", "val")):
    counts = sum(
      np.bincount(each.ravel(), minlength=3) for name, each in expected.items() if part in name
    )
    assert made.pixels[split] == counts.tolist()
  assert not (made.path / "skipped.txt").exists()
  again = prepare_mask_folder(tmp_path / "folder", "own", data_dir=tmp_path, replace=True)
  assert stored("own", tmp_path)[2]["train"].fingerprint == sources["train"].fingerprint
  assert again == made


def test_tfds_itself_opens_the_set(tmp_path):
  write_table(tmp_path / "folder")
  expected = pairs_folder(tmp_path / "folder")
  prepare_mask_folder(tmp_path / "folder", "own", data_dir=tmp_path)
  builder = tfds.builder("own", data_dir=str(tmp_path))
  assert builder.info.features["mask"].names == ["sky", "cat", "dog"]
  example = builder.as_data_source("validation")[0]
  name = example["file_name"].decode()
  np.testing.assert_array_equal(example["mask"][..., 0], expected[name])


def test_a_folder_without_splits_is_divided(tmp_path):
  expected = {
    f"images/{number}.jpg": write_pair(tmp_path / "folder", str(number), seed=number)
    for number in range(10)
  }
  made = prepare_mask_folder(tmp_path / "folder", "own", data_dir=tmp_path)
  assert made.counts == {"train": 8, "validation": 2}
  assert_same(stored("own", tmp_path)[0], expected)
  made = prepare_mask_folder(
    tmp_path / "folder", "own", data_dir=tmp_path, replace=True, validation_ratio=0.5
  )
  assert made.counts == {"train": 5, "validation": 5}


def test_the_fingerprint_follows_masks_and_not_how_they_are_written(tmp_path):
  folder = tmp_path / "folder"
  pairs_folder(folder)

  def checksum():
    prepare_mask_folder(folder, "own", data_dir=tmp_path, replace=True)
    return open_source("own", "train", data_dir=str(tmp_path)).fingerprint["checksum"]

  before = checksum()
  path = folder / "train" / "masks" / "1.png"
  classes = np.asarray(Image.open(path))
  path.write_bytes(encoded(with_palette(classes), compress_level=0))
  assert checksum() == before
  path.write_bytes(encoded(np.where(classes == 1, 2, classes).astype(np.uint8)))
  assert checksum() != before


def test_the_table_names_classes_by_values_and_colours(tmp_path):
  folder = tmp_path / "folder"
  write_table(folder, colors=COLORS, values=[10, 20, 30], ignore=[[9, 9, 9], 7])
  classes = classes_of(20, 16)
  by_color = np.asarray(COLORS, np.uint8)[classes]
  by_color[0, 0] = 9
  by_value = (classes + 1) * 10
  by_value[0, 0] = 7
  for split in ("train", "val"):
    write_pair(folder / split, "color", mask=by_color)
    write_pair(folder / split, "value", mask=by_value)
  made = prepare_mask_folder(folder, "own", data_dir=tmp_path, strict=True)
  classes[0, 0] = IGNORED
  found, _, sources = stored("own", tmp_path)
  assert len(found) == 4
  assert_same(found, dict.fromkeys(found, classes))
  assert made.class_names == sources["validation"].class_names == ("sky", "cat", "dog")
  assert sources["train"].colors == COLORS


def test_an_image_is_compared_with_its_mask_as_exif_turns_it(tmp_path):
  pairs_folder(tmp_path / "folder")
  image = tmp_path / "folder" / "train" / "images" / "0.jpg"
  image.write_bytes(rotated(Image.fromarray(noise(16, 20)), 6))
  prepare_mask_folder(tmp_path / "folder", "own", data_dir=tmp_path, strict=True)
  image.write_bytes(rotated(Image.fromarray(noise(20, 16)), 6))
  text = refusal(tmp_path / "folder", "own", data_dir=tmp_path, strict=True, replace=True)
  assert "train/masks/0.png: it has 20 x 16 pixels, and its image has 16 x 20" in text


def spoil(folder):
  """Adds pairs that cannot be used, and returns a part of the reason for each name."""
  train = folder / "train"
  classes = classes_of(20, 16)
  spoilt = {
    "unknown": (np.where(classes == 1, 9, classes).astype(np.uint8), "has the value 9"),
    "deep": (classes.astype(np.uint16), "16 bits for each value"),
    "colour": (np.dstack([classes] * 3), "mask of colours (RGB)"),
    "size": (classes_of(20, 17), "it has 20 x 17 pixels, and its image has 20 x 16"),
  }
  reasons = {}
  for name, (mask, reason) in spoilt.items():
    write_pair(train, name, mask=mask)
    reasons[f"train/masks/{name}.png"] = reason
  for name in ("alone", "blank", "cut", "jpeg", "twice"):
    write_pair(train, name)
  (train / "masks" / "alone.png").unlink()
  reasons["train/images/alone.jpg"] = "it has no mask train/masks/alone.png"
  write_pair(train, "mask")
  (train / "images" / "mask.jpg").unlink()
  reasons["train/masks/mask.png"] = "it has no image train/images/mask"
  (train / "images" / "blank.jpg").write_bytes(b"")
  reasons["train/images/blank.jpg"] = "empty file"
  path = train / "masks" / "cut.png"
  path.write_bytes(path.read_bytes()[:-30])
  reasons["train/masks/cut.png"] = ""
  (train / "masks" / "jpeg.png").rename(train / "masks" / "jpeg.jpg")
  reasons["train/masks/jpeg.jpg"] = "a mask is a .png file"
  reasons["train/images/jpeg.jpg"] = "it has no mask train/masks/jpeg.png"
  shutil.copy(train / "images" / "twice.jpg", train / "images" / "twice.jpeg")
  for ending in ("jpg", "jpeg"):
    reasons[f"train/images/twice.{ending}"] = "2 images and 1 masks share its name"
  return reasons


def test_pairs_that_cannot_be_used_are_left_out_and_listed(tmp_path):
  folder = tmp_path / "folder"
  write_table(folder)
  expected = pairs_folder(folder)
  reasons = spoil(folder)
  (folder / "train" / "images" / "notes.txt").write_text("x")
  made = prepare_mask_folder(folder, "own", data_dir=tmp_path / "sets")
  assert made.skipped.keys() == reasons.keys()
  for name, reason in reasons.items():
    assert made.skipped[name]
    assert reason in made.skipped[name]
  assert made.others == ["train/images/notes.txt"]
  lines = (made.path / "skipped.txt").read_text().splitlines()
  assert [line.partition("\t")[0] for line in lines] == sorted([*reasons, *made.others])
  assert_same(stored("own", tmp_path / "sets")[0], expected)


def test_strict_lists_them_and_writes_nothing(tmp_path):
  folder = tmp_path / "folder"
  write_table(folder)
  pairs_folder(folder)
  reasons = spoil(folder)
  text = refusal(folder, "own", data_dir=tmp_path / "sets", strict=True)
  assert text.startswith(f"nothing was written, since {len(reasons)} of the files cannot be used")
  assert all(f"{name}: " in text for name in reasons)
  assert files_below(tmp_path / "sets") == {}


def lose_masks(folder):
  shutil.rmtree(folder / "val" / "masks")


def lose_all_masks(folder):
  for path in (folder / "val" / "masks").iterdir():
    path.unlink()


def spoil_all_masks(folder):
  for path in (folder / "val" / "masks").iterdir():
    path.write_bytes(b"")


def ignore_everything(folder):
  for path in (folder / "val" / "masks").iterdir():
    path.write_bytes(encoded(np.full((16, 20), 255, np.uint8)))


def paint_black_and_white(folder):
  for path in folder.glob("*/masks/*"):
    path.write_bytes(encoded(np.eye(16, 20, dtype=np.uint8) * 255))


def use_one_class(folder):
  for path in folder.glob("*/masks/*"):
    path.write_bytes(encoded(np.zeros((16, 20), np.uint8)))


def lose_validation(folder):
  shutil.rmtree(folder / "val")


@pytest.mark.parametrize(
  ("change", "said"),
  [
    (lose_masks, "val has no folder called masks; put images into"),
    (lose_all_masks, "no pair of image and mask for validation (val/images/0.jpg: it has no mask"),
    (spoil_all_masks, "no pair of the validation split could be used, for example val/masks/0.png"),
    (ignore_everything, "no pixel of the validation split has a class"),
    (paint_black_and_white, '255 is a class too, write into {}/classes.json: {{"names": ["backg'),
    (use_one_class, "{} that counts has the class 0. Use masks of at least two classes"),
    (lose_validation, "no validation images. Add a folder called val, or set a share"),
    (shutil.rmtree, "does not exist; give a folder that holds images and masks"),
  ],
)
def test_a_folder_that_cannot_be_used_is_refused(tmp_path, change, said):
  pairs_folder(tmp_path / "folder")
  change(tmp_path / "folder")
  message = refusal(tmp_path / "folder", "own", data_dir=tmp_path / "sets")
  assert said.format(tmp_path / "folder") in message
  assert files_below(tmp_path / "sets") == {}


@pytest.mark.parametrize(
  ("table", "said"),
  [
    ("[]", "must be a table"),
    ('{"names": ["a", "b"]', "it is no JSON"),
    ({"colors": []}, "names is missing. A table of classes looks like"),
    ({"names": ["a", 1]}, "names[1] must be a string"),
    ({"names": ["a", "b"], "colour": []}, "did you mean colors"),
    ({"names": ["a"]}, "it has 1 names, and at least two classes"),
    ({"names": ["a", "a"]}, 'names that stand there twice: "a"'),
    ({"names": ["a", "b\n"]}, "unprintable characters"),
    ({"names": ["a", "b"], "colors": [[0, 0, 0]]}, "it has 2 names and 1 colors"),
    ({"names": ["a", "b"], "colors": [[0, 0, 0], [0, 0, 256]]}, "colors[1][2] must be"),
    ({"names": ["a", "b"], "colors": [[0, 0, 0]] * 2}, "twice: [0, 0, 0]"),
    ({"names": ["a", "b"], "values": [1, 1]}, "values that stand there twice: 1"),
    ({"names": ["a", "b"], "values": [1, 2], "ignore": [2]}, "those of a class: 2"),
    ({"names": ["a", "b"], "ignore": [1]}, "ignored and are those of a class: 1"),
  ],
)
def test_a_table_that_cannot_be_used_is_refused(tmp_path, table, said):
  pairs_folder(tmp_path / "folder")
  text = table if isinstance(table, str) else json.dumps(table)
  (tmp_path / "folder" / "classes.json").write_text(text)
  message = refusal(tmp_path / "folder", "own", data_dir=tmp_path / "sets")
  assert "classes.json cannot be used: " in message
  assert said in message


def test_pairs_that_both_splits_have_are_named(tmp_path):
  pairs_folder(tmp_path / "folder")
  for inner, name in (("images", "0.jpg"), ("masks", "0.png")):
    shutil.copy(tmp_path / "folder/val" / inner / name, tmp_path / "folder/train" / inner / name)
  made = prepare_mask_folder(tmp_path / "folder", "own", data_dir=tmp_path)
  assert made.repeated == ["train/images/0.jpg"]
