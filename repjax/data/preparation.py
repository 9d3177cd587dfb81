"""Makes TFDS sets of the files in a folder: what sets with labels and sets with masks share."""

import contextlib
import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import tensorflow_datasets as tfds
from tensorflow_datasets.core import example_serializer, naming
from tqdm import tqdm

from repjax import disk
from repjax.data import storage
from repjax.data.builders import DEMOS
from repjax.data.reading import in_order
from repjax.errors import InputError, listed, printable

VERSION = "1.0.0"  # the same for every set made here; the checksum tells sets apart


class ReadFile(Protocol):
  """The files of one example, which were read.

  Attributes:
    name: path of the image below the folder that was given; if there is a fault, of the file that
      has it.
    digest: the SHA-256 of all bytes of the example.
    fault: why the files are no example; None where they are one.
  """

  @property
  def name(self) -> str: ...
  @property
  def digest(self) -> bytes: ...
  @property
  def fault(self) -> str | None: ...


File = TypeVar("File", bound=ReadFile)


class LeftOut(NamedTuple):
  """The files that a set is made without, and those that it has twice.

  Attributes:
    skipped: files that cannot be used, each with the reason.
    repeated: examples outside the validation split that equal one of its examples byte for byte.
  """

  skipped: dict[str, str]
  repeated: list[str]


@contextlib.contextmanager
def new_set(
  name: str, problems: Iterable[str], *, data_dir: Any, replace: bool
) -> Iterator[tuple[Path, Path]]:
  """Makes a draft of a set, which becomes the set `name` when the block ends well.

  Args:
    name: name of the set.
    problems: all that is wrong with the folder.
    data_dir: the folder in which TFDS keeps its sets; None is TFDS's default.
    replace: allows a set of this name to be replaced.

  Yields:
    The folder of the set and the folder of the draft.

  Raises:
    InputError: there are problems, of which the text lists the first ten.
  """
  target = storage.sets_folder(data_dir) / name / VERSION
  problems = [*name_problems(name), *problems]
  with disk.writing(target, OSError):
    problems += storage.existing_problems(target, replace=replace)
  if problems:
    raise InputError(listed(problems, 10, between="\n", longest=None))
  with (
    storage.whole_set(target, replace=replace) as draft,
    warnings.catch_warnings(action="ignore"),  # Pillow warns about odd files that it can read
  ):
    yield target, draft


@contextlib.contextmanager
def folder_errors(folder: Path) -> Iterator[None]:
  """Turns an error of the system about a folder of images into an `InputError`."""
  try:
    yield
  except OSError as error:
    where = printable(error.filename or folder)
    raise InputError(f"{where} cannot be read: {error.strerror}") from error


def name_problems(name: str) -> list[str]:
  """Returns the reason why a set cannot have this name, with a possible name, or an empty list."""
  plain = re.sub(r"[^a-z0-9]+", "_", naming.camelcase_to_snakecase(name.strip())).strip("_")
  proposed = plain if re.match("[a-z]", plain) else f"set_{plain}".rstrip("_")
  taken = {*tfds.list_builders(with_community_datasets=False), *DEMOS, "synthetic"}
  if proposed in taken:
    proposed = f"my_{proposed}"
  if name in taken:
    return [f"the name {name} belongs to a data set already; take {proposed}, for example"]
  if not re.fullmatch("[a-z][a-z0-9_]*", name) or naming.camelcase_to_snakecase(name) != name:
    return [
      f"{name!r} cannot be the name of a set. A name consists of lower-case letters, digits and "
      f"underscores, and starts with a letter; take {proposed}, for example"
    ]
  return []


def read_all(
  files: Mapping[str, Iterable[tuple]],
  read: Callable[..., File],
  keep: Callable[[str, File], None],
  *,
  name: str,
  total: int,
  num_workers: int,
) -> LeftOut:
  """Reads the files of all splits in several threads, and hands on those that can be used.

  Args:
    files: each split to the arguments of `read` for its examples, in the order of the set.
    read: reads an example.
    keep: takes a split and an example that can be used.
    name: name of the set, for the bar.
    total: number of examples.
    num_workers: number of threads.
  """
  skipped, repeated, validation = {}, [], set()
  with tqdm(total=total, desc=name, unit=" images", disable=None) as bar:
    # The validation split comes first, so that its digests are known when the other splits follow.
    for split in sorted(files, key=lambda split: split != "validation"):
      for example in in_order(read, files[split], num_workers):
        bar.update()
        if example.fault:
          skipped[example.name] = example.fault
          continue
        keep(split, example)
        if split == "validation":
          validation.add(example.digest)
        elif example.digest in validation:
          repeated.append(example.name)
  return LeftOut(skipped, repeated)


def write_skipped(draft: Path, reasons: Mapping[str, str]) -> None:
  """Writes the list of the files that were left out, each with the reason; none if there are none.

  Names keep their bytes, but a line break in a name must not look like two files.
  """
  lines = [f"{_one_line(path)}\t{reason}\n" for path, reason in sorted(reasons.items())]
  if lines:
    (draft / storage.SKIPPED).write_text("".join(lines), "utf-8", "surrogateescape")


def _one_line(path: str) -> str:
  """Returns a path with its control characters escaped."""
  return path.translate({code: f"\\x{code:02x}" for code in (*range(32), 127)})


def refuse_skipped(skipped: Mapping[str, str], strict: bool) -> None:
  """Raises InputError if files were skipped and `strict` allows none."""
  if strict and skipped:
    raise InputError(
      f"nothing was written, since {len(skipped):,} of the files cannot be used; without "
      f"--strict they are left out, and {storage.SKIPPED} lists them all: "
      + listed(
        (f"{path}: {why}" for path, why in sorted(skipped.items())),
        20,
        between="; ",
        longest=None,
      )
    )


class SplitWriter:
  """Writes the examples of a split, and computes the split's checksum.

  The checksum is the SHA-256 over the name, a zero byte and the digest of each example in turn.

  Attributes:
    checksum: the checksum so far.
  """

  def __init__(self, draft: Path, name: str, split: str, features: tfds.features.FeaturesDict):
    self._shards = storage.ShardWriter(draft, name, split)
    self._features = features
    specs: Any = features.get_serialized_info()
    self._serializer = example_serializer.ExampleSerializer(specs)
    self.checksum = hashlib.sha256()

  def write(self, file: ReadFile, content: Mapping[str, Any]) -> None:
    """Appends an example.

    Args:
      file: what was read.
      content: the features of the example besides the name of the file.
    """
    name = file.name.encode("utf-8", "surrogateescape")
    example = self._features.encode_example({**content, "file_name": name})
    self._shards.write(self._serializer.serialize_example(example))
    self.checksum.update(name + b"\0" + file.digest)

  def finish(self) -> storage.SplitFiles:
    """Closes the files, and returns the facts about them that TFDS keeps."""
    return self._shards.finish()


def write_info(
  draft: Path,
  name: str,
  writers: Mapping[str, SplitWriter],
  *,
  features: tfds.features.FeaturesDict,
  description: str,
  **metadata: Any,
) -> None:
  """Finishes the files of all splits, and writes the metadata, with the checksum of each split."""
  checksums = {split: writer.checksum.hexdigest() for split, writer in writers.items()}
  storage.write_info(
    draft,
    name,
    VERSION,
    features=features,
    splits={split: writer.finish() for split, writer in writers.items()},
    description=description,
    metadata={"checksum": checksums, **metadata},
  )
