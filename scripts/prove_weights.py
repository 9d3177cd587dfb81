"""Imports and exports every published key list, filled by the golden rule in float64.

For each model, source and form, `from_torch` must recognize the state dict and reorder every
tensor rightly, and `to_torch` must give the state dict back bit by bit. Norms in deploy files of
RepMLPNet, ParNet and FastViT are folded by the import and must get the shapes of the deploy form.
Each golden RepVGG, MobileOne, RepViT and FastViT must compute the outputs of the authors or of
timm, in both forms. This takes many minutes and a few GB; the test suite does the same with cheaper
numbers.

Example:
  python scripts/prove_weights.py --models repvgg_a0 repvgg_b1g4
"""

import argparse
import collections
import functools
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # the tests are no part of the installed package

import repjax
from repjax import weights
from repjax.recognition import is_mark
from repjax.weights import sources
from tests import helpers
from tests.models import repmlp_cases
from tests.weights import cases, test_resnet_and_vgg

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)


RESNETS = {
  "resnet18": ("basic", (2, 2, 2, 2)),
  "resnet34": ("basic", (3, 4, 6, 3)),
  "resnet50": ("bottleneck", (3, 4, 6, 3)),
  "resnet101": ("bottleneck", (3, 4, 23, 3)),
  "resnet152": ("bottleneck", (3, 8, 36, 3)),
}
Lists = dict[str, dict[str, dict[str, dict[str, list[int]]]]]


@functools.cache
def key_lists() -> Lists:
  """Returns all published lists: model to source to kind to name to shape."""
  found: Lists = collections.defaultdict(dict)
  for source, lists in helpers.key_lists().items():
    for model, kinds in lists.items():
      found[model][source] = kinds
  for model, kinds in helpers.mobile_keys().items():
    found[model]["timm"] = kinds
    # No list of the authors' names is stored: those of the tables must come back as they were.
    found[model]["official"] = {kind: expected_shapes(model, "official", kind) for kind in kinds}
  for lists in (repmlp_cases.key_lists(), helpers.repmlpnet_keys(), cases.parnet_keys()):
    for model, kinds in lists.items():
      found[model]["official"] = kinds
  # Half as many groups are twice as many inputs.
  found["repmlp_resnet50_bottleneck_g4"]["official"] = {
    kind: {
      name: [shape[0], 2 * shape[1], *shape[2:]]
      if re.search(r"_repmlp\.(fc3|repconv\d+\.conv)\.weight", name)
      else shape
      for name, shape in shapes.items()
    }
    for kind, shapes in found["repmlp_resnet50_bottleneck_g8"]["official"].items()
  }
  # A file in the paper's width has other numbers of channels in one stream alone.
  found["parnet_s_96"]["official"] = {
    kind: {name: [96 if n == 92 else n for n in shape] for name, shape in shapes.items()}
    for kind, shapes in found["parnet_s"]["official"].items()
  }
  for model, layers in RESNETS.items():
    own = {kind: test_resnet_and_vgg.torchvision_resnet(*layers, kind) for kind in cases.KINDS}
    found[model] = {"official": own, "timm": own}
  found["resnet50"]["repmlp"] = test_resnet_and_vgg.beside_repmlp()
  for kind in cases.KINDS:
    own = test_resnet_and_vgg.torchvision_vgg((64, 128, 256, 512, 512), 4096, 1000, kind)
    views = {name: np.broadcast_to(np.float32(), shape) for name, shape in own.items()}
    timm = test_resnet_and_vgg.to_timm_vgg(views)
    found["vgg16"].setdefault("official", {})[kind] = own
    found["vgg16"].setdefault("timm", {})[kind] = {name: list(x.shape) for name, x in timm.items()}
  assert found.keys() == sources.NAMINGS.keys()
  return dict(found)


def expected_shapes(model: str, source: str, kind: str) -> dict[str, list[int]]:
  """Returns names and shapes by the table of a source."""
  wanted = sources.expected(model, source, kind, 1000, {})
  return {name: list(entry.shape) for name, entry in wanted.items()}


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  everything = sorted(key_lists())
  parser.add_argument("--models", nargs="+", choices=everything, default=everything)
  models = parser.parse_args().models
  failed = 0
  for name, check, arguments in proofs(models):
    start = time.perf_counter()
    try:
      result = check(*arguments)
    except Exception as error:  # the next case may say more
      failed += 1
      result = f"FAILED: {type(error).__name__}: {error}"
    print(f"{name:<46}{result}, {time.perf_counter() - start:.1f} s", flush=True)
  print("all as they should be" if not failed else f"{failed} failed")
  sys.exit(failed > 0)


