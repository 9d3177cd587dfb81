"""Fixtures of the tests of data."""

import itertools

import pytest

from tests.data.folders import write_image


@pytest.fixture
def photos(tmp_path):
  """Makes a folder with training and validation images of two classes."""
  folder = tmp_path / "photos"
  for split, count in (("train", 4), ("val", 2)):
    for name, number in itertools.product(("cat", "dog"), range(count)):
      write_image(folder / split / name / f"{split}{number}.jpg")
  return folder
