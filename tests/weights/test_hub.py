"""Weights from the Hugging Face hub: online, from its cache, and every way to find nothing.

The cache is laid out as huggingface_hub lays it out, and its own code reads it. Nothing here asks
the network.
"""

import json
import sys
import types

import huggingface_hub
import jax
import numpy as np
import pytest
from huggingface_hub import constants, errors
from safetensors.numpy import save_file

import repjax
from repjax import cli, weights
from repjax.errors import InputError
from repjax.spec import Preprocessing
from repjax.weights import hub, sources, workdirs
from tests import helpers
from tests.weights import cases
from tests.weights.cases import TINY

MAIN, TAGGED = "1" * 40, "2" * 40
CONFIG = {
  "architecture": "repvgg_a0",
  "num_classes": 10,
  "label_names": [f"class {label}" for label in range(10)],
  "pretrained_cfg": {
    "input_size": [3, 160, 160],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.3, 0.4],
  },
}
STATED = Preprocessing(
  image_size=160,
  resize_size=177,  # 160 / 0.9 = 177.8
  interpolation="bicubic",
  mean=(0.5, 0.4, 0.3),
  std=(0.2, 0.3, 0.4),
)


@pytest.fixture
def cache(tmp_path, monkeypatch):
  """An empty cache, and a hub that answers nothing."""
  folder = tmp_path / "hub"
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  return folder


@pytest.fixture
def online(monkeypatch):
  """A hub that knows some repositories and whose files are those in the cache."""
  asked = []

  def model_info(self, repository, *, revision=None, timeout=None, **settings):
    asked.append((repository, revision))
    kind = {"gone": errors.RepositoryNotFoundError, "old": errors.RevisionNotFoundError}
    if repository.split("/")[-1] in kind or revision == "unknown":
      raise refused(kind.get(repository.split("/")[-1], errors.RevisionNotFoundError))
    return huggingface_hub.ModelInfo(id=repository, sha=MAIN)

  cached = huggingface_hub.hf_hub_download

  def download(repository, name, *, revision=None, local_files_only=False, **settings):
    assert not local_files_only
    try:
      return cached(repository, name, revision=revision, local_files_only=True)
    except errors.LocalEntryNotFoundError:
      raise refused(errors.RemoteEntryNotFoundError) from None

  monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  return asked


def refused(kind):
  """Returns an error as the hub's client raises it."""
  response = types.SimpleNamespace(headers={}, request=None, status_code=404)
  return kind("refused", response=response)


def put(cache, repository, commit=MAIN, refs=("main",), **files):
  """Puts files into the cache as a download does; names have __ for dots."""
  folder = cache / f"models--{repository.replace('/', '--')}"
  snapshot = folder / "snapshots" / commit
  for ref in refs:
    (folder / "refs").mkdir(parents=True, exist_ok=True)
    (folder / "refs" / ref).write_text(commit)
  for name, content in files.items():
    path = snapshot / name.replace("__", ".")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  return snapshot


def test_a_reference_is_found_in_the_cache_without_the_network(cache):
  snapshot = put(cache, "owner/net", model__safetensors=b"x", config__json=b'{"a": 1}')
  found = hub.fetch("hf:owner/net")
  assert found == (snapshot / "model.safetensors", "owner/net", MAIN, {"a": 1}, None)


def test_the_hub_is_asked_for_the_newest(cache, online):
  snapshot = put(cache, "owner/net", model__safetensors=b"x")
  assert hub.fetch("hf:owner/net") == (snapshot / "model.safetensors", "owner/net", MAIN, {}, None)
  assert online == [("owner/net", None)]


@pytest.mark.parametrize("reachable", [False, True], ids=["offline", "online"])
def test_a_revision_and_a_file_can_be_named(cache, request, reachable):
  if reachable:
    request.getfixturevalue("online")
  put(cache, "owner/net", model__safetensors=b"new", other__pth=b"new", config__json=b"{}")
  old = put(
    *(cache, "owner/net", TAGGED, ["v1"]),
    model__safetensors=b"old",
    other__pth=b"old",
    config__json=b"{}",
  )
  for revision in ("v1", TAGGED):
    for end, name in (("", "model.safetensors"), (":other.pth", "other.pth")):
      found = hub.fetch(f"hf:owner/net@{revision}{end}")
      assert (found.path, found.revision) == (old / name, TAGGED)
  found = hub.fetch("hf:owner/net:other.pth")
  assert (found.path.read_bytes(), found.revision) == (b"new", MAIN)


