"""Makes a data set that configs can name: from a folder, from TFRecord files, or with TFDS.

Examples:
  repjax prepare-dataset --from-folder ~/pictures/pets --name pets
  repjax prepare-dataset --from-mask-folder ~/pictures/streets --name streets
  repjax prepare-dataset --from-tfrecord imagenet2012 --data-dir /data/tfds
  repjax prepare-dataset --tfds cifar10

The folder holds one folder of .jpg, .png, .webp or .bmp files for each class. It may also hold the
folders train and val, each with the folders of the classes. The image files are stored unchanged.

A folder for segmentation holds the folder images and the folder masks; or it holds the folders
train and val, each with these two. An image and its mask have the same name but for the ending.
Masks are PNG files of class numbers. A file classes.json beside these folders may name the classes
and give their colours in masks.
"""

from __future__ import annotations

import argparse
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from repjax.cli import flags
from repjax.data.files import ENDINGS
from repjax.errors import InputError, listed, one_paragraph, printable

if TYPE_CHECKING:
  from repjax.data.folder import PreparedSet
  from repjax.data.mask_folder import PreparedPairs


def main(argv: Sequence[str]) -> None:
  """Makes the data set that the flags describe."""
  arguments = parse(argv)
  with one_paragraph():
    for flag in ("from_folder", "from_mask_folder"):
      if getattr(arguments, flag) and not arguments.name:
        name = flag.replace("_", "-")
        raise InputError(f"--{name} needs --name, under which configs will find the set")
    if arguments.to and not arguments.from_tfrecord:
      raise InputError("--to goes with --from-tfrecord; use --data-dir to say where the sets are")
    run(arguments)


def parse(argv: Sequence[str]) -> argparse.Namespace:
  """Returns the parsed flags."""
  parser = flags.parser("prepare-dataset", __doc__)
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument("--from-folder", type=flags.file, metavar="FOLDER", help="a folder of images")
  source.add_argument(
    "--from-mask-folder", type=flags.file, metavar="FOLDER", help="a folder of images and masks"
  )
  source.add_argument(
    "--from-tfrecord", metavar="NAME", help="a TFDS data set on disk in TFRecord files"
  )
  source.add_argument("--tfds", metavar="NAME", help="a data set to download and prepare with TFDS")
  flags.add(parser, "--data-dir", help="folder of all data sets (default: TFDS's default)")
  flags.add(parser, "--num-workers", help="threads (default: one for each core)")
  flags.add(
    parser,
    "--to",
    help="with --from-tfrecord: folder for the copy (default: beside the TFRecord files)",
  )
  folder = parser.add_argument_group("with --from-folder and --from-mask-folder")
  folder.add_argument(
    "--name", help="name of the data set: lower-case letters, digits and underscores"
  )
  folder.add_argument(
    "--validation-ratio",
    type=float,
    metavar="RATIO",
    help="share of each class, or of the pairs, to use for validation where the folder has no "
    "validation images (default: 0.2 where the folder directly holds the classes, or the images)",
  )
  folder.add_argument(
    "--seed", type=int, default=0, metavar="N", help="seed of the validation split (default: 0)"
  )
  folder.add_argument(
    "--strict", action="store_true", help="stop if a file cannot be used, and write nothing"
  )
  folder.add_argument(
    "--replace", action="store_true", help="replace an existing data set of this name"
  )
  return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
  """Makes the data set, and prints a description.

  Raises:
    InputError: there is no such source, or the source cannot be used.
  """
  start = time.perf_counter()
  if arguments.num_workers is not None and arguments.num_workers < 1:
    raise InputError(f"--num-workers counts threads, at least 1; got {arguments.num_workers}")
  from absl import logging

  logging.set_verbosity(logging.ERROR)  # TFDS logs every place where it looks for metadata
  if arguments.from_folder or arguments.from_mask_folder:
    print(make_from_folder(arguments))
  elif arguments.from_tfrecord:
    from repjax.data.tfrecords import prepare_tfrecord

    path = prepare_tfrecord(
      arguments.from_tfrecord,
      data_dir=arguments.data_dir,
      to=arguments.to,
      num_workers=arguments.num_workers or 4,
    )
    print(f"copied: {path} holds the set as array_record; its TFRecord files are as they were")
  else:
    from repjax.data.builders import download_set

    print(f"prepared: {download_set(arguments.tfds, data_dir=arguments.data_dir)}")
  print(f"took {time.perf_counter() - start:.1f} s")


