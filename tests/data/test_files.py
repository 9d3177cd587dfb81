"""Files that users name: only regular ones, within bounds, and however a list is written."""

import inspect
import os
import socket
import sys
import unicodedata

import pytest

from repjax import regular_files
from repjax.data import files
from repjax.errors import InputError


@pytest.fixture
def odd_files(tmp_path):
  """Makes a pipe, a socket, a folder, a broken link, a link to itself and a large file."""
  os.mkfifo(tmp_path / "pipe.jpg")
  with socket.socket(socket.AF_UNIX) as unix:
    unix.bind(os.fspath(tmp_path / "socket.jpg"))
  (tmp_path / "folder.jpg").mkdir()
  (tmp_path / "broken.jpg").symlink_to("nowhere")
  (tmp_path / "self.jpg").symlink_to("self.jpg")
  (tmp_path / "device.jpg").symlink_to("/dev/zero")
  with (tmp_path / "large.jpg").open("wb") as file:
    file.truncate(files.LARGEST + 1)  # takes no room on the disk
  return tmp_path


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("pipe.jpg", "no file but a pipe"),
    ("socket.jpg", "No such device or address"),
    ("device.jpg", "no file but a pipe, a socket or a device"),
    ("folder.jpg", "Is a directory"),
    ("broken.jpg", "No such file"),
    ("self.jpg", "symbolic links"),
    ("large.jpg", "536,870,913 bytes, and at most 536,870,912"),
    ("a\0b.jpg", "NUL"),
    ("x" * 300, "too long"),
  ],
)
def test_what_is_no_file_is_refused_at_once(odd_files, name, said):
  with pytest.raises(OSError, match=said):
    regular_files.read(odd_files / name, files.LARGEST)
  assert not regular_files.is_regular(odd_files / name) or name == "large.jpg"


def test_a_link_to_a_file_is_the_file(tmp_path):
  (tmp_path / "a").write_bytes(b"content")
  (tmp_path / "b").symlink_to("a")
  assert regular_files.read(tmp_path / "b", 7) == b"content"
  assert regular_files.is_regular(tmp_path / "b")


def test_no_more_is_read_than_the_size_of_a_file_says():
  status = "/proc/self/status"  # a file of the kernel, whose size is 0
  if not os.path.exists(status):
    pytest.skip("needs /proc")
  with open(status) as file:
    assert file.read()
  assert regular_files.read(status, 100) == b""


def test_a_walk_follows_links_once_and_leaves_hidden_files_out(tmp_path):
  for name in ("b/2.jpg", "b/1.jpg", "a/c/3.jpg", ".hidden/4.jpg", "b/._1.jpg", "__MACOSX/5.jpg"):
    (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "in" / name).write_bytes(b"")
  (tmp_path / "out").mkdir()
  (tmp_path / "out" / "6.jpg").write_bytes(b"")
  (tmp_path / "in" / "linked").symlink_to(tmp_path / "out")
  (tmp_path / "out" / "loop").symlink_to(tmp_path / "in")
  (tmp_path / "in" / "b" / "self").symlink_to("self")
  (tmp_path / "in" / "gone.jpg").symlink_to("nowhere")
  problems = []
  found = list(files.walk(tmp_path / "in", problems))
  assert found == ["gone.jpg", "a/c/3.jpg", "b/1.jpg", "b/2.jpg", "b/self", "linked/6.jpg"]
  assert problems == []


def test_a_walk_does_not_end_where_recursion_would(tmp_path):
  deepest = tmp_path / "/".join("d" * 300)
  deepest.mkdir(parents=True)
  (deepest / "1.jpg").write_bytes(b"")
  limit, problems = sys.getrecursionlimit(), []
  sys.setrecursionlimit(len(inspect.stack()) + 150)
  try:
    assert [len(path) for path in files.walk(tmp_path, problems)] == [2 * 300 + 5]
  finally:
    sys.setrecursionlimit(limit)
  assert problems == []


NAMES = ["a.jpg", "a b.jpg", "größe.jpg", "sub/c.jpg", 'with "quotes".jpg', "form\x0cfeed.jpg"]
ENCODINGS = {
  "utf-8": ("", "utf-8"),
  "BOM": ("\ufeff", "utf-8"),
  "utf-16 little": ("\ufeff", "utf-16-le"),
  "utf-16 big": ("\ufeff", "utf-16-be"),
  "utf-16 without BOM": ("", "utf-16-le"),
  "utf-16 big without BOM": ("", "utf-16-be"),
}


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize(("mark", "encoding"), ENCODINGS.values(), ids=ENCODINGS)
def test_a_list_of_any_editor_is_read(tmp_path, monkeypatch, mark, encoding, newline):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "sub").mkdir()
  for name in NAMES:
    (tmp_path / name).write_bytes(b"")
  text = mark + newline.join(["", "  " + NAMES[0] + "\t", *NAMES[1:], "   ", ""])
  (tmp_path / "list").write_bytes(text.encode(encoding))
  assert [str(path) for path in files.read_list(tmp_path / "list")] == NAMES


@pytest.mark.parametrize(
  ("line", "name"),
  [
    (b'"sub/a b.jpg"', "sub/a b.jpg"),
    (b"'sub/a b.jpg'", "sub/a b.jpg"),
    (rb"sub\a b.jpg", "sub/a b.jpg"),
    (rb'".\sub\a b.jpg"', "./sub/a b.jpg"),
    (rb"back\slash.jpg", r"back\slash.jpg"),
    (unicodedata.normalize("NFD", "café.jpg").encode(), "café.jpg"),
    (unicodedata.normalize("NFC", "naïve.jpg").encode(), "nai\u0308ve.jpg"),
    ("café.jpg".encode("cp1252"), "café.jpg"),
    (b"caf\xe9 raw.jpg", os.fsdecode(b"caf\xe9 raw.jpg")),
    (rb"C:\gone\x.jpg", r"C:\gone\x.jpg"),
  ],
  ids=repr,
)
def test_a_line_means_the_file_that_exists(tmp_path, monkeypatch, line, name):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "sub").mkdir()
  for each in ("sub/a b.jpg", r"back\slash.jpg", "café.jpg", "nai\u0308ve.jpg"):
    (tmp_path / each).write_bytes(b"")
  (tmp_path / os.fsdecode(b"caf\xe9 raw.jpg")).write_bytes(b"")
  (tmp_path / "list").write_bytes(line)
  (found,) = files.read_list(tmp_path / "list")
  assert os.path.normpath(found) == os.path.normpath(name)


@pytest.mark.parametrize(
  ("content", "said"),
  [
    (b"ab\0c", "neither UTF-8"),
    ("a.jpg".encode("utf-32"), "neither UTF-8"),
    (b"\xff\xfea", "truncated data"),
    (None, "no file but a pipe"),
  ],
)
def test_what_is_no_list_is_one_sentence(tmp_path, content, said):
  path = tmp_path / "list.txt"
  os.mkfifo(path) if content is None else path.write_bytes(content)
  with pytest.raises(InputError, match=f"list.txt cannot be read as a list of paths: .*{said}"):
    files.read_list(path)
