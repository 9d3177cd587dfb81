"""Replacing folders and files: old or new whenever a process ends, and nothing of other people."""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from repjax import disk
from repjax.disk import folders, private
from repjax.errors import InputError

ROOT = Path(__file__).parents[2]
TOO_LONG = r"longer than 255 bytes|File name too long"
EXCHANGES = [folders._renamed, lambda *_: False]  # by the system in one step; by two renames


@pytest.fixture(params=EXCHANGES, ids=["one step", "two renames"], autouse=True)
def exchange(request, monkeypatch):
  """Runs every test with and without the system's call that exchanges two folders."""
  monkeypatch.setattr(folders, "_renamed", request.param)
  return request.param


def make(path, **files):
  path.mkdir(parents=True)
  for name, text in files.items():
    (path / name).write_text(text)
  return path


def texts(folder):
  """Returns the text of every file below a folder, by path."""
  files = (path for path in folder.rglob("*") if path.is_file())
  return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


def replace(path, **options):
  with disk.replacing(path, **options) as draft:
    (draft / "file").write_text("new")


def replace_and_fail(path, error):
  with disk.replacing(path) as draft:
    (draft / "file").write_text("new")
    raise error


@pytest.mark.parametrize("old", [None, {}, {"file": "old", "more": ""}])
def test_a_finished_folder_takes_the_place_of_the_old_one(tmp_path, old):
  if old is not None:
    make(tmp_path / "folder", **old)
  replace(tmp_path / "folder", own=["more"])
  assert texts(tmp_path) == {"folder/file": "new"}
  assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "x"), KeyboardInterrupt(), KeyError()])
@pytest.mark.parametrize("exists", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, error, exists):
  path = tmp_path / "a" / "folder"
  if exists:
    make(path, file="old")
  before = texts(tmp_path)
  kind = InputError if isinstance(error, OSError) else type(error)
  with pytest.raises(kind):
    replace_and_fail(path, error)
  assert texts(tmp_path) == before
  assert (tmp_path / "a").exists() == exists


CALLS = ("mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir")


class Ended(BaseException):
  """The end of a process: nothing that it would clean up is cleaned up."""


@contextlib.contextmanager
def ending_at(number, monkeypatch):
  """Ends the process, as far as files can tell, before the call of this number to the system."""
  counter = itertools.count()

  def counted(function):
    def call(*arguments, **options):
      if next(counter) >= number:
        raise Ended
      return function(*arguments, **options)

    return call

  opened, open_file = [], os.open

  def noted(*arguments, **options):
    opened.append(open_file(*arguments, **options))
    return opened[-1]

  with monkeypatch.context() as patch:
    patch.setattr(os, "open", noted)
    for name in CALLS:
      patch.setattr(os, name, counted(getattr(os, name)))
    patch.setattr(folders, "_renamed", counted(folders._renamed))
    patch.setattr(private, "_discard", counted(private._discard))
    yield
  for file in opened:  # as the system does, which also ends the locks
    with contextlib.suppress(OSError):
      os.close(file)


@pytest.mark.parametrize("exists", [False, True])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_and_the_next_call_tidies_up(
  tmp_path, monkeypatch, exists
):
  for number in itertools.count():
    folder = tmp_path / str(number)
    path = folder / "folder"
    folder.mkdir()
    if exists:
      make(path, file="old")
    finished = True
    with ending_at(number, monkeypatch):
      try:
        replace(path)
      except Ended:
        finished = False
    found = disk.current_folder(path)
    assert (texts(found) if found.exists() else {}) in ({"file": "old"}, {"file": "new"}, {})
    assert found.exists() or not exists
    replace(path)
    assert texts(folder) == {"folder/file": "new"}
    assert [each.name for each in folder.iterdir()] == ["folder"]
    if finished:
      break
  assert number > 8


def test_an_old_folder_that_a_kill_left_aside_is_read_and_put_back(tmp_path, exchange):
  left = make(tmp_path / ".folder.repjax-0123abcd")
  (left / "owner.json").write_bytes(disk.new_holder(target="folder"))
  make(left / "old", file="old")
  path = tmp_path / "folder"
  assert texts(disk.current_folder(path)) == {"file": "old"}
  with pytest.raises(KeyError), disk.replacing(path):
    raise KeyError
  assert texts(tmp_path) == {"folder/file": "old"}