def proofs(models: list[str]) -> Iterator[tuple]:
  """Yields name, function and arguments of each case."""
  for model in models:
    for source, kinds in key_lists()[model].items():
      for kind in kinds:
        yield f"{model} {source} {kind}", check_checkpoint, (model, source, kind)
  for name, case in helpers.goldens().items():
    if name.startswith("repvgg_block"):
      continue
    if cases.golden_network(case)[0] in models:
      yield f"golden outputs of {name}", check_golden, (case,)
  for case in helpers.mobile_goldens()["cases"]:
    if case["model"] in models:
      yield f"golden outputs of {case['model']}", check_mobile, (case,)


def check_checkpoint(model: str, source: str, kind: str) -> str:
  """Imports and exports one key list."""
  lists = key_lists()[model][source]
  state = helpers.fill_state_dict(lists[kind])
  found = weights.recognize(state, model)
  assert found == (model, found.naming, kind, 1000)
  assert sources.NAMINGS[model][found.naming] == sources.NAMINGS[model][source]
  released = sources.RELEASED_WITH.get((model, found.naming), {})
  overrides = {name: value for name, (value, _) in released.items()}
  variables = weights.from_torch(model, state, param_dtype=np.float64, **overrides)
  spec = repjax.ModelSpec.usual(model)
  shapes = spec.variable_shapes(deploy=kind == "deploy")
  assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, shapes)
  if kind == "train" or model not in sources.FOLDED:
    cases.assert_same_bits(weights.to_torch(model, variables, source), state)
    check_values(variables, state)
  if kind == "train":
    params = jax.eval_shape(repjax.reparameterize, variables["params"], variables["batch_stats"])
    if model in sources.FOLDED:
      plain = spec.variable_shapes(deploy=True)["params"]
      assert jax.tree.map(np.shape, params) == jax.tree.map(np.shape, plain)
    else:
      blank = jax.tree.map(lambda leaf: np.broadcast_to(np.float64(), leaf.shape), params)
      names = weights.to_torch(model, {"params": blank}, source)
      assert {name: list(value.shape) for name, value in names.items()} == lists["deploy"]
  return f"{len(state)} tensors, {sum(value.size for value in state.values()):,} numbers"


def check_values(variables: dict, state: dict[str, np.ndarray]) -> None:
  """Checks that every leaf is a tensor of the state dict, with its axes reordered."""
  left = collections.defaultdict(list)  # names of one seed have the same numbers
  for value in state.values():
    left[facts(value)].append(value)
  for path, leaf in helpers.leaves(variables).items():
    if is_mark(path.rpartition("/")[2]):
      continue
    array = next(array for array in turned(path, np.asarray(leaf)) if left.get(facts(array)))
    assert np.array_equal(array, left[facts(array)].pop()), path
  assert not any(left.values())


def turned(path: str, leaf: np.ndarray) -> Iterator[np.ndarray]:
  """Yields the tensors that a leaf may be in a state dict."""
  if leaf.ndim == 7:  # (g, h, w, C/g, h, w, O/g): tiles lie channel by channel there
    _, height, width, inputs, *_ = leaf.shape
    rows = np.einsum("ghwcvuo->govuchw", leaf)
    yield rows.reshape(-1, inputs * height * width, 1, 1)
  elif leaf.ndim == 4 and not path.endswith("kernel"):
    yield np.einsum("ghwo->gohw", leaf).ravel()
  elif path.endswith("gamma"):  # factors lie beside maps with channels first there
    yield leaf[:, None, None]
  else:
    array = helpers.oihw(leaf)
    yield array
    if array.ndim == 2:  # gates are 1x1 convolutions in a state dict
      yield array[:, :, None, None]
    yield array.reshape(len(array), -1)  # VGG's first fully connected layer reads a flat map


def facts(array: np.ndarray) -> tuple:
  """Returns facts that differ between any two filled tensors."""
  return array.shape, tuple(array.flat[:4]), float(array.flat[-1])


def check_golden(case: dict) -> str:
  """Checks a golden network's outputs from a state dict, in both forms."""
  cases.check_golden(case)
  return "as the authors'"


def check_mobile(case: dict) -> str:
  """Checks timm's logits of a network of full size, in both forms."""
  name, x = case["model"], helpers.golden_input(tuple(case["input"]["shape_nchw"]))
  state = helpers.fill_state_dict(helpers.mobile_keys()[name]["train"])
  variables = weights.from_torch(name, state, param_dtype=np.float64)
  params = jax.jit(repjax.reparameterize)(*helpers.halves(variables))
  for held, deploy in ((variables, False), ({"params": params}, True)):
    model = repjax.create_model(name, deploy=deploy, **helpers.F64)
    helpers.assert_golden(jax.jit(model.apply)(held, x), case["expect"]["logits"])
  return "as timm's"


if __name__ == "__main__":
  main()
