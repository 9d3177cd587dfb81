"""The subjects of benchmarks/inference.py: a model's two forms, and the same network in PyTorch."""

import copy
import functools
import importlib
import importlib.util
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import timing
import twins
from timing import Running, Subject

import repjax
from repjax import analysis
from repjax.deploy import runtimes
from repjax.deploy.runtimes import openvino_alone

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}


class Task:
  """A model, a batch size and a dtype, with the variables and inputs that all subjects share."""

  def __init__(self, name: str, batch_size: int, image_size: int, dtype: str):
    self.name, self.batch_size, self.image_size, self.dtype = name, batch_size, image_size, dtype
    self.model: Any = self.create()

  def create(self, deploy: bool = False, dtype: Any = jnp.float32) -> Any:
    """Returns the model in one of its forms."""
    return repjax.create_model(self.name, deploy=deploy, dtype=dtype)

  @functools.cached_property
  def variables(self) -> Any:
    """Variables of the training form.

    Norms and biases are random, as in a trained network. Fresh norms would make both forms agree
    even if a fold were wrong.
    """
    variables = repjax.init(self.model, jax.random.key(0), self.image_size)
    rng = np.random.default_rng(0)

    def stir(path: Any, leaf: jax.Array) -> jax.Array:
      if path[-1].key == "kernel":
        return leaf
      return leaf + jnp.asarray(rng.uniform(-0.1, 0.1, leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(stir, variables)

  @functools.cached_property
  def deployed(self) -> Any:
    """Variables of the deploy form, in float32."""
    fold = jax.jit(repjax.reparameterize)
    return {"params": fold(self.variables["params"], self.variables["batch_stats"])}

  @property
  def has_twin(self) -> bool:
    """True if the deploy form can be built in PyTorch here."""
    of_timm = twins.is_of_timm(self.model) and importlib.util.find_spec("timm") is not None
    return of_timm or twins.has_twin(self.model)

  @functools.cached_property
  def inputs(self) -> list[np.ndarray]:
    """Four batches of images (N, H, W, 3), float32."""
    return timing.random_images(self.batch_size, self.image_size, 4)

  @functools.cached_property
  def costs(self) -> analysis.Summary:
    """Parameters and multiplications of both forms."""
    return analysis.summary(self.model, self.image_size)

  @functools.cached_property
  def twin(self) -> Any:
    """The deploy form in PyTorch, in float32 on the CPU."""
    if twins.is_of_timm(self.model):
      return twins.timm_twin(self.name, self.variables)
    return twins.twin(self.name, self.create(deploy=True), self.deployed)

  def flops(self, name: str) -> int:
    """Returns the FLOP of a call of a subject: two for each multiply-accumulate of its form."""
    cost = self.costs.train if name == "repjax-train-form" else self.costs.deploy
    assert cost is not None
    return 2 * cost.macs * self.batch_size

  def expected(self, outputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """Returns the logits of the deploy form for the first input, computed in full float32."""
    del outputs
    with jax.default_matmul_precision("highest"):
      return np.asarray(jax.jit(self.create(deploy=True).apply)(self.deployed, self.inputs[0]))

  @functools.cached_property
  def onnx(self) -> bytes:
    """The deploy form as PyTorch's own exporter writes it, for this batch size."""
    torch: Any = importlib.import_module("torch")
    images = torch.zeros(self.batch_size, 3, self.image_size, self.image_size)
    file = io.BytesIO()
    with warnings.catch_warnings(category=DeprecationWarning, action="ignore"):
      # The dynamo exporter needs one more package and writes the same network.
      torch.onnx.export(self.twin, (images,), file, dynamo=False, input_names=["images"])
    return file.getvalue()

  @functools.cached_property
  def own_onnx(self) -> bytes:
    """The deploy form as repjax writes it, for any batch size."""
    model = self.create(deploy=True)
    made = repjax.onnx.to_onnx(model, self.deployed, image_size=self.image_size)
    return made.SerializeToString()


class Kind(NamedTuple):
  """A kind of subject, and the conditions under which it can be timed.

  Attributes:
    make: takes a task and returns the subject.
    needs: packages that repjax does not depend on.
    on: devices that the subject is timed on: "cpu", "gpu" or both.
    dtypes: returns the dtypes that the subject can compute in on this machine.
    one_device: True for a subject that uses one device where JAX uses all.
  """

  make: Callable[[Any], Subject]
  needs: tuple[str, ...] = ()
  on: tuple[str, ...] = ("cpu", "gpu")
  dtypes: Callable[[], Sequence[str]] = lambda: tuple(DTYPES)
  one_device: bool = False


def why_not(kind: Kind, task: Any) -> str | None:
  """Returns the reason why a subject cannot do a task on this machine, or None if it can."""
  missing = [package for package in kind.needs if importlib.util.find_spec(package) is None]
  if missing:
    return f"not installed: {', '.join(missing)} (pip install 'repjax[bench]')"
  if task.model is None:
    if "torch" not in kind.needs:
      return f"repjax has no {task.name}"
  elif "torch" in kind.needs and not task.has_twin:
    return (
      f"{task.name} is not written in PyTorch here; ResNet and RepVGG without gates are, and for "
      "inference, with timm, MobileOne, RepViT and FastViT"
    )
  place = "cpu" if jax.default_backend() == "cpu" else "gpu"
  if place not in kind.on:
    return f"it is timed on a {kind.on[0]} only"
  if place == "gpu" and kind.needs and not importlib.import_module("torch").cuda.is_available():
    return "this PyTorch sees no GPU"
  if kind.one_device and jax.device_count() > 1:
    return f"it uses one device, and JAX all {jax.device_count()}"
  if task.dtype not in kind.dtypes():
    return f"it does not compute in {task.dtype} here"
  return None


def train_form(task: Task) -> Subject:
  """Returns the training form in evaluation mode. Parameters stay in float32."""
  dtype = DTYPES[task.dtype]
  return _on_images(timing.program(task.create(dtype=dtype).apply, task.variables, dtype), dtype)


def deploy_form(task: Task, tune: bool = True, cuda_graphs: bool = False) -> Subject:
  """Returns the deploy form, by `repjax.deploy.compile`. The logits stay on the device."""

  def start(images: Any) -> Running:
    compiled = repjax.deploy.compile(
      task.create(deploy=True),
      jax.tree.map(jnp.copy, task.deployed),
      image_size=task.image_size,
      dtype=task.dtype,
      batch_sizes=(len(images),),
      tune=tune,
      cuda_graphs=cuda_graphs,
    )
    program = compiled.programs[len(images)]
    return Running(program.start, lambda: program.memory)

  return Subject(start)


def _on_images(subject: Subject, dtype: Any) -> Subject:
  """Returns the subject for images that are NumPy arrays in float32."""
  return subject._replace(
    prepare=lambda images: jnp.asarray(images, dtype),
    read=lambda logits: np.asarray(logits, np.float32),
  )


def in_torch(task: Task, compiled: bool = False) -> Subject:
  """Returns the deploy form in PyTorch, channels last: eager, or compiled by torch.compile."""
  torch: Any = importlib.import_module("torch")
  device, dtype = twins.device(), getattr(torch, task.dtype)
  network = copy.deepcopy(task.twin).to(device, dtype).to(memory_format=torch.channels_last)

  def start(images: Any) -> Running:
    del images
    call = twins.compiled(network) if compiled else network

    def run(images: Any) -> Any:
      with torch.inference_mode():
        return call(images.to(dtype))  # timed, as the conversion in the programs of JAX is

    return Running(run, twins.memory)

  def prepare(images: np.ndarray) -> Any:
    return torch.from_numpy(images).to(device).permute(0, 3, 1, 2)  # strides of NHWC

  return Subject(start, prepare, twins.wait, lambda y: y.float().cpu().numpy())


def _channels_first(images: np.ndarray) -> np.ndarray:
  """Returns images (N, H, W, 3) as (N, 3, H, W)."""
  return np.ascontiguousarray(images.transpose(0, 3, 1, 2))


def in_onnxruntime(task: Task, own: bool = False) -> Subject:
  """Returns the deploy form in ONNX Runtime on the CPU, exported by PyTorch or by repjax."""
  content = task.own_onnx if own else task.onnx

  def start(images: np.ndarray) -> Running:
    del images
    run = runtimes.in_onnxruntime(content)
    return Running(lambda images: run(images)[0])

  return Subject(start, _channels_first, lambda output: output)


def in_openvino(task: Task, own: bool = False) -> Subject:
  """Returns the deploy form in OpenVINO on the CPU, exported by PyTorch or by repjax."""
  openvino = openvino_alone()
  content = task.own_onnx if own else task.onnx
  settings = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}[
      task.dtype
    ],
    "INFERENCE_NUM_THREADS": timing.cpus(),
  }

  def start(images: np.ndarray) -> Running:
    del images
    core = openvino.Core()
    network = core.compile_model(core.read_model(content), "CPU", settings)
    return Running(lambda images: network(images, share_inputs=True, share_outputs=True)[0])

  return Subject(start, _channels_first, lambda output: output, np.array)


def openvino_dtypes() -> list[str]:
  """Returns the dtypes that OpenVINO can compute in on this CPU."""
  core = openvino_alone().Core()
  able = core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
  names = {"FP32": "float32", "BF16": "bfloat16", "FP16": "float16"}
  return [names[name] for name in able if name in names]


KINDS: dict[str, Kind] = {
  "repjax-train-form": Kind(train_form),
  "repjax-deploy": Kind(deploy_form),
  "repjax-untuned": Kind(functools.partial(deploy_form, tune=False)),
  "repjax-graphs": Kind(functools.partial(deploy_form, cuda_graphs=True), on=("gpu",)),
  "torch-eager": Kind(in_torch, ("torch",)),
  "torch-compile": Kind(functools.partial(in_torch, compiled=True), ("torch",)),
  "onnxruntime": Kind(
    in_onnxruntime, ("torch", "onnx", "onnxruntime"), ("cpu",), lambda: ["float32"]
  ),
  "openvino": Kind(in_openvino, ("torch", "onnx", "openvino"), ("cpu",), openvino_dtypes),
  "repjax-onnxruntime": Kind(
    functools.partial(in_onnxruntime, own=True),
    ("onnx", "onnxruntime"),
    ("cpu",),
    lambda: ["float32"],
  ),
  "repjax-openvino": Kind(
    functools.partial(in_openvino, own=True), ("onnx", "openvino"), ("cpu",), openvino_dtypes
  ),
}