@pytest.mark.parametrize(
  "name",
  [
    *("folder.old", "folder.draft", ".folder.repjax-", ".folder.repjax-0123abcd5", ".folder.tmp"),
    *(".other.repjax-0123abcd", ".folder.repjax-0123ABCD", "folder.repjax-0123abcd"),
  ],
)
def test_folders_of_other_people_stay(tmp_path, name):
  make(tmp_path / name, file="theirs")
  make(tmp_path / ".folder.repjax-00000000", file="no owner, and so not ours")
  make(tmp_path / ".folder.repjax-11111111", file="more than ours", **{"owner.json": "{}"})
  before = texts(tmp_path)
  for _ in range(2):
    replace(tmp_path / "folder")
  assert texts(tmp_path) == {**before, "folder/file": "new"}


def test_what_a_folder_holds_of_other_people_moves_over(tmp_path):
  path = make(tmp_path / "folder", file="old", gone="old")
  disk.write_manifest(path)
  make(path / "below", theirs="theirs")
  (path / "notes").symlink_to("nowhere")
  (path / "data").symlink_to(tmp_path)
  for _ in range(2):
    with disk.replacing(path) as draft:
      (draft / "file").write_text("new")
      disk.write_manifest(draft)
  assert set(texts(path)) == {"file", "below/theirs", "manifest.json"}
  assert (path / "file").read_text() == "new"
  assert os.readlink(path / "notes") == "nowhere"
  assert os.readlink(path / "data") == str(tmp_path)


@pytest.mark.parametrize("manifest", [None, "{"], ids=["missing", "damaged"])
def test_without_a_manifest_names_tell_what_is_of_other_people(tmp_path, manifest):
  path = make(tmp_path / "folder", file="old", shard0="old", theirs="theirs")
  make(path / "params", stale="old")
  make(path / "below", theirs="theirs")
  if manifest is not None:
    (path / "manifest.json").write_text(manifest)
  with disk.replacing(path, own=["shard*"]) as draft:
    (draft / "file").write_text("new")
    make(draft / "params", fresh="new")
  kept = {"theirs": "theirs", "below/theirs": "theirs"}
  assert texts(path) == {"file": "new", "params/fresh": "new", **kept}
  disk.remove(path, ["file", "params"])
  assert texts(path) == kept


def test_to_remove_a_folder_leaves_what_is_of_other_people(tmp_path):
  path = make(tmp_path / "folder", file="old")
  disk.write_manifest(path)
  make(path / "below", theirs="theirs")
  (path / "data").symlink_to(tmp_path)
  disk.remove(path, ["file"])
  assert {each.name for each in path.iterdir()} == {"below", "data"}
  assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_the_root_of_the_file_system_is_not_replaced():
  with pytest.raises(InputError, match="/ cannot be replaced; give the path of a folder"):
    replace(Path("/"), known=["params"])


def test_a_folder_that_is_not_ours_is_not_replaced(tmp_path):
  path = make(tmp_path / "deploy", thesis="theirs")
  with pytest.raises(InputError, match="deploy holds files that repjax did not write"):
    replace(path, known=["params"])
  with pytest.raises(InputError, match="deploy exists already"):
    replace(path, exists=False)
  assert texts(tmp_path) == {"deploy/thesis": "theirs"}
  make(path / "params")
  replace(path, known=["params"])


def test_a_new_place_is_checked_before_any_work(tmp_path, monkeypatch):
  make(tmp_path / "full", file="theirs")
  make(tmp_path / "empty")
  (tmp_path / "link").symlink_to("empty")
  assert disk.check_new(tmp_path / "link") == tmp_path / "empty"
  assert disk.check_new(tmp_path / "a" / "b") == tmp_path / "a" / "b"
  assert disk.check_place(tmp_path / "full" / "file") == tmp_path / "full" / "file"
  for name in ("full", "full/file"):
    with pytest.raises(InputError, match=f"{name} exists already"):
      disk.check_new(tmp_path / name)
  with pytest.raises(InputError, match="full/file cannot be a folder"):
    disk.check_place(tmp_path / "full" / "file" / "a" / "b")
  monkeypatch.chdir(tmp_path / "empty")
  with pytest.raises(InputError, match="current folder cannot be replaced"):
    disk.check_new(tmp_path / "link")
  monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
  with pytest.raises(InputError, match=f"a/b cannot be written: .* in {tmp_path}. Change"):
    disk.check_place(tmp_path / "a" / "b")
  assert not (tmp_path / "a").exists()


