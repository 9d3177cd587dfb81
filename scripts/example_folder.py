"""Makes a small folder of example images: crops of scikit-image's photographs, digits, or scenes.

Each photograph is a class, and its images are crops. Crops for validation come from a part of the
photograph that no training crop shows. For digits, the validation images are the test images of the
digits data set. Scenes are the pairs of images and masks of the data set `scenes`.

Examples:
  python scripts/example_folder.py photographs --to pictures/photographs
  python scripts/example_folder.py digits --to pictures/digits --classes 0 1 2 --train-per-class 10
  repjax prepare-dataset --from-folder pictures/digits --name few_digits
  python scripts/example_folder.py scenes --to pictures/scenes
"""

import argparse
import importlib.resources
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repjax.data import open_source
from repjax.errors import InputError, one_paragraph, unknown
from repjax.extras import need

PURPOSE = "these images, which are inside packages"

# Photographs inside the scikit-image package; the rest would be downloaded. All parts of each
# photograph look alike, where necessary only within a box of (left, top, right, bottom).
PHOTOGRAPHS = {
  "brick": ("brick.png", None),
  "cat": ("chelsea.png", (40, 0, 390, 300)),
  "coffee": ("coffee.png", (40, 0, 460, 400)),
  "coins": ("coins.png", None),
  "galaxies": ("hubble_deep_field.jpg", None),
  "grass": ("grass.png", None),
  "gravel": ("gravel.png", None),
  "moon": ("moon.png", None),
  "page": ("page.png", None),
  "retina": ("retina.jpg", (250, 250, 1160, 1160)),
  "rocket": ("rocket.jpg", None),
  "tissue": ("ihc.png", None),
}
VALIDATION_SHARE = 0.3  # share of the longer side of a photograph
SIZES = (96, 224)  # range of the sides of a crop in pixels, before the crop is resized


def write_photographs(folder: Path, per_class: int, seed: int, classes: list[str]) -> None:
  """Writes `per_class` training crops of each photograph and a quarter as many for validation."""
  need("skimage", PURPOSE)
  data: Any = importlib.resources.files("skimage") / "data"
  for index, name in enumerate(classes):
    file, box = PHOTOGRAPHS[name]
    photograph = Image.open(data / file).convert("RGB").crop(box)
    rng = np.random.default_rng([seed, index])
    train, validation = halves(photograph)
    for part, split, count in (
      (train, "train", per_class),
      (validation, "val", max(per_class // 4, 1)),
    ):
      for number in range(count):
        path = folder / split / name / f"{number:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        random_crop(part, rng).save(path, quality=90)


def halves(photograph: Image.Image) -> tuple[Image.Image, Image.Image]:
  """Cuts a photograph across its longer side into a part for training and one for validation."""
  width, height = photograph.size
  if width >= height:
    cut = round(width * (1 - VALIDATION_SHARE))
    boxes = (0, 0, cut, height), (cut, 0, width, height)
  else:
    cut = round(height * (1 - VALIDATION_SHARE))
    boxes = (0, 0, width, cut), (0, cut, width, height)
  first, second = (photograph.crop(box) for box in boxes)
  return first, second


def random_crop(part: Image.Image, rng: np.random.Generator) -> Image.Image:
  """Returns a random rectangle with a shorter side of 160 pixels, mirrored half of the time."""
  width, height = (
    int(rng.integers(min(SIZES[0], side), min(SIZES[1], side) + 1)) for side in part.size
  )
  left = int(rng.integers(part.size[0] - width + 1))
  top = int(rng.integers(part.size[1] - height + 1))
  crop = part.crop((left, top, left + width, top + height))
  scale = 160 / min(width, height)
  crop = crop.resize((round(width * scale), round(height * scale)), Image.Resampling.BICUBIC)
  return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def write_digits(folder: Path, per_class: int | None, classes: list[str]) -> None:
  """Writes the first training images of each digit and all its test images, 8x8 as PNG."""
  digits: Any = need("sklearn.datasets", PURPOSE).load_digits()
  test = np.arange(len(digits.target)) % 5 == 0
  for name in classes:
    mine = digits.target == int(name)
    train, validation = np.flatnonzero(mine & ~test), np.flatnonzero(mine & test)
    for split, indices in (("train", train[:per_class]), ("val", validation)):
      for index in indices:
        path = folder / split / name / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)).save(path)


def write_scenes(folder: Path) -> None:
  """Writes the images and masks of the set `scenes`, and the table of their classes."""
  table: dict[str, Any] = {}
  for split, name in (("train", "train"), ("val", "test")):
    source = open_source("scenes", name)
    table = {"names": source.class_names, "colors": source.colors}
    for index in range(len(source.examples)):
      example = source.examples[index]
      for kind, key, ending in (("images", "image", "jpg"), ("masks", "mask", "png")):
        path = folder / split / kind / f"{index:03}.{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(example[key])
  (folder / "classes.json").write_text(json.dumps(table, indent=1))


def check(arguments: argparse.Namespace) -> list[str]:
  """Returns the classes that the flags ask for.

  Raises:
    InputError: the folder is not empty, or a flag's value cannot be used.
  """
  folder = arguments.to
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder} is not an empty folder; give another path, or remove it first")
  if arguments.train_per_class is not None and arguments.train_per_class < 1:
    raise InputError(f"--train-per-class is at least 1; got {arguments.train_per_class}")
  if arguments.kind == "scenes" and (arguments.classes or arguments.train_per_class):
    raise InputError("scenes are a whole data set; leave out --classes and --train-per-class")
  known = list(PHOTOGRAPHS) if arguments.kind == "photographs" else list("0123456789")
  classes = sorted(set(arguments.classes or known))
  for name in classes:
    if name not in known:
      raise unknown(f"class of the {arguments.kind}", name, known)
  return classes


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("kind", choices=("photographs", "digits", "scenes"), help="kind of images")
  parser.add_argument("--to", required=True, type=Path, help="folder to make")
  parser.add_argument("--classes", nargs="+", help="classes to make (default: all)")
  parser.add_argument(
    "--train-per-class",
    type=int,
    help="training images in a class (default: 40, or all digits); for validation come a quarter "
    "as many crops, or all test images of the digits",
  )
  parser.add_argument("--seed", type=int, default=0, help="seed of the crops (default: 0)")
  arguments = parser.parse_args()
  with one_paragraph():
    classes = check(arguments)
    if arguments.kind == "scenes":
      write_scenes(arguments.to)
    elif arguments.kind == "photographs":
      write_photographs(arguments.to, arguments.train_per_class or 40, arguments.seed, classes)
    else:
      write_digits(arguments.to, arguments.train_per_class, classes)
  print(arguments.to)
  for split in ("train", "val"):
    count = sum(1 for path in (arguments.to / split).rglob("*") if path.is_file())
    if arguments.kind == "scenes":
      print(f"{split}: {count // 2:,} images and as many masks")
    else:
      print(f"{split}: {count:,} images of {len(classes)} classes")


if __name__ == "__main__":
  main()
