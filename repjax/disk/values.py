"""JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repjax import json_files
from repjax.disk import manifest
from repjax.disk.folders import replacing_file
from repjax.disk.manifest import gone, listed
from repjax.errors import InputError, printable
from repjax.schema import Rule, anything

FUSED = "fused.json"
"""The file by which a folder of folded parameters is known; see `repjax.fusion.saving`."""


def write_json(path: Path, value: Any) -> None:
  """Writes a JSON file that nobody ever sees half-written, and makes its folder.

  Raises:
    InputError: the file cannot be written; an earlier file of that name is intact.
  """
  text = json.dumps(value, indent=2) + "\n"
  with replacing_file(path) as draft:
    draft.write_text(text)


def missing(path: Path) -> InputError:
  """Returns the error for a file or folder that is to be read and is not there."""
  folder = printable(path.parent)
  if folder.startswith("hf:"):
    return InputError(
      f"{folder} names published weights, and a folder is wanted. Make one: repjax import --from "
      f"{folder} --workdir DIR"
    )
  if path.parent.is_file():
    return InputError(
      f"{folder} is a file, and a folder is wanted: that of a run, an import or an export. A "
      f"checkpoint becomes a folder by: repjax import --from {folder} --workdir DIR"
    )
  if not path.parent.exists():
    return InputError(
      f"the folder {folder} does not exist. Give the folder of a run, an import or an export"
    )
  if any(each.partition("/")[0] == path.name for each in listed(path.parent) or ()):
    return gone(path)
  return InputError(
    f"{path} does not exist; is {path.parent} the right folder? "
    + (
      "It holds the folded parameters of a function: read them by fused.load(folder), with what "
      "repjax.fuse returns for this function, and pass both to repjax.deploy.compile"
      if (path.parent / FUSED).exists()
      else "Give the folder of a run, an import or an export"
    )
  )


def read_json(
  path: Path, rule: Rule = anything, read_bytes: Callable[[Path], bytes] | None = None
) -> Any:
  """Reads a JSON file.

  Args:
    path: path of the file.
    rule: the rule of its content, see `repjax.schema`.
    read_bytes: `Snapshot.read_bytes`, which compares the file with its checksum; None: unchecked.

  Raises:
    InputError: the file is missing or damaged, or holds a value that the rule refuses.
  """
  if not path.exists():
    raise missing(path)
  if read_bytes is None:
    return json_files.read(path, rule)
  return json_files.content(path, read_bytes(path), rule)


def update_manifest(folder: Path, path: Path) -> None:
  """Renews the checksum of one file of a folder, if the folder has checksums.

  Raises:
    InputError: the manifest cannot be written.
  """
  changed = manifest.with_file(folder, path)
  if changed is not None:
    write_json(folder / manifest.MANIFEST, changed)
