"""Makes a data set that configs can name, once: from a folder, from TFRecord files, or by TFDS.

repjax prepare-dataset --from-folder ~/pictures/pets --name pets
repjax prepare-dataset --from-tfrecord imagenet2012 --data-dir /data/tfds
repjax prepare-dataset --tfds cifar10

A folder holds one folder of .jpg, .png, .webp or .bmp files a class, or such folders in its folders
train and val. Its images are stored as they are.
"""

import argparse
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import logging

from repjax.data.builders import download_set
from repjax.data.folder import SKIPPED, Prepared, prepare_folder
from repjax.data.layout import ENDINGS
from repjax.data.tfrecords import prepare_tfrecord
from repjax.errors import InputError, one_paragraph


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    prog="repjax prepare-dataset",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  mode = parser.add_mutually_exclusive_group(required=True)
  mode.add_argument("--from-folder", type=Path, metavar="FOLDER", help="a folder of images")
  mode.add_argument(
    "--from-tfrecord", metavar="NAME", help="a TFDS set that is on disk as TFRecord"
  )
  mode.add_argument("--tfds", metavar="NAME", help="a set that TFDS downloads and prepares")
  parser.add_argument("--data-dir", help="where the sets are (default: TFDS's own default)")
  parser.add_argument("--num-workers", type=int, help="threads (default: one for each core)")
  parser.add_argument(
    "--to",
    metavar="DATA_DIR",
    help="with --from-tfrecord: where the copy goes (default: beside the TFRecord files)",
  )
  folder = parser.add_argument_group("with --from-folder")
  folder.add_argument("--name", help="of the set: lower-case letters, digits, underscores")
  folder.add_argument(
    "--validation-ratio",
    type=float,
    help="share of each class to set aside, where the folder has no validation images of its own "
    "(default: 0.2 where the classes are directly in the folder)",
  )
  folder.add_argument("--seed", type=int, default=0, help="of that choice (default: 0)")
  folder.add_argument("--strict", action="store_true", help="stop where files cannot be read")
  folder.add_argument("--replace", action="store_true", help="take the place of a set of this name")
  return parser.parse_args(argv)


def describe(made: Prepared, name: str, data_dir: str | None) -> str:
  """What was made of a folder, and the command that uses it."""
  train = made.counts["train"]
  sizes = [
    f"{count:,} ({made.class_names[train.index(count)]})" for count in (min(train), max(train))
  ]
  images = ", ".join(f"{sum(counts):,} {split}" for split, counts in made.counts.items())
  some = ", ".join(made.class_names[:8]) + (", ..." if len(made.class_names) > 8 else "")
  lines = [
    f"classes: {len(made.class_names)} ({some})",
    f"images: {images}",
    "training images a class: "
    + (" to ".join(sizes) if min(train) < max(train) else f"{min(train):,}"),
  ]
  if made.skipped:
    path, reason = min(made.skipped.items())
    lines.append(
      f"skipped, as they cannot be read: {len(made.skipped):,}, such as {path} ({reason}); all are "
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
  where = f" --config.data_dir={shlex.quote(str(Path(data_dir).absolute()))}" if data_dir else ""
  size = sum(path.stat().st_size for path in made.path.iterdir())
  lines += [
    f"saved: {made.path}, {size / 1e6:,.1f} MB",
    f"next: python main.py --config configs/finetune.py --config.dataset={name}{where} "
    f"--config.init_from=PATH --workdir runs/{name}",
  ]
  return "\n".join(lines)


def run(arguments: argparse.Namespace) -> None:
  """Does what the arguments say, and prints what came of it."""
  start = time.perf_counter()
  if arguments.num_workers is not None and arguments.num_workers < 1:
    raise InputError(f"--num-workers counts threads, at least 1; got {arguments.num_workers}")
  if arguments.from_folder:
    made = prepare_folder(
      arguments.from_folder,
      arguments.name,
      data_dir=arguments.data_dir,
      validation_ratio=arguments.validation_ratio,
      seed=arguments.seed,
      strict=arguments.strict,
      replace=arguments.replace,
      num_workers=arguments.num_workers,
    )
    text = describe(made, arguments.name, arguments.data_dir)
    print(text.encode(errors="backslashreplace").decode())  # a file's name need not be UTF-8
  elif arguments.from_tfrecord:
    path = prepare_tfrecord(
      arguments.from_tfrecord,
      data_dir=arguments.data_dir,
      to=arguments.to,
      num_workers=arguments.num_workers or 4,
    )
    print(f"copied: {path} holds the set as array_record; its TFRecord files are as they were")
  else:
    path = download_set(arguments.tfds, data_dir=arguments.data_dir)
    print(f"prepared: {path}")
  print(f"took {time.perf_counter() - start:.1f} s")


def main(argv: Sequence[str]) -> None:
  """Makes a data set as the flags say."""
  try:
    _main(argv)
  except KeyboardInterrupt:
    print("interrupted; nothing was changed")
    sys.exit(130)


def _main(argv: Sequence[str]) -> None:
  signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; nothing was changed"))
  logging.set_verbosity(logging.ERROR)  # TFDS tells much about where it looks for metadata
  arguments = parse_arguments(argv)
  with one_paragraph():
    if arguments.from_folder and not arguments.name:
      raise InputError("--from-folder needs --name, under which configs will find the set")
    if arguments.to and not arguments.from_tfrecord:
      raise InputError("--to goes with --from-tfrecord; use --data-dir to say where the sets are")
    run(arguments)
