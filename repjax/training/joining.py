"""Finds out whether the processes of a run fit together, before JAX joins them.

JAX answers most mistakes by a wait of minutes or by ending the program without a clear word. So the
processes meet first, at the same address. Process 0 listens there. Every process, also process 0,
connects and says in one line who it is. Once all have come, or something is wrong, process 0
answers all of them. Then the port is free again, and JAX takes it.
"""

import contextlib
import errno
import itertools
import json
import os
import secrets
import select
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

from repjax.errors import InputError

_HELLO = b"repjax\n"
_OK = b"ok\n"
_LONGEST = 4096  # bytes of a message
_ANSWER_SECONDS = 2  # for the first sign of a program that listens
_RESOLVE_SECONDS = 1.5
_PAUSE = 0.1

EXAMPLE = (
  "On two machines, put JAX_COORDINATOR_ADDRESS=HOST_OF_THE_FIRST:1234 JAX_NUM_PROCESSES=2 "
  "JAX_PROCESS_ID=0 before the command on the first, the same with JAX_PROCESS_ID=1 on the second"
)


class Address:
  """A host and a port.

  Attributes:
    host: name or number of the host, without brackets.
    port: number of the port.
    text: both, as they were given.
  """

  def __init__(self, text: str):
    """Splits "HOST:PORT" or "[IPV6]:PORT".

    Raises:
      InputError: the text has a different form, or no such port exists.
    """
    host, colon, port = text.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    self.host, self.text = bare, text
    if not (colon and bare and port.isascii() and port.isdigit()):
      raise InputError(f"JAX_COORDINATOR_ADDRESS is HOST:PORT, got {text}. {EXAMPLE}")
    # JAX waits for minutes at a number of IPv6 without brackets, and then ends with a dump.
    if (host == f"[{bare}]") != (":" in bare):
      raise InputError(
        f"JAX_COORDINATOR_ADDRESS has brackets around a number of IPv6 and nothing else, as in "
        f"[::1]:1234, got {text}"
      )
    self.port = int(port) if len(port) < 10 else 0
    if not 1 <= self.port <= 65535:
      raise InputError(
        f"the port in JAX_COORDINATOR_ADDRESS is in 1 ... 65535, got {port[:20]}; choose one that "
        "is free on the machine of process 0, the same for all processes"
      )

  def resolve(self) -> list[Any]:
    """Returns the results of `socket.getaddrinfo`.

    Raises:
      InputError: the name of the host is unknown.
    """
    # In Kubernetes, the name of a process is known some time after the process has started.
    patience = 300.0 if "KUBERNETES_SERVICE_HOST" in os.environ else _RESOLVE_SECONDS
    end = time.monotonic() + patience
    while True:
      try:
        return socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
      except (OSError, UnicodeError) as error:
        if time.monotonic() > end:
          reason = getattr(error, "strerror", None) or error
          raise InputError(
            f"the host of JAX_COORDINATOR_ADDRESS, {self.host}, is not known here ({reason}); give "
            "the name or number by which this machine reaches the one of process 0"
          ) from error
      time.sleep(_PAUSE)


def meet(address: Address, count: int, index: int, seconds: float) -> None:
  """Returns once all processes of a run have come.

  Args:
    address: where process 0 listens.
    count: number of processes.
    index: index of this process.
    seconds: time to wait for the others.

  Raises:
    InputError: the port is in use, an index is taken twice, the processes disagree on their number,
      or some have not come in time.
  """
  address.resolve()
  print(
    f"process {index} of {count}: waiting for the others at {address.text}, "
    f"at most {seconds:.0f} s",
    file=sys.stderr,
    flush=True,
  )
  end = time.monotonic() + seconds
  if index == 0:
    _Host(address, count).run(end)
  else:
    _visit(address, count, index, secrets.token_hex(8), end)