def test_of_a_link_the_folder_behind_it_is_replaced(tmp_path):
  make(tmp_path / "disk" / "real", file="old")
  (tmp_path / "link").symlink_to("disk/real")
  replace(tmp_path / "link")
  assert (tmp_path / "link").is_symlink()
  assert texts(tmp_path / "disk") == {"real/file": "new"}
  assert {path.name for path in tmp_path.iterdir()} == {"disk", "link"}
  shutil.rmtree(tmp_path / "disk")
  with pytest.raises(InputError, match="link is a link to disk/real, which does not exist"):
    replace(tmp_path / "link")
  assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_to_remove_a_link_leaves_what_it_names(tmp_path):
  make(tmp_path / "real", file="kept")
  (tmp_path / "link").symlink_to("real")
  disk.remove(tmp_path / "link", [])
  assert texts(tmp_path) == {"real/file": "kept"}
  disk.remove(tmp_path / "real", ["file"])
  assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("length", [200, 240, 255])
def test_every_name_that_the_disk_takes_can_be_replaced(tmp_path, length):
  for _ in range(2):
    replace(tmp_path / ("n" * length))
    with disk.replacing_file(tmp_path / ("f" * length)) as draft:
      draft.write_text("new")
  assert sorted(texts(tmp_path)) == ["f" * length, "n" * length + "/file"]


def test_a_name_that_is_too_long_is_one_paragraph(tmp_path):
  for name in ("n" * 256, "n" * 300):
    with pytest.raises(InputError, match=TOO_LONG):
      replace(tmp_path / name)
    with (
      pytest.raises(InputError, match=TOO_LONG),
      disk.replacing_file(tmp_path / name),
    ):
      pass


def test_a_file_where_a_folder_should_be_is_named(tmp_path):
  (tmp_path / "file").touch()
  for path in (tmp_path / "file", tmp_path / "file" / "below" / "folder"):
    with pytest.raises(InputError, match=f"{tmp_path}/file cannot be a folder"):
      replace(path)


def test_two_processes_do_not_write_one_folder(tmp_path):
  program = (
    "import sys\nfrom pathlib import Path\nfrom repjax import disk\n"
    "with disk.replacing(Path(sys.argv[1])) as draft:\n"
    "  (draft / 'file').write_text('theirs')\n  print('writing', flush=True)\n  sys.stdin.read()\n"
  )
  other = subprocess.Popen(
    [sys.executable, "-c", program, tmp_path / "folder"],
    cwd=ROOT,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  )
  assert other.stdout is not None
  assert other.stdout.readline() == "writing\n"
  with pytest.raises(InputError, match=rf"another process is writing .*: process {other.pid} on"):
    replace(tmp_path / "folder")
  with disk.replacing_file(tmp_path / "folder.txt") as draft:
    draft.write_text("")
  other.send_signal(signal.SIGKILL)
  other.communicate()
  assert len(list(tmp_path.iterdir())) == 2  # the text, and what the killed process left
  replace(tmp_path / "folder")
  assert {path.name for path in tmp_path.iterdir()} == {"folder", "folder.txt"}


