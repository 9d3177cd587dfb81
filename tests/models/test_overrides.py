"""Overrides of every family: each value builds a network, or is refused in one paragraph."""

import pytest

import repjax
from repjax import schema
from repjax.errors import InputError
from repjax.models import check_model, create_model
from repjax.models.overrides import rules_of
from repjax.runs import contents
from repjax.spec import Preprocessing
from tests.helpers import assert_one_paragraph
from tests.models.families import FAMILIES, THOROUGH

NAN, INFINITY = float("nan"), float("inf")
EVIL = (
  *(None, True, "x", "", -1, 0, 0.5, 999, 10**6, 10**7, 10**400, 1e308, NAN, INFINITY),
  *([], {}, [0], [1, 2], [0.001] * 4, [-1] * 4, [10**6] * 4, [500] * 3, [None] * 4, ["a"] * 4),
  *([True] * 4, [[1] * 4] * 4, [1] * 5000, {"2": 0}, {"a": 1}, {"-1": 1}, {"2": 10**6}),
  *("conv9x9", "conv999999x999999", "conv" + "9" * 50 + "x" + "9" * 50, "y" * 5000),
)


@pytest.mark.parametrize("name", THOROUGH)
def test_every_value_of_every_attribute_is_taken_or_refused_in_one_paragraph(name):
  family = FAMILIES[name]
  refused = 0
  for attribute in rules_of(type(create_model(name))):
    for value in EVIL:
      try:
        overrides = {**family.overrides, attribute: value}
        spec = repjax.ModelSpec(name, 3, overrides, Preprocessing(32, 32))
        spec.create_model()
        # Tracing takes long, so it is done where a value of this kind could still be wrong.
        if isinstance(value, list | dict) or value in (999, 10**6):
          spec.variable_shapes()
      except InputError as error:
        refused += 1
        assert_one_paragraph(error)
  assert refused > len(EVIL)


def test_the_largest_number_of_blocks_is_checked_before_anything_is_built():
  check_model("repvgg_a0", {"stage_sizes": (500, 400, 99, 1)})
  for name, overrides in (
    ("repvgg_a0", {"stage_sizes": (500, 400, 100, 1)}),
    ("parnet_s", {"stem_blocks": 1001}),
    ("parnet_s", {"stem_blocks": 998, "stage_sizes": (1, 1, 1)}),
  ):
    with pytest.raises(InputError, match="ask for 1,001 blocks"):
      create_model(name, **overrides)


@pytest.mark.parametrize("groups", [2, {2: 2}, {"2": 2}], ids=str)
def test_numbers_that_are_names_may_be_strings_as_in_json(groups):
  check_model("repvgg_a0", {"groups": groups})


class Unread(list):
  """A list that nobody may read, such as one of a million items in a file of somebody."""

  def __iter__(self):
    raise AssertionError("an item was read before the length")


def test_lengths_are_checked_before_items():
  names = Unread(["conv3x3"] * 101)
  with pytest.raises(InputError, match="at most 100"):
    create_model("repvgg_a0", branches=names)
  with pytest.raises(InputError, match="at most 100"):
    schema.check({"name": "repvgg_a0", "overrides": {"branches": names}}, contents.MODEL)
  with pytest.raises(InputError, match="at most 100"):
    schema.check({"name": "repvgg_a0", "overrides": dict.fromkeys(range(101))}, contents.MODEL)
