"""Runs a network on CPUs in ONNX Runtime or OpenVINO, or in whichever runtime is the fastest.

`repjax.onnx` writes the network as an ONNX file in memory, and a runtime loads the file. No runtime
is the fastest for every network, batch size and processor, so "auto" measures. The fastest runtime
is kept in the user's cache folder, as `repjax.deploy.tuning` keeps the fastest algorithms.
"""

import functools
import importlib
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from repjax.cache import recall, remember
from repjax.deploy.devices import BatchPlan, PlacedTree, checked_devices, pad_images
from repjax.deploy.xla import compile_lowered
from repjax.errors import InputError, printable, sentences, unknown
from repjax.functions import Function, say
from repjax.onnx import of_function
from repjax.onnx.translation import IMAGES
from repjax.schema import MisfitError, number, record, table, text
from repjax.timing import Turn, cpus, time_turn

AGREEMENT = 1e-3
"""The largest relative error of a runtime's results against those of XLA."""

_WORTHWHILE = 0.95  # A runtime replaces XLA if it takes less than this share of the time.
_ROUNDS, _FEWEST_ROUNDS, _SECONDS = 10, 2, 5.0

Run = Callable[[np.ndarray], Sequence[np.ndarray]]
"""Takes images (N, 3, H, W), and returns the outputs of an ONNX file in their order."""


def in_onnxruntime(content: bytes) -> Run:
  """Loads an ONNX file in ONNX Runtime."""
  runtime: Any = importlib.import_module("onnxruntime")
  options = runtime.SessionOptions()
  options.intra_op_num_threads = cpus()
  session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
  return lambda images: session.run(None, {IMAGES: images})


def openvino_alone() -> Any:
  """Imports OpenVINO without its telemetry, which would report to its makers."""
  sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
  return importlib.import_module("openvino")


def _in_openvino(content: bytes) -> Run:
  """Loads an ONNX file in OpenVINO."""
  core = openvino_alone().Core()
  settings = {
    "PERFORMANCE_HINT": "LATENCY",
    # Without this hint, OpenVINO computes in bfloat16 where the processor can.
    "INFERENCE_PRECISION_HINT": "f32",
    "INFERENCE_NUM_THREADS": cpus(),
  }
  network = core.compile_model(core.read_model(content), "CPU", settings)
  lock = threading.Lock()

  def run(images: np.ndarray) -> Sequence[np.ndarray]:
    with lock:  # A network of OpenVINO has one set of buffers.
      found = network(images)
    return [found[output] for output in network.outputs]

  return run


_LOADERS: dict[str, Callable[[bytes], Run]] = {
  "onnxruntime": in_onnxruntime,
  "openvino": _in_openvino,
}
_PACKAGES: dict[str, Callable[[], Any]] = {
  "onnxruntime": lambda: importlib.import_module("onnxruntime"),
  "openvino": openvino_alone,
}
RUNTIMES = ("xla", *_LOADERS, "auto")


def check(
  runtime: str,
  dtype: np.dtype,
  devices: Sequence[Any] | None,
  *,
  in_streams: bool,
  cuda_graphs: bool,
) -> None:
  """Raises unless a runtime is known, is installed, and can do what is asked for.

  Args:
    runtime: a name among RUNTIMES.
    dtype: dtype of the computation.
    devices: devices of this process; None takes all.
    in_streams: the network runs in streams.
    cuda_graphs: convolutions are in CUDA graphs.

  Raises:
    InputError: the runtime cannot be used.
  """
  if runtime not in RUNTIMES:
    raise unknown("runtime", runtime, RUNTIMES)
  if runtime == "xla":
    return
  platform = checked_devices(devices)[0].platform
  causes = {
    f"a {platform}": platform != "cpu",
    f"dtype={dtype.name!r}": dtype != np.float32,
    "parallel='streams'": in_streams,
    "cuda_graphs=True": cuda_graphs,
  }
  if found := [cause for cause, holds in causes.items() if holds]:
    raise InputError(
      f"runtime={runtime!r} does not go with {' and '.join(found)}, since runtimes besides XLA "
      "compute in float32 on CPUs, without streams and CUDA graphs. Change that, or leave "
      "runtime='xla', which computes everything"
    )
  _check_installed(runtime)