def test_only_what_dead_processes_left_is_swept(tmp_path):
  with disk.replacing(tmp_path / "living") as draft:
    (draft / "file").write_text("new")
    make(tmp_path / ".empty.repjax-0123abcd")
    left = make(tmp_path / ".x.repjax-0123abcd", **{"owner.json": ""})
    make(left / "new", file="")
    disk.sweep(tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
  assert texts(tmp_path) == {"living/file": "new"}


@pytest.mark.parametrize("ends", [True, False])
def test_what_threads_of_a_failed_save_make_again_is_removed(tmp_path, monkeypatch, ends):
  """`ends`: the process ends before, so that the next one has to remove it."""

  def late(seconds):
    make(private / "new" / "tree.orbax-checkpoint-tmp" / "d", file="late")

  if not ends:
    monkeypatch.setattr("repjax.disk.private.time.sleep", late)
  with disk.private_folder(tmp_path / "tree", alone=True) as private:
    make(private / "new" / "tree.orbax-checkpoint-tmp")
  if ends:
    late(0)
    disk.sweep(tmp_path)
  assert not any(tmp_path.iterdir())


def test_a_folder_without_an_owner_that_holds_anything_else_stays(tmp_path):
  make(tmp_path / ".tree.repjax-0123abcd" / "new", file="somebody's")
  disk.sweep(tmp_path)
  assert texts(tmp_path) == {".tree.repjax-0123abcd/new/file": "somebody's"}


@pytest.mark.parametrize(("host", "stays"), [(socket.gethostname(), False), ("elsewhere", True)])
def test_a_check_of_a_place_removes_what_dead_processes_of_this_machine_left(tmp_path, host, stays):
  owner = json.loads(disk.new_holder(target="mistyped")) | {"host": host}
  left = make(tmp_path / ".mistyped.repjax-0123abcd", **{"owner.json": json.dumps(owner)})
  make(left / "new", file="")
  make(tmp_path / ".mine.tmp", file="")
  disk.check_new(tmp_path / "other")
  assert left.exists() == stays
  assert (tmp_path / ".mine.tmp" / "file").exists()


def test_everything_is_on_the_disk_before_it_has_its_name_and_the_name_after(tmp_path, monkeypatch):
  fsync, synced = os.fsync, []

  def note(descriptor):
    where = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
    synced.append((where.name, (tmp_path / "name").exists()))
    fsync(descriptor)

  monkeypatch.setattr(os, "fsync", note)
  with disk.replacing(tmp_path / "name") as draft:
    make(draft / "below", file="x")
  assert set(synced[:-1]) == {("new", False), ("below", False), ("file", False)}
  assert synced[-1] == (tmp_path.name, True)


def test_a_file_is_replaced_whole_through_links_too(tmp_path):
  (tmp_path / "real").write_text("old")
  (tmp_path / "file").symlink_to("real")
  with disk.replacing_file(tmp_path / "file") as draft:
    draft.write_text("new")
  assert (tmp_path / "file").is_symlink()
  assert texts(tmp_path) == {"file": "new", "real": "new"}
  with (
    pytest.raises(InputError, match="file could not be written: File exists"),
    disk.replacing_file(tmp_path / "file", exists=False) as draft,
  ):
    draft.write_text("newer")
  with pytest.raises(InputError, match="cannot be a file"), disk.replacing_file(tmp_path):
    pass
  assert texts(tmp_path) == {"file": "new", "real": "new"}


def test_a_file_in_a_draft_needs_no_draft_of_its_own(tmp_path, monkeypatch):
  with disk.replacing(tmp_path / "folder") as draft, monkeypatch.context() as patch:
    # A private folder that could not be removed again would become a part of the new folder.
    patch.setattr(folders, "private_folder", None)
    disk.write_json(draft / "below" / "file.json", [1])
  assert texts(tmp_path) == {"folder/below/file.json": "[\n  1\n]\n"}


def test_a_disk_that_cannot_be_written_is_one_paragraph(tmp_path, monkeypatch):
  def refuse(*arguments, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  monkeypatch.setattr(os, "mkdir", refuse)
  with pytest.raises(InputError, match="folder could not be written: Read-only file system"):
    replace(tmp_path / "folder")


@pytest.mark.parametrize(
  ("pid", "host", "swept"),
  [
    (os.getpid(), os.uname().nodename, False),
    (2**22 + 1, os.uname().nodename, True),
    (1, "x", False),
  ],
  ids=["alive", "dead", "elsewhere"],
)
def test_without_locks_the_number_of_the_process_decides(tmp_path, monkeypatch, pid, host, swept):
  def none(file, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", none)
  held = json.loads(disk.new_holder(target="folder"))
  owner = json.dumps({**held, "pid": pid, "host": host})
  left = make(tmp_path / ".folder.repjax-0123abcd", **{"owner.json": owner})
  living = disk.sweep(tmp_path)
  assert left.exists() == (not swept)
  assert len(living) == (pid == os.getpid())
  if not living:
    replace(tmp_path / "folder")
    assert texts(tmp_path / "folder") == {"file": "new"}
