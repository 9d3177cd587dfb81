"""`Predictor`: computes class probabilities, or class maps, of image files or pixels."""

import functools
import itertools
import numbers
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, BinaryIO, Union

import jax
import numpy as np

from repjax import extras, schema
from repjax.cache import keep_every_program
from repjax.deploy.canvases import Canvases, shared_canvas_of
from repjax.deploy.compile import (
  BATCH_SIZES,
  checked_batch_sizes,
  compile,  # noqa: A004
)
from repjax.devices import need_devices
from repjax.errors import InputError, printable
from repjax.output import status
from repjax.pretrained import load
from repjax.spec import ModelSpec, Preprocessing, check_preprocessing

if TYPE_CHECKING:
  from PIL.Image import Image as PillowImage

# A string, since Pillow is imported late.
Image = Union[str, os.PathLike[str], bytes, BinaryIO, np.ndarray, "PillowImage"]
"""A path, the bytes of a file, an open binary file, a Pillow image, or uint8 pixels.

Pixels are RGB (H, W, 3), grey (H, W) or (H, W, 1), or RGBA (H, W, 4), of any size. Pixels that are
not opaque lie on white. A Pillow image is turned as its EXIF asks for, as a file is.
"""


class Predictor:
  """A model in deploy form, loaded from a folder together with its preprocessing.

  `Predictor.of` makes one of a classifier or function that no folder holds.

  For classification, images are decoded, resized and cropped on the host, in threads, exactly as in
  evaluation. They are normalized on the device. The result for an image is a row of probabilities.

  For segmentation, images are decoded and keep their size. An image lies at the top left of a
  canvas whose sides are 33, 65, 97 and so on. The rest of the canvas has the mean colour, as in
  evaluation. A network that does not take such sides has the next larger ones that it takes. Each
  size of canvas is compiled when the first such image comes. With a window, one program slides over
  images of all sizes. The result for an image is its class map, uint8 (H, W).

  Attributes:
    spec: ModelSpec of the model; None for a model that no folder holds.
    preprocessing: steps from images to the input of the model.
    labels: the name of each class, or its number if the folder has no names.
    colors: the colour of each class in pictures of class maps, (red, green, blue): that of the data
      set of the training, or a usual palette if the folder has none. Empty for classification.
    task: "classification" or "segmentation".
    program: the `CompiledModel`, a function of uint8 images (N, S, S, 3) to probabilities (N, K);
      None for segmentation.

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
    batch_sizes: Iterable[int] | None = None,
    devices: Sequence[Any] | None = None,
    tune: bool = True,
    cuda_graphs: bool = False,
    runtime: str = "xla",
    verify: bool = True,
    window: int = 0,
    flip: bool = False,
  ):
    """Loads the model and compiles it.

    Args:
      workdir: the folder of a run, an import or an export, or a deploy folder; or the name of
        published weights, as in `repjax.load`.
      dtype: dtype of the computation, as in `compile`.
      batch_sizes: batch sizes to compile for, as in `compile`. None: those of `compile`, and 1 for
        segmentation, whose images take more memory.
      devices: as in `compile`.
      tune: as in `compile`.
      cuda_graphs: as in `compile`.
      runtime: as in `compile`; `program.plans` says which runtime computes each batch size.
      verify: as in `repjax.load`.
      window: for segmentation, the side in pixels of square windows that slide over each image,
        such as the size that the model was trained on. 0: each image at once.
      flip: for segmentation, average the probabilities of each image and of its mirror image.

    `window` and `flip` are those of `repjax evaluate`. They are not taken from the run.

    Raises:
      InputError: the folder holds no model, `compile` refuses an argument, or `window` or `flip` is
        given for classification.
    """
    schema.check(window, schema.whole(0), "window")
    schema.check(flip, schema.boolean, "flip")
    need_devices()
    # `load` folds a run without a deploy folder, which compiles too.
    with keep_every_program(), status(f"loading {printable(workdir)}"):
      model, variables, spec = load(workdir, verify=verify)
    self.spec: ModelSpec | None = spec
    self.labels = tuple(spec.class_names or map(str, range(spec.num_classes)))
    settings: dict[str, Any] = {
      "dtype": dtype,
      "devices": devices,
      "tune": tune,
      "cuda_graphs": cuda_graphs,
      "runtime": runtime,
    }
    self.colors: tuple[tuple[int, int, int], ...] = ()
    if spec.task == "segmentation":
      from repjax.data.masks import palette

      self.colors = spec.class_colors or palette(spec.num_classes)
      sizes = (1,) if batch_sizes is None else batch_sizes
      self._prepare_maps(model, variables, spec.preprocessing, window, flip, sizes, settings)
      return
    if window or flip:
      raise InputError(
        f"windows and mirror images are averaged for segmentation, and the model in {workdir} is "
        f"for {spec.task}. Leave {'window' if window else 'flip'} out"
      )
    sizes = BATCH_SIZES if batch_sizes is None else batch_sizes
    self._compile(model, variables, spec.preprocessing, batch_sizes=sizes, **settings)

  @classmethod
  def of(
    cls,
    model: Any,
    variables: Any,
    preprocessing: Preprocessing,
    class_names: Sequence[str] = (),
    **settings: Any,
  ) -> "Predictor":
    """Returns the predictor of a model that no folder holds, such as a function of any library.

    Args:
      model: as in `compile`: a module, a function of parameters and images, or a fused function.
        It returns logits (N, K).
      variables: variables of the model, or parameters of the function.
      preprocessing: steps from images to the input of the model.
      class_names: the name of each class; empty: classes have numbers.
      **settings: `dtype`, `batch_sizes`, `devices`, `tune`, `fuse`, `cuda_graphs` and `runtime`, as
        in `compile`.

    Raises:
      InputError: the model does not return logits, there is not one name for each class, or
        `compile` refuses an argument.

    Example:
      predictor = repjax.deploy.Predictor.of(fused, small, repjax.spec.Preprocessing(224, 256))
    """
    made = cls.__new__(cls)
    made.spec, made.colors = None, ()
    made._compile(model, variables, preprocessing, **settings)
    size = preprocessing.image_size
    (count,) = made.program(np.zeros((1, size, size, 3), np.uint8)).shape[1:]
    if len(class_names) not in (0, count):
      raise InputError(
        f"class_names has {len(class_names):,} names, and the model has {count:,} classes. Give a "
        "name for each class, or none"
      )
    made.labels = tuple(class_names or map(str, range(count)))
    return made

  def _compile(
    self, model: Any, variables: Any, preprocessing: Preprocessing, **settings: Any
  ) -> None:
    """Compiles the model to a function of uint8 images that returns probabilities."""
    check_preprocessing(preprocessing)
    self.preprocessing, self.task = preprocessing, "classification"
    self._maps: Canvases | None = None
    self.program: Any = compile(
      model,
      variables,
      image_size=preprocessing.image_size,
      preprocessing=preprocessing,
      probabilities=True,
      **settings,
    )

  def _prepare_maps(
    self,
    model: Any,
    variables: Any,
    preprocessing: Preprocessing,
    window: int,
    flip: bool,
    batch_sizes: Iterable[int],
    settings: Mapping[str, Any],
  ) -> None:
    """Prepares class maps. A program is compiled later, for the canvas of the first image."""
    from repjax.data.pairs import color_of

    self.preprocessing, self.task, self.program = preprocessing, "segmentation", None
    sizes = checked_batch_sizes(batch_sizes)
    self._largest_batch = sizes[-1]
    build = functools.partial(
      compile, model, variables, preprocessing=preprocessing, batch_sizes=sizes, **settings
    )
    self._maps = Canvases(
      lambda size: build(image_size=size),
      color_of(preprocessing.mean),
      functools.partial(shared_canvas_of, model, window=window),
      window=window,
      flip=flip,
    )

  def __call__(self, images: Image | Iterable[Image]) -> Any:
    """Computes the class probabilities of images, or their class maps.

    Args:
      images: any number of images of any sizes, or one image.

    Returns:
      For classification, float32 (N, K); each row adds up to 1. One image gives one row. For
      segmentation, a list of N class maps uint8 (H, W), each of the size of its upright image.

    Raises:
      InputError: a file is not an image, or pixels are not uint8 (H, W, 3), grey or RGBA; or the
        network cannot take an image of this size.
    """
    need_devices()
    with ThreadPoolExecutor(_threads()) as threads:
      return self._results(list(threads.map(self.read, _several(images))))

  def _results(self, images: Sequence[np.ndarray]) -> Any:
    """Returns the results of images from `read`."""
    if self._maps is not None:
      return self._maps(images)
    size = self.preprocessing.image_size
    return self.program(np.stack(images) if images else np.zeros((0, size, size, 3), np.uint8))

  def top(self, images: Image | Iterable[Image], k: int = 5) -> list[list[tuple[str, float]]]:
    """Returns the k most probable labels of each image with their probabilities, best first."""
    return [self.best(row, k) for row in self(images)]

  def best(self, row: np.ndarray, k: int = 5) -> list[tuple[str, float]]:
    """Returns the k most probable labels of one image with their probabilities, best first.

    For segmentation, the labels have the largest shares of the image's pixels.

    Args:
      row: probabilities of the image (K,), or its class map (H, W).
      k: number of labels; all K if k is larger.

    Raises:
      InputError: k is no whole number above 0.
    """
    if not isinstance(k, numbers.Integral) or k < 1:
      raise InputError(f"the number of labels must be 1 or more, got {schema.shown(k)}")
    if row.ndim == 2:
      row = np.bincount(row.ravel(), minlength=len(self.labels)) / row.size
    order = np.argsort(-row, kind="stable")[:k]
    return [(self.labels[index], float(row[index])) for index in order]

  def stream(
    self, images: Image | Iterable[Image]
  ) -> Iterator[tuple[Image, np.ndarray | InputError]]:
    """Yields the probabilities, or the class maps, of any number of images, in order.

    While one batch is on the device, threads decode the next batch and no more than that. An image
    that cannot be read does not stop the stream, whatever is wrong with it.

    Args:
      images: images, taken from the iterable as they are needed, or one image.

    Yields:
      The image as it was given, and its probabilities (K,) or its class map (H, W), or the error if
      the image cannot be read.
    """
    need_devices()
    size = self._largest_batch if self.program is None else self.program.batch_sizes[-1]
    threads = ThreadPoolExecutor(_threads())
    try:
      # A generator: each `next` submits one batch to the threads and does not wait for them.
      batches = (
        [(image, threads.submit(self._read_or_error, image)) for image in batch]
        for batch in _batched(_several(images), size)
      )
      waiting = next(batches, None)
      while waiting is not None:
        # The next batch begins to be decoded before the results of this one are waited for.
        batch, waiting = waiting, next(batches, None)
        yield from self._of_batch([(image, future.result()) for image, future in batch])
    finally:
      # Where the caller stops early, images that wait are not begun.
      threads.shutdown(cancel_futures=True)

  def read(self, image: Image) -> np.ndarray:
    """Returns an image as the model takes it: decoded, resized and cropped to uint8 (S, S, 3).

    For segmentation, the image keeps its size, uint8 (H, W, 3).

    Raises:
      InputError: the image cannot be read, or pixels are not uint8 (H, W, 3), grey or RGBA.
    """
    # Imported late: these modules need OpenCV and Pillow, which a program that resizes its images
    # itself need not install.
    with extras.explained("images of any size"):
      from repjax.data import transforms
      from repjax.data.decode import Picture, image_errors

    how = self.preprocessing
    name = name_of(image)
    with image_errors(name):
      if isinstance(image, bytes | bytearray | memoryview):
        picture = transforms.open_picture(bytes(image))
      elif isinstance(image, str | os.PathLike):
        picture = transforms.open_picture(image)
      elif hasattr(image, "read"):
        picture = transforms.open_picture(_bytes_of(image, name), name)
      elif isinstance(image, np.ndarray):
        _check_pixels(image)
        picture = Picture(image, name)
      elif _is_pillows(image):
        pillows: Any = image
        picture = Picture(pillows, name)
      else:
        raise InputError(
          "an image must be a Pillow image, an open file, a path, bytes or a uint8 array, got "
          f"{type(image).__name__}"
        )
      if self.task == "segmentation":
        return picture.pixels()
      return transforms.resize_and_crop(picture, how.image_size, how.resize_size, how.interpolation)

  def _read_or_error(self, image: Image) -> np.ndarray | InputError:
    """Returns the image as in `read`, or the error, since a thread cannot skip an image."""
    try:
      return self.read(image)
    except InputError as error:
      return error

  def _of_batch(
    self, batch: Sequence[tuple[Image, np.ndarray | InputError]]
  ) -> Iterator[tuple[Image, np.ndarray | InputError]]:
    """Yields each image of a batch with its result, or with the error that it has."""
    read = [pixels for _, pixels in batch if isinstance(pixels, np.ndarray)]
    rows = iter(self._results(read) if read else ())
    for image, pixels in batch:
      yield image, next(rows) if isinstance(pixels, np.ndarray) else pixels


def name_of(image: Image) -> str:
  """Returns the name of an image in messages: its path where it has one."""
  path = image if isinstance(image, str | os.PathLike) else getattr(image, "name", None)
  path = path or getattr(image, "filename", None)  # which images of Pillow have
  try:
    return printable(os.fsdecode(path)) if path else "the image"
  except Exception:  # not a path; and somebody's class of paths can raise anything
    return "the image"


def _bytes_of(file: Any, name: str) -> bytes:
  """Returns the rest of an open file, up to the size of the largest image file.

  Raises:
    InputError: the file gives no bytes, or too many.
  """
  from repjax.data.files import LARGEST

  data = file.read(LARGEST + 1)
  if not isinstance(data, bytes):
    raise InputError(f"{name} must be opened to read bytes, as by open(path, 'rb')")
  if not data:
    raise InputError(f"{name} gives no bytes. If it was read before, go back by seek(0)")
  if len(data) > LARGEST:
    raise InputError(f"{name} cannot be read: it has more than {LARGEST:,} bytes")
  return data


def _check_pixels(image: np.ndarray) -> None:
  """Raises unless an array holds pixels that are RGB, grey or RGBA."""
  is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (1, 3, 4))
  if image.dtype != np.uint8 or not is_image or not image.size:
    raise InputError(
      "an image's pixels must be uint8 (H, W, 3), red first, or grey (H, W), or RGBA (H, W, 4), "
      f"got {image.dtype} {image.shape}. " + " ".join(_ways_to_pixels(image))
    )


def _ways_to_pixels(image: np.ndarray) -> list[str]:
  """Returns what makes pixels of an array, in the order in which to apply it."""
  ways = []
  if np.issubdtype(image.dtype, np.floating):
    ways.append("From numbers of 0 to 1: image = np.rint(255 * image).astype(np.uint8).")
  elif image.dtype != np.uint8:
    ways.append("From numbers of 0 to 255: image = image.astype(np.uint8).")
  if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] not in (1, 3, 4):
    ways.append("From (3, H, W): image = image.transpose(1, 2, 0).")
  return ways


def _is_pillows(image: Any) -> bool:
  """Tells if an object is an image of Pillow, and imports Pillow only if it is imported already."""
  pillow = sys.modules.get("PIL.Image")
  return pillow is not None and isinstance(image, pillow.Image)


def _several(images: Any) -> Iterable[Image]:
  """Returns an iterable of images; a single image is put in a list.

  Raises:
    InputError: what was given is neither.
  """
  single = isinstance(images, str | os.PathLike | bytes | bytearray | memoryview)
  # An open file is iterable too: over its lines.
  single = single or hasattr(images, "read") or _is_pillows(images)
  if single or (isinstance(images, np.ndarray) and images.ndim < 4):
    return [images]
  if not isinstance(images, Iterable):
    raise InputError(f"images must be one image or several, got {schema.shown(images)}")
  return images


def _batched(images: Iterable[Image], size: int) -> Iterator[list[Image]]:
  """Yields lists of `size` images; the last list may be shorter."""
  rest = iter(images)
  while batch := list(itertools.islice(rest, size)):
    yield batch


def _threads() -> int:
  return min(32, os.cpu_count() or 1)
