"""`compile`: compiles a model ahead of time, for batches of any size."""

import collections
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from repjax.cache import keep_every_program
from repjax.deploy import gpu, runtimes
from repjax.deploy.devices import PlacedTree, checked_devices
from repjax.deploy.streams import PlacedStreams, device_groups
from repjax.devices import need_devices
from repjax.errors import InputError, unknown
from repjax.inference import checked_dtype, inference
from repjax.output import status
from repjax.schema import MisfitError, items, shown, whole
from repjax.spec import Preprocessing

BATCH_SIZES = (1, 8, 32)
PARALLEL = ("data", "streams")
_IN_FLIGHT = 2  # While the host collects one batch, the devices already compute the next one.


class CompiledModel:
  """A function of images that is compiled for some batch sizes; `compile` makes it.

  A batch is padded to the next larger compiled size, and the padded rows are cut off the result. A
  batch above the largest size is cut into batches of that size. A call never compiles anything.

  Attributes:
    batch_sizes: the compiled batch sizes, ascending.
    image_size: (height, width) in pixels.
    input_dtype: dtype of the images.
    plans: batch size to `BatchPlan`, which says how the batch runs and what was measured.
    programs: batch size to the compiled program, whose `start` returns results on the devices.
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
    place: Callable[[Any, Sequence[Any] | None], Any] = PlacedTree,
  ):
    """Compiles the function for every batch size.

    Args:
      function: `function(tree, images)`, or the function that the programs of `place` take.
      tree: the arrays that the function reads.
      image_size: (height, width) in pixels.
      input_dtype: dtype of the images.
      batch_sizes: batch sizes to compile for.
      devices: devices of this process; None takes all.
      place: copies a tree to devices; `PlacedTree`, or `PlacedStreams` for a network in streams.
    """
    need_devices()
    self.batch_sizes = checked_batch_sizes(batch_sizes)
    self.image_size, self.input_dtype = image_size, np.dtype(input_dtype)
    self.plans, self.programs = {}, {}
    placed = place(tree, devices)
    with keep_every_program():
      for size in self.batch_sizes:
        batch = jax.ShapeDtypeStruct((size, *image_size, 3), self.input_dtype)
        with status(f"compiling for batches of {size:,}"):
          self.programs[size], self.plans[size] = placed.program(function, batch)

  def __call__(self, images: np.ndarray | jax.Array) -> Any:
    """Computes the model's result for a batch of images.

    Args:
      images: (N, H, W, 3) of dtype `input_dtype`, with any N, and (H, W) equal to `image_size`.

    Returns:
      float32 arrays on the host with N rows: (N, K) for a classifier of K classes, maps by name for
      a model with `features_only`.

    Raises:
      InputError: the images have a different rank, size or dtype; or this process was forked from
        one that had used JAX.
    """
    need_devices()
    self._check(images)
    largest, count = self.batch_sizes[-1], len(images)
    if count not in self.batch_sizes:
      # JAX would compile a program to cut or pad a device array; NumPy needs none.
      images = np.asarray(images)
    unfinished, results = collections.deque(), []
    # `start` returns before the devices are done, and `finish` waits for them. Starting a batch
    # before the one before it is finished keeps the devices busy while the host copies results.
    for start in range(0, max(count, 1), largest):
      batch = images[start : start + largest] if count > largest else images
      program = self.programs[next(size for size in self.batch_sizes if size >= len(batch))]
      unfinished.append(functools.partial(program.finish, program.start(batch), len(batch)))
      if len(unfinished) == _IN_FLIGHT:
        results.append(unfinished.popleft()())
    results.extend(finish() for finish in unfinished)
    if len(results) == 1:
      return results[0]
    return jax.tree.map(lambda *rows: np.concatenate(rows), *results)

  def _check(self, images: Any) -> None:
    """Raises InputError if images have the wrong type, shape or dtype."""
    height, width = self.image_size
    if not isinstance(images, np.ndarray | jax.Array):
      raise InputError(f"images must be one array (N, {height}, {width}, 3), got {type(images)}")
    if images.ndim != 4 or images.shape[1:] != (height, width, 3):
      if images.ndim == 4 and images.shape[1] == 3 and images.shape[3] != 3:
        way_out = "Put channels last: images.transpose(0, 2, 3, 1)."
      elif images.ndim == 3:
        way_out = "Pass one image as images[None]."
      else:
        way_out = "Resize the images, or compile the model with their image_size."
      raise InputError(
        f"this model is compiled for images (N, {height}, {width}, 3), got {images.shape}. "
        + way_out
      )
    if images.dtype != self.input_dtype:
      if self.input_dtype == np.uint8:
        way_out = "Pass the pixels without normalizing them: normalization is compiled in."
      elif images.dtype == np.uint8:
        way_out = (
          "Normalize them by spec.preprocessing.normalize, or compile the model with "
          "preprocessing=spec.preprocessing."
        )
      else:
        way_out = f"Pass images.astype({str(self.input_dtype)!r})."
      raise InputError(f"images must be {self.input_dtype}, got {images.dtype}. {way_out}")


def compile(  # noqa: A001
  model: Any,
  variables: Any,
  *,
  image_size: int | tuple[int, int],
  dtype: jax.typing.DTypeLike = "float32",
  batch_sizes: Iterable[int] = BATCH_SIZES,
  devices: Sequence[Any] | None = None,
  preprocessing: Preprocessing | None = None,
  probabilities: bool = False,
  tune: bool = True,
  fuse: bool = True,
  parallel: str = "data",
  cuda_graphs: bool = False,
  runtime: str = "xla",
) -> CompiledModel:
  """Compiles a model's deploy form ahead of time; calls of the result compile nothing.

  The model may also be a function `function(params, images)` of any library, or what `repjax.fuse`
  returned, with the parameters that its `fold` returned.

  Compiled programs are kept on disk, so that the next process with the same model loads them. The
  folder is `jax_compilation_cache_dir`, by default in the user's cache folder. With
  `parallel="data"`, each batch size is timed on one device and on all devices, and the faster way
  is taken; `CompiledModel.plans` says which.

  Args:
    model: the model in either form; a training form is re-parameterized first. Or a function of
      parameters and of images (N, H, W, 3), in inference mode; or a fused function.
    variables: variables of the model, or parameters of the function.
    image_size: pixels, one number or (height, width).
    dtype: "float32", "bfloat16" or "float16", the dtype of the computation. Parameters are cast
      once, after they are folded. Results are float32. A function gets parameters and images of
      this dtype. A fused function takes the dtype for which it was made.
    batch_sizes: batch sizes to compile for. Batches of other sizes are padded, see `CompiledModel`.
    devices: devices of this process; None takes all.
    preprocessing: preprocessing of the model's ModelSpec, to take uint8 images and to compile their
      normalization in. None: images are float32 and already normalized.
    probabilities: returns a softmax of the logits.
    tune: on a CPU, times several algorithms for each convolution and takes the fastest one. Also
      times whether a large batch is faster in chunks of a few images. For a new network this
      takes ten seconds to a minute, once: measurements are kept on disk. Results then differ by
      rounding; each layer has at most about twice the rounding error. The parameters of 3x3
      convolutions may take four times the memory, and twice that if batch sizes differ in what is
      fastest. On a GPU, times depthwise convolutions as they are and as sums over their taps.
      False: every convolution is XLA's.
    fuse: merges norms and branches of a module or function that is not a deploy form of repjax, by
      `repjax.fuse`, and prints one line about what was merged. Planning and checking take seconds
      for a network of 50 layers. Results then differ by rounding. False: every operation stays.
    parallel: "data": a batch runs on one device, or is split over all of them. "streams", for
      ParNet: every stream has its own device. With k times as many devices as streams, the batch is
      split over k groups and padded to a multiple of k. `critical_path` says what bounds the speed.
    cuda_graphs: on NVIDIA GPUs, puts convolutions into CUDA graphs, so that a network is one launch
      and small batches wait less for the host. Off, since no measurement has proven it yet. Other
      devices refuse it.
    runtime: for float32 on CPUs, what computes the batches. "xla"; "onnxruntime" or "openvino" from
      an ONNX file that is written in memory; or "auto". "auto" times XLA and the others where they
      are installed, a few seconds for each batch size, and takes the fastest. It prints a line
      about each measurement and keeps it on disk; `CompiledModel.plans` has it too. It leaves out
      a runtime that cannot run the model, and prints the reason. Results of a
      runtime differ from XLA's by a relative error of at most 1e-3, which is checked, and usually
      of 1e-6.

  Returns:
    A function of images (N, H, W, 3).

  Raises:
    InputError: a dtype, batch size or device cannot be used; the variables do not fit the model;
      the model has no deploy form; or a function cannot be traced, or returns something else than a
      row for each image. With "streams": the model has no streams, or the number of
      devices is not a multiple of the number of streams. With `cuda_graphs`: the device is no GPU.
      With a runtime besides "auto": it is not installed, ONNX has no operator for a part of the
      model, or the program is not in float32 on a CPU.

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
  if cuda_graphs:
    gpu.check_graphs(checked_devices(devices)[0])
  runtimes.check(
    runtime, checked_dtype(dtype), devices, in_streams=in_streams, cuda_graphs=cuda_graphs
  )
  if in_streams:
    device_groups(model, devices)  # raises early, before the model is folded
  with keep_every_program():
    found = inference(
      model,
      variables,
      image_size=image_size,
      dtype=dtype,
      preprocessing=preprocessing,
      probabilities=probabilities,
      fuse=fuse and not in_streams,
    )
  place: Callable[..., Any] = PlacedTree
  if in_streams:
    place = functools.partial(PlacedStreams, found.network)
  elif runtime != "xla":
    place = functools.partial(runtimes.PlacedRuntimes, runtime)
  gpu.warn_of_dtype(checked_devices(devices)[0], checked_dtype(dtype))
  options = gpu.GRAPHS if cuda_graphs else {}
  return CompiledModel(
    found.run if in_streams else found.function,
    found.tree,
    image_size=image_size if isinstance(image_size, tuple) else (image_size, image_size),
    input_dtype=np.float32 if preprocessing is None else np.uint8,
    batch_sizes=batch_sizes,
    devices=devices,
    place=functools.partial(place, tune=tune, options=options),
  )


def checked_batch_sizes(batch_sizes: Iterable[int]) -> tuple[int, ...]:
  """Returns batch sizes in ascending order, each once; raises InputError if one is not positive."""
  given: Any = batch_sizes
  several = isinstance(given, Iterable) and not isinstance(given, str)
  sizes: tuple[Any, ...] = tuple(given) if several else (given,)
  try:
    items(whole(1)).check(sizes, "")
  except MisfitError:
    sizes = ()
  if not sizes:
    raise InputError(
      f"batch_sizes must be whole numbers above 0 like (1, 8, 32), got {shown(given)}"
    )
  return tuple(sorted({int(size) for size in sizes}))
