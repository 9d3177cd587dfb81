"""Damage to any file of any kind of folder is noticed when the folder is read, and named."""

import dataclasses
import json
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax import cli, disk, runs
from repjax.disk import trees
from repjax.errors import InputError
from repjax.spec import ModelSpec, Preprocessing
from tests.helpers import halves, randomise, spread
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

SPEC = ModelSpec("repvgg_a0", 10, tiny.OVERRIDES, Preprocessing(16, 16))


def variables_of(seed):
  return randomise(SPEC.variable_shapes(), seed=seed)


def params_of(seed):
  return jax.jit(repjax.reparameterize)(*halves(variables_of(seed)))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
  """A folder with a run, an import and two exports, which no test may change."""
  folder = tmp_path_factory.mktemp("written")
  variables, params = variables_of(0), params_of(0)
  workdir = folder / "run"
  runs.write_start(workdir, config={}, data={}, spec=SPEC.to_json())
  writer = runs.CheckpointWriter(workdir)
  writer.save(4, {"variables": variables}, 0.5)
  writer.close()
  stats = variables["batch_stats"]
  runs.write_recalibrated(workdir, 4, stats, stats, {"batches": 1})
  runs.write_deploy(workdir, params, SPEC.to_json(), {"accuracy": {"deploy": 0.5}})
  record = {"kind": "train"}
  runs.write_import(folder / "import", variables, spec=SPEC.to_json(), record=record, config={})
  for name in ("model.onnx", "model.stablehlo"):
    facts = {"format": name.removeprefix("model.")}
    runs.write_export(
      folder / facts["format"],
      {name: b"a program"},
      spec=SPEC.to_json(),
      facts=facts,
      params=params,
    )
  return folder


@pytest.fixture
def folder(written, tmp_path):
  """A copy of `written`, which a test may change."""
  return shutil.copytree(written, tmp_path / "copy")


READERS = {
  "run/deploy": lambda folder, **options: repjax.load(folder / "run", **options),
  "run/recalibrated": lambda folder, **o: repjax.load(folder / "run", deploy=False, **o),
  "run/checkpoints/4": lambda folder, **o: repjax.load(folder / "run", deploy=False, **o),
  "import/checkpoints/0": lambda folder, **options: repjax.load(folder / "import", **options),
  "onnx": lambda folder, **options: repjax.load(folder / "onnx", **options),
  "stablehlo": lambda folder, **options: repjax.load(folder / "stablehlo", **options),
  "run": lambda folder, **options: repjax.load(folder / "run", deploy=False, **options),
  "import": lambda folder, **options: repjax.load(folder / "import", **options),
}
# Files that only a run that continues reads, or a person.
NOT_READ = ("metrics/", "bookmark/", "import.json")


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 4
  path.write_bytes(data)


@pytest.mark.parametrize("name", spread(READERS, READERS.keys() - {"run/recalibrated"}))
def test_a_flipped_byte_in_any_file_is_noticed_and_named(folder, name):
  listed = json.loads((folder / name / "manifest.json").read_text())["files"]
  READERS[name](folder)
  checked = [file for file in listed if not file.startswith(NOT_READ)]
  assert checked
  for file in checked:
    path = folder / name / file
    whole = path.read_bytes()
    flip(path)
    with pytest.raises(InputError, match="is damaged: its bytes are not those") as caught:
      READERS[name](folder)
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(InputError, match=r"is damaged: it is missing|does not exist"):
      READERS[name](folder)
    path.write_bytes(whole)
  READERS[name](folder)


@pytest.mark.parametrize("name", ["run/deploy", "onnx", "stablehlo"])
def test_arrays_that_changed_places_are_noticed(folder, name):
  params = folder / name / "params"
  pair = [params / f"stage{number}.block0.RepConv_0.conv.bias" for number in (1, 2)]
  (params / "aside").mkdir()
  pair[0].rename(params / "aside" / "x"), pair[1].rename(pair[0])
  (params / "aside" / "x").rename(pair[1])
  (params / "aside").rmdir()
  with pytest.raises(InputError, match=r"\.conv\.bias/\S+ is damaged"):
    READERS[name](folder)