@pytest.mark.parametrize("reachable", [False, True], ids=["offline", "online"])
def test_safetensors_come_before_the_pickle(cache, request, reachable):
  if reachable:
    request.getfixturevalue("online")
  put(cache, "owner/net", pytorch_model__bin=b"x", config__json=b"{}")
  assert hub.fetch("hf:owner/net").path.name == "pytorch_model.bin"
  put(cache, "owner/net", model__safetensors=b"x")
  assert hub.fetch("hf:owner/net").path.name == "model.safetensors"


def test_the_commit_is_read_wherever_the_cache_lies(tmp_path, monkeypatch):
  monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "snapshots" / "hub"))
  monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
  put(tmp_path / "snapshots" / "hub", "owner/net", model__safetensors=b"x", config__json=b"{}")
  assert hub.fetch("hf:owner/net").revision == MAIN


@pytest.mark.parametrize(
  ("reference", "said"),
  [
    ("hf:owner/net", "does not hold model.safetensors or pytorch_model.bin of owner/net"),
    ("hf:owner/net:a.pth", "does not hold a.pth of owner/net.*hf download owner/net`"),
    ("hf:owner/other", "does not hold model.safetensors or pytorch_model.bin of owner/other"),
    (
      "hf:owner/net@v2:x.bin",
      "does not hold x.bin of owner/net in the revision v2.* --revision",
    ),
  ],
)
def test_what_is_not_in_the_cache_cannot_be_had_offline(cache, reference, said):
  put(cache, "owner/net", README__md=b"x")
  put(cache, "owner/net", TAGGED, ["v1"], x__bin=b"x")
  with pytest.raises(InputError, match=f"hub cannot be reached .*{said}.*--from FILE"):
    hub.fetch(reference)


@pytest.mark.parametrize(
  ("reference", "said"),
  [
    ("hf:owner/gone", "no public repository owner/gone with revision main"),
    ("hf:owner/old@v7", "no public repository owner/old with revision v7"),
    ("hf:owner/net@unknown", "no public repository owner/net with revision unknown"),
    ("hf:owner/net", "owner/net holds no model.safetensors or pytorch_model.bin; name its weight"),
    ("hf:owner/net:a.pth", "owner/net holds no a.pth; name its weight file: hf:owner/net:FILE"),
  ],
)
def test_what_the_hub_does_not_have_is_said(cache, online, reference, said):
  put(cache, "owner/net", README__md=b"x")
  with pytest.raises(InputError, match=said):
    hub.fetch(reference)


@pytest.mark.parametrize("reference", ["hf:", "hf:a/b/c", "hf:-a", "hf:owner/ net", "hf:a b:file"])
def test_what_is_no_reference_is_said(cache, reference):
  with pytest.raises(InputError, match=r"is not hf:OWNER/NAME\[@REVISION\]\[:FILE\]"):
    hub.fetch(reference)


def test_a_gated_repository_is_one_clear_error(cache, online, monkeypatch):
  def download(*arguments, **settings):
    raise refused(errors.GatedRepoError)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  with pytest.raises(InputError, match="hf auth login"):
    hub.fetch("hf:owner/net")


def test_without_the_package_the_way_to_install_it_is_said(monkeypatch):
  monkeypatch.setitem(sys.modules, "huggingface_hub", None)
  with pytest.raises(InputError, match=r"the package huggingface_hub .*'repjax\[hub\]'"):
    hub.fetch("hf:owner/net")


