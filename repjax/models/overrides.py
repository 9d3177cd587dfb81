"""Checks attributes of a network that people give, by the annotations of the network's class."""

import collections.abc
import dataclasses
import functools
import numbers
import types
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from flax import linen as nn

from repjax import schema
from repjax.errors import InputError, unknown
from repjax.schema import Rule

MOST = 1_000_000
"""Largest number in an attribute, such as a number of channels or classes."""
LONGEST = 100
"""Largest number of items in an attribute, such as stages, and of characters in a name."""
MOST_BLOCKS = 1_000
"""Largest number of blocks in a network. Thousands take minutes to trace."""
# Arguments of `create_model` itself, and what Linen adds to every module.
_NO_OVERRIDES = {"num_classes", "deploy", "dtype", "param_dtype", "parent", "name"}


def check_overrides(
  name: str, network: type[nn.Module], overrides: Mapping[str, Any], prefix: str = ""
) -> None:
  """Raises InputError for an override that a network does not have, or of a wrong type.

  The network itself checks which values fit together.

  Args:
    name: name of the model, for the message.
    network: class of the model.
    overrides: attributes by name.
    prefix: words before the name of an attribute in the message.
  """
  rules = rules_of(network)
  for override, value in overrides.items():
    if override not in rules:
      raise unknown(f"override of {name}", override, rules)
    schema.check(value, rules[override], f"{prefix}{override}")
    _check_sizes(value, f"{prefix}{override}")
  blocks = sum(
    sum(value) if isinstance(value, list | tuple) else value
    for value in (overrides.get(field, 0) for field in ("stage_sizes", "stem_blocks"))
  )
  if blocks > MOST_BLOCKS:
    raise InputError(
      f"{prefix}stage_sizes ask for {blocks:,} blocks, and a network has at most {MOST_BLOCKS:,}. "
      "Take fewer blocks"
    )


def _check_sizes(value: Any, path: str) -> None:
  """Raises InputError for numbers and lists with which no computer could build a network."""
  if isinstance(value, list | tuple | str | Mapping) and len(value) > LONGEST:
    raise InputError(f"{path} has a length of {len(value):,}, and at most {LONGEST} is allowed")
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


def rule_of(annotation: Any) -> Rule:
  """Returns the rule of an attribute from its annotation.

  Args:
    annotation: type of numbers, booleans, strings or None; a Sequence, Mapping or union of such
      types. Every other annotation takes anything.
  """
  plain = {
    int: schema.whole(),
    float: schema.number(),
    bool: schema.boolean,
    str: schema.text(),
    types.NoneType: schema.null,
  }
  if annotation in plain:
    return plain[annotation]
  origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
  if origin in (typing.Union, types.UnionType):
    return schema.either(*map(rule_of, arguments))
  if origin is collections.abc.Sequence:
    return schema.items(rule_of(arguments[0]))
  if origin is collections.abc.Mapping:
    return schema.table(rule_of(arguments[1]), _NUMBER if arguments[0] is int else None)
  return Rule("anything", lambda value, path: None)


def _check_number_as_name(value: Any, path: str) -> None:
  """Raises MisfitError unless a name is a whole number, which JSON turns into a string."""
  text = str(value) if type(value) is int else value
  if not (isinstance(text, str) and text.isascii() and text.isdecimal() and len(text) < 8):
    raise schema.MisfitError(path, "must be a whole number", value)


_NUMBER = Rule("number", _check_number_as_name)
