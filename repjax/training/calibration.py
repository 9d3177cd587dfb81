"""Images to calibrate with, for what replaces floating point by whole numbers."""

from typing import Any

import numpy as np

from repjax.data.sources import Examples, Source
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.training import evaluation


def calibration_images(source: Source, count: int, preprocessing: Preprocessing) -> np.ndarray:
  """Images at equal distances over a split, as evaluation prepares them.

  Image i is example floor(i n / count) of n: sets are often sorted by class, so the first ones
  would be few classes.

  Args:
    source: of images that accuracy is not reported on.
    count: how many; some hundreds give ranges that can be trusted.
    preprocessing: of the model.

  Returns:
    uint8 (N, S, S, 3).

  Raises:
    InputError: the split has fewer images than asked for, none is asked for, or an image that
      cannot be decoded.
  """
  have = len(source.examples)
  if not 1 <= count <= have:
    raise InputError(
      f"{count} images to calibrate with are asked for, and the split has {have}: take 1 to {have} "
      "(--images, or config.qat_images), some hundreds for ranges that can be trusted"
    )
  chosen = source._replace(examples=_Some(source.examples, count))
  batches = evaluation.host_batches(chosen, preprocessing, batch_size=min(64, count))
  return np.concatenate([batch["image"][batch["mask"]] for batch in batches])


def check_apart(calibration: Source, held_out: Source) -> None:
  """Raises InputError where accuracy would be measured on the images that calibrate.

  Those are the same split, or splits whose checksums over all images agree, which only a set made
  from a folder has. Images that two splits share are not looked for.
  """
  one, other = calibration.fingerprint, held_out.fingerprint
  if one == other or ("checksum" in one and one["checksum"] == other.get("checksum")):
    names = sorted({f"{each['name']}'s {each['split']} split" for each in (one, other)})
    raise InputError(
      f"images to calibrate with and those to measure accuracy on are the same, {names[0]}"
      f"{f' and {names[1]}' if len(names) > 1 else ''}, which would flatter the accuracy: name "
      "another split with --calibration-split or --split"
    )


class _Some:
  """Examples at equal distances."""

  def __init__(self, examples: Examples, count: int):
    self._examples, self._count = examples, count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> dict[str, Any]:
    return self._examples[index * len(self._examples) // self._count]