class _Host:
  """The part of process 0: it listens, and answers all when all have come."""

  def __init__(self, address: Address, count: int):
    """Prepares the host, which does not listen yet."""
    self._address, self._count = address, count
    self._token = secrets.token_hex(8)
    self._came: dict[int, socket.socket] = {}  # index to connection
    self._reading: dict[socket.socket, bytes] = {}  # connections whose message is incomplete
    self._knocked: socket.socket | None = None  # the connection of this process to itself
    self._heard = False  # True: something has answered there

  def run(self, end: float) -> None:
    """Waits for all processes until a moment, and answers them; raises InputError as `meet`."""
    try:
      listener = _listen(self._address.port)
    except OSError as error:
      raise InputError(self._why_not_listening(error)) from error
    with listener, contextlib.closing(self):
      try:
        self._knock()
        while len(self._came) < self._count - 1:
          self._look(listener, end)
      except InputError as error:
        self._answer(str(error).encode()[: _LONGEST - 1] + b"\n")
        raise
      self._answer(_OK)

  def _why_not_listening(self, error: OSError) -> str:
    """Returns why the port is not free; a process 0 that has the port is told."""
    port = self._address.port
    if error.errno == errno.EACCES:
      return f"this user may not listen at port {port}; choose one from 1024 on, for all processes"
    if error.errno != errno.EADDRINUSE:
      return f"this machine cannot listen at port {port}: {error.strerror}"
    # If a process 0 waits there, it learns now that there are two, and tells the others.
    with contextlib.suppress(InputError, OSError):
      _visit(self._address, self._count, 0, self._token, time.monotonic() + 1)
    return (
      f"port {port} is in use on this machine: by a different program, by an earlier run that has "
      "not ended, or by a second process with JAX_PROCESS_ID=0. Give each process an index of its "
      "own, or choose a different port for all of them"
    )

  def _knock(self) -> None:
    """Connects to the address as process 0, to find out whether a different process 0 is there."""
    # The address may reach this process later than now, or not from here. Then nothing is known.
    with contextlib.suppress(OSError):
      self._knocked = socket.create_connection((self._address.host, self._address.port), 0.5)
      self._knocked.sendall(_message(self._count, 0, self._token))

  def _look(self, listener: socket.socket, end: float) -> None:
    """Takes what has come: connections, messages, and ends of connections."""
    if time.monotonic() > end:
      missing = (index for index in range(1, self._count) if index not in self._came)
      listed = ", ".join(map(str, itertools.islice(missing, 20)))
      raise InputError(
        f"of {self._count} processes, these have not come: {listed}. Start them all by the same "
        f"command, and see that they reach {self._address.text}"
      )
    own = [] if self._knocked is None else [self._knocked]
    watched = [listener, *own, *self._reading, *self._came.values()]
    ready, _, _ = select.select(watched, [], [], _PAUSE)
    for each in ready:
      if each is listener:
        connection, _ = listener.accept()
        connection.setblocking(False)
        self._reading[connection] = b""
        self._send(connection, _HELLO)
      elif each is self._knocked:
        self._hear(each)
      else:
        self._read(each)

  def _hear(self, knocked: socket.socket) -> None:
    """Reads what listens at the address; raises InputError where this is not this process."""
    text = _line(knocked)
    if not text:  # the other side has hung up
      knocked.close()
      self._knocked = None
    elif text != _HELLO and not self._heard:
      raise InputError(_different(self._address, 0))
    elif text != _HELLO:
      raise InputError(text.decode(errors="replace").strip())
    self._heard = True

  def _read(self, connection: socket.socket) -> None:
    """Reads from a connection; raises InputError where its process does not fit."""
    try:
      data = connection.recv(_LONGEST)
    except OSError:
      data = b""
    text = self._reading.pop(connection, b"") + data
    if not data or len(text) > _LONGEST:  # gone, or something that does not know when to end
      self._came = {index: each for index, each in self._came.items() if each is not connection}
      connection.close()
    elif not text.endswith(b"\n"):
      self._reading[connection] = text
    else:
      self._greet(connection, text)

  def _greet(self, connection: socket.socket, text: bytes) -> None:
    """Takes the message of a process."""
    try:
      count, index, token = json.loads(text)
    except (ValueError, TypeError, RecursionError):
      count = index = token = None
    if not (isinstance(count, int) and isinstance(index, int) and isinstance(token, str)):
      connection.close()  # a different program, such as a scanner of ports
      return
    if token == self._token:  # from this very process
      self._reading[connection] = b""
      return
    problem = None
    if count != self._count:
      problem = (
        f"the processes disagree on their number: JAX_NUM_PROCESSES is {self._count} for process "
        f"0 and {count} for process {index}; give all of them the same"
      )
    elif not 0 < index < count or index in self._came:
      problem = (
        f"two processes have the same index, JAX_PROCESS_ID={index}; number the processes from 0 "
        f"to {self._count - 1}, each once"
      )
    if problem is not None:
      self._reading[connection] = b""  # which is answered like the others
      raise InputError(problem)
    self._came[index] = connection

  def _answer(self, text: bytes) -> None:
    """Answers all processes, and waits a moment for them to hang up."""
    connections = [*self._came.values(), *self._reading]
    for connection in connections:
      self._send(connection, text)
    # The side that hangs up first keeps its port for a minute, and here the port is needed.
    end = time.monotonic() + 1
    for connection in self._came.values():
      with contextlib.suppress(OSError):
        connection.settimeout(max(0.01, end - time.monotonic()))
        connection.recv(1)

  def _send(self, connection: socket.socket, text: bytes) -> None:
    """Sends a short text; a process that is gone is noticed when it is read from."""
    with contextlib.suppress(OSError):
      connection.send(text)

  def close(self) -> None:
    """Closes all connections."""
    own = [] if self._knocked is None else [self._knocked]
    for connection in [*self._came.values(), *own, *self._reading]:
      connection.close()


