"""Checkpoints into folders that the rest of repjax reads, and out of them."""

import hashlib
import json
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import repjax
from repjax import disk, runs, training, weights
from repjax.disk import trees
from repjax.errors import InputError
from repjax.spec import Preprocessing
from tests import helpers
from tests.training import tiny
from tests.weights import cases
from tests.weights.cases import KINDS, TINY, assert_same_bits

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.usefixtures("quick_programs")

AT_224 = Preprocessing()
AT_320 = Preprocessing(image_size=320, resize_size=320)
GATES = TINY | {"se_reduction": 4}
FIELDS = {
  *("entry", "other_entries", "removed", "dtypes"),
  *(
    "source",
    "file",
    "bytes",
    "sha256",
    "revision",
    "license",
    "model",
    "naming",
    "kind",
    "num_classes",
  ),
  *("new_head", "assumed", "parameters"),
}


def save(path, state):
  """Writes a state dict as .npz."""
  np.savez(path, **state)
  return path


def import_state(tmp_path, state, model_name="repvgg_a0", overrides=TINY, **arguments):
  """Imports a state dict; returns the workdir and the record of the import."""
  source = save(tmp_path / "weights.npz", state)
  workdir = tmp_path / "run"
  record = weights.import_weights(
    str(source), workdir, model_name=model_name, overrides=overrides, **arguments
  )
  return workdir, record


@pytest.fixture(scope="module")
def states():
  """A small network's in both kinds, with counters."""
  return {kind: cases.random_state("repvgg_a0", kind, **TINY) for kind in KINDS}


def test_a_training_form_becomes_a_checkpoint_of_step_0(tmp_path, states):
  workdir, _ = import_state(tmp_path, states["train"])
  assert sorted(path.name for path in workdir.iterdir()) == [
    *("checkpoints", "config.json", "import.json", "manifest.json", "model.json"),
  ]
  assert runs.checkpoints(workdir).keys() == {0}
  expected = weights.from_torch("repvgg_a0", states["train"], num_classes=10, **TINY)
  model, variables, spec = repjax.load(workdir, deploy=False)
  assert not model.deploy
  assert spec == repjax.ModelSpec("repvgg_a0", 10, TINY)
  jax.tree.map(np.testing.assert_array_equal, variables, expected)

  plain, deployed, _ = repjax.load(workdir)
  assert plain.deploy
  assert deployed.keys() == {"params"}
  folded = helpers.quick_jit(repjax.reparameterize)(expected["params"], expected["batch_stats"])
  jax.tree.map(lambda a, b: helpers.assert_close(a, b, 1e-6), deployed["params"], folded)


def test_a_deploy_form_becomes_the_deploy_folder(tmp_path, states):
  workdir, _ = import_state(tmp_path, states["deploy"])
  assert sorted(path.name for path in workdir.iterdir()) == [
    *("config.json", "deploy", "import.json", "manifest.json", "model.json"),
  ]
  expected = weights.from_torch("repvgg_a0", states["deploy"], num_classes=10, **TINY)
  for folder in (workdir, workdir / "deploy"):
    model, variables, _ = repjax.load(folder)
    assert model.deploy
    jax.tree.map(np.testing.assert_array_equal, variables, expected)
  with pytest.raises(InputError, match="holds a deploy form only"):
    repjax.load(workdir, deploy=False)


@pytest.mark.parametrize("kind", KINDS)
def test_the_record_says_what_came_from_where(tmp_path, states, kind):
  workdir, record = import_state(tmp_path, states[kind])
  source = tmp_path / "weights.npz"
  assert record.keys() == FIELDS
  assert record == {
    "source": str(source),
    "file": "weights.npz",
    "bytes": source.stat().st_size,
    "sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
    "revision": None,
    "license": None,
    "entry": "",
    "other_entries": [],
    "removed": [],
    "dtypes": ["float32"],
    "model": "repvgg_a0",
    "naming": "official",
    "kind": kind,
    "num_classes": 10,
    "new_head": False,
    "assumed": {},
    "parameters": sum(
      value.size for name, value in states[kind].items() if name.endswith((".weight", ".bias"))
    ),
  }
  assert disk.read_json(workdir / "import.json") == record


