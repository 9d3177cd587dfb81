"""Builds the documentation site: `make docs`.

The pages lie in docs/ and link to other files of the repository, so that they read well there too.
The site has no repository beside it, and therefore gets a copy of every file that a page links to:
data and pictures as they are, programs as pages. The site asks no other server for anything, so
that it gets a copy of ONNX Runtime Web too, which runs the network of docs/digits in the browser.

Examples:
  python scripts/build_site.py   # build/site/index.html
  python scripts/build_site.py --web-runtime onnxruntime-web-1.30.0.tgz   # without a network
"""

import argparse
import ast
import html.parser
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

from repjax import web
from repjax.errors import InputError, listed, one_paragraph

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ROOT / "build" / "pages"
SITE = ROOT / "build" / "site"
OWN_PLACES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
COPIES = "files"  # the folder of the site that holds the other files outside docs/
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\((?![a-z]+:|#)([^)\s#]+)(#[^)\s]*)?\)")
HOSTED = "https://colab.research.google.com/github/{}/blob/main/{}"  # repository, notebook
LOADING = {"script": "src", "img": "src", "link": "href", "iframe": "src"}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--web-runtime",
    type=Path,
    metavar="PATH",
    help="the package onnxruntime-web or a folder with its files (default: the cache or the "
    "registry of npm)",
  )
  arguments = parser.parse_args()
  with one_paragraph():
    write_pages()
    write_digits(arguments.web_runtime)
    build()
    check_names()
    check_loads()
  print(SITE / "index.html")


def write_pages() -> None:
  """Writes the pages of the site, and every file that a page links to."""
  shutil.rmtree(PAGES, ignore_errors=True)
  waiting = [path for path in sorted(DOCS.rglob("*")) if path.is_file()]
  waiting.append(ROOT / "CHANGELOG.md")
  written = set()
  while waiting:
    source = waiting.pop()
    if source in written or source == ROOT / "README.md":  # docs/index.md is the site's own
      continue
    written.add(source)
    target = PAGES / place_of(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix == ".md":
      target.write_text(with_new_links(source))
      waiting += [linked for linked, _ in links_of(source)]
    elif source.suffix == ".py":
      target.write_text(program_page(source))
    else:
      shutil.copyfile(source, target)


def write_digits(runtime: Path | None) -> None:
  """Writes what the network of docs/digits needs to run in a browser: the page and the runtime.

  Args:
    runtime: as `source` in `repjax.web.runtime_files`.
  """
  for name, content in {**web.page_files(), **web.runtime_files(runtime)}.items():
    (PAGES / "digits" / name).write_bytes(content)


def place_of(source: Path) -> Path:
  """Returns where a file of the repository lies in the site, relative to its root."""
  if source.is_relative_to(DOCS):
    return source.relative_to(DOCS)
  name = source.relative_to(ROOT)
  place = Path(OWN_PLACES.get(str(name), Path(COPIES) / name))
  return place.with_name(f"{place.name}.md") if place.suffix == ".py" else place


def links_of(page: Path) -> Iterator[tuple[Path, str]]:
  """Yields the file, and the text, of each link of a page that leads to a file.

  Raises:
    InputError: a link leads to no file.
  """
  for match in LINK.finditer(CODE.sub("", page.read_text())):
    linked = (page.parent / match[1]).resolve()
    if not linked.is_file():
      raise InputError(f"{page.relative_to(ROOT)} links to {match[1]}, which is no file")
    yield linked, match[0]


def with_new_links(page: Path) -> str:
  """Returns the text of a page with the links that lead to the places of the site.

  A link to a notebook opens the notebook where it can be run, if zensical.toml names a repository.
  """
  folder, repository = place_of(page).parent, repository_name()
  text = page.read_text()
  for linked, link in links_of(page):
    match = LINK.fullmatch(link)
    assert match
    target = os.path.relpath(place_of(linked), folder)
    if linked.suffix == ".ipynb" and repository:
      target = HOSTED.format(repository, linked.relative_to(ROOT))
    text = text.replace(link, f"]({target}{match[2] or ''})")
  return text


def repository_name() -> str:
  """Returns the repository on GitHub that zensical.toml names, OWNER/NAME; empty if none."""
  return tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["extra"]["repository"]


def program_page(source: Path) -> str:
  """Returns a page that shows a program."""
  return f"# {source.relative_to(ROOT)}\n\n``````python\n{source.read_text()}``````\n"


def build() -> None:
  """Runs the generator, for which every warning is a mistake.

  Raises:
    InputError: a page has a mistake.
  """
  shutil.rmtree(SITE, ignore_errors=True)
  command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
  if subprocess.run(command, cwd=ROOT).returncode:
    raise InputError("the site was not built. The mistakes stand above this line")


def public_names() -> dict[str, list[str]]:
  """Returns the public names of each module that has a page in docs/reference.

  The source tells them, so that nothing is imported: by `__all__`, or by the first letter.
  """
  names = {}
  for page in sorted((DOCS / "reference").glob("*.md")):
    for module in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
      path = ROOT.joinpath(*module.split("."))
      file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
      names[module] = names_of(ast.parse(file.read_text()))
  return names


def names_of(tree: ast.Module) -> list[str]:
  """Returns the names in `__all__` of a module, else its functions and classes without "_"."""
  for node in tree.body:
    if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
      return ast.literal_eval(node.value)
  defined = [node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
  return [name for name in defined if not name.startswith("_")]


class Elements(html.parser.HTMLParser):
  """The identifiers of a page's elements, and the addresses from which a page loads something."""

  def __init__(self, page: Path) -> None:
    super().__init__()
    self.ids: set[str] = set()
    self.loads: list[str] = []
    self.feed(page.read_text())

  def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
    found = {name: value or "" for name, value in attrs}
    self.ids.add(found.get("id", ""))
    if tag in LOADING and found.get("rel") not in ("canonical", "next", "prev"):
      self.loads.append(found.get(LOADING[tag], ""))


def check_names() -> None:
  """Checks that every public name has a place in the reference.

  Raises:
    InputError: a name is missing.
  """
  ids = set().union(*(Elements(page).ids for page in (SITE / "reference").rglob("*.html")))
  wanted = [f"{module}.{name}" for module, names in public_names().items() for name in names]
  missing = [name for name in wanted if name not in ids]
  if missing:
    raise InputError(f"the reference lacks {listed(missing)}. Add them to pages in docs/reference")


def check_loads() -> None:
  """Checks that the pages load nothing from other servers.

  Raises:
    InputError: a page does.
  """
  for page in sorted(SITE.rglob("*.html")):
    for address in Elements(page).loads:
      if re.match(r"(https?:)?//", address):
        raise InputError(f"{page.relative_to(SITE)} loads {address}. Keep a copy in docs/assets")


if __name__ == "__main__":
  main()
