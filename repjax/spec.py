"""ModelSpec, the description from which a model is built again, and `load` for folders."""

import dataclasses
import functools
import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax import disk, names, runs, schema
from repjax.devices import need_devices
from repjax.errors import InputError
from repjax.models import check_model, create_model, image_size_of
from repjax.reparam import reparameterize
from repjax.runs import contents


@dataclasses.dataclass(frozen=True)
class Preprocessing:
  """The steps from an image of any size to the input of a model.

  `repjax.data.transforms.resize_and_crop` makes a square of uint8 pixels, and `normalize` makes the
  input.

  Attributes:
    image_size: side in pixels of the square that the model sees.
    resize_size: length in pixels of the shorter side before the central square is cut out, at least
      `image_size`.
    interpolation: "nearest", "bilinear" or "bicubic".
    mean: mean of each channel, for values in 0 ... 1; it is subtracted.
    std: standard deviation of each channel; the difference is divided by it.

  Raises:
    InputError: a value of a wrong type or out of range.
  """

  image_size: int = 224
  resize_size: int = 256
  interpolation: str = "bilinear"
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)

  def __post_init__(self):
    schema.check(vars(self), contents.PREPROCESSING, "preprocessing")
    if self.resize_size < self.image_size:
      raise InputError(
        f"preprocessing.resize_size is {self.resize_size}, below preprocessing.image_size, which "
        f"is {self.image_size}. The square is cut out of the resized image, so it cannot be "
        "larger. Make resize_size at least as large"
      )

  def normalize(self, images: jax.Array, dtype: jax.typing.DTypeLike = jnp.float32) -> jax.Array:
    """Maps uint8 images (..., 3) to (x / 255 - mean) / std in `dtype`."""
    scale = 1 / (255 * jnp.asarray(self.std, jnp.float32))
    shift = -jnp.asarray(self.mean, jnp.float32) / jnp.asarray(self.std, jnp.float32)
    over_pixels = (1,) * (images.ndim - 1) + (3,)
    images = images.astype(jnp.float32) * scale.reshape(over_pixels) + shift.reshape(over_pixels)
    return images.astype(dtype)


def check_preprocessing(given: Any) -> None:
  """Checks that an argument called preprocessing says how images become inputs.

  Raises:
    InputError: it is no Preprocessing.
  """
  if not isinstance(given, Preprocessing):
    is_spec = isinstance(given, ModelSpec)
    raise InputError(
      "preprocessing must be a repjax.spec.Preprocessing, which says how images become inputs, got "
      f"{'a ModelSpec' if is_spec else schema.shown(given)}. Pass "
      + (
        "spec.preprocessing"
        if is_spec
        else "Preprocessing(image_size=224, resize_size=256), with the mean and std of the images"
      )
    )


