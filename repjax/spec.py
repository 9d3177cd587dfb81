"""What it takes to build a model again, and loading one from a folder."""

import dataclasses
import functools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax import disk, runs
from repjax.errors import InputError, unknown
from repjax.models import create_model, image_size_of
from repjax.reparam import reparameterize


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """From an image of any size to a model's input.

  `repjax.data.transforms.resize_and_crop` makes the uint8 square, `normalize` the input.

  Attributes:
    image_size: side of the square that the model sees, in pixels.
    resize_size: length of the shorter side before the central square is cut out, in pixels.
    interpolation: "nearest", "bilinear" or "bicubic".
    mean: per channel, subtracted from values in 0 ... 1.
    std: per channel, what the difference is divided by.
  """

  image_size: int = 224
  resize_size: int = 256
  interpolation: str = "bilinear"
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)

  def normalize(self, images: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Maps uint8 images (..., 3) to (x / 255 - mean) / std in `dtype`."""
    scale = 1 / (255 * jnp.asarray(self.std, jnp.float32))
    shift = -jnp.asarray(self.mean, jnp.float32) / jnp.asarray(self.std, jnp.float32)
    over_pixels = (1,) * (images.ndim - 1) + (3,)
    images = images.astype(jnp.float32) * scale.reshape(over_pixels) + shift.reshape(over_pixels)
    return images.astype(dtype)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """What it takes to build a model again and to feed it: `model.json` in run and deploy folders.

  Attributes:
    name: of the model, as in `create_model`.
    num_classes: outputs of the classifier.
    overrides: of the variant's attributes, as in `create_model`.
    preprocessing: how images become inputs.
    class_names: in the order of the logits; empty where unknown.
  """

  name: str
  num_classes: int = 1000
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  preprocessing: Preprocessing = Preprocessing()
  class_names: tuple[str, ...] = ()

  @classmethod
  def usual(
    cls, name: str, num_classes: int = 1000, overrides: Mapping[str, Any] | None = None
  ) -> "ModelSpec":
    """The spec of a model at the image size that it is made for, resized to 8/7 of it first."""
    overrides = dict(overrides or {})
    size = image_size_of(create_model(name, num_classes=num_classes, **overrides))
    return cls(name, num_classes, overrides, Preprocessing(size, round(size * 8 / 7)))

  def create_model(self, *, deploy: bool = False, **settings: Any) -> nn.Module:
    """The model in either form; `settings` are `dtype`, `param_dtype` or further overrides."""
    arguments = {**self.overrides, **settings}
    return create_model(self.name, num_classes=self.num_classes, deploy=deploy, **arguments)

  def variable_shapes(self, *, deploy: bool = False) -> dict[str, Any]:
    """The tree of shapes and dtypes of the model's variables in float32."""
    shapes = shapes_of(self.create_model(deploy=deploy), self.preprocessing.image_size)
    return jax.tree.map(lambda leaf: leaf, shapes)  # another tree, for callers who change it

  def to_json(self) -> dict[str, Any]:
    """As plain dictionaries, lists, strings and numbers."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "ModelSpec":
    """The inverse of `to_json`.

    Raises:
      InputError: a field is missing or unknown.
    """
    fields = {field.name for field in dataclasses.fields(cls)}
    for name in value:
      if name not in fields:
        raise unknown("field of model.json", name, fields)
    if "name" not in value:
      raise InputError(f"model.json does not name a model: it has {sorted(value)}")
    preprocessing = dict(value.get("preprocessing", {}))
    parts = {field.name for field in dataclasses.fields(Preprocessing)}
    for name in preprocessing:
      if name not in parts:
        raise unknown("field of model.json's preprocessing", name, parts)
    for name in ("mean", "std"):
      if name in preprocessing:
        preprocessing[name] = tuple(preprocessing[name])
    return cls(
      **{
        **value,
        "preprocessing": Preprocessing(**preprocessing),
        "class_names": tuple(value.get("class_names", ())),
      }
    )

  def write(self, folder: Path) -> None:
    """Writes model.json into a folder."""
    disk.write_json(runs.model_file(folder), self.to_json())

  @classmethod
  def read(cls, folder: Path) -> "ModelSpec":
    """Reads model.json from a folder.

    Raises:
      InputError: there is none, or it is damaged.
    """
    return cls.from_json(disk.read_json(runs.model_file(folder)))


@functools.lru_cache(maxsize=128)
def shapes_of(model: nn.Module, image_size: int | tuple[int, int]) -> dict[str, Any]:
  """The tree of a model's variables, which callers must not change.

  Traces a model, which takes a second for a large one, once.
  """
  height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)


def load(
  workdir: str | os.PathLike[str], *, deploy: bool = True
) -> tuple[nn.Module, dict[str, Any], ModelSpec]:
  """From a folder to a usable model.

  Args:
    workdir: of a run, or the deploy folder itself.
    deploy: the plain form: what the deploy folder holds or, before there is one, the training form
      re-parameterized here; otherwise the training form of the best checkpoint, in either case
      with re-estimated statistics where it has some.

  Returns:
    The model, its variables, and its ModelSpec. `model.apply(variables, images)` gives logits;
    `spec.preprocessing.normalize` makes such images from uint8 ones.

  Raises:
    InputError: the folder does not hold what was asked for, or it is damaged.

  Example:
    model, variables, spec = repjax.load("runs/digits")
    logits = model.apply(variables, spec.preprocessing.normalize(images))
  """
  folder = Path(workdir)
  spec = ModelSpec.read(folder)
  model = spec.create_model(deploy=deploy)
  shapes = spec.variable_shapes(deploy=deploy)
  deploy_folder = runs.find_deploy(folder)
  if deploy and deploy_folder is not None:
    params = disk.read_tree(runs.params_folder(deploy_folder), shapes["params"])
    return model, {"params": params}, spec
  if runs.onnx_file(folder).exists():
    raise InputError(
      f"{folder} holds a network as an ONNX file alone; its parameters in JAX are in the folder of "
      "the run or import that it was made of"
    )
  variables = runs.read_best(folder, spec.variable_shapes())[1]
  if deploy:
    variables = {"params": jax.jit(reparameterize)(variables["params"], variables["batch_stats"])}
  return model, variables, spec
