"""StableHLO: written, read back here and in another process, and what keeps it from that."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.deploy import layouts
from repjax.deploy.gpu import summed_axes
from repjax.errors import InputError
from repjax.inference import inference
from tests.deploy.tiny import SPEC
from tests.helpers import assert_close

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

needs_flatbuffers = pytest.mark.skipif(
  importlib.util.find_spec("flatbuffers") is None,
  reason="jax.export writes files by flatbuffers: pip install 'repjax[export]'",
)
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), np.uint8)
# Runs an exported folder with jax alone, then as repjax reads it back.
PROGRAM = """
import sys
import jax, numpy as np
from jax import export
folder, pixels, params, result = sys.argv[1:]
with open(folder + "/model.stablehlo", "rb") as file:
  program = export.deserialize(bytearray(file.read()))
flat = np.load(params)
leaves = [flat[str(index)] for index in range(len(flat.files))]
(shapes, _), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
tree = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
np.save(result, program.call(tree, np.load(pixels)))
assert not {"repjax", "flax"} & set(sys.modules)
import repjax
program = repjax.deploy.load_exported(folder, batch_sizes=(4,))
np.save("again_" + result, program(np.load(pixels)))
"""


def logits_of(small, pixels):
  return jax.jit(small[0].apply)(small[1], SPEC.preprocessing.normalize(jnp.asarray(pixels)))


@pytest.fixture(scope="module")
def exported(small, quickly, tmp_path_factory):
  """A folder of the small model, which no test may change, and what `export` returned."""
  folder = tmp_path_factory.mktemp("exported") / "small"
  return folder, repjax.deploy.export(*small, SPEC, folder)


@needs_flatbuffers
@pytest.mark.parametrize("devices", [1, 4])
def test_what_is_read_back_gives_the_models_logits(exported, small, fastest, devices):
  fastest(devices)
  program = repjax.deploy.load_exported(exported[0], batch_sizes=(1, 4))
  assert (program.image_size, program.input_dtype) == ((16, 16), np.uint8)
  assert program.plans[4].devices == devices
  expected = logits_of(small, PIXELS)
  for count in (1, 3, 5):
    assert_close(program(PIXELS[:count]), expected[:count], 1e-5)


@needs_flatbuffers
def test_a_program_that_is_read_back_knows_the_matrices_of_the_traced_one(
  exported, small, monkeypatch
):
  known = []
  monkeypatch.setattr(layouts, "wanted_axes", lambda *given: known.append(given[4]) or {})
  repjax.deploy.load_exported(exported[0], batch_sizes=(1,), devices=jax.devices()[:1])
  function, tree, *_ = inference(
    *small, image_size=16, dtype="float32", preprocessing=SPEC.preprocessing, probabilities=False
  )
  assert known == [summed_axes(function, tree, PIXELS[:1])]


@needs_flatbuffers
def test_another_process_runs_it_without_repjax_and_with_it(exported, small, tmp_path):
  params = repjax.load(exported[0])[1]["params"]
  flat = {str(index): np.asarray(leaf) for index, leaf in enumerate(jax.tree.leaves(params))}
  np.savez(tmp_path / "params.npz", **flat)
  np.save(tmp_path / "pixels.npy", PIXELS[:3])
  # flatbuffers may be in a different folder than the packages of this Python.
  environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
  environment["XDG_CACHE_HOME"] = str(tmp_path)
  names = ("pixels.npy", "params.npz", "result.npy")
  command = [sys.executable, "-c", PROGRAM, exported[0], *names]
  subprocess.run(command, env=environment, cwd=tmp_path, check=True)
  expected = logits_of(small, PIXELS[:3])
  for name in ("result.npy", "again_result.npy"):
    assert_close(np.load(tmp_path / name), expected, 1e-5)


@needs_flatbuffers
def test_the_folder_says_what_it_is_and_is_a_deploy_folder_too(exported, small):
  folder, facts = exported
  assert json.loads((folder / "export.json").read_text()) == facts
  assert facts == {
    "format": "stablehlo",
    "dtype": "float32",
    "image_size": 16,
    "input": "uint8",
    "output": "logits",
    "platforms": ["cpu", "cuda"],
    "summed_axes": facts["summed_axes"],
    "jax": jax.__version__,
    "note": facts["note"],
  }
  assert facts["summed_axes"]["params/head/kernel"] == 0
  assert "six months" in facts["note"]
  model, variables, spec = repjax.load(folder)
  assert spec == SPEC
  normalized = SPEC.preprocessing.normalize(jnp.asarray(PIXELS))
  assert_close(jax.jit(model.apply)(variables, normalized), logits_of(small, PIXELS), 1e-5)


@needs_flatbuffers
def test_normalized_input_half_precision_and_probabilities(small, tmp_path):
  facts = repjax.deploy.export(
    *small,
    SPEC,
    tmp_path / "half",
    dtype=jnp.bfloat16,
    platforms=["cpu"],
    normalize=False,
    probabilities=True,
  )
  assert (facts["dtype"], facts["input"], facts["output"]) == (
    "bfloat16",
    "float32",
    "probabilities",
  )
  program = repjax.deploy.load_exported(
    tmp_path / "half", batch_sizes=(2,), devices=jax.devices()[:1]
  )
  assert program.input_dtype == np.float32
  tree = program.programs[2]._tree
  assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {jnp.dtype(jnp.bfloat16)}
  rows = program(np.asarray(SPEC.preprocessing.normalize(jnp.asarray(PIXELS))))
  assert rows.dtype == np.float32
  assert_close(rows, jax.nn.softmax(logits_of(small, PIXELS)), 5e-2)


@needs_flatbuffers
def test_the_script_exports_a_folder_and_says_for_how_long(
  run_command, small_folder, small, tmp_path
):
  target = tmp_path / "below" / "exported"
  printed = run_command("export", "--workdir", small_folder, "--to", target)
  first, promise, last = printed.splitlines()
  assert first == (
    "repvgg_a0, float32, for cpu and cuda: uint8 (N, 16, 16, 3) -> logits float32 (N, 10)"
  )
  assert "for six months" in promise
  assert last == f"saved: {target}"
  program = repjax.deploy.load_exported(target, batch_sizes=(5,), devices=jax.devices()[:1])
  assert_close(program(PIXELS), logits_of(small, PIXELS), 1e-5)
  with pytest.raises(SystemExit, match=r"^error: .*exists already"):
    run_command("export", "--workdir", small_folder, "--to", target)
  assert {path.name for path in target.parent.iterdir()} == {"exported"}


@needs_flatbuffers
def test_damage_expiry_and_other_platforms_are_refused(exported, small, tmp_path):
  folder = shutil.copytree(exported[0], tmp_path / "copy")
  program = folder / "model.stablehlo"
  whole = program.read_bytes()
  program.write_bytes(whole[: len(whole) // 2])
  with pytest.raises(InputError, match=r"model\.stablehlo is damaged: it has \d+ bytes instead"):
    repjax.deploy.load_exported(folder)
  with pytest.raises(InputError, match=r"model\.stablehlo cannot be read by jax .*repjax export"):
    repjax.deploy.load_exported(folder, verify=False)
  program.unlink()
  with pytest.raises(InputError, match=r"model\.stablehlo is damaged: it is missing"):
    repjax.deploy.load_exported(folder)
  with pytest.raises(InputError, match=r"model\.stablehlo cannot be read: No such file"):
    repjax.deploy.load_exported(folder, verify=False)
  with pytest.raises(InputError, match=r"export\.json does not exist"):
    repjax.deploy.load_exported(tmp_path)
  repjax.deploy.export(*small, SPEC, tmp_path / "cuda", platforms=["cuda"])
  with pytest.raises(InputError, match=r"is for cuda, .* are cpu\. .*--platforms cuda cpu"):
    repjax.deploy.load_exported(tmp_path / "cuda")


@needs_flatbuffers
def test_nothing_is_left_where_writing_fails(small, tmp_path, monkeypatch):
  def fail(path, tree):
    raise OSError(28, "No space left on device")

  monkeypatch.setattr("repjax.disk.trees.write_tree", fail)
  with pytest.raises(InputError, match="could not be written: No space left"):
    repjax.deploy.export(*small, SPEC, tmp_path / "out")
  assert list(tmp_path.iterdir()) == []


def test_platforms_and_folders_are_checked_first(small, tmp_path):
  (tmp_path / "theirs").touch()
  with pytest.raises(InputError, match="exists already"):
    repjax.deploy.export(*small, SPEC, tmp_path)
  with pytest.raises(InputError, match=r"unknown platform .gpu.; did you mean tpu or cpu"):
    repjax.deploy.export(*small, SPEC, tmp_path / "out", platforms=["gpu"])


def test_without_flatbuffers_the_way_out_is_said(
  small, run_command, small_folder, tmp_path, monkeypatch
):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec",
    lambda name, *rest: None if name == "flatbuffers" else find_spec(name, *rest),
  )
  with pytest.raises(InputError, match=r"pip install 'repjax\[deploy\]'"):
    repjax.deploy.export(*small, SPEC, tmp_path / "out")
  with pytest.raises(SystemExit, match=r"^error: for StableHLO files, the package flatbuffers"):
    run_command("export", "--workdir", small_folder, "--to", tmp_path / "out")
  assert list(tmp_path.iterdir()) == []
  (tmp_path / "export.json").write_text('{"image_size": 16}')
  with pytest.raises(InputError, match=r"pip install 'repjax\[deploy\]'"):
    repjax.deploy.load_exported(tmp_path)
