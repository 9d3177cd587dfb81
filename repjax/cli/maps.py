"""The folder of class maps and overlays that `repjax predict --to` makes.

maps/
classes.json        the names and colours of the classes
masks/cat.png       PNG with a palette, whose values are the classes
overlays/cat.png    the image with the colours of the classes over it
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from repjax import disk
from repjax.data import class_table, masks
from repjax.errors import InputError, printable

if TYPE_CHECKING:
  from repjax.deploy import Predictor

Draw = Callable[[int, Path, np.ndarray], None]
"""A function of the number of an image, its path and its class map (H, W), which writes files."""


def stems(images: Sequence[Path], given: Sequence[Path]) -> list[Path]:
  """Returns the path of each image's files in the folders of the output, without an ending.

  An image in a folder keeps its place below that folder. Any other image keeps its name alone.

  Args:
    images: the image files.
    given: the files, folders and lists that were given.

  Raises:
    InputError: two images would share a file.
  """
  folders = [path for path in given if path.is_dir()]
  found: dict[Path, Path] = {}
  for image in images:
    folder = next((each for each in folders if image.is_relative_to(each)), image.parent)
    stem = image.relative_to(folder).with_suffix("")
    if stem in found:
      raise InputError(
        f"{printable(found[stem])} and {printable(image)} would both be written as "
        f"{printable(stem)}.png. Rename one of them, or predict them into different folders"
      )
    found[stem] = image
  return list(found)


@contextlib.contextmanager
def opened(folder: Path, predictor: Predictor, stems: Sequence[Path]) -> Iterator[Draw]:
  """Yields a function that writes the files of an image. The folder appears when the block ends.

  Args:
    folder: the folder to make.
    predictor: has read the images, and names the classes.
    stems: from `stems`.

  Raises:
    InputError: the folder exists, or cannot be written.
  """
  colors = predictor.colors
  with disk.replacing(folder, exists=False) as draft:
    table = {"names": list(predictor.labels), "colors": [list(color) for color in colors]}
    disk.write_json(draft / class_table.NAME, table)

    def draw(number: int, image: Path, classes: np.ndarray) -> None:
      pixels = predictor.read(image)
      if pixels.shape[:2] != classes.shape:
        raise InputError(f"{printable(image)} was replaced while it was read. Start again")
      for kind in ("masks", "overlays"):
        target = draft / kind / stems[number].with_name(f"{stems[number].name}.png")
        target.parent.mkdir(parents=True, exist_ok=True)
        if kind == "masks":
          target.write_bytes(masks.encoded(classes, colors))
        else:
          Image.fromarray(masks.overlay(pixels, classes, colors)).save(target)

    yield draw
