"""Numbers and ranges in a config are checked, and errors name the argument."""

import math

import numpy as np
import pytest

from repjax.data.augmentation.base import check_number, check_range
from repjax.errors import InputError


@pytest.mark.parametrize("value", ["0.5", None, True, float("nan"), [0.5], 1 + 0j, -0.1, 1.1])
def test_a_number_outside_its_range_is_refused_by_name(value):
  with pytest.raises(InputError, match=r"^it is .*; it must be a number from 0 to 1$"):
    check_number("it", value, 0, 1)


@pytest.mark.parametrize("value", [0, 1, 0.5, np.float32(0.5), np.int64(1)])
def test_a_number_inside_its_range_is_taken(value):
  check_number("it", value, 0, 1)


def test_whole_numbers_may_be_asked_for():
  check_number("it", 3.0, 0, 5, whole=True)
  with pytest.raises(InputError, match=r"^it is 3.5; it must be a whole number from 0 to 5$"):
    check_number("it", 3.5, 0, 5, whole=True)


@pytest.mark.parametrize("value", [(0.5, 2), [0.5, 2.0], (2, 2)])
def test_a_range_comes_back_as_two_floats(value):
  result = check_range("it", value, 0, math.inf)
  assert result == tuple(value)
  assert all(type(number) is float for number in result)


@pytest.mark.parametrize("value", [(2, 1), (0, 1), (1,), (1, 2, 3), "ab", 1, None, (1, "2")])
def test_what_is_no_range_is_refused_by_name(value):
  with pytest.raises(InputError, match=r"of it is|^it is"):
    check_range("it", value, 0, math.inf)
