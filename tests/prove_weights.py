"""Every published RepVGG key list through import and export, filled by the golden rule in float64.

For each model, source and kind: `from_torch` must recognize the state dict and turn every tensor
as it should, and `to_torch` must give it back bit by bit. For each golden network the authors'
outputs must come out, in both forms. Takes minutes and a few GB; the test suite does the same with
cheaper numbers.

python -m tests.prove_weights --models repvgg_a0 repvgg_b1g4
"""

import argparse
import collections
import sys
import time
from collections.abc import Iterator

import jax
import numpy as np

import repjax
from repjax import weights
from tests import helpers
from tests.weights import cases

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  everything = sorted(helpers.counts())
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
  """Name, function and arguments of each case."""
  for model in models:
    for source, lists in helpers.key_lists().items():
      for kind in lists.get(model, ()):
        yield f"{model} {source} {kind}", check_checkpoint, (model, source, kind)
  for name, case in helpers.goldens().items():
    if name.startswith("repvgg_block"):
      continue
    if cases.golden_network(case)[0] in models:
      yield f"golden outputs of {name}", check_golden, (case,)


def check_checkpoint(model: str, source: str, kind: str) -> str:
  """One key list, there and back."""
  state = helpers.fill_state_dict(helpers.keys(source, model)[kind])
  assert weights.recognize(state, model) == (model, source, kind, 1000)
  variables = weights.from_torch(model, state, param_dtype=np.float64)
  shapes = repjax.ModelSpec(model).variable_shapes(deploy=kind == "deploy")
  assert jax.tree.map(np.shape, variables) == jax.tree.map(lambda leaf: leaf.shape, shapes)
  cases.assert_same_bits(weights.to_torch(model, variables, source), state)
  check_values(variables, state)
  if kind == "train":
    params = repjax.reparameterize(variables["params"], variables["batch_stats"])
    names = weights.to_torch(model, {"params": params}, source)
    deploy = {name: list(value.shape) for name, value in names.items()}
    assert deploy == helpers.keys(source, model)["deploy"]
  return f"{len(state)} tensors, {sum(value.size for value in state.values()):,} numbers"


def check_values(variables: dict, state: dict[str, np.ndarray]) -> None:
  """Every leaf is some tensor of the state dict, turned as its kind asks for."""
  left = collections.defaultdict(list)  # names of one seed have the same numbers
  for value in state.values():
    left[facts(value)].append(value)
  for path, leaf in helpers.leaves(variables).items():
    array = helpers.oihw(leaf)
    if not left.get(facts(array)):
      array = array[:, :, None, None]  # gates are 1x1 convolutions in a state dict
    assert np.array_equal(array, left[facts(array)].pop()), path
  assert not any(left.values())


def facts(array: np.ndarray) -> tuple:
  """Enough to tell filled tensors apart."""
  return array.shape, tuple(array.flat[:4]), float(array.flat[-1])


def check_golden(case: dict) -> str:
  """The authors' outputs from a state dict, in both forms."""
  cases.check_golden(case)
  return "as the authors'"


if __name__ == "__main__":
  main()