@pytest.mark.parametrize(
  ("card", "stated", "name"),
  [
    ({}, {}, None),
    ({"license": "mit"}, {}, "mit"),
    ({}, {"license": "fastvit-license"}, "fastvit-license"),
    ({"license": "other", "license_name": "apple-amlr"}, {"license": "mit"}, "apple-amlr"),
    ({"license": "other"}, {"license": "mobileone-license"}, "mobileone-license"),
    ({"license": ["mit"]}, {"license": None}, None),
  ],
)
def test_the_licence_is_that_of_the_card_or_else_of_the_config(card, stated, name):
  assert hub.license_of(card, {"pretrained_cfg": stated}) == name


def test_the_hub_is_asked_for_the_licence(cache, online, monkeypatch):
  def model_info(self, repository, **settings):
    return huggingface_hub.ModelInfo(id=repository, sha=MAIN, cardData={"license": "mit"})

  monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
  put(cache, "owner/net", model__safetensors=b"x")
  assert hub.fetch("hf:owner/net").license == "mit"


# The preprocessing in config.json


def test_preprocessing_is_what_timm_evaluates_with():
  assert hub.preprocessing(CONFIG) == STATED
  changes = {"input_size": [3, 224, 224], "crop_pct": 0.875, "interpolation": "bilinear"}
  stated = hub.preprocessing({"pretrained_cfg": CONFIG["pretrained_cfg"] | changes})
  assert (stated.image_size, stated.resize_size) == (224, 256)


@pytest.mark.parametrize("config", [{}, {"pretrained_cfg": {}}, {"architectures": ["X"]}])
def test_a_config_may_say_nothing_about_images(config):
  assert hub.preprocessing(config) is None


@pytest.mark.parametrize(
  ("change", "said"),
  [
    ({"crop_mode": "border"}, "crop_mode 'border'"),
    ({"std": [1e-320] * 3}, r"std\[0\] must be a number from .*--from FILE"),
    ({"std": [0, 1, 1]}, r"std\[0\] must be a number from .*--from FILE"),
    ({"mean": [1e300] * 3}, r"mean\[0\] must be a number from .*--from FILE"),
    ({"input_size": [1, 224, 224]}, "square images of 3 channels.*--from FILE"),
    ({"crop_pct": 1e-9}, "crop_pct is 1e-09, and gives no size.*--from FILE"),
    ({"interpolation": "lanczos"}, "interpolation must be one of .*'lanczos'.*--from FILE"),
  ],
)
def test_preprocessing_that_cannot_be_expressed_is_refused(change, said):
  with pytest.raises(InputError, match=said):
    hub.preprocessing({"pretrained_cfg": CONFIG["pretrained_cfg"] | change})


def test_an_import_takes_what_the_repository_states(cache, tmp_path):
  overrides = TINY | {"se_reduction": 4}
  state = cases.random_state("repvgg_d2se", "deploy", "timm", **overrides)
  snapshot = put(cache, "owner/repvgg_d2se", config__json=json.dumps(CONFIG).encode())
  save_file(state, snapshot / "model.safetensors")
  source, workdir = "hf:owner/repvgg_d2se@main", tmp_path / "run"
  record = weights.import_weights(source, workdir, overrides=overrides)
  assert record["source"] == source
  assert record["file"] == "model.safetensors"
  assert (record["revision"], record["license"]) == (MAIN, None)
  assert (record["model"], record["naming"]) == ("repvgg_d2se", "timm")
  spec = repjax.ModelSpec.read(workdir)
  assert spec.preprocessing == STATED
  assert spec.class_names == tuple(CONFIG["label_names"])
  expected = weights.from_torch("repvgg_d2se", state, num_classes=10, **overrides)
  jax.tree.map(np.testing.assert_array_equal, repjax.load(workdir)[1], expected)


def test_names_of_classes_are_not_those_of_a_new_classifier(cache, tmp_path):
  state = cases.random_state("repvgg_a0", "deploy", "timm", **TINY)
  snapshot = put(cache, "owner/repvgg_a0", config__json=json.dumps(CONFIG).encode())
  save_file(state, snapshot / "model.safetensors")
  weights.import_weights(
    "hf:owner/repvgg_a0", tmp_path / "run", num_classes=3, drop_head=True, overrides=TINY
  )
  assert repjax.ModelSpec.read(tmp_path / "run").class_names == ()


