"""Tests of `repjax summary`."""

import pytest

from repjax import ModelSpec
from tests.cli.helpers import stop_of

pytest_plugins = ["tests.training.fixtures"]

SMALL = ("--num-classes", 10, "--image-size", 32)


def test_a_model_is_named_first_or_by_its_flag(run_command):
  printed = run_command("summary", "repvgg_a0", *SMALL)
  first, *_, last = printed.splitlines()
  assert first == "repvgg_a0, 10 classes, one image of 32 px"
  assert last.startswith("depth 23:")
  assert run_command("summary", "--model", "repvgg_a0", *SMALL) == printed


def test_a_folder_is_summarized_as_it_was_trained(run_command, tmp_path):
  ModelSpec.usual("repvgg_a0", 7).write(tmp_path)
  printed = run_command("summary", "--workdir", tmp_path, "--image-size", 32)
  assert printed.startswith("repvgg_a0, 7 classes, one image of 32 px\n")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "error: summary takes one model"),
    (("repvgg_a0", "--model", "repvgg_a0"), "error: summary takes one model"),
    (("repvgg_a9",), "error: unknown model 'repvgg_a9'; did you mean"),
  ],
  ids=str,
)
def test_a_mistake_is_one_paragraph(run_command, arguments, message):
  assert stop_of(run_command, "summary", *arguments).startswith(message)
