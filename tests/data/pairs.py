"""Images and masks that the data tests make."""

import json

import numpy as np
from PIL import Image

from tests.data.images import encoded, noise

COLORS = ((0, 0, 0), (200, 30, 30), (30, 30, 200))


def classes_of(width, height, count=3, seed=0):
  """Returns blocks of random classes, uint8 (height, width)."""
  blocks = np.random.default_rng(seed).integers(0, count, (-(-height // 4), -(-width // 4)))
  return np.kron(blocks, np.ones((4, 4), int))[:height, :width].astype(np.uint8)


def with_palette(classes, colors=COLORS):
  """Returns an index image that shows the given colours."""
  image = Image.fromarray(classes)
  image.putpalette(np.asarray(colors, np.uint8).ravel().tolist())
  return image


def write_pair(split, name="a", size=(20, 16), seed=0, mask=None):
  """Writes an image and a mask below the folder of a split; returns the classes."""
  classes = classes_of(*size, seed=seed)
  for folder, ending, data in (
    ("images", "jpg", encoded(noise(*size, seed), "JPEG")),
    ("masks", "png", encoded(classes if mask is None else mask)),
  ):
    path = split / folder / f"{name}.{ending}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  return classes


def pairs_folder(folder, train=3, val=2):
  """Makes a folder of images and masks; returns the classes by the path of the image."""
  return {
    f"{split}/images/{number}.jpg": write_pair(
      folder / split, str(number), seed=number + 10 * count
    )
    for split, count in (("train", train), ("val", val))
    for number in range(count)
  }


def write_table(folder, **fields):
  """Writes classes.json, with names if none are given."""
  folder.mkdir(parents=True, exist_ok=True)
  table = {"names": ["sky", "cat", "dog"]} | fields
  (folder / "classes.json").write_text(json.dumps(table))