@pytest.mark.parametrize(
  ("model", "source", "preprocessing"),
  [
    ("repvgg_d2se", "official", AT_320),
    ("repvgg_d2se", "timm", AT_320),
    ("repvgg_d2se", "mmpretrain", AT_224),
    ("repvggplus_l2pse", "official", AT_320),
    ("repvgg_a0", "official", AT_224),
    ("repvgg_b3", "timm", AT_224),
  ],
)
def test_images_are_prepared_as_for_the_published_accuracy(tmp_path, model, source, preprocessing):
  overrides = TINY if model in ("repvgg_a0", "repvgg_b3") else GATES
  state = cases.random_state(model, "deploy", source, **overrides)
  workdir, record = import_state(tmp_path, state, model, overrides)
  assert record["naming"] == source
  for folder in (workdir, workdir / "deploy"):
    assert repjax.ModelSpec.read(folder).preprocessing == preprocessing
  assert AT_224.resize_size == 256


def test_the_model_is_found_where_none_is_named(tmp_path):
  state = cases.random_state("repvgg_d2se", "deploy", "timm", **GATES)
  workdir, record = import_state(tmp_path, state, None, GATES)
  assert record["model"] == "repvgg_d2se"
  assert repjax.ModelSpec.read(workdir).name == "repvgg_d2se"


def test_the_name_of_the_file_decides_between_models_that_fit(tmp_path, states):
  source = save(tmp_path / "RepVGG-B1-train.npz", states["deploy"])  # cut like this it is A0, too
  record = weights.import_weights(str(source), tmp_path / "run", overrides=TINY)
  assert record["model"] == "repvgg_b1"


def test_imagenets_classes_make_imagenet_the_data_set(tmp_path, states):
  workdir, _ = import_state(tmp_path, states["deploy"])
  config = disk.read_json(workdir / "config.json")
  assert config["dataset"] is None
  with pytest.raises(InputError, match="no data set"):
    training.evaluate(training.read_config(workdir), workdir, deploy=True)
  other = tmp_path / "other"
  other.mkdir()
  state = cases.random_state("repvgg_a0", "deploy", num_classes=1000, **TINY)
  workdir, _ = import_state(other, state)
  config = training.read_config(workdir)
  assert (config.dataset, config.eval_split) == ("imagenet2012", "validation")


def test_a_new_classifier_is_drawn_on_request(tmp_path, states):
  workdir, record = import_state(tmp_path, states["train"], num_classes=3, drop_head=True)
  assert (record["num_classes"], record["new_head"]) == (3, True)
  expected = weights.from_torch("repvgg_a0", states["train"], num_classes=3, drop_head=True, **TINY)
  _, variables, spec = repjax.load(workdir, deploy=False)
  assert spec.num_classes == 3
  jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_a_backbone_needs_a_number_of_classes(tmp_path, states):
  backbone = {name: x for name, x in states["train"].items() if not name.startswith("linear")}
  with pytest.raises(InputError, match=r"no classifier.*--drop-head(.|\n)*missing linear\.bias"):
    import_state(tmp_path, backbone)
  with pytest.raises(InputError, match="holds no classifier"):
    import_state(tmp_path, backbone, drop_head=True)
  workdir, record = import_state(tmp_path, backbone, num_classes=3, drop_head=True)
  assert record["num_classes"] == 3
  assert repjax.load(workdir, deploy=False)[1]["params"]["head"]["bias"].shape == (3,)


def test_half_precision_is_widened_on_request_only(tmp_path, states):
  half = {
    name: x if name.endswith("tracked") else x.astype(np.float16)
    for name, x in states["train"].items()
  }
  with pytest.raises(InputError, match="--allow-half"):
    import_state(tmp_path, half)
  workdir, _ = import_state(tmp_path, half, allow_half=True)
  widened = {name: x.astype(np.float32) for name, x in half.items()}
  expected = weights.from_torch("repvgg_a0", widened, num_classes=10, **TINY)
  jax.tree.map(np.testing.assert_array_equal, repjax.load(workdir, deploy=False)[1], expected)


def test_what_does_not_fit_leaves_no_trace(tmp_path, states):
  wrong = dict(states["train"])
  wrong["linear.w"] = wrong.pop("linear.weight")
  for state, arguments in (
    (wrong, {}),
    (states["train"], {"num_classes": 11}),
    (states["train"], {"model_name": "repvgg_a9"}),
    (states["train"], {"overrides": TINY | {"se": "pre", "se_reduction": 4}}),
    (states["train"], {"overrides": {"stage_size": [1]}}),
    (states["train"], {"entry": "model"}),
    ({"x": np.zeros(2)}, {}),
  ):
    with pytest.raises(InputError):
      import_state(tmp_path, state, **arguments)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]
  with pytest.raises(InputError, match="does not exist"):
    weights.import_weights(str(tmp_path / "none.pth"), tmp_path / "run")
  assert [path.name for path in tmp_path.iterdir()] == ["weights.npz"]


