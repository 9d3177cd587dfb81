"""Signals that stop a run: noted while a step is in hand, raised elsewhere."""

import os
import signal
import threading

import pytest

from repjax.training.interruption import Interruption, Preempted, Stopped

pytest_plugins = ["tests.training.fixtures"]

STOPS = [
  (signal.SIGINT, Stopped),
  *((number, Preempted) for number in (signal.SIGTERM, signal.SIGHUP)),
  *((number, Preempted) for number in (signal.SIGUSR1, signal.SIGUSR2)),
]


def send(*numbers):
  for number in numbers:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "error"), STOPS)
def test_a_signal_raises_at_once_where_nothing_is_deferred(number, error):
  with Interruption() as interruption:
    with pytest.raises(KeyboardInterrupt) as caught:
      send(number)
    assert type(caught.value) is error
    assert interruption.noted is None


@pytest.mark.parametrize(("number", "error"), STOPS)
def test_a_deferred_signal_is_noted_and_raised_at_the_end(number, error, capfd):
  noted = []

  def work(interruption):
    with interruption.deferred():
      send(number)
      noted.append(interruption.noted)

  with Interruption() as interruption, pytest.raises(KeyboardInterrupt) as caught:
    work(interruption)
  assert noted == [number]
  assert type(caught.value) is error
  assert "the step in hand is finished and saved first" in capfd.readouterr().err


def test_further_sigterms_change_nothing_and_a_second_ctrl_c_stops_at_once():
  noted = []

  def work(interruption):
    with interruption.deferred():
      send(signal.SIGTERM, signal.SIGTERM)
      noted.append(interruption.noted)
      send(signal.SIGINT)
      noted.append("went on")

  with Interruption() as interruption, pytest.raises(KeyboardInterrupt) as caught:
    work(interruption)
  assert noted == [signal.SIGTERM]
  assert type(caught.value) is Stopped


def test_an_error_wins_over_a_noted_signal():
  def work(interruption):
    with interruption.deferred():
      send(signal.SIGTERM)
      raise KeyError

  with Interruption() as interruption, pytest.raises(KeyError):
    work(interruption)


def test_the_handlers_before_are_put_back():
  before = [signal.getsignal(number) for number, _ in STOPS]
  with Interruption():
    assert [signal.getsignal(number) for number, _ in STOPS] != before
  assert [signal.getsignal(number) for number, _ in STOPS] == before


def test_other_threads_have_no_handlers():
  problems = []

  def run():
    try:
      with Interruption() as interruption, interruption.deferred():
        pass
    except ValueError as error:
      problems.append(error)

  thread = threading.Thread(target=run)
  thread.start()
  thread.join()
  assert problems == []
