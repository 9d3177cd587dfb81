"""Orbax under our hands: its clocks and the noise of its threads."""

import contextlib
import logging
import shutil
import sys
import threading
import time

import numpy as np
import pytest

from repjax import runs, saving
from repjax.disk import trees
from repjax.errors import InputError


def test_a_save_succeeds_while_the_clock_is_set(tmp_path, monkeypatch):
  saving.orbax()
  start, years = time.time(), 3e8
  calls = iter(range(10**9))
  monkeypatch.setattr(time, "time", lambda: start + years * (next(calls) % 7 - 3))
  tree = {"a": np.arange(3, dtype=np.float32)}
  writer = runs.CheckpointWriter(tmp_path)
  writer.save(1, {"variables": tree}, 0.5)
  writer.close()
  assert runs.read_checkpoint(tmp_path, {"variables": tree})[0] == 1


@pytest.fixture
def shown(monkeypatch):
  """Collects the errors that reach the hook for errors that nobody can raise."""
  found = []
  monkeypatch.setattr(sys, "unraisablehook", lambda problem: found.append(str(problem.exc_value)))
  return found


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03])
def test_a_folder_that_vanishes_is_one_error_without_noise(tmp_path, shown, capfd, delay):
  tree = {f"array{number}": np.ones((200, 200), np.float32) for number in range(40)}
  (tmp_path / "run").mkdir()
  thread = threading.Timer(delay, shutil.rmtree, [tmp_path / "run", True])
  thread.start()
  with contextlib.suppress(InputError):  # a fast disk is done before the folder vanishes
    trees.write_tree(tmp_path / "run" / "tree", tree)
  thread.join()
  time.sleep(0.2)  # abandoned threads report late
  assert shown == []
  assert "Traceback" not in capfd.readouterr().err


class _Problem:
  """An argument of `sys.unraisablehook`, as Python makes it."""

  def __init__(self, text, thing=None, traceback=None):
    self.exc_value, self.object, self.exc_traceback = RuntimeError(text), thing, traceback


def traceback_through(path):
  """Returns the traceback of an error that a function of a file at this path raised."""
  scope = {}
  exec(compile("def fail():\n  raise KeyError", path, "exec"), scope)
  with pytest.raises(KeyError) as caught:
    scope["fail"]()
  return caught.value.__traceback__


def test_after_an_error_only_abandoned_work_is_hidden(shown):
  with pytest.raises(KeyError), saving.quietly():
    raise KeyError
  sys.unraisablehook(_Problem("Event loop is closed"))
  sys.unraisablehook(_Problem("Event loop is closed", shown))
  sys.unraisablehook(_Problem("different"))
  sys.unraisablehook(_Problem("in Orbax", shown, traceback_through("/packages/orbax/read.py")))
  sys.unraisablehook(_Problem("elsewhere", shown, traceback_through("/packages/flax/read.py")))
  assert shown == ["Event loop is closed", "different", "elsewhere"]


def test_after_success_everything_is_shown_again(shown):
  with saving.quietly():
    sys.unraisablehook(_Problem("Event loop is closed"))
  assert shown == []
  sys.unraisablehook(_Problem("Event loop is closed"))
  assert shown == ["Event loop is closed"]


@pytest.mark.parametrize(("package", "count"), [("orbax", 0), ("flax", 1)])
def test_tasks_of_orbax_that_nobody_waited_for_are_not_logged(caplog, package, count):
  traceback = traceback_through(f"/packages/{package}/read.py")
  with saving.quietly():
    error = (ValueError, ValueError("damaged"), traceback)
    logging.getLogger("asyncio").error("exception was never retrieved", exc_info=error)
  assert len(caplog.records) == count


def test_logs_of_other_packages_are_shown(caplog):
  def log(path, text):
    logger = logging.getLogger("absl")
    logger.handle(logger.makeRecord("absl", logging.ERROR, path, 1, text, (), None))

  log("/packages/orbax/checkpoint/save.py", "before")
  with saving.quietly():
    log("/packages/orbax/checkpoint/save.py", "hidden")
    log("/packages/different/file.py", "shown")
  assert [record.msg for record in caplog.records if record.name == "absl"] == ["before", "shown"]
