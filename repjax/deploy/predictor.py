"""`Predictor`: from image files or pixels to class probabilities."""

import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from repjax.cache import keep_every_program
from repjax.deploy.compile import BATCH_SIZES, compile  # noqa: A004
from repjax.errors import InputError
from repjax.spec import load

Image = str | os.PathLike[str] | bytes | np.ndarray
"""A path, the bytes of a file, or uint8 pixels (H, W, 3) of any size."""


class Predictor:
  """The classifier of a folder, in deploy form, with the preprocessing that is stored with it.

  Images are decoded, resized and cut on the host, in threads, to the pixel as in evaluation; they
  are normalized on the device.

  Attributes:
    spec: of the model.
    labels: a name for each class; its number where the folder has no names.
    program: the `CompiledModel`, from uint8 (N, S, S, 3) to probabilities (N, K).

  Example:
    predictor = repjax.deploy.Predictor("runs/a0", dtype="bfloat16")
    for label, probability in predictor.top("cat.jpg", 3)[0]:
      print(f"{probability:.1%} {label}")
  """

  def __init__(
    self,
    workdir: str | os.PathLike[str],
    *,
    dtype: jax.typing.DTypeLike = "float32",
    batch_sizes: Iterable[int] = BATCH_SIZES,
    devices: Sequence[Any] | None = None,
    tune: bool = True,
  ):
    """Loads and compiles.

    Args:
      workdir: of a run, an import or an export, or a deploy folder.
      dtype: of the computation, as in `compile`.
      batch_sizes: to compile for, as in `compile`.
      devices: as in `compile`.
      tune: as in `compile`.

    Raises:
      InputError: the folder holds no model, or as in `compile`.
    """
    with keep_every_program():  # where there is no deploy folder yet, it is made here
      model, variables, self.spec = load(workdir)
    self.program = compile(
      model,
      variables,
      image_size=self.spec.preprocessing.image_size,
      dtype=dtype,
      batch_sizes=batch_sizes,
      devices=devices,
      preprocessing=self.spec.preprocessing,
      probabilities=True,
      tune=tune,
    )
    names = self.spec.class_names or map(str, range(self.spec.num_classes))
    self.labels = tuple(names)

  def __call__(self, images: Image | Iterable[Image]) -> np.ndarray:
    """Probabilities.

    Args:
      images: any number of them, of any sizes; a lone one counts as one of one.

    Returns:
      float32 (N, K); a row adds up to 1.

    Raises:
      InputError: a file that is no image, or pixels that are not uint8 (H, W, 3).
    """
    with ThreadPoolExecutor(_threads()) as threads:
      squares = list(threads.map(self.read, _several(images)))
    size = self.spec.preprocessing.image_size
    return self.program(np.stack(squares) if squares else np.zeros((0, size, size, 3), np.uint8))

  def top(self, images: Image | Iterable[Image], k: int = 5) -> list[list[tuple[str, float]]]:
    """For each image its k most probable labels, the first first, with their probabilities."""
    return [self.best(row, k) for row in self(images)]

  def best(self, row: np.ndarray, k: int = 5) -> list[tuple[str, float]]:
    """The k most probable labels of one image, the first first.

    Args:
      row: of its probabilities (K,).
      k: at most as many as there are classes.

    Raises:
      InputError: no k of 1 or more.
    """
    if k < 1:
      raise InputError(f"the number of labels is 1 or more, got {k}")
    order = np.argsort(-row, kind="stable")[:k]
    return [(self.labels[index], float(row[index])) for index in order]

  def stream(self, images: Iterable[Image]) -> Iterator[tuple[Image, np.ndarray | InputError]]:
    """As many images as there are, in their order, while the next are being decoded.

    Args:
      images: taken as they are needed.

    Yields:
      The image as it was given, and its probabilities (K,) or, where it cannot be read, the error.
    """
    size = self.program.batch_sizes[-1]
    with ThreadPoolExecutor(_threads()) as threads:
      batches = (
        [(image, threads.submit(self._read_or_error, image)) for image in batch]
        for batch in _batched(images, size)
      )
      waiting = next(batches, None)
      while waiting is not None:
        batch, waiting = waiting, next(batches, None)  # whose decoding starts here
        yield from self._probabilities([(image, future.result()) for image, future in batch])

  def read(self, image: Image) -> np.ndarray:
    """An image as the model sees it, uint8 (S, S, 3).

    Raises:
      InputError: it cannot be read, or is not what it should be.
    """
    # OpenCV and Pillow, which programs that make their squares themselves do not need.
    from repjax.data import transforms
    from repjax.data.decode import Picture

    if not isinstance(image, np.ndarray):
      if not isinstance(image, str | os.PathLike | bytes):
        raise InputError(f"an image is a path, bytes or a uint8 array, got {type(image).__name__}")
      return transforms.read_image(image, self.spec.preprocessing)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
      raise InputError(
        f"an image's pixels are uint8 (H, W, 3), red first, got {image.dtype} {image.shape}; a "
        "grey image is np.repeat(grey[..., None], 3, 2)"
      )
    wanted = self.spec.preprocessing
    return transforms.resize_and_crop(
      Picture(image), wanted.image_size, wanted.resize_size, wanted.interpolation
    )

  def _read_or_error(self, image: Image) -> np.ndarray | InputError:
    try:
      return self.read(image)
    except InputError as error:
      return error

  def _probabilities(
    self, batch: Sequence[tuple[Image, np.ndarray | InputError]]
  ) -> Iterator[tuple[Image, np.ndarray | InputError]]:
    squares = [square for _, square in batch if isinstance(square, np.ndarray)]
    rows = iter(self.program(np.stack(squares)) if squares else ())
    for image, square in batch:
      yield image, next(rows) if isinstance(square, np.ndarray) else square


def _several(images: Any) -> Iterable[Image]:
  """Images, of which there may be one that is not in a list."""
  lone = isinstance(images, str | os.PathLike | bytes)
  return [images] if lone or (isinstance(images, np.ndarray) and images.ndim < 4) else images


def _batched(images: Iterable[Image], size: int) -> Iterator[list[Image]]:
  rest = iter(images)
  while batch := list(itertools.islice(rest, size)):
    yield batch


def _threads() -> int:
  return min(32, os.cpu_count() or 1)
