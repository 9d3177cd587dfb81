"""Says what is in images: the most probable labels of a trained model.

Images are files, folders of them, and lists: .txt files with a path in each line. What cannot be
read is named and left out; the status is 1 if nothing could be read. From a thousand images on it
is measured first, once, which convolutions are fastest.

repjax predict --workdir runs/a0 cat.jpg
repjax predict --workdir runs/a0 photographs/ --csv labels.csv
"""

import argparse
import contextlib
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from repjax.data.layout import ENDINGS
from repjax.deploy import Predictor
from repjax.deploy.compile import BATCH_SIZES
from repjax.errors import InputError, one_paragraph
from repjax.inference import DTYPES

MANY = 1000
"""Images from which measuring what is fastest pays."""


def files_of(images: Sequence[Path]) -> list[Path]:
  """The image files that are meant, in order.

  Raises:
    InputError: a folder or a list without images, or a list that cannot be read.
  """
  files = []
  for path in images:
    if path.is_dir():
      found = sorted(each for each in path.rglob("*") if each.name.lower().endswith(ENDINGS))
    elif path.suffix == ".txt":
      found = [Path(line) for line in _lines(path)]
    else:
      found = [path]
    if not found:
      raise InputError(f"{path} holds no images; their endings are {', '.join(sorted(ENDINGS))}")
    files += found
  return files


def _lines(path: Path) -> list[str]:
  try:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path} cannot be read as a list of paths: {error}") from error


@contextlib.contextmanager
def opened_csv(path: Path, k: int) -> Iterator[Any]:
  """A writer of rows; the file has its name when all are written, and `.part` behind it before."""
  part = path.with_name(f"{path.name}.part")
  try:
    with part.open("w", newline="", encoding="utf-8") as file:
      writer = csv.writer(file)
      columns = (f"{what}{rank}" for rank in range(1, k + 1) for what in ("label", "probability"))
      writer.writerow(["image", *columns])
      yield writer
    part.replace(path)
  except InputError:
    part.unlink(missing_ok=True)
    raise
  except OSError as error:
    raise InputError(f"{path} cannot be written: {error.strerror}") from error


def batch_size_of(count: int) -> int:
  """The one batch size to compile for, so that a few images are answered at once."""
  return next((size for size in BATCH_SIZES if size >= count), BATCH_SIZES[-1])


def main(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(
    prog="repjax predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("images", nargs="+", type=Path, help="files, folders, .txt lists")
  parser.add_argument("--workdir", required=True, type=Path, help="folder of a run or an import")
  parser.add_argument("--top", type=int, default=5, metavar="K", help="labels for each image")
  parser.add_argument("--csv", type=Path, help="write the labels to this file, print none")
  parser.add_argument("--dtype", choices=DTYPES, default="float32")
  parser.add_argument("--batch-size", type=int, help="(default: 1, 8 or 32, as there are images)")
  arguments = parser.parse_args(argv)
  with one_paragraph(), contextlib.ExitStack() as stack:
    files = files_of(arguments.images)
    size = arguments.batch_size or batch_size_of(len(files))
    predictor = Predictor(
      arguments.workdir,
      dtype=arguments.dtype,
      batch_sizes=(size,),
      tune=len(files) >= MANY,
    )
    k = min(arguments.top, len(predictor.labels))
    writer = stack.enter_context(opened_csv(arguments.csv, k)) if arguments.csv else None
    skipped = write(predictor, files, k, writer)
    if skipped == len(files):
      raise InputError(f"none of the {skipped} images could be read, see above")
  if skipped:
    print(f"{skipped} of {len(files)} images could not be read, see above", file=sys.stderr)
  if arguments.csv:
    print(f"{len(files) - skipped} images\nsaved: {arguments.csv}")


def write(predictor: Predictor, files: Sequence[Path], k: int, writer: Any) -> int:
  """Prints a line, or writes a row, for each image that can be read; how many cannot."""
  skipped = 0
  for file, result in progress(predictor.stream(files), len(files), shown=writer is not None):
    if not isinstance(result, np.ndarray):
      print(f"skipped: {result}", file=sys.stderr)
      skipped += 1
      continue
    best = predictor.best(result, k)
    if writer is None:
      labels = ", ".join(f"{label} {probability:.1%}" for label, probability in best)
      print(f"{file}: {labels}", flush=True)
    else:
      cells = (cell for label, probability in best for cell in (label, f"{probability:.6f}"))
      writer.writerow([file, *cells])
  return skipped


def progress(results: Iterator[Any], count: int, *, shown: bool) -> Iterator[Any]:
  """The same with a bar on a terminal, which printed lines take the place of."""
  if not shown:
    return results
  import tqdm

  return iter(tqdm.tqdm(results, "predicting", count, leave=False, disable=None))
