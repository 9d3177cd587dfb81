"""State dicts that the tests of weights share."""

import functools
import gzip
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import repjax
from repjax import weights
from tests import helpers

KINDS = ("train", "deploy")
TINY = {"stage_sizes": [1, 1, 2, 1], "width_multipliers": [0.125] * 4}
TINY_PLUS = TINY | {"width_multipliers": [0.25] * 4}

_FROM_OFFICIAL = {
  "official": (),
  "timm": (
    (r"^stage0\.", "stem."),
    (r"^stage(\d)\.", lambda match: f"stages.{int(match[1]) - 1}."),
    ("rbr_dense", "conv_kxk"),
    ("rbr_1x1", "conv_1x1"),
    ("rbr_identity", "identity"),
    ("rbr_reparam", "reparam_conv"),
    (r"\bse\.down", "attn.fc1"),
    (r"\bse\.up", "attn.fc2"),
    ("^linear", "head.fc"),
  ),
  "mmpretrain": (
    (r"\bbn\b", "norm"),
    (r"^stage0\.", "backbone.stem."),
    (r"^stage(\d)\.", r"backbone.stage_\1."),
    ("rbr_dense", "branch_3x3"),
    ("rbr_1x1", "branch_1x1"),
    ("rbr_identity", "branch_norm"),
    ("rbr_reparam", "branch_reparam"),
    (r"\bse\.down", "se_layer.conv1.conv"),
    (r"\bse\.up", "se_layer.conv2.conv"),
    ("^linear", "head.fc"),
  ),
}


def renamed(state: Mapping[str, Any], source: str) -> dict[str, Any]:
  """Renames a state dict from RepVGG's official names to the names of a different source."""
  result = {}
  for name, value in state.items():
    for pattern, replacement in _FROM_OFFICIAL[source]:
      name = re.sub(pattern, replacement, name)
    result[name] = value
  return result


@functools.cache
def parnet_keys() -> dict[str, dict[str, dict[str, list[int]]]]:
  """Returns the shapes in the authors' files of ParNet: model to kind to name to shape."""
  with gzip.open(helpers.GOLDENS / "parnet_keys.json.gz", "rt") as file:
    return json.load(file)


def numbered(shapes: Mapping[str, Sequence[int]]) -> dict[str, np.ndarray]:
  """Tensors that count their elements, each from a number of its own; all views of one array."""
  sizes = {name: int(np.prod(shape)) for name, shape in shapes.items()}
  numbers = np.arange(max(sizes.values()) + len(sizes), dtype=np.float32)
  return {
    name: numbers[start : start + sizes[name]].reshape(shape)
    for start, (name, shape) in enumerate(shapes.items())
  }


def random_variables(model: str, kind: str = "train", num_classes: int = 10, **overrides: Any):
  """Returns random variables of a model in either form, in float32."""
  spec = repjax.ModelSpec.usual(model, num_classes, overrides)
  return helpers.randomise(spec.variable_shapes(deploy=kind == "deploy"))


def random_state(
  model: str,
  kind: str = "train",
  source: str = "official",
  num_classes: int = 10,
  counters: bool = True,
  **overrides: Any,
) -> dict[str, np.ndarray]:
  """Returns a random state dict of a model, with the counters that PyTorch's batch norms have."""
  variables = random_variables(model, kind, num_classes, **overrides)
  state = weights.to_torch(model, variables, source)
  norms = [name.removesuffix("running_var") for name in state if name.endswith("running_var")]
  counts = {f"{norm}num_batches_tracked": np.asarray(7) for norm in norms}
  return state | counts if counters else state


def golden_network(case: Mapping[str, Any]) -> tuple[str, int, dict[str, Any]]:
  """Returns name, number of classes and overrides of the network of a golden case."""
  spec = case["spec"]
  if spec.get("model"):
    return spec["model"], spec["num_classes"], {}
  overrides = {"stage_sizes": spec["num_blocks"], "width_multipliers": spec["width_multiplier"]}
  if "aux_heads" in spec:
    return "repvggplus_l2pse", spec["num_classes"], overrides
  gates = {"se": "pre", "se_reduction": spec["se"]["reduction"], "groups": spec["groups"]}
  return "repvgg_a0", spec["num_classes"], overrides | gates


def check_golden(case: Mapping[str, Any]) -> None:
  """Fails where a golden network, read from a filled state dict, is not what the authors' is.

  Checks logits, auxiliary logits and fused kernels in float64, and that both forms come out of
  `to_torch` as they went into `from_torch`. Needs JAX's 64 bits.
  """
  name, num_classes, overrides = golden_network(case)
  arguments = {"num_classes": num_classes, "param_dtype": np.float64, **overrides}
  spec, expect = repjax.ModelSpec(name, num_classes, overrides), case["expect"]
  names = weights.to_torch(name, jax.tree.map(jnp.zeros_like, spec.variable_shapes()))
  state = helpers.fill_state_dict({name: value.shape for name, value in names.items()})
  if not overrides:
    shapes = {name: list(value.shape) for name, value in state.items()}
    assert shapes == helpers.keys("official", name)["train"]
  variables = weights.from_torch(name, state, **arguments)
  assert_same_bits(weights.to_torch(name, variables), state)

  x = helpers.golden_input(tuple(case["input"]["shape_nchw"]))
  model, plain = (spec.create_model(deploy=deploy, **helpers.F64) for deploy in (False, True))
  outputs = helpers.quick_jit(lambda v: model.apply(v, x, capture_intermediates=True))
  logits, captured = outputs(variables)
  expected = expect.get("logits") or expect["main"]
  helpers.assert_golden(logits, expected)
  for head in case["spec"].get("aux_heads", ()):
    scope = captured["intermediates"][f"AuxHead_{head.removesuffix('_aux')}"]
    helpers.assert_golden(scope["__call__"][0], expect[head])

  reparameterize = helpers.quick_jit(repjax.reparameterize)
  params = reparameterize(variables["params"], variables["batch_stats"])
  deployed = weights.to_torch(name, {"params": params})
  for fused, record in expect.get("fused", {}).items():
    helpers.assert_golden(deployed[fused], record)
  again = weights.from_torch(name, deployed, **arguments)
  assert again.keys() == {"params"}
  assert_same_bits(weights.to_torch(name, again), deployed)
  helpers.assert_golden(helpers.quick_jit(lambda v: plain.apply(v, x))(again), expected)


def assert_same_bits(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> None:
  """Fails where two dictionaries of arrays differ in a name, a shape, a dtype or a bit."""
  assert ours.keys() == theirs.keys()
  for name in theirs:
    a, b = np.asarray(ours[name]), np.asarray(theirs[name])
    assert (a.shape, a.dtype) == (b.shape, b.dtype), name
    assert np.array_equal(a, b), name
