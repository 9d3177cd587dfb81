"""Checks the metadata of a data set on disk before TFDS reads it.

A data set may come from anyone. TFDS imports each class that `features.json` names, and believes
all numbers and names. So the files are read here first: classes are those of TFDS itself, sizes are
within bounds, and no name leads out of the folder.
"""

import functools
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from repjax import json_files, regular_files
from repjax.data.formats import MOST_PIXELS
from repjax.errors import sentences
from repjax.schema import MisfitError, items, table, text, whole

MOST_CLASSES = 10**6
MOST_IMAGES = 10**10  # of a shard
_LARGEST = 2**25  # bytes of a file of metadata
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_COUNT_KEYS = ("num_classes", "numClasses")


def check_sets(folder: Path, name: str, variant: str | None) -> None:
  """Checks all metadata that TFDS may read when it opens a set by its name.

  Args:
    folder: the folder of all sets.
    name: name of the set, as its folder is called.
    variant: name of the variant, if one is wanted.

  Raises:
    ValueError: a file cannot be read, or says what no data set of TFDS says.
  """
  default = folder / name / ".config" / "metadata.json"
  if default.exists():
    _check_default(default, _json(default))
  inside = folder / name / variant if variant else folder / name
  found = {path.parent for path in inside.glob("*/*.json")}
  found |= set() if variant else {path.parent for path in inside.glob("*/*/*.json")}
  for version in sorted(found):
    # The folder in which a successor is written is hidden and incomplete; TFDS does not look there.
    if not any(part.startswith(".") for part in version.relative_to(inside).parts):
      check_set(version)


def check_set(folder: Path) -> None:
  """Checks the metadata in one folder of a version of a set.

  Raises:
    ValueError: as in `check_sets`.
  """
  checks: dict[str, Callable[[Path, Any], None]] = {
    "dataset_info.json": _check_info,
    "features.json": _check_features,
    "metadata.json": _check_metadata,
  }
  for name, check in checks.items():
    path = folder / name
    if path.exists():
      check(path, _json(path))
  for path in folder.glob("*.labels.txt"):
    _check_labels(path)


def _refuse(path: Path, problem: str) -> ValueError:
  """Returns the error for a file of metadata."""
  way_out = "Copy the data set again, or prepare it again"
  return ValueError(sentences(f"{path} cannot be used: {problem}", way_out))


def _read(path: Path) -> bytes:
  """Returns the bytes of a file of metadata."""
  try:
    return regular_files.read(path, _LARGEST)
  except OSError as error:
    raise _refuse(path, error.strerror or str(error)) from error


def _json(path: Path) -> Any:
  """Returns the content of a JSON file."""
  try:
    return json_files.parse(_read(path))
  except MisfitError as misfit:
    raise _refuse(path, misfit.words(json_files.shown)) from None


def _check_default(path: Path, content: Any) -> None:
  """Checks the file that names the default variant of a set."""
  names = list(content.values()) if isinstance(content, dict) else [None]
  for name in names:
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]*", name) or ".." in name:
      raise _refuse(path, f"{json_files.shown(name)} is no name of a variant")


def _check_info(path: Path, content: Any) -> None:
  """Checks `dataset_info.json`: names, and the numbers of images in each file."""
  info = _plain_keys(path, content)
  for key, pattern in (("name", r"\w+"), ("version", r"\d+\.\d+\.\d+"), ("configname", r"[\w.-]*")):
    value = info.get(key, "")
    wanted = isinstance(value, str) and (re.fullmatch(pattern, value) or not value)
    if not wanted or ".." in value:
      raise _refuse(path, f"{key} is {json_files.shown(value)}")
  splits = info.get("splits", [])
  if not isinstance(splits, list):
    raise _refuse(path, f"splits is {json_files.shown(splits)}, and must be a list")
  for item in splits:
    split = _plain_keys(path, item)
    name, template = split.get("name"), split.get("filepathtemplate", "")
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+", name) or ".." in name:
      raise _refuse(path, f"{json_files.shown(name)} is no name of a split")
    if not isinstance(template, str) or not _TEMPLATE.fullmatch(template):
      raise _refuse(path, f"{json_files.shown(template)} is no template of the names of files")
    lengths = split.get("shardlengths", [])
    if not isinstance(lengths, list):
      raise _refuse(path, f"shardLengths is {json_files.shown(lengths)}, and must be a list")
    for length in lengths:
      _check_whole(path, f"shardLengths of {name}", length, MOST_IMAGES)
    _check_whole(path, f"numBytes of {name}", split.get("numbytes", 0), 2**62)