def make_from_folder(arguments: argparse.Namespace) -> str:
  """Makes a data set from a folder of images, and returns its description."""
  from repjax.data.folder import prepare_folder
  from repjax.data.mask_folder import prepare_mask_folder

  prepare = prepare_folder if arguments.from_folder else prepare_mask_folder
  made = prepare(
    arguments.from_folder or arguments.from_mask_folder,
    arguments.name,
    data_dir=arguments.data_dir,
    validation_ratio=arguments.validation_ratio,
    seed=arguments.seed,
    strict=arguments.strict,
    replace=arguments.replace,
    num_workers=arguments.num_workers,
  )
  return describe(made, arguments.name, arguments.data_dir)


def describe(made: PreparedSet | PreparedPairs, name: str, data_dir: str | None) -> str:
  """Returns lines that say what the data set holds, and the command that trains on it.

  Args:
    made: from `repjax.data.folder.prepare_folder`, or the same for masks.
    name: name of the data set.
    data_dir: value of --data-dir.
  """
  from repjax.data.folder import PreparedSet

  some = ", ".join(made.class_names[:8]) + (", ..." if len(made.class_names) > 8 else "")
  where = f" --config.data_dir={shlex.quote(str(Path(data_dir).absolute()))}" if data_dir else ""
  size = sum(path.stat().st_size for path in made.path.iterdir())
  if isinstance(made, PreparedSet):
    counts = {split: sum(counts) for split, counts in made.counts.items()}
    facts, config = _class_sizes(made), f"finetune --config.dataset={name}{where}"
    config += " --config.init_from=PATH"
  else:
    counts, facts = made.counts, _class_shares(made)
    # The weights and the split of the config are those of the scenes.
    config = f"scenes --config.dataset={name}{where} --config.num_classes={len(made.class_names)}"
    config += " --config.eval_split=validation --config.class_weights=None"
  images = ", ".join(f"{count:,} {split}" for split, count in counts.items())
  lines = [
    f"classes: {len(made.class_names)} ({some})",
    f"images: {images}",
    *facts,
    *warnings(made),
    f"saved: {made.path}, {size / 1e6:,.1f} MB",
    f"next: repjax train --config {config} --workdir runs/{name}",
  ]
  return "\n".join(map(printable, lines))  # names of files and classes may hold anything


def _class_sizes(made: PreparedSet) -> list[str]:
  """Returns a line with the numbers of training images of the smallest and the largest class."""
  train = made.counts["train"]
  sizes = [
    f"{count:,} ({made.class_names[train.index(count)]})" for count in (min(train), max(train))
  ]
  span = " to ".join(sizes) if min(train) < max(train) else f"{min(train):,}"
  return [f"training images a class: {span}"]


def _class_shares(made: PreparedPairs) -> list[str]:
  """Returns a line with the smallest and the largest class, and one with classes of no pixel."""
  train, names = made.pixels["train"], made.class_names
  shares = [
    f"{count / sum(train):.2%} ({names[train.index(count)]})" for count in (min(train), max(train))
  ]
  lines = [f"training pixels a class: {' to '.join(shares)}"]
  for split, pixels in made.pixels.items():
    if none := [name for name, count in zip(names, pixels) if not count]:
      lines.append(f"warning: classes without a pixel in the {split} split: {listed(none)}")
  return lines


def warnings(made: PreparedSet | PreparedPairs) -> list[str]:
  """Returns a line for each kind of file that was left out, and for repeated images."""
  from repjax.data.storage import SKIPPED

  lines = []
  if made.skipped:
    path, reason = min(made.skipped.items())
    lines.append(
      f"skipped, as they cannot be used: {len(made.skipped):,}, such as {path} ({reason}); all are "
      f"listed in {made.path / SKIPPED}"
    )
  if made.others:
    lines.append(
      f"left out, as their endings are not {', '.join(ENDINGS)}: {len(made.others):,}, such as "
      f"{min(made.others)}; all are listed in {made.path / SKIPPED}"
    )
  if made.repeated:
    lines.append(
      f"warning: images that are in the validation split and outside it, byte for byte: "
      f"{len(made.repeated):,}, such as {min(made.repeated)}; the accuracy on it will be too high"
    )
  return lines
