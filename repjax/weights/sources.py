"""The tables of all families whose weights can be read, and the tensors that state dicts hold."""

import functools
import json
from collections.abc import Mapping
from typing import Any

from repjax.errors import InputError, unknown
from repjax.recognition import layer_name
from repjax.spec import ModelSpec, Preprocessing
from repjax.weights import (
  fastvit,
  mobileone,
  parnet,
  repmlp,
  repmlpnet,
  repvgg,
  repvit,
  resnet,
  vgg,
)
from repjax.weights.naming import Entry, Naming, entries, marks_in

NAMINGS: dict[str, dict[str, Naming]] = {
  **repvgg.NAMINGS,
  **resnet.NAMINGS,
  **vgg.NAMINGS,
  **repmlp.NAMINGS,
  **repmlpnet.NAMINGS,
  **parnet.NAMINGS,
  **mobileone.NAMINGS,
  **repvit.NAMINGS,
  **fastvit.NAMINGS,
}
"""Model to source to table of names. A new family adds its table here."""

FOLDED: dict[str, tuple[str, ...]] = {
  **repmlpnet.FOLDED,
  **parnet.FOLDED,
  **fastvit.FOLDED,
}
"""Model to the layers that its deploy files hold in deploy form.

All other layers are in these files as they were trained, and are folded on import. Models that are
not in this table have deploy files without statistics.
"""

PREPROCESSING: dict[tuple[str, str], Preprocessing] = {
  **repvgg.PREPROCESSING,
  **mobileone.PREPROCESSING,
  **repvit.PREPROCESSING,
  **fastvit.PREPROCESSING,
}
"""(model, source) to the preprocessing with which its published accuracy was measured.

Models that are not in this table use the defaults of `ModelSpec.usual`.
"""

RELEASED_WITH: dict[tuple[str, str], dict[str, tuple[Any, str]]] = {**parnet.RELEASED_WITH}
"""(model, source) to attributes of released weights that differ from the variant's and do not show.

No name or shape of a tensor tells the value of such an attribute. The table has the value that the
released weights need, and the reason. `from_torch` requires the caller to pass the attribute;
`import_weights` takes the value for released weights.
"""

KINDS = ("train", "deploy")


def naming_of(model_name: str, naming: str) -> Naming:
  """Returns the table of a model's names in a source.

  Raises:
    InputError: the model has no names, or no names in this source.
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
  """Returns the tensors that a state dict of a model, naming and kind holds, by name."""
  return _expected_cached(model_name, naming, kind, num_classes, json.dumps(dict(overrides)))


def expected_marks(
  model_name: str, kind: str, num_classes: int, overrides: Mapping[str, Any]
) -> dict[tuple[str, ...], tuple[int, ...]]:
  """Returns path and shape of the notes in a model's variables for which files hold no tensor."""
  return marks_in(_shapes(model_name, kind, num_classes, dict(overrides)))


@functools.lru_cache(maxsize=256)
def _expected_cached(
  model_name: str, naming: str, kind: str, num_classes: int, overrides: str
) -> dict[str, Entry]:
  shapes = _shapes(model_name, kind, num_classes, json.loads(overrides))
  return entries(naming_of(model_name, naming), shapes)


def _shapes(
  model_name: str, kind: str, num_classes: int, overrides: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns shapes of the variables of which a file of a kind holds the tensors."""
  spec = ModelSpec.usual(model_name, num_classes, overrides)
  shapes = spec.variable_shapes(deploy=kind == "deploy")
  if kind == "deploy" and model_name in FOLDED:
    layers = dict.fromkeys(FOLDED[model_name])
    return _partly_folded(spec.variable_shapes(), shapes["params"], layers)
  return shapes


def _partly_folded(
  trained: Mapping[str, Any], plain: Mapping[str, Any], layers: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns training-form variables in which the named layers are in deploy form.

  Args:
    trained: {"params", "batch_stats"} of the training form.
    plain: parameters of the deploy form.
    layers: names of the layers to take from the deploy form.
  """

  def walk(params: Any, stats: Any, plain: Any) -> tuple[Any, Any]:
    # Statistics beside the parameters of a scope stay, and those of a folded scope are dropped.
    kept = {}
    kept_stats = {name: value for name, value in stats.items() if name not in params}
    for name, value in params.items():
      if layer_name(name, layers):
        kept[name] = plain[name]
      elif isinstance(value, Mapping):
        kept[name], below = walk(value, stats.get(name, {}), plain.get(name, {}))
        kept_stats |= {name: below} if below else {}
      else:
        kept[name] = value
    return kept, kept_stats

  params, stats = walk(trained["params"], trained["batch_stats"], plain)
  return {"params": params, "batch_stats": stats}
