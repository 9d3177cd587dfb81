"""Errors for the person at the keyboard."""

import pytest

from repjax.errors import InputError, one_paragraph, printable, unknown

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


def test_foreign_text_is_one_line_that_moves_no_cursor():
  assert printable("größe 猫 a.jpg") == "größe 猫 a.jpg"
  assert printable("a\n\x1b[2J\x9b\u2028\udcff\\") == r"a\n\x1b[2J\x9b\u2028\udcff" + "\\"


def test_unknown_lists_foreign_names_on_one_line():
  text = str(unknown("split", "x", ["a\nb\x1b[2J"]))
  assert text == r"unknown split 'x'; known: a\nb\x1b[2J"
