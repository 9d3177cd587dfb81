"""Prints the most probable labels of images.

Examples:
  repjax predict --workdir runs/a0 cat.jpg
  repjax predict --workdir runs/a0 photographs/ --csv labels.csv

Images are files, folders of files, or .txt files with one path in each line. An image that cannot
be read is named and left out. The exit status is 1 if no image could be read. For 1,000 images or
more, repjax first measures once which algorithm is fastest for each convolution.
"""

from __future__ import annotations

import contextlib
import csv
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repjax.cli import flags
from repjax.data.layout import ENDINGS
from repjax.errors import InputError, one_paragraph, printable

if TYPE_CHECKING:
  from repjax.deploy import Predictor

MANY = 1000
"""Number of images from which measuring the fastest algorithms saves time."""


def main(argv: Sequence[str]) -> None:
  """Labels the images that the flags name."""
  parser = flags.parser("predict", __doc__)
  parser.add_argument(
    "images", nargs="+", type=Path, metavar="IMAGE", help="image file, folder, or .txt list"
  )
  flags.add(parser, "--workdir")
  parser.add_argument(
    "--top", type=int, default=5, metavar="K", help="labels for each image (default: 5)"
  )
  parser.add_argument(
    "--csv", type=Path, metavar="FILE", help="write the labels to this file instead of printing"
  )
  flags.add(parser, "--dtype", "--no-verify")
  flags.add(
    parser,
    "--batch-size",
    help="images in a batch (default: 1, 8 or 32, by the number of images)",
  )
  arguments = parser.parse_args(argv)
  from repjax.deploy import Predictor

  with one_paragraph(), contextlib.ExitStack() as stack:
    files = image_files(arguments.images)
    predictor = Predictor(
      arguments.workdir,
      dtype=arguments.dtype,
      batch_sizes=(arguments.batch_size or smallest_batch_size(len(files)),),
      tune=len(files) >= MANY,
      verify=arguments.verify,
    )
    k = min(arguments.top, len(predictor.labels))
    writer = stack.enter_context(open_csv(arguments.csv, k)) if arguments.csv else None
    skipped = write(predictor, files, k, writer)
    if skipped == len(files):
      raise InputError(f"none of the {skipped} images could be read, see above")
  if skipped:
    print(f"{skipped} of {len(files)} images could not be read, see above", file=sys.stderr)
  if arguments.csv:
    print(f"{len(files) - skipped} images\nsaved: {arguments.csv}")


def image_files(images: Sequence[Path]) -> list[Path]:
  """Returns the files that the given files, folders and lists name, in order.

  Raises:
    InputError: a folder or a list names no image, or a list cannot be read.
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
  """Returns the lines of a text file that are not blank."""
  try:
    return [line.strip() for line in path.read_text().splitlines() if line.strip()]
  except (OSError, UnicodeDecodeError) as error:
    raise InputError(f"{path} cannot be read as a list of paths: {error}") from error


@contextlib.contextmanager
def open_csv(path: Path, k: int) -> Iterator[Any]:
  """Opens a CSV file for rows of `k` labels, and yields its writer.

  The file appears after the last row, so that a stopped command leaves no incomplete table.

  Raises:
    InputError: the file cannot be written.
  """
  from repjax import disk

  with disk.replacing_file(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file)
    columns = (f"{kind}{rank}" for rank in range(1, k + 1) for kind in ("label", "probability"))
    writer.writerow(["image", *columns])
    yield writer


def smallest_batch_size(count: int) -> int:
  """Returns the smallest batch size that holds `count` images, or the largest batch size.

  Only one size is compiled, so that a few images are labelled at once.
  """
  from repjax.deploy.compile import BATCH_SIZES

  return next((size for size in BATCH_SIZES if size >= count), BATCH_SIZES[-1])


def write(predictor: Predictor, files: Sequence[Path], k: int, writer: Any) -> int:
  """Writes the labels of each image that can be read, and returns how many images cannot be read.

  Args:
    predictor: labels the images.
    files: paths of the images.
    k: number of labels for each image.
    writer: from `open_csv`; None prints a line for each image.
  """
  skipped = 0
  for file, result in progress(predictor.stream(files), len(files), shown=writer is not None):
    if not hasattr(result, "shape"):  # an error in place of an array of probabilities
      print(f"skipped: {printable(result)}", file=sys.stderr)
      skipped += 1
      continue
    best = predictor.best(result, k)
    if writer is None:
      labels = ", ".join(f"{label} {probability:.1%}" for label, probability in best)
      print(f"{printable(file)}: {printable(labels)}", flush=True)
    else:
      cells = (cell for label, probability in best for cell in (label, f"{probability:.6f}"))
      writer.writerow([file, *cells])
  return skipped


def progress(results: Iterator[Any], count: int, *, shown: bool) -> Iterator[Any]:
  """Returns the results with a progress bar on a terminal, if the bar is to be shown."""
  if not shown:
    return results
  import tqdm

  return iter(tqdm.tqdm(results, "predicting", count, leave=False, disable=None))
