"""JSON files."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from repjax.disk import manifest
from repjax.disk.folders import replacing_file
from repjax.errors import InputError


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
  if not path.parent.exists():
    return InputError(
      f"the folder {path.parent} does not exist. Give the folder of a run, an import or an export"
    )
  return InputError(
    f"{path} does not exist; is {path.parent} the right folder? Give the folder of a run, an "
    "import or an export"
  )


def read_json(path: Path, read_bytes: Callable[[Path], bytes] = Path.read_bytes) -> Any:
  """Reads a JSON file.

  Args:
    path: path of the file.
    read_bytes: reads the file; `Snapshot.read_bytes` also compares it with its checksum.

  Raises:
    InputError: the file is missing or damaged.
  """
  if not path.exists():
    raise missing(path)
  try:
    return json.loads(read_bytes(path).decode())
  except InputError:  # which is a ValueError too
    raise
  except OSError as error:
    raise InputError(f"{path} cannot be read: {error.strerror}") from error
  except ValueError as error:
    raise InputError(f"{path} is damaged ({error}); restore it or start in a new folder") from error


def update_manifest(folder: Path, path: Path) -> None:
  """Renews the checksum of one file of a folder, if the folder has checksums.

  Raises:
    InputError: the manifest cannot be written.
  """
  changed = manifest.with_file(folder, path)
  if changed is not None:
    write_json(folder / manifest.MANIFEST, changed)
