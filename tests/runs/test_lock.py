"""One writer for a workdir, whatever becomes of it."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys

import pytest

from repjax import disk
from repjax.disk import locks
from repjax.errors import InputError
from repjax.runs import lock, lock_file
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture
def other(tmp_path):
  """A process that holds the lock of `run`."""
  program = (
    "import signal, sys, types\n"
    # The packages without what they import, which takes a second and has no part in locks.
    "for name in ('repjax', 'repjax.runs'):\n"
    "  sys.modules[name] = types.ModuleType(name)\n"
    f"  sys.modules[name].__path__ = [{str(tiny.ROOT)!r} + '/' + name.replace('.', '/')]\n"
    "from repjax.runs import lock\n"
    f"with lock.hold({str(tmp_path / 'run')!r}): print('held', flush=True); signal.pause()"
  )
  process = subprocess.Popen(
    [sys.executable, "-c", program], cwd=tiny.ROOT, stdout=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  assert process.stdout.readline() == "held\n"
  yield process
  process.kill()
  process.wait()


def test_a_second_process_is_refused_and_told_of_the_first(other, tmp_path):
  with (
    pytest.raises(InputError, match=f"in use by process {other.pid} on {os.uname().nodename} sin"),
    lock.hold(tmp_path / "run"),
  ):
    pytest.fail("held twice")
  assert json.loads(lock_file(tmp_path / "run").read_text())["pid"] == other.pid


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_lock_ends_with_its_process(other, tmp_path, number):
  other.send_signal(number)
  other.wait()
  (tmp_path / "run").mkdir(exist_ok=True)  # a process that could clean up has removed it
  (tmp_path / "run" / "kept").touch()
  with lock.hold(tmp_path / "run"):
    held = json.loads(lock_file(tmp_path / "run").read_text())
    assert held["pid"] == os.getpid()
  assert [path.name for path in (tmp_path / "run").iterdir()] == ["kept"]


def test_folders_that_stay_empty_are_removed_and_no_others(tmp_path):
  (tmp_path / "a").mkdir()
  with lock.hold(tmp_path / "a" / "b" / "c"):
    assert (tmp_path / "a" / "b" / "c").is_dir()
  assert [path.name for path in tmp_path.rglob("*")] == ["a"]
  with lock.hold(tmp_path / "a" / "b" / "c"):
    (tmp_path / "a" / "b" / "file").touch()
  assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "b", "file"]


def test_a_lock_that_was_removed_while_it_was_opened_is_not_taken_for_held(tmp_path, monkeypatch):
  flock, opened = fcntl.flock, []

  def removed_before(file, operation):
    if not opened:
      lock_file(tmp_path).unlink()
    opened.append(file)
    flock(file, operation)

  monkeypatch.setattr(fcntl, "flock", removed_before)
  with lock.hold(tmp_path):
    assert len(opened) == 2
    assert json.loads(lock_file(tmp_path).read_text())["pid"] == os.getpid()


def test_without_locks_there_is_one_warning_for_all_writers(tmp_path, monkeypatch, capsys):
  def none(file, operation):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(fcntl, "flock", none)
  monkeypatch.setattr(locks, "_warned", set())
  for _ in range(2):
    with lock.hold(tmp_path / "run"):
      assert json.loads(lock_file(tmp_path / "run").read_text())["pid"] == os.getpid()
      with disk.replacing_file(tmp_path / "run" / "file") as draft:
        draft.write_text("new")
      (tmp_path / "run" / "file").unlink()
    assert not (tmp_path / "run").exists()  # the lock is removed, and then the empty folder
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f"warning: {tmp_path / 'run'} is on a file system without locks (No locks")


@pytest.mark.parametrize("content", ["", "[]", '{"pid": 1'])
def test_a_holder_that_has_not_said_who_it_is_holds_all_the_same(tmp_path, content):
  lock_file(tmp_path).write_text(content)
  with lock_file(tmp_path).open() as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    with (
      pytest.raises(InputError, match="is in use by another process"),
      lock.hold(tmp_path),
    ):
      pytest.fail("held twice")


def test_a_file_where_the_folder_should_be_is_named(tmp_path):
  (tmp_path / "run").touch()
  with pytest.raises(InputError, match="run cannot be a folder"), lock.hold(tmp_path / "run"):
    pytest.fail("held")


@pytest.mark.parametrize("kind", ["link", "dangling", "hard", "fifo", "folder"])
def test_a_lock_that_is_not_ours_is_refused_and_left_as_it_is(tmp_path, kind):
  path, theirs = lock_file(tmp_path / "run"), tmp_path / "theirs"
  path.parent.mkdir()
  if kind != "dangling":
    theirs.write_text("thesis")
  if kind == "hard":
    os.link(theirs, path)
  elif kind == "fifo":
    os.mkfifo(path)
  elif kind == "folder":
    path.mkdir()
  else:
    path.symlink_to(theirs)
  with (
    pytest.raises(InputError, match=r"\.lock is a link or no plain file|cannot be written to"),
    lock.hold(tmp_path / "run"),
  ):
    pytest.fail("held")
  assert path.exists() or path.is_symlink()
  assert kind == "dangling" or theirs.read_text() == "thesis"


def test_a_lock_that_cannot_be_removed_hides_no_error(tmp_path, monkeypatch):
  def refuse(path, **options):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))

  def work():
    monkeypatch.setattr("pathlib.Path.unlink", refuse)
    raise InputError("the real message")

  with pytest.raises(InputError, match="the real message"), lock.hold(tmp_path / "run"):
    work()


def test_a_workdir_that_is_a_link_to_nothing_is_refused(tmp_path):
  (tmp_path / "run").symlink_to("gone")
  with (
    pytest.raises(InputError, match="run is a link to gone, which does not exist"),
    lock.hold(tmp_path / "run"),
  ):
    pytest.fail("held")
  assert not (tmp_path / "gone").exists()