def _check_installed(runtime: str) -> None:
  """Raises InputError if packages are missing, and names all of them at once."""
  found = _installed()
  either = [] if found else [*_LOADERS]
  missing = either if runtime == "auto" else [runtime] if runtime not in found else []
  if importlib.util.find_spec("onnx") is None:
    missing = ["onnx", *missing]
  if missing:
    compared = ", which compares XLA with ONNX Runtime and OpenVINO," if runtime == "auto" else ""
    raise InputError(
      f"runtime={runtime!r}{compared} needs packages that are not installed: pip install "
      f"{' '.join(missing)}. runtime='xla' needs no further package"
    )


def _installed() -> list[str]:
  """Returns the names of the installed runtimes besides XLA."""
  return [name for name in _LOADERS if importlib.util.find_spec(name) is not None]


class RuntimeProgram:
  """A function for batches of one size that a runtime computes, in place of a `BatchProgram`.

  Attributes:
    images: number of images that run; smaller batches are padded.
    memory: None, since the runtimes do not say.
  """

  memory = None

  def __init__(self, run: Run, structure: Any, images: int):
    """Keeps the arguments.

    Args:
      run: runs the ONNX file of the function.
      structure: tree structure of the function's results.
      images: number of images that run.
    """
    self.images = images
    self._run, self._structure = run, structure

  def start(self, images: Any) -> Any:
    """Computes the results of a batch, and returns when they are there.

    Args:
      images: (n, H, W, 3) with n at most the program's number of images.
    """
    images = pad_images(np.asarray(images), self.images)
    outputs = self._run(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))  # (N, 3, H, W)
    # Maps come with channels first, as the images went in.
    rows = [each.transpose(0, 2, 3, 1) if each.ndim == 4 else each for each in outputs]
    return jax.tree.unflatten(self._structure, rows)

  def finish(self, results: Any, count: int) -> Any:
    """Returns the first `count` rows of each result."""
    return jax.tree.map(lambda rows: rows[:count], results)


class _Measured(NamedTuple):
  """The runtime to take for a batch size, and the seconds of a batch in each runtime."""

  runtime: str
  seconds: Mapping[str, float]


_ANSWER = record(
  {"runtime": text("xla", *_LOADERS), "seconds": table(number(0))},
  required=("runtime", "seconds"),
)


