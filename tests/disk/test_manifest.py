"""Checksums: every changed file is noticed, and a reader sees the files of one writer."""

import json
import os
import shutil
import threading

import google_crc32c
import pytest

from repjax import disk
from repjax.errors import InputError


def write(folder, value):
  """Replaces a folder by one whose files all hold the same value."""
  with disk.replacing(folder) as draft:
    (draft / "below").mkdir()
    for name in ("a", "b", "below/c"):
      (draft / name).write_text(value)
    disk.write_manifest(draft)


def read(folder, **options):
  """Returns the values of all files of a folder."""
  return disk.read_whole(lambda: disk.current_folder(folder), values, **options)


def values(snapshot):
  return [snapshot.read_bytes(snapshot.folder / name) for name in ("a", "b", "below/c")]


def test_a_manifest_lists_every_file_with_size_and_checksum(tmp_path):
  write(tmp_path / "folder", "123456789")
  assert json.loads((tmp_path / "folder" / "manifest.json").read_text()) == {
    "algorithm": "crc32c",
    # The check value of CRC-32C, Castagnoli, and the last four digits.
    "files": dict.fromkeys(("a", "b", "below/c"), "9 e3069283 36373839"),
  }


def flip(path):
  path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize(
  ("damage", "text"),
  [
    (flip, "is damaged: its bytes are not those that were written"),
    (lambda path: path.write_text(""), "is damaged: it has 0 bytes instead of 3"),
    (lambda path: path.unlink(), "is damaged: it is missing"),
    (lambda path: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
  ],
)
def test_damage_names_the_file_and_the_way_out(tmp_path, damage, text):
  write(tmp_path, "old")
  damage(tmp_path / "below" / "c")
  for check in (values, lambda snapshot: snapshot.check()):
    with pytest.raises(InputError, match=f"{tmp_path}/below/c {text}"):
      disk.read_whole(lambda: tmp_path, check)
  disk.Snapshot(tmp_path).check(but=[tmp_path / "below" / "c"])
  with pytest.raises(InputError, match="below/c"):
    disk.Snapshot(tmp_path).check(tmp_path / "below")


def test_without_the_check_a_changed_file_is_read(tmp_path):
  write(tmp_path, "old")
  flip(tmp_path / "a")
  with pytest.raises(InputError, match=r"on purpose.*verify=False or --no-verify"):
    read(tmp_path)
  assert read(tmp_path, verify=False) == [b"nld", b"old", b"old"]


def test_a_file_that_was_added_later_is_not_read(tmp_path):
  write(tmp_path, "old")
  (tmp_path / "d").touch()
  with pytest.raises(InputError, match=r"/d is damaged: manifest\.json does not list it"):
    disk.Snapshot(tmp_path).read_bytes(tmp_path / "d")


@pytest.mark.parametrize(
  "text",
  ["", "{", "[]", "{}", '{"algorithm": "crc32c"}', '{"algorithm": "md5", "files": {}}', "[" * 9**5],
)
def test_a_damaged_manifest_is_named(tmp_path, text):
  write(tmp_path, "old")
  (tmp_path / "manifest.json").write_text(text)
  with pytest.raises(InputError, match=r"manifest\.json is damaged"):
    read(tmp_path)
  assert read(tmp_path, verify=False) == [b"old"] * 3


@pytest.mark.parametrize("target", [None, "/dev/zero"])
def test_a_manifest_that_is_no_file_is_not_waited_for(tmp_path, target):
  write(tmp_path, "old")
  (tmp_path / "manifest.json").unlink()
  if target is None:
    os.mkfifo(tmp_path / "manifest.json")
  else:
    (tmp_path / "manifest.json").symlink_to(target)
  with pytest.raises(InputError, match=r"manifest\.json cannot be read: it is no file but a pipe"):
    read(tmp_path)


def test_a_folder_without_a_manifest_is_read_with_one_warning(tmp_path, capsys):
  write(tmp_path, "old")
  os.unlink(tmp_path / "manifest.json")
  for _ in range(2):
    assert read(tmp_path, warn=tmp_path) == [b"old"] * 3
  warned = capsys.readouterr().err
  assert warned.count("warning") == 1
  assert f"{tmp_path} cannot be checked for damage" in warned
  read(tmp_path, warn=tmp_path, verify=False)
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("verify", [False, True])
def test_a_reader_beside_a_writer_sees_the_old_or_the_new(tmp_path, verify):
  write(tmp_path / "folder", "0")
  ended = threading.Event()

  def keep_writing():
    number = 0
    while not ended.is_set():
      number += 1
      write(tmp_path / "folder", str(number))

  writer = threading.Thread(target=keep_writing)
  writer.start()
  try:
    seen = []
    while len(set(seen)) < 10:
      seen.append(tuple(read(tmp_path / "folder", verify=verify)))
  finally:
    ended.set()
    writer.join()
  assert all(len(set(found)) == 1 for found in seen)


def test_a_reader_starts_again_where_the_folder_was_replaced_while_it_read(tmp_path):
  write(tmp_path / "folder", "old")
  tries = []

  def slowly(snapshot):
    first = snapshot.read_bytes(snapshot.folder / "a")
    if not tries:
      write(tmp_path / "folder", "new")
    tries.append(first)
    return first, snapshot.read_bytes(snapshot.folder / "b")

  assert disk.read_whole(lambda: tmp_path / "folder", slowly, verify=False) == (b"new", b"new")
  assert tries == [b"old", b"new"]


def test_a_folder_that_is_gone_is_an_error_of_its_own(tmp_path):
  with pytest.raises(InputError, match="cannot be read: No such file"):
    read(tmp_path / "none")
  write(tmp_path / "folder", "old")
  with pytest.raises(InputError, match="cannot be read: No such file"):
    disk.read_whole(
      lambda: tmp_path / "folder",
      lambda snapshot: (shutil.rmtree(snapshot.folder), values(snapshot)),
      verify=False,
    )


@pytest.mark.parametrize(
  "name", ["/etc/hostname", "../folder/a", "below/../../folder/a", "a/", "./a", "a" * 1001]
)
def test_no_manifest_leads_out_of_its_folder(tmp_path, name):
  write(tmp_path / "folder", "old")
  manifest = {"algorithm": "crc32c", "files": {name: "3 00000000"}}
  (tmp_path / "folder" / "manifest.json").write_text(json.dumps(manifest))
  with pytest.raises(InputError, match=r"manifest\.json is damaged: .* is no file with a size"):
    disk.Snapshot(tmp_path / "folder")


def test_a_manifest_without_last_bytes_is_read(tmp_path):
  write(tmp_path, "old")
  file = tmp_path / "manifest.json"
  content = json.loads(file.read_text())
  content["files"] = {name: facts.rpartition(" ")[0] for name, facts in content["files"].items()}
  file.write_text(json.dumps(content))
  assert read(tmp_path) == [b"old"] * 3
  flip(tmp_path / "a")
  with pytest.raises(InputError, match="a is damaged"):
    read(tmp_path)


def test_files_that_end_with_their_own_checksum_are_told_apart(tmp_path):
  def with_checksum(data):
    return data + google_crc32c.value(data).to_bytes(4, "little")

  (tmp_path / "a").write_bytes(with_checksum(b"first"))
  disk.write_manifest(tmp_path)
  (tmp_path / "a").write_bytes(with_checksum(b"other"))
  for check in (disk.Snapshot.check, lambda snapshot: snapshot.read_bytes(tmp_path / "a")):
    with pytest.raises(InputError, match="its bytes are not those that were written"):
      check(disk.Snapshot(tmp_path))


def test_a_manifest_that_lists_nothing_of_a_folder_is_no_check(tmp_path):
  write(tmp_path, "old")
  file = tmp_path / "manifest.json"
  content = json.loads(file.read_text())
  del content["files"]["below/c"]
  file.write_text(json.dumps(content))
  snapshot = disk.Snapshot(tmp_path)
  snapshot.check()
  snapshot.check(tmp_path / "none")
  with pytest.raises(InputError, match=r"manifest\.json is damaged: it lists no file of .*below"):
    snapshot.check(tmp_path / "below")
