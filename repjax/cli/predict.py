"""Prints the most probable labels of images, or writes the class of each of their pixels.

Examples:
  repjax predict --workdir runs/a0 cat.jpg
  repjax predict --workdir runs/a0 photographs/ --csv labels.csv
  repjax predict --workdir hf:timm/repvgg_a0.rvgg_in1k cat.jpg
  repjax predict --workdir runs/scenes photographs/ --to maps

Images are files, folders of files, or .txt files with one path in each line. Folders are searched
as by prepare-dataset: links are followed, and hidden files are left out. An image that cannot be
read is named and left out. The exit status is 1 if no image could be read. For 1,000 images or
more, repjax first measures once which algorithm is fastest for each convolution.

With a model for segmentation, the labels of an image are those with most pixels, with their shares.
--to makes a folder: masks/ has PNG files with a palette, whose values are the classes, and
overlays/ has the images with the colours of the classes over them. A file is called as its image,
and has its size. classes.json names the classes and colours, those of the data set of the
training. The folder appears after the last image, and an old one is not replaced.

Images for segmentation are not resized. Each one lies at the top left of a canvas whose sides are
33, 65, 97, ..., and the rest of the canvas has the mean colour, as in evaluation. Every size of
canvas is compiled once, which takes seconds. --window slides one square over images of all sizes
instead, as repjax evaluate does: for a network that takes one size only, and for large images.
--flip averages each image and its mirror image. Neither is taken from the run: give the window and
flip with which the run was evaluated.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import itertools
import os
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from repjax import disk, regular_files
from repjax.cli import flags
from repjax.data import files
from repjax.errors import InputError, one_paragraph, printable

if TYPE_CHECKING:
  from repjax.cli import maps
  from repjax.deploy import Predictor

MANY = 1000
"""Number of images from which measuring the fastest algorithms saves time."""


def main(argv: Sequence[str]) -> None:
  """Labels the images that the flags name."""
  parser = flags.parser("predict", __doc__)
  parser.add_argument(
    "images", nargs="+", type=flags.file, metavar="IMAGE", help="image file, folder, or .txt list"
  )
  flags.add(parser, "--workdir", **flags.SOURCE)
  parser.add_argument(
    "--top", type=int, default=5, metavar="K", help="labels for each image (default: 5)"
  )
  parser.add_argument(
    "--csv",
    type=flags.file,
    metavar="FILE",
    help="write the labels to this file instead of printing",
  )
  flags.add(parser, "--to", help="folder to make, for class maps and overlays of a segmentation")
  parser.add_argument(
    "--window",
    type=int,
    default=0,
    metavar="PIXELS",
    help="side of windows that slide over images for segmentation; 0: whole images (default: 0)",
  )
  parser.add_argument(
    "--flip",
    action="store_true",
    help="average the predictions for each image of a segmentation and its mirror image",
  )
  flags.add(parser, "--dtype", "--no-verify")
  flags.add(
    parser,
    "--batch-size",
    help="images in a batch (default: 1, 8 or 32, by the number of images; 1 for segmentation)",
  )
  parser.add_argument(
    "--cuda-graphs", action="store_true", help="on NVIDIA GPUs, launch the network as one graph"
  )
  parser.add_argument(
    "--runtime",
    default="xla",
    metavar="NAME",
    help="on CPUs in float32: xla, onnxruntime, openvino, or auto, which measures (default: xla)",
  )
  arguments = parser.parse_args(argv)
  from repjax.cli import maps
  from repjax.deploy import Predictor
  from repjax.pretrained import task_of

  with one_paragraph(), contextlib.ExitStack() as stack:
    check_arguments(arguments)
    images = image_files(arguments.images)
    if arguments.csv:
      refuse_to_replace(arguments.csv, [*arguments.images, *images])
    task = task_of(arguments.workdir, verify=arguments.verify)
    if arguments.to and task != "segmentation":
      raise InputError(
        f"--to writes class maps of a segmentation, and the model in {arguments.workdir} is for "
        f"{task}. Leave it out, or write the labels by --csv"
      )
    stems = maps.stems(images, arguments.images) if arguments.to else []
    size = arguments.batch_size or 1
    if task == "classification":
      size = batch_size(arguments.batch_size, len(images))
    predictor = Predictor(
      arguments.workdir,
      dtype=arguments.dtype,
      batch_sizes=(size,),
      tune=len(images) >= MANY,
      cuda_graphs=arguments.cuda_graphs,
      runtime=arguments.runtime,
      verify=arguments.verify,
      window=arguments.window,
      flip=arguments.flip,
    )
    k = min(arguments.top, len(predictor.labels))
    draw = stack.enter_context(maps.opened(arguments.to, predictor, stems)) if stems else None
    writer = stack.enter_context(open_csv(arguments.csv, k)) if arguments.csv else None
    skipped = write(predictor, images, k, writer, draw)
    if skipped == len(images):
      raise InputError(f"none of the {skipped} images could be read, see above")
  if skipped:
    print(f"{skipped} of {len(images)} images could not be read, see above", file=sys.stderr)
  saved = [path for path in (arguments.csv, arguments.to) if path]
  if saved:
    print(
      f"{len(images) - skipped} images", *(f"saved: {printable(path)}" for path in saved), sep="\n"
    )


def check_arguments(arguments: argparse.Namespace) -> None:
  """Raises if a value cannot be used, before anything is loaded.

  Raises:
    InputError: the batch size or the number of labels is below 1, or the CSV file cannot be made.
  """
  if arguments.batch_size is not None and arguments.batch_size < 1:
    raise InputError(
      f"batch_sizes must be whole numbers above 0, got --batch-size {arguments.batch_size}"
    )
  if arguments.top < 1:
    raise InputError(f"the number of labels must be 1 or more, got {arguments.top}")
  if arguments.to:
    disk.check_new(arguments.to)
  path = arguments.csv
  if path is None:
    return
  if os.path.exists(path) and not regular_files.is_regular(path):
    raise InputError(f"{printable(path)} cannot be written: it is no file; give a different name")
  disk.check_place(path)


def refuse_to_replace(path: Path, inputs: Sequence[Path]) -> None:
  """Raises if a table would take the place of an image or of a list.

  Raises:
    InputError: the path is that of an input.
  """
  for each in inputs:
    # Names are compared first, since looking up a million files takes long.
    both = each.name == path.name and os.path.exists(each) and os.path.exists(path)
    if both and os.path.samefile(each, path):
      raise InputError(
        f"{printable(path)} is read as an image or a list, and --csv would replace it; give a "
        "different name"
      )


def image_files(images: Sequence[Path]) -> list[Path]:
  """Returns the files that the given files, folders and lists name, in order.

  A folder inside a folder that cannot be read is named on stderr and left out.

  Raises:
    InputError: a folder or a list names no image, or a list cannot be read.
  """
  found = []
  for path in images:
    problems: list[str] = []
    if os.path.isdir(path):
      inside = sorted(Path(each) for each in files.walk(path, problems) if files.is_image(each))
      some = [path / each for each in inside]
    elif path.suffix.lower() == ".txt":
      some = files.read_list(path)
    else:
      some = [path]
    for problem in problems:
      print(f"skipped: {problem}", file=sys.stderr)
    if not some:
      raise InputError(
        f"{printable(path)} holds no images; their endings are {', '.join(sorted(files.ENDINGS))}"
      )
    found += some
  return found


@contextlib.contextmanager
def open_csv(path: Path, k: int) -> Iterator[Any]:
  """Opens a CSV file for rows of `k` labels, and yields its writer.

  The file appears after the last row, so that a stopped command leaves no incomplete table.

  Raises:
    InputError: the file cannot be written.
  """
  # Names of files need not be UTF-8, and a table with such bytes could not be read by many.
  how: dict[str, Any] = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}
  with disk.replacing_file(path) as draft, draft.open("w", **how) as file:
    writer = csv.writer(file)
    columns = (f"{kind}{rank}" for rank in range(1, k + 1) for kind in ("label", "probability"))
    writer.writerow(["image", *columns])
    yield writer


def cell(text: str) -> str:
  """Returns a text for a CSV file that no spreadsheet takes for a formula.

  Names of files and classes come from anyone, and a formula can start programs. An apostrophe in
  front makes such a cell a text.

  References:
    OWASP, CSV Injection. https://owasp.org/www-community/attacks/CSV_Injection
  """
  # Some programs skip blanks in front, and read the wide forms of these signs as the usual ones.
  plain = unicodedata.normalize("NFKC", text)
  risky = plain.startswith(("\t", "\r", "\n")) or plain.lstrip().startswith(("=", "+", "-", "@"))
  return f"'{text}" if risky else text


def batch_size(given: int | None, count: int) -> int:
  """Returns the batch size that was given, or the one that fits `count` images.

  A batch larger than all images together would be filled up with nothing.
  """
  return smallest_batch_size(count) if given is None else min(given, count)


def smallest_batch_size(count: int) -> int:
  """Returns the smallest batch size that holds `count` images, or the largest batch size.

  Only one size is compiled, so that a few images are labelled at once.
  """
  from repjax.deploy.compile import BATCH_SIZES

  return next((size for size in BATCH_SIZES if size >= count), BATCH_SIZES[-1])


def write(
  predictor: Predictor, images: Sequence[Path], k: int, writer: Any, draw: maps.Draw | None = None
) -> int:
  """Writes the labels of each image that can be read, and returns how many images cannot be read.

  Args:
    predictor: labels the images.
    images: paths of the images.
    k: number of labels for each image.
    writer: from `open_csv`; None prints a line for each image.
    draw: writes the class map of an image; None writes none.
  """
  skipped = 0
  results = progress(predictor.stream(images), len(images), shown=writer is not None)
  for number, (file, result) in enumerate(results):
    if not hasattr(result, "shape"):  # an error in place of an array of probabilities
      print(f"skipped: {printable(result)}", file=sys.stderr)
      skipped += 1
      continue
    if draw is not None:
      draw(number, images[number], result)
    best = predictor.best(result, k)
    if writer is None:
      labels = ", ".join(f"{printable(label)} {probability:.1%}" for label, probability in best)
      print(f"{printable(file)}: {labels}", flush=True)
    else:
      cells = [(cell(label), f"{probability:.6f}") for label, probability in best]
      writer.writerow([cell(str(file)), *itertools.chain(*cells)])
  return skipped


def progress(results: Iterator[Any], count: int, *, shown: bool) -> Iterator[Any]:
  """Returns the results with a progress bar on a terminal, if the bar is to be shown."""
  if not shown:
    return results
  import tqdm

  return iter(tqdm.tqdm(results, "predicting", count, leave=False, disable=None))
