"""Models by name."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from repjax.errors import InputError, printable
from repjax.models import registry, segmentation
from repjax.models.base import Network
from repjax.models.initialize import init
from repjax.models.registry import CLASSIFIERS, hashable

__all__ = ["check_model", "create_model", "image_size_of", "init", "list_models"]

_MODELS: dict[str, tuple[type[Network], Mapping[str, Any]]] = {
  **CLASSIFIERS,
  **segmentation.VARIANTS,
}


def list_models() -> list[str]:
  """Returns the names that `create_model` takes, sorted."""
  return sorted(_MODELS)


def image_size_of(model: nn.Module) -> int:
  """Returns the side in pixels of the images that a model is made for.

  That is the attribute `image_size` of the model. Models without the attribute are made for 224.
  """
  return getattr(model, "image_size", 224)


def create_model(
  name: str = "",
  /,
  *,
  num_classes: int = 1000,
  deploy: bool = False,
  dtype: jax.typing.DTypeLike = jnp.float32,
  param_dtype: jax.typing.DTypeLike = jnp.float32,
  **overrides: Any,
) -> nn.Module:
  """Builds a model in its training form, or in the plain form that `reparameterize` makes.

  Args:
    name: one of `list_models()`; it may be passed as a keyword too.
    num_classes: number of classes.
    deploy: build the plain form, whose parameters `reparameterize` returns.
    dtype: dtype of the computation and of the logits.
    param_dtype: dtype of the parameters.
    **overrides: attributes of the model's class that replace those of the variant. With
      `features_only=True` every model returns the maps of its stages by name, which its class
      describes. The variables are then those of a classifier without its head. The variables of a
      whole classifier serve as well, in both forms, because nothing reads the head.

  Returns:
    A module called as `module(images, train=False)` on images (N, H, W, 3), in both forms.

  Raises:
    InputError: the name or an override is unknown (the text lists close matches), or the model does
      not take a value.
  """
  if not name:
    name = overrides.pop("name", "")
  elif "name" in overrides:
    raise InputError(
      f"create_model got two names of a model, {name!r} and {printable(repr(overrides['name']))}. "
      "Pass one. A module that is part of another gets its own name by model.clone(name=...)"
    )
  model_class, row = check_model(name, overrides)
  attributes = {**row, **{key: hashable(value) for key, value in overrides.items()}}
  return model_class(
    num_classes=num_classes, deploy=deploy, dtype=dtype, param_dtype=param_dtype, **attributes
  )


def check_model(
  name: str, overrides: Mapping[str, Any], prefix: str = ""
) -> tuple[type[Network], Mapping[str, Any]]:
  """Returns the class of a model and the attributes of the variant, without building the model.

  Args:
    name: one of `list_models()`.
    overrides: attributes by name, as in `create_model`.
    prefix: words before the name of an attribute in the message.

  Raises:
    InputError: the name or an override is unknown, or an override has a wrong type; also an
      override of the backbone of a segmenter.
  """
  found, row = registry.checked(_MODELS, "model", name, overrides, prefix)
  if issubclass(found, segmentation.Segmenter):
    segmentation.check_backbone({**row, **overrides}, prefix)
  return found, row
