"""`compile`: a model compiled ahead of time for batches of any size."""

import collections
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from repjax.cache import keep_every_program
from repjax.deploy.devices import Placed
from repjax.deploy.streams import PlacedStreams, check_streams
from repjax.errors import InputError, unknown
from repjax.inference import inference
from repjax.spec import Preprocessing

BATCH_SIZES = (1, 8, 32)
PARALLEL = ("data", "streams")
_IN_FLIGHT = 2  # batches, so that devices need not wait for the host


class CompiledModel:
  """A function of images, compiled for some batch sizes; `compile` makes it.

  A batch runs as the next larger batch size, padded; the padding is cut off again. A batch beyond
  the largest size runs in pieces of that size. Nothing is compiled in a call.

  Attributes:
    batch_sizes: that are compiled, ascending.
    image_size: (height, width) in pixels.
    input_dtype: of the images.
    plans: batch size to `Plan`: how it runs, and what was measured.
  """

  def __init__(
    self,
    function: Callable[..., Any],
    tree: Any,
    *,
    image_size: tuple[int, int],
    input_dtype: jax.typing.DTypeLike,
    batch_sizes: Iterable[int] = BATCH_SIZES,
    devices: Sequence[Any] | None = None,
    place: Callable[[Any, Sequence[Any] | None], Any] = Placed,
  ):
    """Compiles `function(tree, images)`, or what `place` takes, for every batch size."""
    self.batch_sizes = _checked_batch_sizes(batch_sizes)
    self.image_size, self.input_dtype = image_size, np.dtype(input_dtype)
    self.plans, self._programs = {}, {}
    placed = place(tree, devices)
    with keep_every_program():
      for size in self.batch_sizes:
        batch = jax.ShapeDtypeStruct((size, *image_size, 3), self.input_dtype)
        self._programs[size], self.plans[size] = placed.program(function, batch)

  def __call__(self, images: np.ndarray | jax.Array) -> Any:
    """Computes.

    Args:
      images: (N, H, W, 3) with any N, H and W as in `image_size`, of `input_dtype`.

    Returns:
      float32 arrays on the host with N rows: (N, K) for a classifier of K classes, maps by name for
      a model with `features_only`.

    Raises:
      InputError: images of another rank, size or dtype.
    """
    self._check(images)
    largest, count = self.batch_sizes[-1], len(images)
    if count not in self.batch_sizes:
      images = np.asarray(images)  # cutting and padding on a device would compile
    running, parts = collections.deque(), []
    for start in range(0, max(count, 1), largest):
      piece = images[start : start + largest] if count > largest else images
      program = self._programs[next(size for size in self.batch_sizes if size >= len(piece))]
      running.append(functools.partial(program.finish, program.start(piece), len(piece)))
      if len(running) == _IN_FLIGHT:
        parts.append(running.popleft()())
    parts.extend(finish() for finish in running)
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *rows: np.concatenate(rows), *parts)

  def _check(self, images: Any) -> None:
    height, width = self.image_size
    if not isinstance(images, np.ndarray | jax.Array):
      raise InputError(f"images are one array (N, {height}, {width}, 3), got {type(images)}")
    if images.ndim != 4 or images.shape[1:] != (height, width, 3):
      hint = "; for one image pass images[None]" if images.ndim == 3 else ""
      raise InputError(
        f"this model is compiled for images (N, {height}, {width}, 3), got {images.shape}{hint}; "
        "resize them, or compile with another image_size"
      )
    if images.dtype != self.input_dtype:
      raise InputError(
        f"images are {self.input_dtype} here, got {images.dtype}; "
        + (
          "pass the pixels as they are: normalization is compiled in"
          if self.input_dtype == np.uint8
          else "normalize uint8 images by spec.preprocessing.normalize, or compile with "
          "preprocessing=spec.preprocessing, and they are taken as they are"
          if images.dtype == np.uint8
          else f"images.astype({str(self.input_dtype)!r}) is what to pass"
        )
      )


def compile(  # noqa: A001
  model: nn.Module,
  variables: Mapping[str, Any],
  *,
  image_size: int | tuple[int, int],
  dtype: jax.typing.DTypeLike = "float32",
  batch_sizes: Iterable[int] = BATCH_SIZES,
  devices: Sequence[Any] | None = None,
  preprocessing: Preprocessing | None = None,
  probabilities: bool = False,
  tune: bool = True,
  parallel: str = "data",
) -> CompiledModel:
  """Compiles a model's deploy form ahead of time; from then on nothing is compiled.

  Programs are kept on disk (`jax_compilation_cache_dir`, by default in the user's cache folder), so
  that another process with the same model has them at once. With `parallel="data"` whether a batch
  runs on one device or on all is measured here for each batch size, see `CompiledModel.plans`.

  Args:
    model: in either form; a training form is re-parameterized first.
    variables: of the model.
    image_size: pixels, one number or (height, width).
    dtype: "float32", "bfloat16" or "float16": of parameters, cast once behind the folding, and of
      the computation. Results are float32.
    batch_sizes: to compile for; a batch of another size is padded, see `CompiledModel`.
    devices: of this process; None: all.
    preprocessing: of the model's ModelSpec, to take uint8 images; their normalization is compiled
      in. None: images are normalized and float32.
    probabilities: return a softmax of the logits.
    tune: on a CPU, measure for each convolution which way to compute it is fastest, and for large
      batches whether a few images after another are; see `CompiledModel.plans`. This takes ten
      seconds to a minute for a new network, once: what was measured is kept on disk. Results then
      differ by rounding, of which a layer has at most about twice as much, and the parameters of
      3x3 convolutions may take four times the memory, or twice that where batch sizes differ in
      what is fastest. False: XLA's own convolutions.
    parallel: "data": one device, or all with a part of the batch each. "streams", for ParNet: a
      device for each stream; of k times as many devices each group has a part of the batch, which
      is padded to a multiple of k. `critical_path` says what bounds it.

  Returns:
    A function of images (N, H, W, 3).

  Raises:
    InputError: a dtype, batch size or device that cannot be, variables that do not fit the model,
      or a model without a deploy form; with "streams" a model without them, or a number of devices
      that is no multiple of theirs.

  Example:
    model, variables, spec = repjax.load("runs/a0")
    logits_of = repjax.deploy.compile(
      model, variables, image_size=224, dtype="bfloat16", preprocessing=spec.preprocessing
    )
    logits = logits_of(uint8_images)
  """
  if parallel not in PARALLEL:
    raise unknown("parallel", parallel, PARALLEL)
  in_streams = parallel == "streams"
  if in_streams:
    check_streams(model, devices)
  with keep_every_program():
    found = inference(
      model,
      variables,
      image_size=image_size,
      dtype=dtype,
      preprocessing=preprocessing,
      probabilities=probabilities,
    )
  place = functools.partial(PlacedStreams, found.network) if in_streams else Placed
  return CompiledModel(
    found.run if in_streams else found.function,
    found.tree,
    image_size=image_size if isinstance(image_size, tuple) else (image_size, image_size),
    input_dtype=np.float32 if preprocessing is None else np.uint8,
    batch_sizes=batch_sizes,
    devices=devices,
    place=functools.partial(place, tune=tune),
  )


def _checked_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
  sizes = (batch_sizes,) if isinstance(batch_sizes, int) else tuple(batch_sizes)
  if not sizes or not all(type(size) is int and size > 0 for size in sizes):
    raise InputError(f"batch_sizes are whole numbers above 0, for example (1, 8, 32), got {sizes}")
  return tuple(sorted(set(sizes)))