def test_an_import_that_cannot_be_fetched_writes_nothing(cache, tmp_path):
  with pytest.raises(InputError, match="the Hugging Face hub cannot be reached"):
    weights.import_weights("hf:owner/net", tmp_path / "runs" / "a")
  assert not (tmp_path / "runs").exists()


# Models by the name of published weights


@pytest.fixture
def a0(cache, monkeypatch):
  """The weights of a small RepVGG-A0 in the cache under the name of the published ones.

  Returns the state dict, and a list of the models that `load` looks for by name.
  """
  looked_for, read = [], workdirs.read_weights

  def read_small(source, *, model_name):
    looked_for.append(model_name)
    return read(source, model_name=model_name, overrides=TINY)

  monkeypatch.setattr(workdirs, "read_weights", read_small)
  state = cases.random_state("repvgg_a0", "train", "timm", **TINY)
  snapshot = put(cache, "timm/repvgg_a0.rvgg_in1k", config__json=json.dumps(CONFIG).encode())
  save_file(state, snapshot / "model.safetensors")
  return state, looked_for


def test_a_model_is_loaded_by_the_name_of_its_weights(a0):
  state, looked_for = a0
  variables = weights.from_torch("repvgg_a0", state, num_classes=10, **TINY)
  model, found, spec = repjax.load("hf:timm/repvgg_a0.rvgg_in1k", deploy=False)
  assert not model.deploy
  jax.tree.map(np.testing.assert_array_equal, found, variables)
  assert (spec.preprocessing, spec.class_names[9]) == (STATED, "class 9")
  plain, found, _ = repjax.load("hf:timm/repvgg_a0.rvgg_in1k@main:model.safetensors")
  assert plain.deploy
  folded = jax.jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  jax.tree.map(np.testing.assert_array_equal, found, {"params": folded})
  assert looked_for == ["repvgg_a0", "repvgg_a0"]


def test_weights_in_deploy_form_have_no_training_form(a0, cache):
  state = cases.random_state("repvgg_a0", "deploy", "timm", **TINY)
  snapshot = put(cache, "owner/plain", config__json=b"{}")
  save_file(state, snapshot / "model.safetensors")
  assert repjax.load("hf:owner/plain")[0].deploy
  with pytest.raises(InputError, match=r"hf:owner/plain holds the deploy form .*repjax\.expand"):
    repjax.load("hf:owner/plain", deploy=False)
  assert a0[1] == [None, None]


@pytest.mark.parametrize("command", [("predict", "a.png"), ("export", "--to", "out")])
def test_commands_take_the_name_of_weights(cache, tmp_path, monkeypatch, command):
  monkeypatch.chdir(tmp_path)
  name, *rest = command
  with pytest.raises(SystemExit, match=r"^error: the Hugging Face hub cannot be reached"):
    cli.main([name, "--workdir", "hf:timm/repvgg_a0.rvgg_in1k", *rest])
  assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_not_in_the_cache_is_one_clear_error_offline(cache):
  with pytest.raises(InputError, match=r"hub cannot be reached .*hf download timm/repvgg_a1"):
    repjax.load("hf:timm/repvgg_a1.rvgg_in1k")


def test_the_table_names_models_and_their_repositories():
  rows = {row.model: row for row in repjax.list_pretrained()}
  assert len(rows) == len(repjax.list_pretrained()) > 30
  assert rows.keys() <= set(repjax.list_models())
  for model, row in rows.items():
    assert "timm" in sources.NAMINGS[model]
    assert (row.top1 is None) == (not row.top1_source)
  for model, golden in helpers.mobile_goldens()["counts"].items():
    row = rows[model]
    assert (row.name, row.license) == (f"hf:{golden['hf']}", golden["license"])
    steps = row.preprocessing
    side = int(golden["input"] / golden["crop_pct"])
    assert (steps.image_size, steps.resize_size) == (golden["input"], side)
    assert steps.interpolation == golden["interpolation"]