_PLAIN_FIELDS = ("name", "num_classes", "class_names", "class_colors")


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """The description from which a model is built again and fed: `model.json` in a folder.

  Attributes:
    name: name of the model, as in `create_model`.
    num_classes: number of classes.
    overrides: attributes that replace those of the variant, as in `create_model`.
    preprocessing: steps from images to inputs.
    class_names: names of the classes in the order of the logits; empty if unknown.
    class_colors: the colour (red, green, blue) of each class in pictures of masks, in 0 ... 255;
      empty for classification, or if unknown.

  Raises:
    InputError: an unknown model or override, or a value of a wrong type or out of range.
  """

  name: str
  num_classes: int = 1000
  overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  preprocessing: Preprocessing = Preprocessing()
  class_names: tuple[str, ...] = ()
  class_colors: tuple[tuple[int, int, int], ...] = ()

  def __post_init__(self):
    # Overrides come last, since their rules follow from the model.
    plain = {name: value for name, value in vars(self).items() if name in _PLAIN_FIELDS}
    schema.check(plain, contents.MODEL)
    check_model(self.name, self.overrides, "overrides.")
    for field, noun in (("class_names", "name"), ("class_colors", "colour")):
      given = len(getattr(self, field))
      if given not in (0, self.num_classes):
        raise InputError(
          f"{field} has {given:,} {noun}s, and num_classes is {self.num_classes:,}. Give a {noun} "
          "for each class, or none"
        )

  @classmethod
  def usual(
    cls, name: str, num_classes: int = 1000, overrides: Mapping[str, Any] | None = None
  ) -> "ModelSpec":
    """Returns the spec of a model at the image size for which the model is made.

    Images are resized to 8/7 of the size before the central square is cut out.
    """
    overrides = dict(overrides or {})
    size = image_size_of(create_model(name, num_classes=num_classes, **overrides))
    return cls(name, num_classes, overrides, Preprocessing(size, round(size * 8 / 7)))

  @property
  def task(self) -> str:
    """What the model is for, "classification" or "segmentation"; its class says so."""
    return check_model(self.name, self.overrides)[0].task

  def create_model(self, *, deploy: bool = False, **more: Any) -> nn.Module:
    """Builds the model in either form.

    Args:
      deploy: build the deploy form.
      **more: `dtype`, `param_dtype` or more overrides.
    """
    arguments = {**self.overrides, **more}
    return create_model(self.name, num_classes=self.num_classes, deploy=deploy, **arguments)

  def variable_shapes(self, *, deploy: bool = False) -> dict[str, Any]:
    """Returns the tree of shapes and dtypes of the model's variables in float32."""
    shapes = shapes_of(self.create_model(deploy=deploy), self.preprocessing.image_size)
    # `shapes_of` keeps its result, so callers get a copy that they may change.
    return jax.tree.map(lambda leaf: leaf, shapes)

  def to_json(self) -> dict[str, Any]:
    """Returns the spec as plain dictionaries, lists, strings and numbers."""
    value = dataclasses.asdict(self)
    if not self.class_colors:
      del value["class_colors"]  # which earlier versions do not know
    return value

  @classmethod
  def from_json(cls, value: Mapping[str, Any]) -> "ModelSpec":
    """Builds a spec from the value that `to_json` returns.

    Raises:
      InputError: a field is missing or unknown, or has a wrong value.
    """
    schema.check(value, contents.MODEL, "")
    preprocessing = dict(value.get("preprocessing", {}))
    for name in ("mean", "std"):
      if name in preprocessing:
        preprocessing[name] = tuple(preprocessing[name])
    return cls(
      **{
        **value,
        "preprocessing": Preprocessing(**preprocessing),
        "class_names": tuple(value.get("class_names", ())),
        "class_colors": tuple(map(tuple, value.get("class_colors", ()))),
      }
    )

  def write(self, folder: Path) -> None:
    """Writes model.json into a folder."""
    runs.write_spec(folder, self.to_json())

  @classmethod
  def read(cls, folder: Path, *, verify: bool = True) -> "ModelSpec":
    """Reads model.json from a folder.

    Args:
      folder: any folder that holds a model.
      verify: compare the file with its checksum, if there is one.

    Raises:
      InputError: the file does not exist, is damaged, or describes no model.
    """
    return cls._of(folder, runs.read_spec(folder, verify=verify))

  @classmethod
  def read_from(cls, snapshot: disk.Snapshot) -> "ModelSpec":
    """Reads model.json from one deploy folder or exported folder, as `read` does."""
    return cls._of(snapshot.folder, runs.read_spec_of(snapshot))

  @classmethod
  def _of(cls, folder: Path, value: Mapping[str, Any]) -> "ModelSpec":
    """Builds a spec from the content of model.json, which an error names."""
    try:
      return cls.from_json(value)
    except InputError as error:
      raise InputError(f"{runs.model_file(folder)}: {error}") from error


_EVALUATION = {
  **dict.fromkeys(("train", "training", "is_training"), False),
  **dict.fromkeys(("deterministic", "use_running_average"), True),
}
"""Arguments by which modules are told that they evaluate, with their values."""


def evaluation_options(module: nn.Module) -> dict[str, Any]:
  """Returns the arguments that put the call of a Linen module into evaluation, by name."""
  taken = inspect.signature(type(module).__call__).parameters
  return {name: value for name, value in _EVALUATION.items() if name in taken}


@functools.lru_cache(maxsize=128)
def shapes_of(model: nn.Module, image_size: int | tuple[int, int]) -> dict[str, Any]:
  """Returns the tree of shapes of a model's variables, which callers must not change.

  The model is traced once, which takes a second for a large one. The result is kept.
  """
  need_devices()
  height, width = image_size if isinstance(image_size, tuple) else (image_size, image_size)
  images = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  return jax.eval_shape(
    functools.partial(model.init, **evaluation_options(model)), jax.random.key(0), images
  )


def load(
  workdir: str | os.PathLike[str], *, deploy: bool = True, verify: bool = True
) -> tuple[nn.Module, dict[str, Any], ModelSpec]:
  """Loads a model from a folder; arguments, results and errors are those of `repjax.load`.

  Commands and rooms that know folders alone call this function.
  """
  schema.check(deploy, schema.boolean, "deploy")
  schema.check(verify, schema.boolean, "verify")
  need_devices()
  folder = names.folder(workdir)
  if deploy and runs.find_deploy(folder) is not None:
    return runs.read_deploy(folder, _read_deploy, verify=verify)
  spec = ModelSpec.read(folder, verify=verify)
  if runs.onnx_file(folder).exists():
    raise InputError(
      f"{folder} holds a network as an ONNX file alone. Load the folder of the run or import from "
      "which the file was made"
    )
  variables = runs.read_best(folder, spec.variable_shapes(), verify=verify)[1]
  if deploy:
    variables = {"params": jax.jit(reparameterize)(variables["params"], variables["batch_stats"])}
  return spec.create_model(deploy=deploy), variables, spec


def _read_deploy(snapshot: disk.Snapshot) -> tuple[nn.Module, dict[str, Any], ModelSpec]:
  """Reads spec and parameters from one deploy folder or exported folder."""
  spec = ModelSpec.read_from(snapshot)
  params = runs.read_params(snapshot, spec.variable_shapes(deploy=True)["params"])
  return spec.create_model(deploy=True), {"params": params}, spec