class PlacedRuntimes:
  """A tree of arrays for programs of a runtime; takes the place of a `PlacedTree`.

  A runtime loads the ONNX file of a function once, for all batch sizes.
  """

  def __init__(
    self,
    runtime: str,
    tree: Any,
    devices: Sequence[Any] | None = None,
    tune: bool = False,
    options: Mapping[str, Any] | None = None,
  ):
    """Keeps the arguments.

    Args:
      runtime: "onnxruntime", "openvino" or "auto", which `check` has accepted.
      tree: arrays.
      devices, tune, options: as for `PlacedTree`, for programs of XLA.
    """
    self._runtime, self._tune = runtime, tune
    self._placed = PlacedTree(tree, devices, tune, options)
    self._runs: dict[str, Run] = {}
    self._sample: tuple[np.ndarray, Any] | None = None  # an image, and XLA's results for it

  def program(self, function: Function, batch: jax.ShapeDtypeStruct) -> tuple[Any, BatchPlan]:
    """Compiles the function for one batch size in a runtime, or in the fastest one.

    Args:
      function: a function of the tree and of images, the same in every call.
      batch: shape (N, H, W, 3) and dtype of the images.

    Raises:
      InputError: ONNX has no operator for a part of the function, or a runtime computes something
        else than XLA.
    """
    if self._runtime != "auto":
      return self._program(self._runtime, function, batch)
    question, batches = self._question(batch), f"batches of {batch.shape[0]:,}"
    known = _recalled(question)
    if known is not None:
      say(f"{batches}: {described(known)}; measured earlier")
      program, plan = self._program(known.runtime, function, batch)
      return program, plan._replace(runtimes=known.seconds)
    programs, reasons = self._possible(function, batch)
    for reason, names in reasons.items():
      say(f"{batches}: without {' and '.join(names)}: {reason}")
    if len(programs) == 1:
      return programs["xla"]
    seconds = measured({name: each for name, (each, _) in programs.items()}, batch)
    known = _Measured(fastest(seconds), seconds)
    say(f"{batches}: {described(known)}")
    if not reasons:  # A runtime that is left out is tried again, since a new version may run it.
      remember(question, known._asdict())
    program, plan = programs[known.runtime]
    return program, plan._replace(runtimes=known.seconds)

  def _possible(
    self, function: Function, batch: jax.ShapeDtypeStruct
  ) -> tuple[dict[str, tuple[Any, BatchPlan]], dict[str, list[str]]]:
    """Returns the programs of XLA and of the runtimes that can run a function.

    Returns:
      The program of each runtime with its plan; and the reasons why others cannot run the function,
      with the names of these.
    """
    programs = {"xla": self._program("xla", function, batch)}
    reasons: dict[str, list[str]] = {}
    written = functools.cache(lambda: self._written(function, batch))
    for name in _installed():
      try:
        programs[name] = self._program(name, function, batch, written)
      except InputError as error:
        reasons.setdefault(str(error), []).append(name)
    return programs, reasons

  def _program(
    self,
    name: str,
    function: Function,
    batch: jax.ShapeDtypeStruct,
    written: Callable[[], bytes] | None = None,
  ) -> tuple[Any, BatchPlan]:
    """Returns the program of a runtime, and its plan.

    Args:
      name: name of the runtime.
      function: a function of the tree and of images.
      batch: shape (N, H, W, 3) and dtype of the images.
      written: returns the content of the ONNX file; None: the file is written here.
    """
    if name == "xla":
      return self._placed.program(function, batch)
    if name not in self._runs:
      self._runs[name] = _load(name, written() if written else self._written(function, batch))
    return self._loaded(name, function, batch)

  def _loaded(
    self, name: str, function: Function, batch: jax.ShapeDtypeStruct
  ) -> tuple[RuntimeProgram, BatchPlan]:
    """Returns a program of a runtime that has loaded the function, after a check of its results."""
    start = time.perf_counter()
    size = batch.shape[0]
    self._sample = image, wanted = self._sample or self._computed(function, batch)
    program = RuntimeProgram(self._runs[name], jax.tree.structure(wanted), size)
    # This call prepares the runtime for this batch size, too, so that no later call has to.
    _check_agreement(name, program.finish(program.start(image), 1), wanted)
    seconds = time.perf_counter() - start
    return program, BatchPlan(1, size, size, {}, seconds, None, {}, name, {})

  def _written(self, function: Function, batch: jax.ShapeDtypeStruct) -> bytes:
    """Returns the function as the content of an ONNX file, for any batch size."""
    size = batch.shape[1], batch.shape[2]
    try:
      made = of_function(function, self._placed.tree, size, batch.dtype, probabilities=False)
    except InputError as error:
      raise InputError(sentences(error, "runtime='xla' runs such a model")) from error
    return made.SerializeToString()

  def _computed(self, function: Function, batch: jax.ShapeDtypeStruct) -> tuple[np.ndarray, Any]:
    """Returns an image of noise, and what XLA computes from it with its own convolutions."""
    image = noise((1, *batch.shape[1:]), batch.dtype)
    arguments = self._placed.on_first(self._placed.tree), jax.device_put(image, self._placed.one)
    lowered = jax.jit(function).lower(*arguments)
    results = compile_lowered(lowered, self._placed.devices[0])(*arguments)
    return image, jax.tree.map(np.asarray, results)

  def _question(self, batch: jax.ShapeDtypeStruct) -> str:
    """Returns a text with everything that decides which runtime is the fastest."""
    # The version of the module: distributions have several names, such as onnxruntime-gpu.
    versions = [f"{name} {_PACKAGES[name]().__version__}" for name in _installed()]
    asked = self._placed.question(batch)
    names = f"xla, {', '.join(versions)}"
    return f"the fastest runtime after a rest of {names}, tuned: {self._tune}; {asked}"