# TFDS fills in such a template by `str.format`, which can follow attributes and pad to any length.
_TEMPLATE = re.compile(
  r"([\w.-]|\{(DATASET|SPLIT|FILEFORMAT|SHARD_INDEX|NUM_SHARDS|SHARD_X_OF_Y)\})*", re.ASCII
)


def _plain_keys(path: Path, content: Any) -> dict[str, Any]:
  """Returns a table with its keys in lower case: protocol buffers take shardLengths, shard_lengths.

  Raises:
    ValueError: `content` is no table.
  """
  if not isinstance(content, dict):
    raise _refuse(path, f"{json_files.shown(content)} must be a table")
  return {key.replace("_", "").lower(): value for key, value in content.items()}


def _check_whole(path: Path, name: str, value: Any, most: int) -> None:
  """Raises unless a value is a whole number from 0 to `most`; JSON has long ones as strings."""
  number = -1
  if isinstance(value, int) and not isinstance(value, bool):
    number = value
  elif isinstance(value, str) and re.fullmatch("[0-9]{1,20}", value):
    number = int(value)
  if not 0 <= number <= most:
    wanted = f"must be a whole number from 0 to {most:,}"
    raise _refuse(path, f"{name} is {json_files.shown(value)}, and {wanted}")


def _check_features(path: Path, content: Any) -> None:
  """Checks `features.json`: TFDS imports the classes that it names, and makes objects of them."""
  for key, value in _leaves(content):
    if key in _CLASS_KEYS and value not in known_features():
      raise _refuse(path, f"{json_files.shown(value)} is no feature of TFDS, and would be imported")
    if key in _COUNT_KEYS:
      _check_whole(path, key, value, MOST_CLASSES)
    if key in ("names_file", "namesFile"):
      raise _refuse(path, f"it names a file outside of the set, {json_files.shown(value)}")


@functools.cache
def known_features() -> frozenset[str]:
  """Returns the full names of the feature classes that TFDS has."""
  classes = [each for each in vars(tfds.features).values() if isinstance(each, type)]
  return frozenset(
    f"{each.__module__}.{each.__name__}"
    for each in classes
    if issubclass(each, tfds.features.FeatureConnector)
  )


def _leaves(content: Any) -> Iterator[tuple[str, Any]]:
  """Yields the key and value of everything in JSON that is no table and no list.

  TFDS also reads JSON inside of strings. Such strings are opened here too.
  """
  pending = [("", content)]
  while pending:
    key, value = pending.pop()
    if isinstance(value, dict):
      pending += value.items()
    elif isinstance(value, list):
      pending += [(key, each) for each in value]
    else:
      yield key, value
      if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
          pending.append(("", json.loads(value)))
        except (ValueError, RecursionError):
          continue  # a text that begins like JSON, which TFDS cannot read either


# The checksum of each split. Sets with masks also have the largest height and width in each split,
# and the colours of their classes. Sets of TFDS may have anything else there.
_METADATA = {
  "checksum": table(text()),
  "largest_images": table(items(whole(1, MOST_PIXELS), length=2)),
  "class_colors": items(items(whole(0, 255), length=3), most=256),
}


def _check_metadata(path: Path, content: Any) -> None:
  """Checks what repjax reads of `metadata.json`, which it writes into its own sets."""
  if not isinstance(content, dict):
    raise _refuse(path, f"{json_files.shown(content)} must be a table")
  try:
    for key, rule in _METADATA.items():
      if key in content:
        rule.check(content[key], key)
  except MisfitError as misfit:
    raise _refuse(path, misfit.words(json_files.shown)) from None


def _check_labels(path: Path) -> None:
  """Checks a file with the names of classes, one in each line."""
  data = _read(path)
  if data.count(b"\n") > MOST_CLASSES:
    raise _refuse(path, f"it has more than {MOST_CLASSES:,} names")
  if not data.strip():  # TFDS would take numbers for names
    raise _refuse(path, "it is empty")
  if data.startswith(b"\xef\xbb\xbf") or b"\0" in data:
    raise _refuse(path, "it holds a byte order mark or zero bytes, which no name of a class has")
  try:
    data.decode()
  except UnicodeDecodeError as error:
    raise _refuse(path, f"it is not encoded as UTF-8: byte {error.start} is wrong") from error
