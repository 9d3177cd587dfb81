"""Makes a small folder of images to try things out: photographs of scikit-image, or digits.

python scripts/example_folder.py photographs --to pictures/photographs
python scripts/example_folder.py digits --to pictures/digits --classes 0 1 2 3 4 --per-class 10
repjax prepare-dataset --from-folder pictures/digits --name few_digits

Photographs: a class is one photograph, its images are crops of it, those for validation from a part
that no training image shows. Digits: the validation images are the test images of the digits set.
"""

import argparse
import importlib
import importlib.resources
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from repjax.errors import InputError, one_paragraph, unknown

# What is inside scikit-image itself (its other photographs would be downloaded) and looks alike in
# all its parts, if need be within a box of (left, top, right, bottom).
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
VALIDATION_SHARE = 0.3  # of a photograph's longer side
SIZES = (96, 224)  # of a crop's sides before it is resized, where the photograph is large enough


def write_photographs(folder: Path, per_class: int, seed: int, classes: list[str]) -> None:
  """Writes `per_class` training crops of each photograph and a quarter as many for validation."""
  data = package("skimage", "scikit-image") / "data"
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
  """A random rectangle, enlarged or reduced to a shorter side of 160 pixels, sometimes mirrored."""
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
  package("sklearn", "scikit-learn")
  digits: Any = importlib.import_module("sklearn.datasets").load_digits()
  test = np.arange(len(digits.target)) % 5 == 0
  for name in classes:
    mine = digits.target == int(name)
    train, validation = np.flatnonzero(mine & ~test), np.flatnonzero(mine & test)
    for split, indices in (("train", train[:per_class]), ("val", validation)):
      for index in indices:
        path = folder / split / name / f"{index:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.rint(digits.images[index] * (255 / 16)).astype(np.uint8)).save(path)


def package(module: str, name: str) -> Any:
  """The folder of an installed package."""
  try:
    return importlib.resources.files(module)
  except ModuleNotFoundError:
    raise InputError(
      f"these images are inside {name}, which is not installed; run `pip install {name}`"
    ) from None


def check(arguments: argparse.Namespace) -> list[str]:
  """The classes that were asked for."""
  folder = arguments.to
  if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
    raise InputError(f"{folder} is not an empty folder; give another path, or remove it first")
  if arguments.per_class is not None and arguments.per_class < 1:
    raise InputError(f"--per-class is at least 1; got {arguments.per_class}")
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
  parser.add_argument("kind", choices=("photographs", "digits"))
  parser.add_argument("--to", required=True, type=Path, help="folder to be made")
  parser.add_argument("--classes", nargs="+", help="some of them (default: all)")
  parser.add_argument(
    "--per-class", type=int, help="training images of each (default: 40 photographs, all digits)"
  )
  parser.add_argument("--seed", type=int, default=0, help="of the crops (default: 0)")
  arguments = parser.parse_args()
  with one_paragraph():
    classes = check(arguments)
    if arguments.kind == "photographs":
      write_photographs(arguments.to, arguments.per_class or 40, arguments.seed, classes)
    else:
      write_digits(arguments.to, arguments.per_class, classes)
  print(arguments.to)
  for split in ("train", "val"):
    count = sum(1 for path in (arguments.to / split).rglob("*") if path.is_file())
    print(f"{split}: {count:,} images of {len(classes)} classes")


if __name__ == "__main__":
  main()