def test_a_folder_that_holds_something_is_left_alone(tmp_path, states):
  import_state(tmp_path, states["deploy"])
  before = tiny.contents(tmp_path)
  with pytest.raises(InputError, match="exists already"):
    import_state(tmp_path, states["deploy"])
  with pytest.raises(InputError, match=r"weights\.npz exists already"):
    weights.import_weights(str(tmp_path / "weights.npz"), tmp_path / "weights.npz")
  assert tiny.contents(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path, states):
  (tmp_path / "run").mkdir()
  workdir, _ = import_state(tmp_path, states["deploy"])
  assert repjax.load(workdir)[2].name == "repvgg_a0"


def test_folders_above_the_workdir_are_made(tmp_path, states):
  source = save(tmp_path / "weights.npz", states["deploy"])
  workdir = tmp_path / "a" / "b"
  weights.import_weights(str(source), workdir, model_name="repvgg_a0", overrides=TINY)
  assert repjax.load(workdir)[2].name == "repvgg_a0"


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_that_was_killed_is_no_run_and_can_be_repeated(
  tmp_path, states, kind, monkeypatch
):
  write_json, written = disk.write_json, []

  def killed(path, value):
    written.append(path.name)
    if path.name == "config.json":
      raise KeyboardInterrupt
    write_json(path, value)

  with monkeypatch.context() as patch:
    patch.setattr(disk, "write_json", killed)
    with pytest.raises(KeyboardInterrupt):
      import_state(tmp_path, states[kind])
  assert {"model.json", "import.json"} <= set(written)
  assert [path.name for path in tmp_path.iterdir() if "run" in path.name] == []
  (tmp_path / "run.draft").mkdir()  # of somebody else
  workdir, _ = import_state(tmp_path, states[kind])
  assert (tmp_path / "run.draft").exists()
  assert repjax.load(workdir)[2].name == "repvgg_a0"


def test_training_refuses_an_imported_folder(tmp_path, states, digits_dir):
  workdir, _ = import_state(tmp_path, states["train"])
  before = tiny.contents(workdir)
  with pytest.raises(InputError, match="holds imported weights"):
    training.train(tiny.config(digits_dir), workdir)
  assert tiny.contents(workdir) == before


def test_a_deploy_form_is_read_rather_than_made_again(tmp_path, states):
  workdir, _ = import_state(tmp_path, states["train"])
  config = training.read_config(workdir, dataset="synthetic", eval_split="sample")
  training.convert(config, workdir)
  marked = jax.tree.map(lambda leaf: leaf + 1, repjax.load(workdir)[1]["params"])
  shutil.rmtree(workdir / "deploy" / "params")
  trees.write_tree(workdir / "deploy" / "params", marked)
  disk.write_manifest(workdir / "deploy")
  jax.tree.map(np.testing.assert_array_equal, repjax.load(workdir)[1]["params"], marked)


# Back out


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("source", ["official", "timm", "mmpretrain"])
def test_what_goes_in_comes_out_bit_by_bit(tmp_path, source, kind):
  state = cases.random_state("repvgg_d2se", kind, source, **GATES)
  workdir, _ = import_state(tmp_path, state, "repvgg_d2se", GATES)
  target = tmp_path / "new" / "folder" / "out.safetensors"
  returned = weights.export_weights(workdir, target, naming=source, form=kind)
  written = load_file(target)
  assert_same_bits(written, returned)
  at_zero = {name: x * 0 if name.endswith("tracked") else x for name, x in state.items()}
  assert_same_bits(written, at_zero)
  assert [path.name for path in target.parent.iterdir()] == [target.name]


def test_an_export_can_be_imported_again_from_other_names(tmp_path, states):
  workdir, _ = import_state(tmp_path, states["train"])
  for source in ("timm", "mmpretrain"):
    target, again = tmp_path / f"{source}.safetensors", tmp_path / source
    weights.export_weights(workdir, target, naming=source)
    record = weights.import_weights(str(target), again, model_name="repvgg_a0", overrides=TINY)
    assert (record["naming"], record["kind"]) == (source, "train")
    ours, theirs = (repjax.load(folder, deploy=False)[1] for folder in (again, workdir))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_training_form_can_leave_as_the_deploy_form(tmp_path, states):
  workdir, _ = import_state(tmp_path, states["train"])
  state = weights.export_weights(workdir, tmp_path / "out.safetensors", form="deploy")
  assert state.keys() == states["deploy"].keys()
  variables = weights.from_torch("repvgg_a0", state, num_classes=10, **TINY)
  jax.tree.map(np.testing.assert_array_equal, variables, repjax.load(workdir)[1])


