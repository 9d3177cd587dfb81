"""TFRecord sets are copied without TensorFlow: checksums, copies, damage."""

import json
import os
import struct
import types

import numpy as np
import pytest

from repjax.data import eval_batches, open_source, storage
from repjax.data.folder import prepare_folder
from repjax.data.tfrecords import masked_crc32c, prepare_tfrecord, read_tfrecord
from repjax.errors import InputError
from tests.data.folders import files_below, write_image


def bitwise_crc32c(data):
  """Computes the checksum by its definition, bit by bit: division by Castagnoli's polynomial."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  return crc ^ 0xFFFFFFFF


def masked(data):
  crc = bitwise_crc32c(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32


def tfrecord(records_of_file):
  """Returns the bytes of a TFRecord file."""
  parts = []
  for record in records_of_file:
    length = struct.pack("<Q", len(record))
    parts += [length, struct.pack("<I", masked(length)), record, struct.pack("<I", masked(record))]
  return b"".join(parts)


@pytest.fixture
def tfrecord_set(tmp_path, monkeypatch):
  """A data_dir with a set of images twice: as array_record, and as TFRecord under another name."""
  for name in ("cat", "dog"):
    for split, count in (("train", 9), ("val", 2)):
      for number in range(count):
        write_image(tmp_path / "photos" / split / name / f"{number}.jpg")
  with monkeypatch.context() as patch:
    patch.setattr(storage, "SHARD_BYTES", 5000)
    made = prepare_folder(tmp_path / "photos", "known", data_dir=tmp_path).path
  folder = tmp_path / "pets" / "1.0.0"
  folder.mkdir(parents=True)
  for path in made.iterdir():
    if ".array_record" in path.name:
      reader = storage.array_record_module.ArrayRecordReader(str(path))
      copy = path.name.replace("known", "pets").replace("array_record", "tfrecord")
      (folder / copy).write_bytes(tfrecord(reader.read_all()))
    else:
      (folder / path.name).write_bytes(path.read_bytes())
  info = json.loads((folder / "dataset_info.json").read_text())
  info |= {"name": "pets", "fileFormat": "tfrecord"}
  (folder / "dataset_info.json").write_text(json.dumps(info))
  return tmp_path


def examples(name, split, data_dir):
  """Returns the examples without their "name", which holds the name of the set."""
  source = open_source(name, split, data_dir=str(data_dir))
  rows = [source.examples[index] for index in range(len(source.examples))]
  return [{key: row[key] for key in row.keys() - {"name"}} for row in rows]


@pytest.mark.parametrize(
  ("data", "checksum"),
  [  # the usual check value, and RFC 3720, appendix B.4
    (b"123456789", 0xE3069283),
    (bytes(32), 0x8A9136AA),
    (b"\xff" * 32, 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
  ],
)
def test_known_checksums_are_rotated_and_shifted(data, checksum):
  assert bitwise_crc32c(data) == checksum
  assert masked_crc32c(data) == ((checksum >> 15 | checksum << 17) + 0xA282EAD8) % 2**32


@pytest.mark.parametrize("size", [0, 1, 3, 128, 1000, 10007])
def test_checksums_follow_the_definition(size):
  data = np.random.default_rng(size).bytes(size)
  assert masked_crc32c(data) == masked(data)


def test_records_are_read_back(tmp_path):
  expected = [b"", b"a", bytes(1000), np.random.default_rng(0).bytes(777)]
  (tmp_path / "file").write_bytes(tfrecord(expected))
  assert list(read_tfrecord(tmp_path / "file")) == expected
  (tmp_path / "file").write_bytes(b"")
  assert list(read_tfrecord(tmp_path / "file")) == []


def test_every_cut_and_every_changed_byte_is_noticed(tmp_path):
  content = [b"first", b"second record"]
  data, first = tfrecord(content), len(tfrecord(content[:1]))
  path = tmp_path / "file"
  for size in range(1, len(data)):
    path.write_bytes(data[:size])
    if size == first:
      continue  # a whole file of one record; the set's metadata know better
    with pytest.raises(InputError, match=f"cut off in record {int(size > first)}"):
      list(read_tfrecord(path))
  for place in range(len(data)):
    path.write_bytes(data[:place] + bytes([data[place] ^ 0x10]) + data[place + 1 :])
    with pytest.raises(InputError, match=f"damaged (in|at) record {int(place >= first)}"):
      list(read_tfrecord(path))


def test_the_copy_holds_the_same_examples(tfrecord_set):
  with pytest.raises(InputError, match="--from-tfrecord pets"):
    open_source("pets", "train", data_dir=str(tfrecord_set))
  before = files_below(tfrecord_set / "pets")
  assert len([name for name in before if "train.tfrecord" in name]) > 1
  folder = prepare_tfrecord("pets", data_dir=str(tfrecord_set))
  assert folder == tfrecord_set / "pets" / "1.0.0"
  for split in ("train", "validation"):
    assert examples("pets", split, tfrecord_set) == examples("known", split, tfrecord_set)
    ours, theirs = (
      open_source(name, split, data_dir=str(tfrecord_set)).fingerprint for name in ("pets", "known")
    )
    assert ours == theirs | {"name": "pets"}
  after = files_below(tfrecord_set / "pets")
  assert {name for name, data in before.items() if after[name] != data} == {
    "1.0.0/dataset_info.json"
  }
  assert not list(folder.glob(".*"))
  with pytest.raises(InputError, match="stored as array_record already"):
    prepare_tfrecord("pets", data_dir=str(tfrecord_set))


def test_a_set_whose_metadata_names_no_format_is_taken_for_tfrecord(tfrecord_set):
  path = tfrecord_set / "pets/1.0.0/dataset_info.json"
  info = json.loads(path.read_text())
  del info["fileFormat"]
  path.write_text(json.dumps(info))
  prepare_tfrecord("pets", data_dir=str(tfrecord_set))
  assert len(examples("pets", "train", tfrecord_set)) == 18


def test_a_set_that_tfds_knows_is_copied_too(tfrecord_set):
  folder = tfrecord_set / "mnist" / "3.0.1"
  folder.mkdir(parents=True)
  for path in (tfrecord_set / "pets" / "1.0.0").iterdir():
    (folder / path.name.replace("pets", "mnist")).write_bytes(path.read_bytes())
  info = json.loads((folder / "dataset_info.json").read_text())
  (folder / "dataset_info.json").write_text(
    json.dumps(info | {"name": "mnist", "version": "3.0.1"})
  )
  (folder / "label.labels.txt").write_text("".join(f"{digit}\n" for digit in range(10)))
  prepare_tfrecord("mnist", data_dir=str(tfrecord_set))
  expected = [
    (row["image"], row["label"], row["index"]) for row in examples("known", "train", tfrecord_set)
  ]
  found = examples("mnist", "train", tfrecord_set)
  assert [(row["image"], row["label"], row["index"]) for row in found] == expected


def cut_off(path):
  path.write_bytes(path.read_bytes()[:-5])


def one_record_less(path):
  first = 16 + struct.unpack("<Q", path.read_bytes()[:8])[0]
  path.write_bytes(path.read_bytes()[first:])


def damaged(path):
  data = path.read_bytes()
  path.write_bytes(data[:500] + b"damage" + data[506:])


@pytest.mark.parametrize(
  ("damage", "said"),
  [
    (cut_off, "is cut off in record"),
    (one_record_less, "the set's metadata says"),
    (damaged, "is damaged in record 0"),
    (lambda path: path.unlink(), "1 of its"),
  ],
)
def test_a_damaged_set_is_not_copied(tfrecord_set, damage, said):
  path = sorted((tfrecord_set / "pets" / "1.0.0").glob("pets-train.tfrecord*"))[1]
  damage(path)
  before = files_below(tfrecord_set / "pets")
  with pytest.raises(InputError, match=said) as caught:
    prepare_tfrecord("pets", data_dir=str(tfrecord_set))
  assert path.name in str(caught.value)
  assert files_below(tfrecord_set / "pets") == before
  assert not list(path.parent.glob(".*"))


def test_without_room_nothing_is_begun(tfrecord_set, monkeypatch):
  monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 17_000}))
  with pytest.raises(InputError, match=r"copy needs 0\.0 GB, and the disk of .* has 0\.0 GB free"):
    prepare_tfrecord("pets", data_dir=str(tfrecord_set))


def test_a_copy_may_go_to_another_folder(tfrecord_set, tmp_path):
  source, target = tfrecord_set / "pets" / "1.0.0", tmp_path / "other"
  before = files_below(source)
  assert prepare_tfrecord("pets", data_dir=str(tfrecord_set), to=target) == target / "pets/1.0.0"
  assert files_below(source) == before
  assert {path.name for path in target.iterdir()} == {"pets"}
  assert not list(target.rglob("*tfrecord*"))
  for split in ("train", "validation"):
    assert examples("pets", split, target) == examples("known", split, tfrecord_set)
  with pytest.raises(InputError, match="a set called pets exists already"):
    prepare_tfrecord("pets", data_dir=str(tfrecord_set), to=target)
  prepare_tfrecord("pets", data_dir=str(tfrecord_set))  # has both formats now
  prepare_tfrecord("pets", data_dir=str(tfrecord_set), to=tmp_path / "third")
  assert files_below(tmp_path / "third") == files_below(target)


def test_a_variant_keeps_its_folder(tfrecord_set, tmp_path):
  folder = tfrecord_set / "pets" / "1.0.0"
  folder.rename(tfrecord_set / "moved")
  folder.parent.joinpath("small").mkdir()
  folder = (tfrecord_set / "moved").rename(folder.parent / "small" / "1.0.0")
  info = json.loads((folder / "dataset_info.json").read_text())
  (folder / "dataset_info.json").write_text(json.dumps(info | {"configName": "small"}))
  made = prepare_tfrecord("pets/small", data_dir=str(tfrecord_set), to=tmp_path / "other")
  assert made == tmp_path / "other/pets/small/1.0.0"
  theirs = examples("known", "train", tfrecord_set)
  assert examples("pets/small", "train", tmp_path / "other") == theirs


@pytest.mark.parametrize(
  ("name", "said"),
  [("pet", "unknown data set 'pet'; did you mean pets"), ("mnist", "3.0.1 does not exist")],
)
def test_a_set_that_is_not_there_cannot_be_copied(tfrecord_set, name, said):
  with pytest.raises(InputError, match=said):
    prepare_tfrecord(name, data_dir=str(tfrecord_set))


@pytest.mark.parametrize("length", [10**6, 2**40, 2**63, 2**64 - 1])
def test_a_length_beyond_the_end_of_the_file_is_not_allocated(tmp_path, length):
  header = struct.pack("<Q", length)
  path = tmp_path / "a.tfrecord"
  path.write_bytes(header + struct.pack("<I", masked(header)) + bytes(100))
  with pytest.raises(InputError, match="is cut off in record 0"):
    list(read_tfrecord(path))


def test_a_file_that_shrinks_while_it_is_read_is_cut_off(tmp_path, monkeypatch):
  path = tmp_path / "a.tfrecord"
  path.write_bytes(tfrecord([b"first", b"second"])[:-2])
  monkeypatch.setattr(os, "fstat", lambda _: types.SimpleNamespace(st_size=10**6, st_mode=0o100644))
  with pytest.raises(InputError, match="is cut off in record 1"):
    list(read_tfrecord(path))


def test_an_empty_record_is_an_image_that_cannot_be_read(tfrecord_set):
  path = min((tfrecord_set / "pets" / "1.0.0").glob("pets-train.tfrecord*"))
  data = path.read_bytes()
  path.write_bytes(tfrecord([b""]) + data[16 + struct.unpack("<Q", data[:8])[0] :])
  prepare_tfrecord("pets", data_dir=str(tfrecord_set))
  for num_workers in (0, 2):
    with pytest.raises(InputError, match=r"image 0 of the train split .* has no image"):
      examples_in_batches(tfrecord_set, num_workers)


def examples_in_batches(data_dir, num_workers):
  """Reads all training examples of "pets", by workers if there are any."""
  split = open_source("pets", "train", data_dir=str(data_dir)).examples
  batches = eval_batches(
    split,
    batch_size=4,
    image_size=16,
    resize_size=16,
    interpolation="bilinear",
    num_workers=num_workers,
  )
  return list(batches)


def test_a_pipe_in_place_of_a_file_is_not_waited_for(tfrecord_set):
  path = next((tfrecord_set / "pets" / "1.0.0").glob("*tfrecord*"))
  path.unlink()
  os.mkfifo(path)
  with pytest.raises(InputError, match=r"is incomplete: 1 of its .* files are missing"):
    prepare_tfrecord("pets", data_dir=str(tfrecord_set))
