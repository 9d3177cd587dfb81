"""The names of RepOptimizer's authors: plain networks, and those of the hyper-search."""

import jax
import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.errors import InputError
from repjax.weights.repvgg import repopt_overrides
from tests import helpers
from tests.weights import cases
from tests.weights.cases import assert_same_bits

PLAIN = {**cases.TINY, "branches": ["conv3x3"]}
SEARCH = {**cases.TINY, "scaled": True}


def blocks(stage_sizes, widths):
  """Yields the name, inputs and outputs of each block, and whether the block keeps the shape."""
  inputs = 3
  for stage, (count, width) in enumerate(zip((1, *stage_sizes), widths)):
    for number in range(count):
      yield "stage0" if stage == 0 else f"stage{stage}.{number}", inputs, width, number > 0
      inputs = width


def authors_shapes(stage_sizes, widths, num_classes, searched):
  """Returns names and shapes by repoptimizer/repoptvgg_model.py, in modes "target" and "hs"."""
  state = {}
  for name, inputs, outputs, keeps in blocks(stage_sizes, widths):
    state[f"{name}.conv.weight"] = [outputs, inputs, 3, 3]
    if searched:
      state[f"{name}.conv_1x1.weight"] = [outputs, inputs, 1, 1]
      branches = ["conv", "1x1", *(["identity"] if keeps else [])]
      state.update({f"{name}.scale_{branch}.weight": [outputs] for branch in branches})
    for leaf in ("weight", "bias", "running_mean", "running_var"):
      state[f"{name}.bn.{leaf}"] = [outputs]
  return state | {
    "linear.weight": [num_classes, widths[-1]],
    "linear.bias": [num_classes],
  }


@pytest.mark.parametrize("overrides", [PLAIN, SEARCH], ids=["plain", "search"])
def test_the_authors_files_come_in_and_go_out_as_they_were(overrides):
  shapes = authors_shapes((1, 1, 2, 1), (8, 8, 16, 32, 64), 7, "scaled" in overrides)
  state = cases.numbered(shapes)
  found = weights.recognize(state, "repvgg_a0", **overrides)
  assert found == ("repvgg_a0", "repopt", "train", 7)
  variables = weights.from_torch("repvgg_a0", state, num_classes=7, **overrides)
  assert_same_bits(weights.to_torch("repvgg_a0", variables, "repopt"), state)


@pytest.mark.parametrize(
  ("name", "stage_sizes", "widths"),
  [
    ("repvgg_b1", (4, 6, 16, 1), (64, 128, 256, 512, 2048)),
    pytest.param("repvgg_b2", (4, 6, 16, 1), (64, 160, 320, 640, 2560), marks=pytest.mark.proof),
    pytest.param("repvgg_b1", (8, 14, 24, 1), (64, 128, 256, 512, 2048), marks=pytest.mark.proof),
  ],
  ids=["B1", "B2", "L1"],
)
def test_the_whole_networks_are_those_of_the_authors(name, stage_sizes, widths):
  shapes = authors_shapes(stage_sizes, widths, 1000, searched=False)
  state = {name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()}
  overrides = repopt_overrides(state)
  deeper = {} if stage_sizes == (4, 6, 16, 1) else {"stage_sizes": [*stage_sizes]}
  assert overrides == {"branches": ["conv3x3"], **deeper}
  assert weights.recognize(state, **overrides).model == name


def test_a_released_file_becomes_a_folder_that_runs(tmp_path):
  state = cases.random_state("repvgg_a0", "train", "repopt", 1000, **PLAIN)
  np.savez(tmp_path / "RepOpt-VGG-acc.npz", **state)
  record = weights.import_weights(
    str(tmp_path / "RepOpt-VGG-acc.npz"),
    tmp_path / "run",
    model_name="repvgg_a0",
    overrides={"width_multipliers": PLAIN["width_multipliers"]},
  )
  assert (record["naming"], record["kind"]) == ("repopt", "train")
  assert record["assumed"] == {"branches": ["conv3x3"], "stage_sizes": [1, 1, 2, 1]}
  preprocessing = repjax.ModelSpec.read(tmp_path / "run").preprocessing
  assert (preprocessing.resize_size, preprocessing.image_size) == (224, 224)
  model, variables, _ = repjax.load(tmp_path / "run")
  kernel = variables["params"]["stage1"]["block0"]["RepConv_0"]["conv"]["kernel"]
  assert kernel.shape == (3, 3, 8, 8)
  logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct((1, 224, 224, 3), "float32"))
  assert logits.shape == (1, 1000)


def test_names_show_what_an_import_need_not_be_told():
  sizes = {"stage_sizes": [1, 1, 2, 1]}
  for prefix in ("", "module."):
    plain, search = (
      [prefix + name for name in authors_shapes((1, 1, 2, 1), (8,) * 5, 7, searched)]
      for searched in (False, True)
    )
    assert repopt_overrides(plain) == {"branches": ["conv3x3"], **sizes}
    assert repopt_overrides(search) == {"scaled": True, **sizes}
  for model in ("repvgg_a0", "repvggplus_l2pse"):
    assert repopt_overrides(helpers.keys("official", model)["train"]) == {}


def test_networks_with_norms_in_their_branches_have_no_such_names():
  variables = cases.random_variables("repvgg_a0", **cases.TINY)
  with pytest.raises(InputError, match="repopt names of repvgg_a0 do not cover stage1/block0"):
    weights.to_torch("repvgg_a0", variables, "repopt")
