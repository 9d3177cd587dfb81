"""A thread that reads ahead yields the items of its source, and always ends."""

import contextlib
import gc
import signal
import threading
import time

import pytest

from repjax.errors import InputError
from repjax.training.prefetch import ReadAhead
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

PATIENCE = 20  # seconds after which something hangs


def same(item):
  return item


class Source:
  """Counts, and remembers which threads pulled and closed it."""

  def __init__(self, length=100, pause=None):
    self.pulled, self.closed, self.threads = 0, threading.Event(), set()
    self.inside = threading.Event()
    self.items = self._items(length, pause)

  def _items(self, length, pause):
    try:
      for number in range(length):
        self.threads.add(threading.get_ident())
        self.pulled += 1
        if pause is not None:
          self.inside.set()
          pause(number)
        yield number
    finally:
      self.threads.add(threading.get_ident())
      self.closed.set()


class Running:
  """Stands for an array that is being computed: done at the look after which `done` says so."""

  def __init__(self, done):
    self.is_ready = done


def settled(source):
  """Returns how many items were pulled, once the number no longer changes."""
  count = -1
  while count != source.pulled:
    count = source.pulled
    time.sleep(0.1)
  return count


def readers():
  return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


@pytest.fixture(autouse=True)
def _no_thread_stays():
  with tiny.quick_collection():
    yield
    gc.collect()
  for thread in readers():
    thread.join(PATIENCE)
  assert readers() == []


@pytest.mark.parametrize("size", [1, 2, 5])
def test_items_come_made_and_in_order_and_then_end(size):
  with contextlib.closing(ReadAhead(iter(range(20)), lambda item: item * 10, size)) as ahead:
    assert list(ahead) == list(range(0, 200, 10))
    assert list(ahead) == []


@pytest.mark.parametrize("size", [1, 2, 5])
def test_no_more_than_the_given_number_of_items_is_ahead(size):
  source = Source()
  with contextlib.closing(ReadAhead(source.items, same, size)) as ahead:
    assert settled(source) == size
    for taken in range(1, 4):
      next(ahead)
      assert settled(source) == size + taken


def test_an_item_that_is_there_does_not_wait_for_the_next_one():
  release = threading.Event()
  source = Source(pause=lambda number: number == 2 and release.wait(PATIENCE))
  with contextlib.closing(ReadAhead(source.items, same, 2)) as ahead:
    assert [next(ahead), next(ahead)] == [0, 1]
    assert not release.is_set()
    release.set()
    assert next(ahead) == 2


@pytest.mark.parametrize("error", [InputError("no such image"), KeyboardInterrupt(), OSError(5)])
@pytest.mark.parametrize("inside", ["source", "make"])
def test_an_error_comes_out_unchanged_after_the_items_before_it(error, inside):
  def fail(number):
    if number == 3:
      raise error
    return number

  source = Source(pause=fail if inside == "source" else None)
  ahead = ReadAhead(source.items, fail if inside == "make" else same, 2)
  with contextlib.closing(ahead):
    assert [next(ahead) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(type(error)) as caught:
      next(ahead)
    assert caught.value is error
    with pytest.raises(StopIteration):
      next(ahead)
    assert source.closed.is_set()


def test_the_source_is_used_and_closed_by_one_thread_that_is_not_the_consumers():
  source = Source()
  with contextlib.closing(ReadAhead(source.items, same, 2)) as ahead:
    next(ahead)
  assert source.closed.is_set()
  assert len(source.threads) == 1
  assert threading.get_ident() not in source.threads


def test_closing_ends_the_thread_although_nobody_takes_what_it_made():
  source = Source()
  ahead = ReadAhead(source.items, same, 2)
  assert settled(source) == 2
  ahead.close()
  assert readers() == []
  assert source.closed.is_set()
  assert source.pulled == 2  # nothing more was read for nobody
  with pytest.raises(StopIteration):
    next(ahead)
  ahead.close()


def test_closing_waits_for_a_source_that_is_busy_and_then_closes_it():
  source = Source(pause=lambda _: time.sleep(0.2))
  ahead = ReadAhead(source.items, same, 2)
  assert source.inside.wait(PATIENCE)
  ahead.close()
  assert source.closed.is_set()
  assert source.pulled == 1


def test_a_reader_that_nobody_holds_any_more_stops():
  source = Source()
  ahead = ReadAhead(source.items, same, 2)
  next(ahead)
  del ahead
  gc.collect()
  assert source.closed.wait(PATIENCE)


def test_an_interrupt_while_waiting_leaves_no_thread():
  interrupted = threading.Event()

  def interrupt(number):
    if number == 2:
      signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
      interrupted.wait(PATIENCE)

  source = Source(pause=interrupt)
  ahead = ReadAhead(source.items, same, 2)
  with contextlib.closing(ahead):
    with pytest.raises(KeyboardInterrupt):
      list(ahead)
    interrupted.set()
  assert readers() == []
  assert source.closed.is_set()


def test_time_without_an_item_is_waiting_where_nothing_runs():
  source = Source(pause=lambda _: time.sleep(0.1))
  start = time.perf_counter()
  with contextlib.closing(ReadAhead(source.items, same, 1)) as ahead:
    for _ in range(3):
      next(ahead)
    assert 0.2 < ahead.waited <= time.perf_counter() - start


def test_time_in_which_something_runs_is_no_waiting():
  looked = threading.Event()
  source = Source(pause=lambda _: looked.wait(PATIENCE))
  with contextlib.closing(ReadAhead(source.items, same, 1)) as ahead:
    # The item comes only after the first look, which finds that the array is not there yet.
    assert ahead.take(running=[Running(lambda: looked.set() and False)]) == 0
    assert ahead.waited == 0


def test_waiting_begins_when_what_was_running_is_done():
  start = time.perf_counter()
  done = threading.Event()

  def is_ready():
    if time.perf_counter() > start + 0.2:
      done.set()
    return done.is_set()

  def pause(_):
    done.wait(PATIENCE)
    time.sleep(0.1)

  with contextlib.closing(ReadAhead(Source(pause=pause).items, same, 1)) as ahead:
    ahead.take(running={"loss": Running(is_ready), "accuracy": Running(lambda: True)})
    assert 0.05 < ahead.waited <= time.perf_counter() - start - 0.2


def test_an_item_that_is_ready_costs_no_time():
  source = Source()
  with contextlib.closing(ReadAhead(source.items, same, 2)) as ahead:
    settled(source)
    next(ahead)
    assert ahead.waited < 0.05