@pytest.mark.parametrize("name", READERS)
def test_checksums_that_are_missing_in_one_folder_are_said(folder, name, capsys):
  (folder / name / "manifest.json").unlink()
  READERS[name](folder)
  assert capsys.readouterr().err.count("cannot be checked for damage") == 1


@pytest.mark.parametrize("name", ["run/deploy", "run/checkpoints/4", "run/recalibrated"])
def test_folders_without_checksums_load_with_one_warning(folder, name, capsys):
  for path in (folder / "run").rglob("manifest.json"):
    path.unlink()
  found = READERS[name](folder)[1]
  assert capsys.readouterr().err.count("cannot be checked for damage") == 1
  READERS[name](folder)
  assert capsys.readouterr().err == ""
  expected = READERS[name](folder, verify=False)[1]
  jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("name", ["run/deploy", "run/checkpoints/4", "onnx"])
def test_parameters_that_are_not_finite_are_named_on_loading(folder, name):
  spoiled = variables_of(0) if "checkpoints" in name else {"params": params_of(0)}
  head = spoiled["params"]["head"]
  head["bias"] = head["bias"].at[3].set(jnp.nan)
  item = folder / name / ("variables" if "checkpoints" in name else "params")
  shutil.rmtree(item)
  trees.write_tree(item, spoiled if "checkpoints" in name else spoiled["params"])
  disk.write_manifest(folder / name)
  with pytest.raises(InputError, match=r"not finite \(NaN or infinity\), in (params/)?head/bias"):
    READERS[name](folder)
  READERS[name](folder, verify=False)


@pytest.mark.parametrize("is_rewritten", [False, True])
def test_a_flipped_byte_in_the_roundings_of_a_run_is_noticed(tmp_path, is_rewritten):
  facts = {"activations": "uint8", "weight_bits": 7, "tensors": {"x": [0.5, 128.0]}, "weights": {}}
  runs.write_roundings(tmp_path, facts)
  runs.write_start(tmp_path, config={}, data={}, spec=SPEC.to_json())
  if is_rewritten:
    facts["tensors"] = {"x": [0.25, 128.0]}
    runs.write_roundings(tmp_path, facts)
  assert runs.read_roundings(tmp_path) == facts
  path = runs.rounding_file(tmp_path)
  path.write_text(path.read_text().replace("128.0", "129.0"))
  with pytest.raises(InputError, match=r"rounding\.json is damaged: its bytes are not those"):
    runs.read_roundings(tmp_path)


def test_a_command_names_damage_and_the_way_out(folder, run_command, tmp_path):
  flip(folder / "run" / "deploy" / "report.json")
  target = tmp_path / "weights.safetensors"
  arguments = ("export-weights", "--workdir", folder / "run", "--to", target, "--form", "deploy")
  with pytest.raises(SystemExit, match=r"^error: \S*report\.json is damaged.*--no-verify"):
    run_command(*arguments)
  run_command(*arguments, "--no-verify")


@pytest.mark.parametrize(
  "command",
  [
    *("predict", "evaluate", "convert", "recalibrate", "export", "quantize", "report", "summary"),
  ],
)
def test_commands_that_read_a_folder_have_a_flag_against_the_check(command, capsys):
  with pytest.raises(SystemExit):
    cli.main([command, "--help"])
  assert "--no-verify" in capsys.readouterr().out


def test_a_reader_beside_conversions_sees_one_network_or_the_other(tmp_path):
  networks = [params_of(seed) for seed in (0, 1)]
  specs = [dataclasses.replace(SPEC, preprocessing=Preprocessing(size, 32)) for size in (16, 32)]
  runs.write_deploy(tmp_path, networks[0], specs[0].to_json(), {})
  ended = threading.Event()

  def convert_in_turns():
    for number in range(1, 30):
      which = number % 2
      runs.write_deploy(tmp_path, networks[which], specs[which].to_json(), {})
    ended.set()

  writer = threading.Thread(target=convert_in_turns)
  writer.start()
  seen = set()
  while not ended.is_set():
    _, variables, spec = repjax.load(tmp_path)
    which = [16, 32].index(spec.preprocessing.image_size)
    jax.tree.map(np.testing.assert_array_equal, variables["params"], networks[which])
    seen.add(which)
  writer.join()
  assert seen == {0, 1}
