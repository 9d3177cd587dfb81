"""Signals: handled, ignored, kept from children, and insisted on."""

import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from repjax import signals


def send(number):
  os.kill(os.getpid(), number)


def stop(number):
  raise signals.error_of(number)


@pytest.mark.parametrize("number", signals.STOPPING, ids=lambda number: number.name)
def test_every_stopping_signal_is_handled_inside_only(number):
  before = signal.getsignal(number)
  with signals.handled(stop), pytest.raises(signals.Stopped) as caught:
    send(number)
  assert caught.value.number == number
  assert isinstance(caught.value, signals.Preempted) == (number != signal.SIGINT)
  assert signals.status_of(caught.value) == (130 if number == signal.SIGINT else 0)
  assert signal.getsignal(number) is before


@pytest.mark.parametrize("number", signals.STOPPING, ids=lambda number: number.name)
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(number):
  before = signal.signal(number, signal.SIG_IGN)
  try:
    with signals.handled(stop):
      send(number)
      assert signal.getsignal(number) == signal.SIG_IGN
  finally:
    signal.signal(number, before)


def wait():
  """Runs instructions, between which a signal can come, for longer than a signal is insisted on."""
  deadline = time.monotonic() + 5
  while time.monotonic() < deadline:
    time.sleep(0.01)


def test_a_stop_that_a_finalizer_has_dropped_comes_again(monkeypatch):
  dropped = []
  monkeypatch.setattr(sys, "unraisablehook", lambda problem: dropped.append(problem.exc_value))

  class Finalized:
    def __del__(self):
      send(signal.SIGINT)

  def work():
    Finalized()
    assert dropped
    wait()

  with signals.handled(stop), pytest.raises(signals.Stopped):
    work()


def test_a_stop_waits_for_the_end_of_an_import(tmp_path, monkeypatch):
  (tmp_path / "interrupted_import.py").write_text(
    "import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\nwhole = True\n"
  )
  monkeypatch.syspath_prepend(tmp_path)

  def work():
    assert importlib.import_module("interrupted_import").whole
    wait()

  with signals.handled(stop), pytest.raises(signals.Preempted):
    work()


def _in_orbax(done, seconds):
  """Calls a function of a file in a folder `orbax`, which gets a signal and then takes a while."""
  source = "os.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(seconds)\ndone.append(True)\n"
  code = compile(source, os.sep + os.path.join("any", "orbax", "writer.py"), "exec")
  names = {"os": os, "signal": signal, "time": time, "done": done, "seconds": seconds}
  exec(code, names)


def test_a_stop_waits_for_the_end_of_what_orbax_does():
  done = []

  def work():
    _in_orbax(done, 0.2)
    wait()

  with signals.handled(stop), pytest.raises(signals.Preempted):
    work()
  assert done


def test_a_second_signal_does_not_wait():
  done = []
  threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
  with signals.handled(stop), pytest.raises(signals.Stopped):
    _in_orbax(done, 5)
  assert not done


def test_a_stop_does_not_wait_for_ever(monkeypatch):
  monkeypatch.setattr(signals, "_PATIENCE", 0.1)
  done = []
  with signals.handled(stop), pytest.raises(signals.Preempted):
    _in_orbax(done, 5)
  assert not done


def test_what_cleans_up_after_a_stop_is_left_in_peace():
  cleaned = []

  def work():
    try:
      send(signal.SIGINT)
    finally:
      time.sleep(1.2)
      cleaned.append(True)

  with signals.handled(stop), pytest.raises(signals.Stopped):
    work()
  assert cleaned


def test_a_second_ctrl_c_stops_what_cleans_up():
  def work():
    try:
      send(signal.SIGINT)
    finally:
      send(signal.SIGINT)
      wait()

  start = time.monotonic()
  with signals.handled(stop), pytest.raises(signals.Stopped):
    work()
  assert time.monotonic() - start < 1


def test_children_do_not_see_the_signals_of_their_group():
  command = "for each in INT TERM HUP USR1 USR2; do kill -$each $$; done; echo alive"
  with signals.kept_from_children():
    ended = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
  assert ended.stdout == "alive\n"
  assert subprocess.run(["sh", "-c", command], capture_output=True).returncode != 0


@pytest.mark.parametrize("method", ["start", "cancel"])
def test_a_signal_while_a_timer_is_set_waits_for_no_lock(monkeypatch, method):
  class Interrupted(threading.Timer):
    pass

  def interrupted(timer):
    if isinstance(signal.getsignal(signal.SIGUSR1), signals._Insistent):
      with timer.finished._cond:  # the lock that a timer takes when it is cancelled
        send(signal.SIGUSR1)
        came.append(True)
    usual(timer)

  def send_twice():
    try:
      send(signal.SIGUSR2)
    finally:
      send(signal.SIGUSR2)

  came, usual = [], getattr(threading.Timer, method)
  monkeypatch.setattr(Interrupted, method, interrupted)
  monkeypatch.setattr(signals.threading, "Timer", Interrupted)
  faulthandler.dump_traceback_later(60, exit=True)
  try:
    with signals.handled(stop), pytest.raises(signals.Stopped):
      send_twice()
  finally:
    faulthandler.cancel_dump_traceback_later()
  assert came


def test_a_stop_is_found_within_the_error_of_a_library():
  def wrapped():
    try:
      try:
        raise signals.Preempted
      except BaseException as error:
        raise RuntimeError("cannot read") from error
    except RuntimeError as error:
      return error

  assert isinstance(signals.stop_within(wrapped()), signals.Preempted)
  assert signals.stop_within(RuntimeError("cannot read")) is None
