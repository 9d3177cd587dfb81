"""Processes that meet before JAX joins them: threads of this process, at a free port."""

import contextlib
import socket
import threading
import time

import pytest

from repjax.errors import InputError
from repjax.training import joining

pytest_plugins = ["tests.training.fixtures"]


@pytest.fixture
def port():
  """A port that is free."""
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def meet(port, *processes, seconds=5.0, pause=0.0):
  """Lets processes meet, each given as (number of processes, index); returns what each raised."""
  said = [None] * len(processes)

  def run(number, count, index):
    try:
      joining.meet(joining.Address(f"localhost:{port}"), count, index, seconds)
    except InputError as error:
      said[number] = str(error)

  threads = []
  for number, process in enumerate(processes):
    threads.append(threading.Thread(target=run, args=(number, *process)))
    threads[-1].start()
    time.sleep(pause)
  for thread in threads:
    thread.join()
  return said


@pytest.mark.parametrize("order", [(0,), (0, 1), (2, 1, 0)], ids=str)
def test_processes_that_fit_together_meet_and_leave_the_port_free(port, order):
  assert meet(port, *((len(order), index) for index in order), pause=0.05) == [None] * len(order)
  with socket.create_server(("", port)):
    pass


@pytest.mark.parametrize(
  "processes", [[(2, 0), (2, 0)], [(3, 1), (3, 1), (3, 0)], [(3, 0), (3, 2), (3, 2)]], ids=str
)
def test_an_index_that_is_taken_twice_is_named_in_every_process(port, processes):
  start = time.monotonic()
  twice = max((index for _, index in processes), key=[each for _, each in processes].count)
  for text in meet(port, *processes, pause=0.1):
    assert f"JAX_PROCESS_ID={twice}" in text
  assert time.monotonic() - start < 2.5


def test_processes_that_disagree_on_their_number_all_say_so(port):
  for text in meet(port, (2, 0), (3, 1)):
    assert "JAX_NUM_PROCESSES is 2 for process 0 and 3 for process 1" in text


def test_processes_that_do_not_come_are_named(port):
  for text in meet(port, (4, 0), (4, 2), seconds=0.5):
    assert "of 4 processes, these have not come: 1, 3." in text
  (text,) = meet(port, (2, 1), seconds=0.3)
  assert f"process 0 does not answer at localhost:{port}" in text


@pytest.fixture
def waiting(port):
  """A process 0 of three that waits already: what it raises, in a list, and its thread."""
  said = []
  host = threading.Thread(target=lambda: said.extend(meet(port, (3, 0))))
  host.start()
  return said, host


def send(port, text):
  """Connects to a port as soon as something listens there, sends a text, and hangs up."""
  for _ in range(200):
    with contextlib.suppress(ConnectionRefusedError):
      with socket.create_connection(("localhost", port)) as connection:
        connection.sendall(text)
      return
    time.sleep(0.02)
  raise AssertionError("nothing listens")


@pytest.mark.parametrize(
  "text",
  [
    b'[3, 1, "a process that has ended since"]\n',
    b"GET / HTTP/1.1\r\n\r\n",
    b'[1]\n["2", [], {}]\n',
    b"[" * 4000 + b"\n",
    b"x" * 9999,
    b"",
  ],
  ids=["ended", "browser", "list", "deep", "long", "scanner"],
)
def test_others_that_knock_are_ignored(port, waiting, text):
  said, host = waiting
  send(port, text)
  time.sleep(0.1)
  assert meet(port, (3, 1), (3, 2)) == [None, None]
  host.join()
  assert said == [None]


@pytest.mark.parametrize("words", [b"", b"SSH-2.0-OpenSSH_9.2\r\n"], ids=["silent", "talking"])
def test_a_port_in_use_is_named_by_every_process(words):
  with socket.create_server(("localhost", 0)) as foreign:
    port = foreign.getsockname()[1]

    def serve():
      while True:
        try:
          foreign.accept()[0].sendall(words)
        except OSError:
          return

    threading.Thread(target=serve, daemon=True).start()
    start = time.monotonic()
    first, second = meet(port, (2, 0), (2, 1))
    assert time.monotonic() - start < 3.5
  assert f"port {port} is in use on this machine" in first
  assert f"a different program listens at localhost:{port}" in second


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("machine", "HOST:PORT, got machine"),
    (":1234", "HOST:PORT"),
    ("machine:", "HOST:PORT"),
    ("machine:http", "HOST:PORT"),
    ("machine:٣", "HOST:PORT"),
    ("machine:-1", "HOST:PORT"),
    ("::1:1234", "brackets"),
    ("[machine]:1234", "brackets"),
    ("[::1:1234", "brackets"),
    ("machine:0", "1 ... 65535, got 0"),
    ("machine:65536", "1 ... 65535, got 65536"),
    ("machine:" + "9" * 5000, "1 ... 65535"),
  ],
)
def test_an_address_that_cannot_be_is_refused(text, words):
  with pytest.raises(InputError) as caught:
    joining.Address(text)
  assert words in str(caught.value)
  assert len(str(caught.value)) < 500


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 300, "..", "256.0.0.1"])
def test_a_host_that_nobody_knows_is_named(host):
  start = time.monotonic()
  with pytest.raises(InputError, match="is not known here"):
    joining.meet(joining.Address(f"{host}:1234"), 2, 1, 60)
  assert time.monotonic() - start < 5


def test_an_address_of_the_newer_internet_is_split_at_its_brackets():
  address = joining.Address("[::1]:1234")
  assert (address.host, address.port) == ("::1", 1234)
