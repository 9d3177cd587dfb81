"""The JSON files in the folder of a run, read and written as plain dictionaries.

A caller that needs a class, such as a ModelSpec, builds an instance from the dictionary.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repjax import disk
from repjax.config import CONFIG_JSON
from repjax.runs import contents, paths


def write_start(
  workdir: Path,
  *,
  config: Mapping[str, Any],
  data: Mapping[str, Any],
  spec: Mapping[str, Any],
) -> None:
  """Writes the files that describe a run when the run starts or continues.

  Args:
    workdir: folder of the run.
    config: content of config.json.
    data: content of data.json, the fingerprints of both splits.
    spec: content of model.json.

  Raises:
    InputError: a file cannot be written; an earlier file of that name is intact.
  """
  disk.write_json(paths.config_file(workdir), config)
  disk.write_json(paths.data_file(workdir), data)
  write_spec(workdir, spec)


def read_config_json(workdir: Path) -> dict[str, Any]:
  """Reads config.json, the config that a run was last started with.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_json(paths.config_file(workdir), CONFIG_JSON)


def read_data(workdir: Path) -> dict[str, dict[str, Any]] | None:
  """Reads data.json: "train" and "eval", each to the fingerprint of the split.

  Returns:
    The content of the file; None for a run that is older than the file.

  Raises:
    InputError: the file is damaged, or a field has a wrong value.
  """
  path = paths.data_file(workdir)
  return disk.read_json(path, contents.DATA) if path.exists() else None


def read_spec(folder: Path) -> dict[str, Any]:
  """Reads model.json; `ModelSpec` checks the overrides in it.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_json(paths.model_file(folder), contents.MODEL)


def write_spec(folder: Path, spec: Mapping[str, Any]) -> None:
  """Writes model.json.

  Raises:
    InputError: the file cannot be written.
  """
  disk.write_json(paths.model_file(folder), spec)


def read_roundings(workdir: Path) -> dict[str, Any]:
  """Reads rounding.json, which says how quantization-aware training rounds tensors.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_json(paths.rounding_file(workdir), contents.ROUNDINGS)


def write_roundings(workdir: Path, roundings: Mapping[str, Any]) -> None:
  """Writes rounding.json.

  Raises:
    InputError: the file cannot be written.
  """
  path = paths.rounding_file(workdir)
  with disk.writing(path):
    disk.write_json(path, roundings)


def read_conversion_report(workdir: Path) -> dict[str, Any]:
  """Reads the comparison of both forms from the deploy folder of a run.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_json(paths.conversion_file(paths.deploy_folder(workdir)), contents.REPORT)


def read_export(folder: Path) -> dict[str, Any]:
  """Reads export.json, which says what an exported program takes and returns.

  Raises:
    InputError: the file is missing or damaged, or a field has a wrong value.
  """
  return disk.read_json(paths.export_file(folder), contents.EXPORT)
