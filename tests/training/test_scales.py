"""Scales of RepOptimizer: read from a run or a file, and used from the first step of a run on."""

import itertools
import shutil

import jax
import numpy as np
import pytest

from repjax import runs, training, weights
from repjax.algebra import scale_branches
from repjax.data import train_batches
from repjax.disk import trees
from repjax.errors import InputError
from repjax.models import init
from repjax.spec import ModelSpec
from repjax.training import loop, planning, repoptimizer
from repjax.training.scales import read_scales
from tests.helpers import assert_one_paragraph, leaves, randomise
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

PLAIN = ModelSpec("repvgg_a0", 3, {**tiny.OVERRIDES, "branches": ("conv3x3",)})
SEARCH = ModelSpec("repvgg_a0", 5, {**tiny.OVERRIDES, "scaled": True})  # of other classes


def write_search(folder, spec=SEARCH, variables=None):
  """Writes the folder of a search; returns its variables."""
  variables = variables or randomise(spec.variable_shapes())
  trees.write_tree(folder / "checkpoints" / "0" / "variables", variables)
  spec.write(folder)
  return variables


def authors_state(variables=None):
  """Returns a search in the names of the authors."""
  return weights.to_torch("repvgg_a0", variables or randomise(SEARCH.variable_shapes()), "repopt")


@pytest.mark.parametrize("what", ["run", "file of a search", "file of scales", "nested file"])
def test_scales_are_those_of_the_searched_branches(tmp_path, what):
  if what == "run":
    source, variables = tmp_path, write_search(tmp_path)
  else:
    source, variables = tmp_path / "scales.npz", randomise(SEARCH.variable_shapes())
    state = authors_state(variables)
    if what != "file of a search":
      state = {name: value for name, value in state.items() if "scale" in name}
    prefix = "module." if what == "nested file" else ""
    np.savez(source, **{f"{prefix}{name}": value for name, value in state.items()})
  scales = read_scales(str(source), PLAIN)
  params = variables["params"]
  for path in (("stem",), ("stage1", "block0"), ("stage4", "block0")):
    held, found = params, scales
    for scope in path:
      held, found = held[scope], found[scope]
    held, found = held["ScaledConv_0"], found["RepConv_0"]
    np.testing.assert_array_equal(found.conv3x3, held["conv3x3"]["scale"])
    np.testing.assert_array_equal(found.conv1x1, held["conv1x1"]["scale"])
    assert (found.identity is not None) == ("identity" in held) == (path[0] == "stage1")
  np.testing.assert_array_equal(
    scales["stage1"]["block0"]["RepConv_0"].identity,
    params["stage1"]["block0"]["ScaledConv_0"]["identity"]["scale"],
  )


def test_the_names_in_a_file_are_those_of_the_authors():
  assert {name for name in authors_state() if name.startswith("stage1.")} == {
    *("stage1.0.conv.weight", "stage1.0.conv_1x1.weight"),
    *("stage1.0.scale_conv.weight", "stage1.0.scale_1x1.weight", "stage1.0.scale_identity.weight"),
    *(f"stage1.0.bn.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")),
  }


def damaged(state, change):
  """Returns the scales of a state dict with a change."""
  state = {name: value for name, value in state.items() if "scale" in name}
  name = "stage2.0.scale_1x1.weight"
  if change == "missing":
    del state[name]
  elif change == "longer":
    state[name] = np.ones(9, np.float32)
  elif change == "deeper":
    state["stage2.1.scale_conv.weight"] = np.ones(16, np.float32)
  elif change == "infinite":
    state[name] = state[name] * np.float32(np.nan)
  elif change == "beyond float32":
    state[name] = np.full(state[name].shape, 1e300)
  else:
    state[name] = state[name].astype(change)
  return state


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ("missing", r"missing: stage2\.0\.scale_1x1\.weight"),
    ("longer", r"of a different length: stage2\.0\.scale_1x1\.weight \(9,\) instead of \(\d+,\)"),
    ("deeper", r"beyond the network: stage2\.1\.scale_conv\.weight"),
    ("infinite", r"not finite in float32: stage2\.0\.scale_1x1\.weight"),
    ("beyond float32", r"not finite in float32: stage2\.0\.scale_1x1\.weight"),
    *(
      (kind, rf"not floating-point: stage2\.0\.scale_1x1\.weight, of type \W*{kind}")
      for kind in ("complex64", "int8", "bool", "U4")
    ),
  ],
)
def test_a_file_that_does_not_fit_is_explained(tmp_path, change, said):
  np.savez(tmp_path / "scales.npz", **damaged(authors_state(), change))
  with pytest.raises(InputError, match=rf"config\.scales.*{said}.*same stage_sizes") as caught:
    read_scales(str(tmp_path / "scales.npz"), PLAIN)
  assert_one_paragraph(caught.value)


def test_the_search_of_a_different_network_is_refused(tmp_path):
  write_search(
    tmp_path, ModelSpec("repvgg_a0", 3, {**SEARCH.overrides, "stage_sizes": (1, 2, 1, 1)})
  )
  with pytest.raises(InputError, match="beyond the network: stage2/block1/ScaledConv_0") as caught:
    read_scales(str(tmp_path), PLAIN)
  assert_one_paragraph(caught.value)


