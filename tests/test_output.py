"""Standard output and standard error that vanish."""

import errno
import io
import os
import sys

import pytest

from repjax import output
from tests.cli.helpers import stop_of


class Broken(io.StringIO):
  """A stream that cannot be written to from the second line on."""

  def __init__(self, number):
    super().__init__()
    self.error = OSError(number, os.strerror(number))

  def write(self, text):
    if self.getvalue().count("\n"):
      raise self.error
    return super().write(text)


@pytest.fixture
def broken(monkeypatch):
  """Makes stdout one that breaks."""

  def make(number):
    stream = Broken(number)
    monkeypatch.setattr(sys, "stdout", stream)
    return stream

  return make


def print_in(lost):
  with output.guarded(lost):
    for number in range(4):
      print(f"line {number}", flush=True)
    print("end", file=sys.stderr)


@pytest.mark.parametrize(
  ("number", "status"),
  [(errno.EPIPE, 141), (errno.ENOSPC, "error: the output cannot be written: No space left")],
)
def test_a_command_ends_where_its_output_does(broken, number, status):
  stream = broken(number)
  found = stop_of(print_in, output.end)
  assert found == status if isinstance(status, int) else found.startswith(status)
  assert stream.getvalue() == "line 0\n"
  assert sys.stdout is stream


def test_training_goes_on_and_says_so_once(broken, capsys):
  stream = broken(errno.EPIPE)
  print_in(output.go_on)
  assert stream.getvalue() == "line 0\n"
  said = capsys.readouterr().err
  assert said == "the output is no longer shown (Broken pipe); training goes on\nend\n"


def test_of_two_guards_the_inner_one_decides(broken, capsys):
  broken(errno.EPIPE)
  with output.guarded(output.end):
    print_in(output.go_on)
  assert "training goes on" in capsys.readouterr().err


def test_a_lost_stderr_ends_nothing(broken, monkeypatch, capsys):
  monkeypatch.setattr(sys, "stderr", broken(errno.ENOSPC))
  monkeypatch.setattr(sys, "stdout", sys.__stdout__)
  with output.guarded(output.end):
    for _ in range(3):
      print("text", file=sys.stderr, flush=True)


@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_stream_that_is_missing_is_one_into_nothing(monkeypatch, name):
  monkeypatch.setattr(sys, name, None)
  with output.guarded(output.end):
    print("text", file=getattr(sys, name), flush=True)
    assert not getattr(sys, name).isatty()
  assert getattr(sys, name) is None


def test_characters_that_a_terminal_does_not_have_are_escaped(monkeypatch):
  held = io.BytesIO()
  monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(held, encoding="ascii"))
  with output.guarded(output.end):
    print("ä", os.fsdecode(b"\xff"), "b")
  assert held.getvalue() == rb"\xe4 \udcff b" + b"\n"