def _listen(port: int) -> socket.socket:
  """Returns a socket that listens at a port of all network cards, by IPv6 and IPv4 if possible."""
  if socket.has_dualstack_ipv6():
    with contextlib.suppress(OSError):  # IPv6 can be switched off in the system
      return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
  return socket.create_server(("", port))


def _message(count: int, index: int, token: str) -> bytes:
  """Returns the line by which a process says who it is."""
  return json.dumps([count, index, token]).encode() + b"\n"


def _visit(address: Address, count: int, index: int, token: str, end: float) -> None:
  """Tells process 0 who this process is, and waits for the answer; raises InputError as `meet`."""
  for connection in _connections(address, end):
    with connection:
      if _line(connection, min(end, time.monotonic() + _ANSWER_SECONDS)) != _HELLO:
        raise InputError(_different(address, index))
      with contextlib.suppress(OSError):
        connection.sendall(_message(count, index, token))
      # A process 0 that runs out of time says so, a little later than this moment.
      answer = _line(connection, end + _ANSWER_SECONDS)
    if answer == _OK:
      return
    if answer:
      raise InputError(answer.decode(errors="replace").strip())
    # Process 0 has ended without an answer. It may be started again.
  raise InputError(
    f"process 0 does not answer at {address.text}. See that it runs there, that the address is "
    "that of its machine, and that no firewall is in between"
  )


def _different(address: Address, index: int) -> str:
  """Returns the error for a program at the address that is not process 0 of this run."""
  return (
    f"a different program listens at {address.text}, or a run that has begun without this process: "
    f"is JAX_PROCESS_ID={index} taken twice, or the port in use on the machine of process 0? "
    "Choose a different port for all processes"
  )


def _connections(address: Address, end: float) -> Iterator[socket.socket]:
  """Yields a new connection whenever the last one has ended, until a moment."""
  while (left := end - time.monotonic()) > 0:
    with contextlib.suppress(OSError):  # process 0 does not listen yet
      yield socket.create_connection((address.host, address.port), min(left, _ANSWER_SECONDS))
    time.sleep(_PAUSE)


def _line(connection: socket.socket, end: float | None = None) -> bytes:
  """Returns what comes until the end of a line, the end of the connection, or a moment.

  Args:
    connection: where it comes from.
    end: the moment; None waits as long as the connection does.
  """
  found = b""
  with contextlib.suppress(OSError):
    while len(found) < _LONGEST and not found.endswith(b"\n"):
      if end is not None:
        connection.settimeout(max(0.01, end - time.monotonic()))
      data = connection.recv(1)  # a byte, so that nothing of the next line is taken
      if not data:
        break
      found += data
  return found