@pytest.mark.parametrize(
  "change",
  [{"groups": 2}, {"groups": {"2": 2}}, {"strides": (1, 1, 2, 2, 4)}, {"strides": (2, 1, 2, 2, 2)}],
  ids=str,
)
def test_a_search_whose_scales_have_the_same_shapes_is_refused(tmp_path, change):
  write_search(tmp_path, ModelSpec("repvgg_a0", 3, {**SEARCH.overrides, **change}))
  with pytest.raises(InputError, match=rf"with {next(iter(change))} .* the same") as caught:
    read_scales(str(tmp_path), PLAIN)
  assert_one_paragraph(caught.value)


def test_a_folder_or_file_without_scales_is_named(tmp_path, finished):
  with pytest.raises(InputError, match=r"none does not exist.*scaled=True"):
    read_scales(str(tmp_path / "none"), PLAIN)
  with pytest.raises(InputError, match="holds a repvgg_a0 without scales"):
    read_scales(str(finished[0]), PLAIN)
  np.savez(tmp_path / "other.npz", weight=np.ones(3, np.float32))
  with pytest.raises(InputError, match=r"missing: stage1\.0\.scale_1x1\.weight, .* and \d+ more"):
    read_scales(str(tmp_path / "other.npz"), PLAIN)


@pytest.mark.parametrize(
  "spec",
  [
    ModelSpec("repvgg_a0", 3, tiny.OVERRIDES),
    SEARCH,
    ModelSpec("resnet18", 3),
    ModelSpec("repvgg_a0", 3, {**tiny.OVERRIDES, "branches": ("conv3x3", "identity")}),
  ],
  ids=lambda spec: f"{spec.name} {sorted(spec.overrides)}",
)
def test_a_network_that_is_not_plain_is_refused(spec):
  with pytest.raises(InputError, match="the branch conv3x3 alone") as caught:
    repoptimizer.search_spec(spec)
  assert_one_paragraph(caught.value)


@pytest.fixture(scope="module")
def search(digits_dir, cache_home, tmp_path_factory):
  """The folder of a finished search of the tiny network; no test may change it."""
  folder = tmp_path_factory.mktemp("runs") / "search"
  with tiny.quick_programs(cache_home / "repjax" / "xla"):
    report = training.train(tiny.config(digits_dir, model_overrides={"scaled": True}), folder)
  assert report["accuracy"]["train"] == report["accuracy"]["deploy"]
  return folder


def config(digits_dir, search, **changes):
  """Returns the config of a tiny plain run with RepOptimizer."""
  plain = {"branches": ("conv3x3",)}
  settings = {"optimizer": "repoptimizer", "scales": str(search), **changes}
  return tiny.config(digits_dir, model_overrides=plain, **settings)


@pytest.mark.proof
def test_a_run_begins_with_kernels_that_are_sums_of_scaled_branches(digits_dir, search):
  plan = planning.make_plan(config(digits_dir, search))
  fresh, key = init(plan.spec.create_model(), jax.random.key(0), 16), jax.random.key(3)
  scales = read_scales(str(search), plan.spec)
  begun = repoptimizer.initial_variables(plan.spec, fresh, scales, key)
  branches = init(repoptimizer.search_spec(plan.spec).create_model(), key, 16)["params"]
  changed = {path for path, leaf in leaves(begun).items() if leaf is not leaves(fresh)[path]}
  assert changed == {path for path in leaves(fresh) if path.endswith("conv3x3/conv/kernel")}
  k3, k1 = (
    branches["stage1"]["block0"]["ScaledConv_0"][name]["conv"]["kernel"]
    for name in ("conv3x3", "conv1x1")
  )
  np.testing.assert_array_equal(
    begun["params"]["stage1"]["block0"]["RepConv_0"]["conv3x3"]["conv"]["kernel"],
    scale_branches(k3, k1, scales["stage1"]["block0"]["RepConv_0"]),
  )


def stopping(*arguments, **settings):
  """Yields the batches until two steps after the first checkpoint."""
  yield from itertools.islice(train_batches(*arguments, **settings), tiny.EVAL_STEPS + 2)
  raise KeyboardInterrupt


@pytest.mark.proof
@pytest.mark.parametrize("name", ["repoptimizer", "repoptimizer_adamw"])
def test_a_continued_run_has_the_same_bits_without_the_folder_of_its_scales(
  digits_dir, search, tmp_path, monkeypatch, capsys, name
):
  own = shutil.copytree(search, tmp_path / "search")
  settings = config(digits_dir, own, optimizer=name)
  training.train(settings, tmp_path / "whole")
  monkeypatch.setattr(loop, "train_batches", stopping)
  with pytest.raises(KeyboardInterrupt):
    training.train(settings, tmp_path / "parted")
  assert f"scales and initial kernels from {own}" in capsys.readouterr().out
  monkeypatch.undo()
  shutil.rmtree(own)
  settings.scales = str(tmp_path / "moved")
  training.train(settings, tmp_path / "parted")
  assert "config.scales is not read again" in capsys.readouterr().out
  whole, parted = (
    runs.read_best(tmp_path / run, ModelSpec.read(tmp_path / run).variable_shapes())[1]
    for run in ("whole", "parted")
  )
  jax.tree.map(np.testing.assert_array_equal, whole, parted)


def test_a_mistake_in_the_scales_leaves_no_trace(digits_dir, tmp_path):
  with pytest.raises(InputError, match=r"config\.scales: .* does not exist"):
    training.train(config(digits_dir, tmp_path / "none"), tmp_path / "run")
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_network_that_is_not_plain_is_refused_before_its_scales_are_read(digits_dir, tmp_path):
  settings = tiny.config(digits_dir, optimizer="repoptimizer", scales=str(tmp_path / "none"))
  with pytest.raises(InputError, match="the branch conv3x3 alone"):
    planning.make_plan(settings)
