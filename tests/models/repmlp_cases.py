"""What the authors' code of RepMLP (2021) gives: outputs, counts, and names in checkpoints."""

import functools
import gzip
import json
from typing import Any

import jax
import jax.numpy as jnp

from repjax.models.repmlp import RepMLP
from repjax.weights.naming import Naming, entries
from tests import helpers


@functools.cache
def _held() -> dict[str, Any]:
  return json.loads((helpers.GOLDENS / "repmlp.json").read_text())


def blocks() -> dict[str, dict[str, Any]]:
  """Golden cases of lone blocks by id."""
  return {case["id"]: case for case in _held()["cases"]}


def counts() -> dict[str, dict[str, int]]:
  """Parameters, statistics, multiply-accumulates and sizes of state dicts of whole networks."""
  return _held()["counts"]


@functools.cache
def key_lists() -> dict[str, dict[str, dict[str, list[int]]]]:
  """Model to kind to name to shape."""
  with gzip.open(helpers.GOLDENS / "keys_repmlp.json.gz", "rt") as file:
    return json.load(file)


def block_of(case: dict[str, Any]) -> tuple[RepMLP, Any]:
  """The block of a golden case in float64, and its input (N, H, W, C)."""
  spec = case["spec"]
  block = RepMLP(
    spec["O"],
    (spec["h"], spec["w"]),
    spec["fc3_groups"],
    spec["fc1_fc2_reduction"],
    tuple(spec["reparam_conv_k"]),
    **helpers.F64,
  )
  return block, helpers.golden_input(tuple(case["input"]["shape_nchw"]))


def fill(variables: Any, naming: Naming) -> Any:
  """Variables by the golden fill rule, through the names that a table gives them."""
  filled = {
    entry.path: entry.layout.from_torch(helpers.fill(name, entry.shape))
    for name, entry in entries(naming, variables).items()
  }
  return jax.tree_util.tree_map_with_path(
    lambda path, leaf: jnp.asarray(filled[tuple(key.key for key in path)], leaf.dtype), variables
  )
