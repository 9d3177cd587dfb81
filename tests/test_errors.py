"""Errors for the person at the keyboard."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from repjax.errors import InputError, listed, one_paragraph, printable, sentences, unknown
from tests.helpers import spread

KNOWN = ("repvgg_b1", "repvgg_a0", "resnet50")


def test_an_unknown_name_lists_close_ones_only():
  error = unknown("model", "repvgg-a0", KNOWN)
  assert isinstance(error, ValueError)
  assert str(error).startswith("unknown model 'repvgg-a0'; did you mean repvgg_a0")
  assert "resnet50" not in str(error)


def test_without_a_close_one_all_are_listed_in_order():
  assert str(unknown("model", "xyz", KNOWN)).endswith("known: repvgg_a0, repvgg_b1, resnet50")


def test_a_long_list_is_not_printed():
  error = unknown("flag", "xyz", (f"a{number}" for number in range(1000)))
  assert len(str(error)) < 100


def test_a_name_need_not_be_a_string():
  assert "unknown model None" in str(unknown("model", None, KNOWN))


def test_an_input_error_ends_the_program_with_its_text_alone():
  with pytest.raises(SystemExit) as stop, one_paragraph():
    raise InputError("no such folder")
  assert stop.value.code == "error: no such folder"  # a string is printed, and the status is 1
  assert stop.value.__suppress_context__


@pytest.mark.parametrize("error", [ValueError, KeyError, KeyboardInterrupt])
def test_other_errors_pass(error):
  with pytest.raises(error), one_paragraph():
    raise error("a defect")


@pytest.mark.parametrize("name", ["a\nb", b"a\nb"])
def test_a_file_that_the_system_refuses_ends_the_program_with_its_name(name):
  with pytest.raises(SystemExit) as stop, one_paragraph():
    raise PermissionError(errno.EACCES, "Permission denied", name)
  assert stop.value.code == r"error: a\nb cannot be used: Permission denied"
  with pytest.raises(OSError, match="about no file"), one_paragraph():
    raise OSError(errno.EPERM, "about no file")


def test_foreign_text_is_one_line_that_moves_no_cursor():
  assert printable("größe 猫 a.jpg") == "größe 猫 a.jpg"
  assert printable("a\n\x1b[2J\x9b\u2028\udcff\\") == r"a\n\x1b[2J\x9b\u2028\udcff" + "\\"


def test_unknown_lists_foreign_names_on_one_line():
  text = str(unknown("split", "x", ["a\nb\x1b[2J"]))
  assert text == r"unknown split 'x'; known: a\nb\x1b[2J"


@pytest.mark.parametrize(
  ("options", "text"),
  [
    ({}, "a, b, c, d, e and 1,001 more"),
    ({"most": 1, "between": "; "}, "a and 1,005 more"),
    ({"most": 2, "between": "\n"}, "a\nb\nand 1,004 more"),
  ],
)
def test_a_list_in_a_message_is_short(options, text):
  assert listed([*"abcdef", *1000 * ["x"]], **options) == text
  assert listed(["a\n" + "b" * 200]) == "a\\n" + "b" * 98 + "..."


def test_sentences_end_with_one_mark():
  assert sentences("did you mean b?", "so", "Do c.", "d") == "did you mean b? so. Do c. d"


ESCAPES = ("\x1b[2J", "\x9b2J", "\r", "\x07", "\u202e", "\t", "\x00")


@pytest.mark.parametrize("escape", ESCAPES, ids=ascii)
def test_what_a_terminal_would_obey_is_shown(escape):
  text = str(InputError(f"a{escape}b\nsecond line é 日本"))
  assert escape not in text
  assert text.splitlines() == [
    f"a{escape.encode('unicode_escape').decode()}b",
    "second line é 日本",
  ]


def test_a_foreign_text_is_one_line_of_bounded_length():
  assert printable("all is well\nerror: none") == "all is well\\nerror: none"
  assert printable("x" * 10**6, 20) == "x" * 20 + "..."
  assert printable("\ud800") == "\\ud800"  # half of a pair cannot be printed


@pytest.mark.parametrize("platform", spread(["cuda", "bogus"], ["cuda"]))
def test_missing_devices_are_one_paragraph(platform):
  done = subprocess.run(
    [sys.executable, "-m", "repjax", "summary", "--model", "repvgg_a0"],
    env=os.environ | {"JAX_PLATFORMS": platform},
    capture_output=True,
    text=True,
    check=False,
    cwd=Path(__file__).parents[1],
  )
  assert done.returncode == 1
  assert f"error: JAX finds no device of the platform '{platform}'" in done.stderr
  assert "JAX_PLATFORMS=cpu" in done.stderr
  assert "Traceback" not in done.stderr


@pytest.mark.parametrize("error", [AssertionError, RuntimeError])
def test_errors_with_devices_in_place_pass(error):
  with pytest.raises(error, match="a defect"), one_paragraph():
    raise error("a defect")