def test_an_export_has_the_entries_of_the_authors_state_dict(tmp_path):
  narrow = {"width_multipliers": [0.0625] * 4}
  for form in KINDS:
    (tmp_path / form).mkdir()
    state = cases.random_state("repvgg_a0", form, **narrow)
    workdir, _ = import_state(tmp_path / form, state, overrides=narrow)
    target = tmp_path / f"{form}.safetensors"
    weights.export_weights(workdir, target, form=form)
    names = load_file(target).keys()
    assert len(names) == helpers.counts()["repvgg_a0"][f"{form}_state_dict_entries"]
    plain = {name for name in names if not name.endswith("num_batches_tracked")}
    assert plain == helpers.keys("official", "repvgg_a0")[form].keys()


def test_counters_are_whole_numbers_at_zero(tmp_path, states):
  workdir, _ = import_state(tmp_path, states["train"])
  weights.export_weights(workdir, tmp_path / "out.safetensors")
  written = load_file(tmp_path / "out.safetensors")
  counters = {name for name in states["train"] if name.endswith("num_batches_tracked")}
  assert counters < written.keys() == states["train"].keys()
  for name in counters:
    assert (written[name].dtype, written[name].shape, int(written[name])) == (np.int64, (), 0)


@pytest.mark.parametrize(
  ("target", "arguments", "said"),
  [
    ("taken.safetensors", {}, r"taken\.safetensors exists already"),
    ("out.pth", {}, r"out\.pth must end in \.safetensors; call it out\.safetensors"),
    ("out.safetensors", {"naming": "keras"}, "'keras' has no names for repvgg_a0; there are"),
    ("out.safetensors", {"form": "train"}, "holds a deploy form only"),
  ],
)
def test_what_cannot_be_exported_leaves_no_trace(tmp_path, states, target, arguments, said):
  workdir, _ = import_state(tmp_path, states["deploy"])
  (tmp_path / "taken.safetensors").write_bytes(b"mine")
  before = tiny.contents(tmp_path)
  with pytest.raises(InputError, match=said):
    weights.export_weights(workdir, tmp_path / target, **{"form": "deploy", **arguments})
  assert tiny.contents(tmp_path) == before


def test_gates_between_stages_have_no_names_in_timm(tmp_path):
  overrides = cases.TINY_PLUS
  state = cases.random_state("repvggplus_l2pse", **overrides)
  workdir, _ = import_state(tmp_path, state, "repvggplus_l2pse", overrides)
  with pytest.raises(InputError, match="'timm' has no names for repvggplus_l2pse"):
    weights.export_weights(workdir, tmp_path / "x.safetensors", naming="timm", form="train")


def test_a_folder_that_is_no_run_cannot_be_exported(tmp_path):
  with pytest.raises(InputError, match=r"model\.json does not exist; is .* the right folder"):
    weights.export_weights(tmp_path, tmp_path / "x.safetensors")


def test_json_of_an_import_is_readable(tmp_path, states):
  overrides = TINY | {"groups": {"2": 2}}
  state = cases.random_state("repvgg_a0", "deploy", **overrides)
  workdir, _ = import_state(tmp_path, state, overrides=overrides)
  value = json.loads((workdir / "model.json").read_text())
  assert value["overrides"] == overrides
  assert repjax.load(workdir)[0].groups_of(2) == 2


def test_what_wrappers_added_is_taken_off_and_recorded(tmp_path, states):
  wrapped = {
    f"lightning.net.{name}".replace("stage1.", "stage1._orig_mod.module."): value
    for name, value in states["train"].items()
  }
  workdir, record = import_state(tmp_path, wrapped | {"n_averaged": np.asarray(3)})
  assert record["removed"] == ["lightning.net.", "module"]  # `read` takes _orig_mod off
  expected = weights.from_torch("repvgg_a0", states["train"], num_classes=10, **TINY)
  jax.tree.map(np.testing.assert_array_equal, repjax.load(workdir, deploy=False)[1], expected)