def _load(name: str, content: bytes) -> Run:
  """Loads an ONNX file in a runtime, and raises InputError if the runtime cannot run the file."""
  try:
    return _LOADERS[name](content)
  except Exception as error:
    # The errors of ONNX Runtime share no base class, but a module.
    if not isinstance(error, RuntimeError) and type(error).__module__.split(".")[0] != name:
      raise
    said = f"{name} cannot load this model: {printable(str(error), 300)}"
    raise InputError(sentences(said, "runtime='xla' runs such a model")) from error


def _recalled(question: str) -> _Measured | None:
  """Returns what an earlier process has measured, or None; the file may hold anything."""
  answer = recall(question)
  try:
    _ANSWER.check(answer, "")
  except MisfitError:
    return None
  # Whoever wrote the file may have had more runtimes.
  return _Measured(**answer) if answer["runtime"] in ("xla", *_installed()) else None


def _check_agreement(name: str, results: Any, wanted: Any) -> None:
  """Raises InputError if the results of a runtime are not those of XLA.

  Args:
    name: name of the runtime.
    results, wanted: trees of arrays of the same structure.
  """
  pairs = zip(jax.tree.leaves(results), jax.tree.leaves(wanted), strict=True)
  errors = [np.abs(a - b).max() / (np.abs(b).max() or 1.0) for a, b in pairs]
  if not all(error <= AGREEMENT for error in errors):  # so that NaN is refused too
    raise InputError(
      f"{name} computes something else than XLA: the relative error of the results is "
      f"{max(errors):.1e}, and at most {AGREEMENT:.0e} can be rounding. Are all parameters finite? "
      "Otherwise leave runtime='xla'; this is a mistake of repjax or of the runtime"
    )


def measured(programs: Mapping[str, Any], batch: jax.ShapeDtypeStruct) -> dict[str, float]:
  """Returns the least seconds of a batch in each program.

  The programs take turns, so that a disturbance of the machine slows all of them. Other work on the
  machine only adds to a time, so the least time is the best estimate.

  Args:
    programs: name to program.
    batch: shape (N, H, W, 3) and dtype of the images.
  """
  import tqdm

  images = noise(batch.shape, batch.dtype)
  turns = {name: _turn(program, images) for name, program in programs.items()}
  seconds = dict.fromkeys(programs, float("inf"))
  begin, title = time.perf_counter(), "measuring which runtime is the fastest"
  for done in tqdm.tqdm(range(_ROUNDS), title, leave=False, disable=None):
    if done >= _FEWEST_ROUNDS and time.perf_counter() - begin > _SECONDS:
      break
    for name, turn in turns.items():
      seconds[name] = min(seconds[name], time_turn(turn, done))
  return seconds


def _turn(program: Any, images: np.ndarray) -> Turn:
  """Returns the turn of a program, which computes the same images at every call."""

  def turn(number: int, calls: int) -> None:
    for _ in range(calls):
      program.finish(program.start(images), len(images))

  return turn


def fastest(seconds: Mapping[str, float]) -> str:
  """Returns the fastest runtime; one that is hardly faster than XLA is not taken."""
  name = min(seconds, key=lambda name: seconds[name])
  return name if seconds[name] < _WORTHWHILE * seconds["xla"] else "xla"


def described(known: _Measured) -> str:
  """Says which runtime is taken, and how its time compares with the time of the others."""
  own = known.seconds[known.runtime]
  others = [
    f"{seconds / own:.2f} times as fast as {name} ({_milliseconds(seconds)})"
    for name, seconds in known.seconds.items()
    if name != known.runtime
  ]
  return f"{known.runtime} takes {_milliseconds(own)}, {', '.join(others)}"


def _milliseconds(seconds: float) -> str:
  """Returns a time with three digits, or with all digits before the point."""
  value = 1e3 * seconds
  return f"{value:,.0f} ms" if value >= 100 else f"{value:#.3g} ms"


def noise(shape: Sequence[int], dtype: np.dtype) -> np.ndarray:
  """Returns images of noise."""
  rng = np.random.default_rng(0)
  if dtype == np.uint8:
    return rng.integers(0, 256, shape, np.uint8)
  return rng.standard_normal(shape, np.float32).astype(dtype)
