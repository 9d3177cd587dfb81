"""model.json, preprocessing, and loading a model from a folder."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.spec import Preprocessing
from tests.helpers import assert_close, leaves, random_input, relative_error, shapes
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SPEC = repjax.ModelSpec(
  "repvgg_a0",
  num_classes=3,
  overrides={**tiny.OVERRIDES, "groups": {2: 2}, "se": "post", "se_reduction": 4, "act": "silu"},
  preprocessing=Preprocessing(20, 24, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)),
  class_names=("ant", "bee", "cat"),
)


def test_a_spec_read_back_builds_the_same_model(tmp_path):
  SPEC.write(tmp_path)
  read = repjax.ModelSpec.read(tmp_path)
  assert (read.name, read.num_classes, read.class_names) == ("repvgg_a0", 3, SPEC.class_names)
  assert read.preprocessing == SPEC.preprocessing
  for deploy in (False, True):
    assert shapes(read.variable_shapes(deploy=deploy)) == shapes(
      SPEC.variable_shapes(deploy=deploy)
    )
  kernel = read.variable_shapes(deploy=True)["params"]["stage2"]["block0"]["RepConv_0"]["conv"]
  assert kernel["kernel"].shape == (3, 3, 4, 16)  # 8 channels in 2 groups


def test_a_spec_is_the_same_after_every_round_trip(tmp_path):
  SPEC.write(tmp_path)
  written = (tmp_path / "model.json").read_bytes()
  repjax.ModelSpec.read(tmp_path).write(tmp_path)
  assert (tmp_path / "model.json").read_bytes() == written


def test_a_spec_has_a_colour_for_each_class_or_none(tmp_path):
  colored = dataclasses.replace(SPEC, class_colors=((0, 0, 0), (1, 2, 3), (255, 4, 0)))
  colored.write(tmp_path)
  assert repjax.ModelSpec.read(tmp_path).class_colors == colored.class_colors
  assert "class_colors" not in SPEC.to_json()
  with pytest.raises(InputError, match="class_colors has 2 colours, and num_classes is 3"):
    dataclasses.replace(SPEC, class_colors=((0, 0, 0), (1, 2, 3)))
  with pytest.raises(InputError, match=r"class_colors\[1\]\[0\] must be .* to 255, got 256"):
    repjax.ModelSpec.from_json(
      {"name": "repvgg_a0", "num_classes": 2, "class_colors": [[0, 0, 0], [256, 0, 0]]}
    )


def test_what_a_spec_does_not_say_has_defaults():
  assert repjax.ModelSpec.from_json({"name": "repvgg_b1"}) == repjax.ModelSpec("repvgg_b1")


def test_a_spec_builds_models_with_further_settings():
  model = SPEC.create_model(dtype=jnp.bfloat16, axis_name="batch", act="gelu")
  assert (model.dtype, model.axis_name, model.act) == (jnp.bfloat16, "batch", "gelu")
  assert SPEC.create_model(deploy=True).deploy


@pytest.mark.parametrize(
  ("value", "message"),
  [
    (
      {"name": "a", "num_clases": 3},
      "unknown field 'num_clases'; did you mean num_classes",
    ),
    ({"num_classes": 3}, "name is missing"),
    ({"name": "a", "preprocessing": {"size": 3}}, "unknown field 'preprocessing.size'"),
  ],
  ids=str,
)
def test_a_field_that_does_not_belong_in_model_json_is_named(value, message):
  with pytest.raises(InputError, match=message):
    repjax.ModelSpec.from_json(value)


@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 5, 3)])
def test_normalize_is_value_over_255_less_mean_over_std(shape):
  images = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
  mean, std = SPEC.preprocessing.mean, SPEC.preprocessing.std
  expected = (images / 255 - np.array(mean)) / np.array(std)
  result = SPEC.preprocessing.normalize(jnp.asarray(images))
  assert result.dtype == jnp.float32
  assert relative_error(result, expected) <= 1e-6
  half = SPEC.preprocessing.normalize(jnp.asarray(images), jnp.bfloat16)
  assert half.dtype == jnp.bfloat16
  assert relative_error(half, expected) <= 2**-8


def logits(folder, deploy, images):
  model, variables, _ = repjax.load(folder, deploy=deploy)
  return jax.jit(model.apply)(variables, images)


@pytest.mark.usefixtures("quick_programs")
def test_a_run_loads_in_both_forms_and_so_does_its_deploy_folder(finished, tmp_path):
  images = jnp.asarray(random_input(4, 16, 16, 3), jnp.float32)
  trained = logits(finished[0], False, images)
  assert trained.shape == (4, 10)
  assert relative_error(logits(finished[0], True, images), trained) <= 1e-5
  shipped = shutil.copytree(finished[0] / "deploy", tmp_path / "shipped")
  np.testing.assert_array_equal(logits(shipped, True, images), logits(finished[0], True, images))


def test_the_deploy_form_is_what_loads_by_default(finished):
  model, variables, spec = repjax.load(str(finished[0]))
  assert model.deploy
  assert variables.keys() == {"params"}
  assert shapes(variables) == shapes(spec.variable_shapes(deploy=True))
  assert spec.class_names == tuple("0123456789")
  assert not repjax.load(finished[0], deploy=False)[0].deploy


def test_the_training_form_that_loads_is_the_best_checkpoint(finished, overtrained):
  expected = repjax.load(finished[0], deploy=False)[1]
  loaded = repjax.load(overtrained, deploy=False)[1]
  jax.tree.map(np.testing.assert_array_equal, loaded, expected)


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished[0], tmp_path / "run")


def test_a_deploy_form_whose_replacement_was_killed_half_way_loads(workdir):
  expected = repjax.load(workdir)[1]
  (workdir / ".deploy.repjax-0123abcd").mkdir()
  (workdir / "deploy").rename(workdir / ".deploy.repjax-0123abcd" / "old")
  jax.tree.map(np.testing.assert_array_equal, repjax.load(workdir)[1], expected)


def test_a_run_without_a_deploy_form_is_re_parameterized_on_loading(workdir):
  expected = repjax.load(workdir)[1]
  shutil.rmtree(workdir / "deploy")
  model, variables, _ = repjax.load(workdir)
  assert model.deploy
  assert leaves(variables).keys() == leaves(expected).keys()
  for path, leaf in leaves(variables).items():
    assert_close(leaf, leaves(expected)[path], 1e-6)


@pytest.mark.usefixtures("no_leftovers")
def test_a_damaged_deploy_form_is_named(workdir):
  shutil.rmtree(workdir / "deploy" / "params" / "head.bias")
  with pytest.raises(InputError, match=r"head\.bias/.zarray is damaged: it is missing"):
    repjax.load(workdir)
  with pytest.raises(InputError, match="deploy/params cannot be read"):
    repjax.load(workdir, verify=False)


def test_a_deploy_folder_has_no_training_form(workdir):
  with pytest.raises(InputError, match="holds a deploy form only"):
    repjax.load(workdir / "deploy", deploy=False)


def test_a_folder_that_is_no_run_is_named(tmp_path):
  with pytest.raises(InputError, match=r"model.json does not exist; is .* the right folder\?"):
    repjax.load(tmp_path)


def test_a_damaged_model_json_is_named(workdir):
  text = (workdir / "model.json").read_text()
  (workdir / "model.json").write_text(text[: len(text) // 2])
  with pytest.raises(InputError, match=r"model\.json is damaged"):
    repjax.load(workdir, deploy=False)
  repjax.load(workdir)  # which reads the deploy folder alone


@pytest.mark.usefixtures("no_leftovers")
def test_a_model_json_of_another_width_does_not_load_the_params(workdir):
  value = repjax.ModelSpec.read(workdir).to_json()
  value["overrides"]["width_multipliers"] = [0.25] * 4
  for folder in (workdir, workdir / "deploy"):
    repjax.ModelSpec.from_json(value).write(folder)
  for deploy in (False, True):
    with pytest.raises(InputError, match=r"cannot be read|no whole checkpoint"):
      repjax.load(workdir, deploy=deploy)


@pytest.mark.parametrize(
  ("name", "overrides", "size", "resize"),
  [
    ("repvgg_a0", {}, 224, 256),
    ("repmlp_resnet50_light", {}, 224, 256),
    ("repmlp_resnet50_bottleneck_g8", {"tile": 10, "local_kernels": [1, 3, 5, 7]}, 320, 366),
    ("repmlp_cifar", {"tile": 4, "local_kernels": [1]}, 16, 18),
  ],
)
def test_the_usual_spec_has_the_image_size_that_the_model_is_made_for(
  name, overrides, size, resize
):
  spec = repjax.ModelSpec.usual(name, 7, overrides)
  assert (spec.name, spec.num_classes, spec.overrides) == (name, 7, overrides)
  assert (spec.preprocessing.image_size, spec.preprocessing.resize_size) == (size, resize)
  assert repjax.ModelSpec.from_json(spec.to_json()) == spec


def test_a_square_that_is_larger_than_the_resized_image_is_refused():
  value = json.loads(json.dumps(SPEC.to_json()))
  value["preprocessing"] |= {"image_size": 64, "resize_size": 63}
  with pytest.raises(InputError, match=r"preprocessing\.resize_size is 63, below"):
    repjax.ModelSpec.from_json(value)


def test_a_description_has_the_classes_beside_the_overrides():
  with pytest.raises(InputError, match="unknown override of repvgg_a0 'num_classes'") as told:
    repjax.ModelSpec("repvgg_a0", overrides={"num_classes": 3})
  assert "did you mean" not in str(told.value)
