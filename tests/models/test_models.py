"""Models by name."""

import inspect

import jax
import jax.numpy as jnp
import pytest

import repjax
from tests import helpers

IMAGES = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)


def test_every_repvgg_has_a_name():
  repvgg = {name for name in repjax.list_models() if name.startswith("repvgg")}
  assert repvgg == helpers.counts().keys()
  assert len(repvgg) == 15


def test_names_are_sorted():
  assert repjax.list_models() == sorted(repjax.list_models())


@pytest.mark.parametrize("name", repjax.list_models())
@pytest.mark.parametrize("deploy", [False, True])
def test_both_forms_are_called_alike(name, deploy):
  model = repjax.create_model(name, deploy=deploy)
  parameters = inspect.signature(model.__call__).parameters
  assert list(parameters) == ["images", "train"]
  assert parameters["train"].default is False


@pytest.mark.parametrize(
  ("name", "said"),
  [
    ("repvgg_a3", "unknown model 'repvgg_a3'; did you mean .*repvgg_a2"),
    ("repvgg-b1g4", "did you mean repvgg_b1g4"),
    ("repvggplus", "did you mean repvggplus_l2pse"),
    ("xyz", "unknown model 'xyz'; known: .*repvgg_a0, .*repvgg_d2se"),
    (["repvgg_a0"], r"unknown model \['repvgg_a0'\]"),
  ],
)
def test_an_unknown_model_lists_close_ones(name, said):
  with pytest.raises(ValueError, match=said):
    repjax.create_model(name)


@pytest.mark.parametrize(
  ("override", "said"),
  [
    (
      "width_multiplier",
      "unknown override of repvgg_a0 'width_multiplier'; did you mean width_mul",
    ),
    ("drop_out", "did you mean dropout"),
    ("parent", "unknown override .*'parent'"),
    ("pretrained", r"made without weights.*repjax\.load.*list_pretrained"),
    ("num_class", "did you mean num_classes"),
    ("dtyp", "did you mean .*dtype"),
  ],
)
def test_an_unknown_override_lists_close_ones(override, said):
  with pytest.raises(ValueError, match=said):
    repjax.create_model("repvgg_a0", **{override: 1})


def test_a_second_name_is_refused():
  with pytest.raises(ValueError, match=r"two names of a model, 'repvgg_a0' and 'b'.*clone\(name"):
    repjax.create_model("repvgg_a0", name="b")
  assert repjax.create_model(name="repvgg_a0") == repjax.create_model("repvgg_a0")


def test_lists_as_json_gives_them_are_taken():
  lists = {"stage_sizes": [1, 1, 2, 1], "width_multipliers": [0.25, 0.25, 0.25, 0.25]}
  lists |= {"strides": [2, 2, 2, 2, 2], "groups": {"2": 2}}
  from_json = repjax.create_model("repvgg_a0", num_classes=10, **lists)
  tuples = {key: tuple(value) for key, value in lists.items() if key != "groups"}
  usual = repjax.create_model("repvgg_a0", num_classes=10, groups={2: 2}, **tuples)
  assert helpers.shapes(helpers.init_shapes(from_json, IMAGES)) == helpers.shapes(
    helpers.init_shapes(usual, IMAGES)
  )


@pytest.mark.parametrize("groups", [2, {2: 2}], ids=str)
def test_models_are_hashable_as_static_arguments_must_be(groups):
  one, other = (repjax.create_model("repvgg_a0", strides=[2] * 5, groups=groups) for _ in range(2))
  assert hash(one) == hash(other)
