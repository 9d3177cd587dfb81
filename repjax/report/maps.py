"""Computes the class maps of some images for the picture of a segmentation, and reads the IoU."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax import runs
from repjax.data import Source, open_source
from repjax.data.masks import IGNORED, Color, palette
from repjax.data.pairs import color_of, pair_of
from repjax.deploy.canvases import Canvases, canvas_of
from repjax.spec import ModelSpec, load

SHOWN = 4
"""Number of images that the picture shows."""


class Example(NamedTuple):
  """An image of the evaluation split, and the class of each pixel: in truth and in both forms.

  Attributes:
    pixels: uint8 (H, W, 3).
    truth: uint8 (H, W), 255 where no class counts.
    train: uint8 (H, W), by the training form.
    deploy: uint8 (H, W), by the deploy form.
  """

  pixels: np.ndarray
  truth: np.ndarray
  train: np.ndarray
  deploy: np.ndarray

  def differs(self) -> np.ndarray:
    """Returns where the classes of the forms differ, bool (H, W)."""
    return self.train != self.deploy

  def wrong(self) -> np.ndarray:
    """Returns where the deploy form differs from the truth, bool (H, W)."""
    return (self.deploy != self.truth) & (self.truth != IGNORED)


class Maps(NamedTuple):
  """Images of a segmentation with their class maps, and the IoU of each class.

  Attributes:
    examples: some images.
    class_names: the names of the classes.
    colors: the colour of each class.
    iou: IoU of each class over the whole split, in deploy form; None for a class that does not
      occur. Empty before a conversion has measured it.
  """

  examples: list[Example]
  class_names: tuple[str, ...]
  colors: tuple[Color, ...]
  iou: Sequence[float | None]


def read_maps(workdir: Path, *, verify: bool = True) -> Maps | None:
  """Computes the class maps of some images of the evaluation split of a run, see `maps_of`.

  Args:
    workdir: folder of a run.
    verify: compare every file that is read with its checksum.

  Returns:
    The maps; None for a folder that is no run of segmentation, and for a run on noise.

  Raises:
    InputError: the data set cannot be read, or the folder does not hold both forms.
  """
  spec = ModelSpec.read(workdir, verify=verify)
  if spec.task != "segmentation" or not runs.checkpoints(workdir):
    return None
  config = runs.read_config_json(workdir)
  if config["dataset"] == "synthetic":
    return None
  source = open_source(
    config["dataset"],
    config["eval_split"],
    data_dir=config["data_dir"],
    num_classes=spec.num_classes,
    image_size=spec.preprocessing.image_size,
    task=spec.task,
  )
  how = {name: config.get(f"eval_{name}", 0) for name in ("window", "flip", "multiple")}
  return maps_of(workdir, spec, source, verify=verify, **how)


def maps_of(
  workdir: Path,
  spec: ModelSpec,
  source: Source,
  *,
  window: int = 0,
  flip: bool = False,
  multiple: int = 0,
  verify: bool = True,
) -> Maps:
  """Computes the class maps of SHOWN images at equal distances over a split, as evaluation does.

  Args:
    workdir: folder of a run.
    spec: describes the model.
    source: the split, with masks.
    window: the run's `eval_window`.
    flip: the run's `eval_flip`.
    multiple: the run's `eval_multiple`.
    verify: compare every file that is read with its checksum.

  Raises:
    InputError: an image cannot be decoded, or the folder does not hold both forms.
  """
  fill, model = color_of(spec.preprocessing.mean), spec.create_model()
  canvas = source.canvas(lambda size: canvas_of(model, size, window=window, multiple=multiple))
  assert canvas is not None  # only a classification has none
  places = np.linspace(0, len(source.examples) - 1, min(SHOWN, len(source.examples)))
  pairs = [pair_of(source.examples[int(place)], fill) for place in places]
  images = [pair.pixels for pair in pairs]
  make = functools.partial(
    Canvases, fill=fill, canvas=lambda _, canvas=canvas: canvas, window=window, flip=flip
  )
  forms = [
    _classes(workdir, images, make, deploy=deploy, verify=verify) for deploy in (False, True)
  ]
  examples = [
    Example(pair.pixels, pair.classes, *found) for pair, *found in zip(pairs, *forms, strict=True)
  ]
  names = source.class_names or tuple(map(str, range(spec.num_classes)))
  colors = spec.class_colors or source.colors or palette(len(names))
  return Maps(examples, names, colors, _iou(workdir))


def _classes(
  workdir: Path,
  images: Sequence[np.ndarray],
  make: Callable[[Any], Canvases],
  *,
  deploy: bool,
  verify: bool,
) -> list[np.ndarray]:
  """Returns the class maps of images by one form; `make` builds canvases for a network."""
  model, variables, spec = load(workdir, deploy=deploy, verify=verify)

  @jax.jit
  def logits(variables: Any, images: jax.Array) -> Any:
    return model.apply(variables, spec.preprocessing.normalize(images))

  def build(_: tuple[int, int]) -> Any:  # `jax.jit` keeps a program for each size
    return lambda images: np.asarray(logits(variables, images))

  canvases = make(build)
  return [canvases([image])[0] for image in images]


def _iou(workdir: Path) -> Sequence[float | None]:
  """Returns the IoU of each class in deploy form, as the conversion measured it."""
  folder = runs.find_deploy(workdir)
  if folder is None or not runs.conversion_file(folder).exists():
    return ()
  report: Mapping[str, Any] = runs.read_conversion_report(workdir)
  return report.get("iou", {}).get("deploy", ())
