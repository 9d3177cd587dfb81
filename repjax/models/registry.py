"""The table of classifiers by name, and checks of a name and of attributes that people give."""

from collections.abc import Mapping
from typing import Any, TypeVar

from flax.core import FrozenDict

from repjax.errors import unknown
from repjax.models import (
  fastvit,
  mobileone,
  parnet,
  repmlp,
  repmlp_resnet,
  repmlpnet,
  repvgg,
  repvit,
  resnet,
  vgg,
)
from repjax.models.base import Classifier, Network
from repjax.models.overrides import check_overrides

N = TypeVar("N", bound=Network)

_FAMILIES: tuple[tuple[type[Classifier], Mapping[str, Mapping[str, Any]]], ...] = (
  (repvgg.RepVGG, repvgg.VARIANTS),
  (resnet.ResNet, resnet.VARIANTS),
  (vgg.VGG, vgg.VARIANTS),
  (repmlp.RepMLPCifar, repmlp.VARIANTS),
  (repmlp_resnet.RepMLPResNet, repmlp_resnet.VARIANTS),
  (repmlpnet.RepMLPNet, repmlpnet.VARIANTS),
  (parnet.ParNet, parnet.VARIANTS),
  (mobileone.MobileOne, mobileone.VARIANTS),
  (repvit.RepViT, repvit.VARIANTS),
  (fastvit.FastViT, fastvit.VARIANTS),
)
CLASSIFIERS: dict[str, tuple[type[Classifier], Mapping[str, Any]]] = {
  name: (family, row) for family, variants in _FAMILIES for name, row in variants.items()
}
"""Name of a classifier to its class, and to the attributes of the variant."""


def checked(
  table: Mapping[str, tuple[type[N], Mapping[str, Any]]],
  kind: str,
  name: Any,
  overrides: Mapping[str, Any],
  prefix: str = "",
) -> tuple[type[N], Mapping[str, Any]]:
  """Returns the class of a network in a table, and the attributes of the variant.

  Args:
    table: name to class and attributes.
    kind: description of what the name names, for the message.
    name: a name in the table.
    overrides: attributes that replace those of the variant.
    prefix: words before the name of an attribute in the message.

  Raises:
    InputError: the name or an override is unknown, or an override has a wrong type.
  """
  if not isinstance(name, str) or name not in table:
    raise unknown(kind, name, table)
  check_overrides(name, table[name][0], overrides, prefix)
  return table[name]


def hashable(value: Any) -> Any:
  """Returns lists as tuples and dictionaries as FrozenDicts, because modules need a hash."""
  if isinstance(value, Mapping):
    return FrozenDict({key: hashable(item) for key, item in value.items()})
  return tuple(hashable(item) for item in value) if isinstance(value, list | tuple) else value
