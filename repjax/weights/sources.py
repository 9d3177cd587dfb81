"""Whose weights can be read: the tables of all families, and what a state dict of theirs holds."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from repjax.errors import InputError, unknown
from repjax.reparam import layer_name
from repjax.spec import ModelSpec
from repjax.weights import parnet, repmlp, repmlpnet, repvgg, resnet, vgg
from repjax.weights.naming import Entry, Naming, entries

NAMINGS: dict[str, dict[str, Naming]] = {
  **repvgg.NAMINGS,
  **resnet.NAMINGS,
  **vgg.NAMINGS,
  **repmlp.NAMINGS,
  **repmlpnet.NAMINGS,
  **parnet.NAMINGS,
}
"""Model to source to table; a new family adds its own."""

FOLDED: dict[str, tuple[str, ...]] = {**repmlpnet.FOLDED, **parnet.FOLDED}
"""Model to the layers that its deploy files hold in deploy form; the others are folded on import.

Models that are not here have deploy files without statistics.
"""

RELEASED_WITH: dict[tuple[str, str], dict[str, tuple[Any, str]]] = {**parnet.RELEASED_WITH}
"""(model, source) to attributes in which released weights differ from the variant without showing.

Each is its value there and the reason. `from_torch` insists on being told one, `import_weights`
takes the released weights'.
"""

KINDS = ("train", "deploy")


def naming_of(model_name: str, naming: str) -> Naming:
  """The table of a model's names in a source.

  Raises:
    InputError: there is none.
  """
  if model_name not in NAMINGS:
    raise unknown("model with importable weights", model_name, NAMINGS)
  if naming not in NAMINGS[model_name]:
    raise InputError(
      f"{naming!r} has no names for {model_name}; there are: {', '.join(NAMINGS[model_name])}"
    )
  return NAMINGS[model_name][naming]


def expected(
  model_name: str, naming: str, kind: str, num_classes: int, overrides: Mapping[str, Any]
) -> dict[str, Entry]:
  """What a state dict of that model, naming and kind holds."""
  return _expected_cached(model_name, naming, kind, num_classes, json.dumps(dict(overrides)))


@functools.lru_cache(maxsize=256)
def _expected_cached(
  model_name: str, naming: str, kind: str, num_classes: int, overrides: str
) -> dict[str, Entry]:
  spec = ModelSpec.usual(model_name, num_classes, json.loads(overrides))
  shapes = spec.variable_shapes(deploy=kind == "deploy")
  if kind == "deploy" and model_name in FOLDED:
    layers = dict.fromkeys(FOLDED[model_name])
    shapes = _partly_folded(spec.variable_shapes(), shapes["params"], layers)
  return entries(naming_of(model_name, naming), shapes)


def _partly_folded(
  trained: Mapping[str, Any], plain: Mapping[str, Any], layers: Mapping[str, Any]
) -> dict[str, Any]:
  """Training-form variables where scopes called like `layers` are as in the plain parameters."""

  def walk(params: Any, stats: Any, plain: Any) -> tuple[Any, Any]:
    own, held = {}, {name: value for name, value in stats.items() if name not in params}
    for name, value in params.items():
      if layer_name(name, layers):
        own[name] = plain[name]
      elif isinstance(value, Mapping):
        own[name], below = walk(value, stats.get(name, {}), plain.get(name, {}))
        held |= {name: below} if below else {}
      else:
        own[name] = value
    return own, held

  params, stats = walk(trained["params"], trained["batch_stats"], plain)
  return {"params": params, "batch_stats": stats}
