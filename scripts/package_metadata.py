"""Gives the package its README with absolute links and its addresses; the build calls this.

A package index shows the README without the repository beside it, so that relative links lead
nowhere there. With the repository that zensical.toml names, they become addresses on GitHub.
While it names none, the README stays as it is, and the package has no addresses.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

from hatchling.metadata.plugin.interface import MetadataHookInterface

ROOT = Path(__file__).resolve().parents[1]
CODE = re.compile(r"(^```.*?^```$|`[^`\n]+`)", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"(!?\[[^\]]*\]\()(?![a-z]+:|#)([^)\s]+)\)")
PLACES = {
  "!": "https://raw.githubusercontent.com/{}/main/",
  "[": "https://github.com/{}/blob/main/",
}


class PackageMetadata(MetadataHookInterface):
  """Fills in the fields of pyproject.toml that depend on the repository."""

  def update(self, metadata: dict[str, Any]) -> None:
    """Adds `readme` and `urls` to the metadata."""
    settings = tomllib.loads((ROOT / "zensical.toml").read_text())["project"]
    metadata |= fields((ROOT / "README.md").read_text(), settings["extra"]["repository"])


def fields(readme: str, repository: str) -> dict[str, Any]:
  """Returns the fields `readme` and `urls` of the package.

  Args:
    readme: the text of README.md.
    repository: the repository on GitHub, OWNER/NAME; empty if there is none yet.

  Raises:
    ValueError: the repository has a different form.
  """
  if not re.fullmatch(r"([\w.-]+/[\w.-]+)?", repository):
    raise ValueError(f'zensical.toml: repository is OWNER/NAME on GitHub, not "{repository}"')
  owner, _, name = repository.partition("/")
  text = with_absolute_links(readme, repository) if repository else readme
  addresses = {
    "Documentation": f"https://{owner.lower()}.github.io/{name}/",
    "Source": f"https://github.com/{repository}",
    "Issues": f"https://github.com/{repository}/issues",
    "Changelog": f"https://github.com/{repository}/blob/main/CHANGELOG.md",
  }
  return {
    "readme": {"content-type": "text/markdown", "text": text},
    "urls": addresses if repository else {},
  }


def with_absolute_links(text: str, repository: str) -> str:
  """Returns Markdown whose relative links, those outside code, lead to a repository on GitHub."""

  def absolute(match: re.Match[str]) -> str:
    return f"{match[1]}{PLACES[match[1][0]].format(repository)}{match[2]})"

  # Odd parts are code.
  parts = CODE.split(text)
  return "".join(part if i % 2 else LINK.sub(absolute, part) for i, part in enumerate(parts))
