"""Folders of images for tests, and views of the sets made from them."""

import os

import numpy as np
import pytest
from PIL import Image

from repjax.data import open_source
from repjax.data.folder import prepare_folder
from repjax.errors import InputError


def write_image(path, seed=0, mode="RGB", kind=None, exif=None, size=(24, 20), **options):
  """Writes a random image, different for each seed and path."""
  path.parent.mkdir(parents=True, exist_ok=True)
  rng = np.random.default_rng([seed, *os.fsencode(path.name), *os.fsencode(path.parent.name)])
  if mode == "I;16":
    image = Image.fromarray(rng.integers(0, 65536, size[::-1], np.uint16))
  else:
    image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), np.uint8)).convert(mode)
  if exif:
    tags = Image.Exif()
    tags.update(exif)
    options["exif"] = tags
  image.save(path, kind or {".png": "PNG"}.get(path.suffix, "JPEG"), **options)
  return path


def classes_folder(folder, **counts):
  """Makes a folder of classes with the given numbers of images."""
  for name, count in counts.items():
    (folder / name).mkdir(parents=True)
    for number in range(count):
      write_image(folder / name / f"{number}.jpg")
  return folder


def files_below(folder):
  return {
    str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()
  }


def stored(name, split, data_dir):
  """Returns the bytes and the class of each file name of a split."""
  source = open_source(name, split, data_dir=str(data_dir))
  rows = [source.examples[index] for index in range(len(source.examples))]
  return {row["file_name"]: (row["image"], source.class_names[row["label"]]) for row in rows}


def refusal(*arguments, **options):
  with pytest.raises(InputError) as caught:
    prepare_folder(*arguments, **options)
  return str(caught.value)


def fingerprints(name, data_dir):
  return {
    split: open_source(name, split, data_dir=str(data_dir)).fingerprint
    for split in ("train", "validation")
  }
