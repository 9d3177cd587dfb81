"""Checks attributes of a network that people give, by the annotations of the network's class."""

import dataclasses
import functools
import numbers
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen as nn

from repjax import schema
from repjax.errors import InputError, unknown
from repjax.layers.attributes import rule_of
from repjax.schema import LONGEST, Rule

MOST = 1_000_000
"""Largest number in an attribute, such as a number of channels or classes."""
MOST_BLOCKS = 1_000
"""Largest number of blocks in a network. Thousands take minutes to trace."""
ARGUMENTS = ("num_classes", "deploy", "dtype", "param_dtype")
"""Attributes of a network that are arguments of `create_model` itself, and no overrides."""
_NO_OVERRIDES = {*ARGUMENTS, "parent", "name"}  # Linen adds the last two to every module.


def check_overrides(
  name: str, network: type[nn.Module], overrides: Mapping[str, Any], prefix: str = ""
) -> None:
  """Raises InputError for an override that a network does not have, or of a wrong type.

  The network itself checks which values fit together.

  Args:
    name: name of the model, for the message.
    network: class of the model.
    overrides: attributes by name.
    prefix: words before the name of an attribute in the message; empty for arguments of
      `create_model`.
  """
  rules = rules_of(network)
  for override, value in overrides.items():
    if override == "pretrained":
      raise InputError(
        f"{name} is made without weights, and takes no {prefix}pretrained. Load a model and its "
        'weights by repjax.load("hf:OWNER/NAME"). repjax.list_pretrained() has the names'
      )
    if override not in rules:
      # Without a prefix, `create_model` got the overrides beside its own arguments.
      raise unknown(f"override of {name}", override, [*rules, *(() if prefix else ARGUMENTS)])
    # A rule looks at every item, of which a file may hold millions.
    _check_length(value, f"{prefix}{override}")
    schema.check(value, rules[override], f"{prefix}{override}")
    _check_numbers(value, f"{prefix}{override}")
  blocks = sum(
    sum(value) if isinstance(value, list | tuple) else value
    for value in (overrides.get(field, 0) for field in ("stage_sizes", "stem_blocks"))
  )
  if blocks > MOST_BLOCKS:
    raise InputError(
      f"{prefix}stage_sizes ask for {blocks:,} blocks, and a network has at most {MOST_BLOCKS:,}. "
      "Take fewer blocks"
    )


def _check_length(value: Any, path: str) -> None:
  """Raises InputError for a list, table or name that is longer than that of any network."""
  if isinstance(value, list | tuple | str | Mapping) and len(value) > LONGEST:
    raise InputError(f"{path} has a length of {len(value):,}, and at most {LONGEST} is allowed")


def _check_numbers(value: Any, path: str) -> None:
  """Raises InputError for numbers with which no computer could build a network."""
  for item in _numbers(value):
    if item > MOST:
      raise InputError(f"{path} must be at most {MOST:,}, got {schema.shown(value)}")


def _numbers(value: Any) -> Iterator[Any]:
  """Yields the numbers in lists and tables."""
  if isinstance(value, numbers.Real):
    yield value
  elif isinstance(value, list | tuple | Mapping):
    for item in value.values() if isinstance(value, Mapping) else value:
      yield from _numbers(item)


@functools.cache
def rules_of(network: type[nn.Module]) -> dict[str, Rule]:
  """Returns the rule of each attribute that `create_model` can override."""
  annotations = typing.get_type_hints(network)
  names = {field.name for field in dataclasses.fields(network)} - _NO_OVERRIDES
  return {name: rule_of(annotations[name]) for name in sorted(names)}
