"""Worker processes: their memory is counted first, and how one died is explained."""

import itertools
import multiprocessing
import os
import shutil
import signal
import types

import pytest

from repjax.data import processes, train_batches
from repjax.errors import InputError
from tests.data.test_pipeline import Numbered
from tests.helpers import error_in_child


@pytest.fixture
def free(monkeypatch):
  """Sets how many bytes of shared memory seem to be free."""

  def seem(count):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=count))
    monkeypatch.setattr(os.path, "isdir", lambda _: True)

  return seem


def batches(**changes):
  arguments = {
    "batch_size": 64,
    "image_size": 224,
    "augment": "none",
    "interpolation": "bilinear",
    "seed": 0,
    "num_workers": 2,
  }
  return train_batches(Numbered(), **arguments | changes)


def test_two_workers_at_224_pixels_do_not_fit_into_a_container_of_docker(free):
  free(64 * 2**20)
  with pytest.raises(InputError) as caught:
    next(batches())
  text = str(caught.value)
  assert "2 worker processes need 96 MB of shared memory for batches of 9.6 MB" in text
  assert "/dev/shm has 67 MB free" in text
  for way_out in ("--shm-size", "fewer workers", "num_workers=0"):
    assert way_out in text


def test_what_fits_or_shares_no_memory_is_not_refused(free):
  free(64 * 2**20)
  processes.check_shared_memory(2, 6_000_000)
  next(batches(num_workers=0))


@pytest.mark.parametrize(
  ("code", "said"),
  [
    (-7, "found no room in shared memory .*--shm-size"),
    (-9, "was killed, most likely .* memory"),
    (-11, "was ended by SIGSEGV"),
    (3, "ended with the status 3"),
  ],
)
def test_the_death_of_a_worker_is_explained(code, said):
  text = f"Worker process was terminated unexpectedly with exit code {code}. Search the logs above."
  wanted = f"^a worker process that reads images {said}"
  with pytest.raises(InputError, match=wanted), processes.explained_death():
    raise RuntimeError(text)


def test_a_different_error_is_left_alone():
  with pytest.raises(RuntimeError, match="something"), processes.explained_death():
    raise RuntimeError("something")


def test_a_worker_that_is_killed_is_explained():
  iterator = batches(batch_size=4, image_size=8, num_workers=1)
  next(iterator)
  (worker,) = (each for each in multiprocessing.active_children() if "grain" in each.name)
  os.kill(worker.pid, signal.SIGKILL)
  with pytest.raises(InputError, match="was killed, most likely"):
    list(itertools.islice(iterator, 50))


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_forked_process_is_told_that_it_would_wait_for_ever():
  iterator = batches(batch_size=4, image_size=8, num_workers=0)
  next(iterator)
  text = error_in_child(lambda: next(iterator))
  assert "threads of the process from which this one was forked" in text
  next(iterator)
  iterator.close()
