"""The package has absolute links and addresses where the project names its repository."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


@pytest.fixture
def metadata(monkeypatch):
  """Imports the hook of the build."""
  monkeypatch.syspath_prepend(ROOT / "scripts")
  return importlib.import_module("package_metadata")


def test_without_a_repository_the_readme_stays(metadata):
  fields = metadata.fields(README, "")
  assert fields["readme"] == {"content-type": "text/markdown", "text": README}
  assert fields["urls"] == {}


def test_with_a_repository_every_link_is_absolute_and_leads_to_a_file(metadata):
  fields = metadata.fields(README, "Some-Body/fork")
  text = fields["readme"]["text"]
  pictures = re.findall(r"!\[[^]]*\]\(https://raw\.githubusercontent\.com/(.*?)/main/(.*?)\)", text)
  pages = re.findall(r"\]\(https://github\.com/(.*?)/blob/main/([^)#]*)", text)
  assert len(pictures) == text.count("![") > 0
  assert len(pages) > 20
  for repository, name in pictures + pages:
    assert repository == "Some-Body/fork"
    assert (ROOT / name).is_file()
  assert not re.search(r"\]\((?!https?:)", text)
  assert fields["urls"]["Documentation"] == "https://some-body.github.io/fork/"


def test_links_in_code_and_other_addresses_stay(metadata):
  text = "`[a](b)` [c](https://d) [e](#f)\n```\n[g](h)\n```\n[i](j.md#k)"
  done = metadata.with_absolute_links(text, "o/n")
  assert done == text.replace("(j.md#k)", "(https://github.com/o/n/blob/main/j.md#k)")


def test_an_address_in_place_of_a_name_is_refused(metadata):
  with pytest.raises(ValueError, match="OWNER/NAME"):
    metadata.fields(README, "https://github.com/o/n")
