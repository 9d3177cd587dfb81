"""Class maps of images of any size, computed on canvases that compiled programs take."""

import collections
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from repjax.deploy.compile import CompiledModel
from repjax.errors import InputError

_KEPT = 4  # compiled programs at a time
_COARSE = 32  # a multiple of most total strides

Size = tuple[int, int]


def canvas_of(model: Any, size: Size, *, window: int = 0, multiple: int = 0) -> Size:
  """Returns the (height, width) of the canvas on which evaluation lays images of a size.

  Args:
    model: the network, a `Segmenter`.
    size: (height, width) of the images in pixels.
    window: side of the windows that slide over the canvas, which is no smaller; 0: the network sees
      the canvas as a whole.
    multiple: a number that divides height and width of a canvas without windows; 0: the network
      chooses the canvas, see `Segmenter.canvas`.

  Raises:
    InputError: the network takes no such canvas.
  """
  height, width = size
  if window:
    return max(height, window), max(width, window)
  if multiple:
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple
  return model.canvas(size)


def shared_canvas_of(model: Any, size: Size, *, window: int = 0) -> Size:
  """Returns a canvas as `canvas_of` does, the same one for images of similar sizes.

  With fewer sizes of canvases, fewer programs are compiled. Without windows, sides are 33, 65, 97
  and so on, if the network takes these.
  """
  height, width = (-(-(side - 1) // _COARSE) * _COARSE + 1 for side in size)
  return canvas_of(model, size if window else (height, width), window=window)


def stretching(model: Any, what: str, size: Size) -> str:
  """Returns a sentence if images of a size lose mean IoU, since they stretch maps; else nothing.

  Args:
    model: the network, a `Segmenter`.
    what: what has this size, in the plural, such as "crops".
    size: (height, width) in pixels.
  """
  fit = model.canvas(size)
  if fit == size:
    return ""
  sides, better = (" x ".join(map(str, each)) for each in (size, fit))
  return (
    f"{what} of {sides} px (height x width) stretch the maps of the network to fit its logits, "
    f"which costs mean IoU; {better} px do not"
  )


class Canvases:
  """A function of images of any sizes that returns the class of each of their pixels.

  An image keeps its resolution. It lies at the top left of a canvas of one colour, as in
  evaluation, and the class map is cut to the image. Each size of canvas has a program, which is
  compiled when the first image of this size comes.

  With windows there is one program, for a window. Windows overlap by a third, and their
  probabilities are averaged, as `repjax evaluate --window` does. Mirror images are averaged as by
  `repjax evaluate --flip`.

  Attributes:
    build: compiles the network for a canvas of (height, width). The program returns logits.
    fill: colour of the canvas.
    canvas: function of the (height, width) of an image that returns those of its canvas, which are
      no smaller than a window.
    window: side of the windows in pixels; 0: the network sees a canvas as a whole.
    flip: average the probabilities of each image and of its mirror image.
  """

  def __init__(
    self,
    build: Callable[[Size], CompiledModel],
    fill: tuple[int, int, int],
    canvas: Callable[[Size], Size],
    *,
    window: int = 0,
    flip: bool = False,
  ):
    self.build, self.fill, self.canvas, self.window, self.flip = build, fill, canvas, window, flip
    self._programs: collections.OrderedDict[Size, CompiledModel] = collections.OrderedDict()

  def __call__(self, images: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Returns uint8 class maps (H, W) of uint8 images (H, W, 3), in their order.

    Raises:
      InputError: the network cannot take a canvas.
    """
    groups: dict[Size, list[int]] = {}
    for number, image in enumerate(images):
      height, width = image.shape[:2]
      groups.setdefault(self.canvas((height, width)), []).append(number)
    found: dict[int, np.ndarray] = {}
    for canvas, numbers in groups.items():
      classes = self._classes([images[number] for number in numbers], canvas)
      found |= dict(zip(numbers, classes))
    return [
      found[number][: image.shape[0], : image.shape[1]] for number, image in enumerate(images)
    ]

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
    """Returns logits of canvases (N, H, W, 3), or sums of probabilities of several views.

    Views are windows, and the mirror image of each view.

    Args:
      images: uint8; no side is shorter than the window.

    Returns:
      float32 (N, H, W, K).
    """
    if not self.window:
      program = self.program(images.shape[1:3])
      return self._probabilities(program, images) if self.flip else program(images)
    # Imported late, as in `Predictor.read`.
    from repjax.data.pairs import window_starts

    side, total = self.window, None
    program = self.program((side, side))
    rows, columns = (window_starts(length, side) for length in images.shape[1:3])
    for top, left in itertools.product(rows, columns):
      place = np.s_[:, top : top + side, left : left + side]
      new = self._probabilities(program, images[place])
      if total is None:
        total = np.zeros((*images.shape[:3], new.shape[-1]), np.float32)
      total[place] += new
    assert total is not None
    return total

  def _probabilities(self, program: CompiledModel, images: np.ndarray) -> np.ndarray:
    """Returns probabilities of views (N, h, w, K); with `flip`, their sum over mirror images."""
    found = _softmax(program(images))
    if self.flip:
      mirrored = np.ascontiguousarray(images[:, :, ::-1])
      found += _softmax(program(mirrored))[:, :, ::-1]
    return found


def _softmax(logits: np.ndarray) -> np.ndarray:
  """Returns probabilities over the last axis."""
  powers = np.exp(logits - logits.max(-1, keepdims=True))
  return powers / powers.sum(-1, keepdims=True)
