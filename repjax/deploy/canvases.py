"""Class maps of images of any size, computed on canvases that compiled programs take."""

import collections
import itertools
from collections.abc import Callable, Sequence

import numpy as np

from repjax.deploy.compile import CompiledModel
from repjax.errors import InputError

MULTIPLE = 32
"""Sides of canvases are multiples of this number plus one, so that similar images share a program.

At such a side, a network with a total stride of up to 32 computes maps whose pixels lie exactly
under those of the logits, as on the crops of 713 or 97 pixels on which it was trained. At a
multiple of 32, aligned corners stretch the maps by almost a stride.
"""
_KEPT = 4  # compiled programs at a time

Size = tuple[int, int]


class Canvases:
  """A function of images of any sizes that returns the class of each of their pixels.

  An image keeps its resolution. It lies at the top left of a canvas of one colour, as in
  evaluation, and the class map is cut to the image. Each size of canvas has a program, which is
  compiled when the first image of this size comes.

  With windows there is one program, for a window. Windows overlap by a third, and their
  probabilities are averaged, as `repjax evaluate --window` does.

  Attributes:
    build: compiles the network for a canvas of (height, width). The program returns logits.
    fill: colour of the canvas.
    window: side of the windows in pixels; 0: the network sees a canvas as a whole.
  """

  def __init__(
    self, build: Callable[[Size], CompiledModel], fill: tuple[int, int, int], window: int = 0
  ):
    self.build, self.fill, self.window = build, fill, window
    self._programs: collections.OrderedDict[Size, CompiledModel] = collections.OrderedDict()

  def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns uint8 class maps (H, W) of uint8 images (H, W, 3), in their order.

    Raises:
      InputError: the network cannot take a canvas.
    """
    groups: dict[Size, list[int]] = {}
    for number, image in enumerate(images):
      groups.setdefault(self.canvas(image), []).append(number)
    found: dict[int, np.ndarray] = {}
    for canvas, numbers in groups.items():
      classes = self._classes([images[number] for number in numbers], canvas)
      found |= dict(zip(numbers, classes))
    return [
      found[number][: image.shape[0], : image.shape[1]] for number, image in enumerate(images)
    ]

  def canvas(self, image: np.ndarray) -> Size:
    """Returns the (height, width) of the canvas of an image."""
    height, width = image.shape[:2]
    if self.window:
      return max(height, self.window), max(width, self.window)
    return _side(height), _side(width)

  def program(self, size: Size) -> CompiledModel:
    """Returns the compiled program for images of (height, width)."""
    if size not in self._programs:
      if len(self._programs) == _KEPT:
        self._programs.popitem(last=False)  # each program holds a copy of the parameters
      self._programs[size] = self._built(size)
    self._programs.move_to_end(size)
    return self._programs[size]

  def _built(self, size: Size) -> CompiledModel:
    try:
      return self.build(size)
    except InputError as error:
      if self.window:
        raise
      height, width = size
      raise InputError(
        f"the network cannot take a canvas of {width} x {height} pixels: {error}. Windows have one "
        "size for all images: pass window, or --window, with the size that the network was trained "
        "on"
      ) from error

  def _classes(self, images: Sequence[np.ndarray], canvas: Size) -> np.ndarray:
    """Returns uint8 (N, height, width) for images of one canvas."""
    from repjax.data.pairs import laid_out

    laid = np.stack([laid_out(image, canvas, self.fill) for image in images])
    return self.scores(laid).argmax(-1).astype(np.uint8)

  def scores(self, images: np.ndarray) -> np.ndarray:
    """Returns logits of canvases (N, H, W, 3), or with windows the sums of their probabilities.

    Args:
      images: uint8; no side is shorter than the window.

    Returns:
      float32 (N, H, W, K).
    """
    if not self.window:
      return self.program(images.shape[1:3])(images)
    # Imported late, as in `Predictor.read`.
    from repjax.data.pairs import window_starts

    side, total = self.window, None
    program = self.program((side, side))
    rows, columns = (window_starts(length, side) for length in images.shape[1:3])
    for top, left in itertools.product(rows, columns):
      place = np.s_[:, top : top + side, left : left + side]
      new = _softmax(program(images[place]))
      if total is None:
        total = np.zeros((*images.shape[:3], new.shape[-1]), np.float32)
      total[place] += new
    assert total is not None
    return total


def _side(length: int) -> int:
  """Returns the side of a canvas on which so many pixels fit."""
  return -(-(length - 1) // MULTIPLE) * MULTIPLE + 1


def _softmax(logits: np.ndarray) -> np.ndarray:
  """Returns probabilities over the last axis."""
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)
