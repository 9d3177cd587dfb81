"""Checks attributes of modules that people give, by the annotations of the module's class."""

import collections.abc
import dataclasses
import types
import typing
from typing import Any

import jax.numpy as jnp

from repjax import schema
from repjax.errors import InputError
from repjax.schema import Rule


def check_attributes(module: Any, but: collections.abc.Container[str] = ()) -> None:
  """Raises InputError for an attribute of a module whose value is not as the class annotates it.

  Args:
    module: module of Linen. Annotations that are texts are not read.
    but: names of attributes that are not checked.
  """
  for field in dataclasses.fields(module):
    if field.name not in but and not isinstance(field.type, str):
      where = f"{field.name} of a {type(module).__name__}"
      schema.check(getattr(module, field.name, None), rule_of(field.type), where)


def check_dtypes(**dtypes: Any) -> None:
  """Raises InputError if a dtype that a module computes or stores in is not floating-point."""
  for name, dtype in dtypes.items():
    try:
      floating = jnp.issubdtype(jnp.dtype(dtype), jnp.floating)
    except TypeError:
      floating = False
    if not floating:
      raise InputError(f"{name} takes a floating-point type such as jnp.bfloat16, got {dtype!r}")


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
