"""The site: docstrings become Markdown, names have a place, nothing comes from other servers."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from repjax.errors import InputError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def script(monkeypatch):
  """Imports a program of scripts/."""
  monkeypatch.syspath_prepend(ROOT / "scripts")
  return importlib.import_module


DOCSTRING = """Adds x_1 to `y_1`, see [1].

  z = x_1 + y_1

Args:
  x, y: arrays (N, H), as
    for z.
  z: <None>.

Example:
  add(x, y)

  add(x, y)["z"]

References:
  Somebody, https://example.org/a_b
"""

MARKDOWN = r"""Adds x\_1 to `y_1`, see \[1\].

```text
z = x_1 + y_1
```

Args:
  x: arrays (N, H), as
    for z.
  y: arrays (N, H), as
    for z.
  z: \<None\>.

**Example**

```python
add(x, y)

add(x, y)["z"]
```

**References**

Somebody, https://example.org/a_b"""


def test_docstrings_become_markdown(script):
  pytest.importorskip("griffe")
  assert script("site_docstrings").as_markdown(DOCSTRING) == MARKDOWN


def test_files_outside_docs_have_a_place(script):
  place_of = script("build_site").place_of
  assert place_of(ROOT / "docs" / "guides" / "data.md") == Path("guides/data.md")
  assert place_of(ROOT / "CHANGELOG.md") == Path("changelog.md")
  assert place_of(ROOT / "benchmarks" / "a.json") == Path("files/benchmarks/a.json")
  assert place_of(ROOT / "repjax" / "algebra.py") == Path("files/repjax/algebra.py.md")


def test_links_follow_their_files(script):
  page = ROOT / "docs" / "benchmarks.md"
  text = script("build_site").with_new_links(page)
  assert "](files/benchmarks/README.md)" in text
  assert "](../" not in text


def test_links_to_notebooks_open_them_where_there_is_a_repository(script, monkeypatch):
  site, page = script("build_site"), ROOT / "docs" / "tutorials" / "notebooks.md"
  assert "](../notebooks/convert.ipynb)" in site.with_new_links(page)
  monkeypatch.setattr(site, "repository_name", lambda: "somebody/fork")
  wanted = "](https://colab.research.google.com/github/somebody/fork/blob/main/docs/notebooks/"
  assert site.with_new_links(page).count(wanted) == 2


@pytest.mark.parametrize(
  ("page", "loads"),
  [
    ('<a href="https://example.org">elsewhere</a><img src="../figure.svg">', False),
    ('<script src="https://example.org/a.js"></script>', True),
    ('<link rel="stylesheet" href="//example.org/a.css">', True),
    ('<link rel="canonical" href="https://example.org/">', False),
  ],
)
def test_a_page_that_loads_from_elsewhere_is_refused(script, page, loads, tmp_path, monkeypatch):
  site = script("build_site")
  monkeypatch.setattr(site, "SITE", tmp_path)
  (tmp_path / "index.html").write_text(page)
  if loads:
    with pytest.raises(InputError, match=r"index\.html loads .*example"):
      site.check_loads()
  else:
    site.check_loads()


def test_a_public_name_without_a_place_is_refused(script, tmp_path, monkeypatch):
  site = script("build_site")
  monkeypatch.setattr(site, "SITE", tmp_path)
  (tmp_path / "reference").mkdir()
  page = tmp_path / "reference" / "index.html"
  names = [f"{module}.{name}" for module, found in site.public_names().items() for name in found]
  assert {"repjax.fuse", "repjax.algebra.compose", "repjax.deploy.compile"} <= {*names}
  page.write_text("".join(f'<h2 id="{name}"></h2>' for name in names))
  site.check_names()
  page.write_text("".join(f'<h2 id="{name}"></h2>' for name in names[1:]))
  with pytest.raises(InputError, match=names[0]):
    site.check_names()


@pytest.mark.proof  # seconds, and `make docs` does the same
def test_the_site_is_built():
  subprocess.run([sys.executable, ROOT / "scripts" / "build_site.py"], check=True)
