"""Folded parameters in a folder: written whole, checked when read, and known again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax import disk
from repjax.errors import InputError
from tests.helpers import assert_one_paragraph
from tests.libraries import images, linen


@pytest.fixture(scope="module")
def block():
  """A fused function and its folded parameters."""
  function, params = linen()
  fused = repjax.fuse(function, params, images(1))
  return fused, fused.fold(params), function, params


def test_a_process_with_shapes_alone_goes_on(block, tmp_path):
  fused, small, function, params = block
  fused.save(small, tmp_path / "small")
  fused.save(small, tmp_path / "small")  # an earlier folder is replaced
  shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
  again = repjax.fuse(function, shapes, jax.ShapeDtypeStruct((2, 16, 16, 3), jnp.float32))
  loaded = again.load(tmp_path / "small")
  assert loaded.keys() == small.keys()
  for name, leaf in small.items():
    np.testing.assert_array_equal(loaded[name], leaf)


def test_arrays_may_have_any_names_and_dtypes(tmp_path):
  params = {"../a b": {"*": np.ones((3, 3, 3, 4), np.float32)}}
  params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)

  def function(params, x):
    spec = ("NHWC", "HWIO", "NHWC")
    kernel = params["../a b"]["*"]
    y = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=spec)
    return 2 * y + 1

  fused = repjax.fuse(function, params, jnp.ones((1, 8, 8, 3), jnp.bfloat16))
  small = fused.fold(params)
  fused.save(small, tmp_path / "small")
  loaded = fused.load(tmp_path / "small")
  assert {name: (leaf.shape, leaf.dtype) for name, leaf in loaded.items()} == {
    name: (leaf.shape, leaf.dtype) for name, leaf in small.items()
  }
  assert sorted(path.name for path in tmp_path.iterdir()) == ["small"]


def test_random_keys_are_written_and_read(tmp_path):
  key = jax.random.key(3, impl="rbg")
  params = {"kernel": jnp.ones((3, 4)), "key": key}

  def function(params, x):
    return 2 * (x @ params["kernel"]), params["key"]

  fused = repjax.fuse(function, params, jnp.ones((2, 3)))
  fused.save(fused.fold(params), tmp_path / "small")
  loaded = fused.load(tmp_path / "small")
  assert jax.random.key_impl(loaded["key"]) == jax.random.key_impl(key)
  wanted = jax.random.key_data(key)
  np.testing.assert_array_equal(jax.random.key_data(loaded["key"]), wanted)


def test_parameters_of_a_different_function_are_refused(block, tmp_path):
  fused, small, *_ = block
  fused.save(small, tmp_path / "small")
  other = repjax.fuse(lambda p, x: x.mean((1, 2)) @ p["head"], {"head": jnp.ones((3, 4))}, images())
  with pytest.raises(InputError, match="parameters of a different function: head is missing") as no:
    other.load(tmp_path / "small")
  assert_one_paragraph(no.value)
  with pytest.raises(InputError, match="not from its own fold"):
    other.save(small, tmp_path / "other")
  assert not (tmp_path / "other").exists()


def test_parameters_of_a_different_function_are_not_replaced(block, tmp_path):
  fused, small, *_ = block
  fused.save(small, tmp_path / "small")
  other = repjax.fuse(lambda p, x: x.mean((1, 2)) @ p["head"], {"head": jnp.ones((3, 4))}, images())
  with pytest.raises(InputError, match="a different function, so it is not replaced") as no:
    other.save(other.fold({"head": jnp.ones((3, 4))}), tmp_path / "small")
  assert_one_paragraph(no.value)
  assert fused.load(tmp_path / "small").keys() == small.keys()


def test_other_folders_of_repjax_are_not_replaced(block, tmp_path):
  fused, small, *_ = block
  (tmp_path / "run").mkdir()
  (tmp_path / "run/notes.txt").write_text("mine")
  disk.write_manifest(tmp_path / "run")
  with pytest.raises(InputError, match="something else than folded parameters"):
    fused.save(small, tmp_path / "run")
  assert (tmp_path / "run/notes.txt").exists()


def test_damage_is_found(block, tmp_path):
  fused, small, *_ = block
  fused.save(small, tmp_path / "small")
  files = [path for path in (tmp_path / "small/params").rglob("*") if path.is_file()]
  file = max(files, key=lambda path: path.stat().st_size)
  data = bytearray(file.read_bytes())
  data[100] ^= 1
  file.write_bytes(data)
  with pytest.raises(InputError, match="is damaged"):
    fused.load(tmp_path / "small")
  assert fused.load(tmp_path / "small", verify=False).keys() == small.keys()


def test_what_is_lost_or_not_finite_is_named(block, tmp_path):
  fused, small, *_ = block
  name = max(small, key=lambda name: small[name].size)
  fused.save(small | {name: small[name] * np.nan}, tmp_path / "small")
  with pytest.raises(InputError, match=f"not finite .*: {name}\\. Fold finite parameters") as no:
    fused.load(tmp_path / "small")
  assert_one_paragraph(no.value)
  assert fused.load(tmp_path / "small", verify=False).keys() == small.keys()
  (tmp_path / "small/fused.json").unlink()
  with pytest.raises(InputError, match=r"fused\.json is damaged: it is missing"):
    fused.load(tmp_path / "small")


def test_a_folder_of_folded_parameters_says_how_it_is_read(block, tmp_path):
  fused, small, *_ = block
  fused.save(small, tmp_path / "small")
  for read in (repjax.load, repjax.deploy.Predictor):
    with pytest.raises(InputError, match=r"folded parameters of a function: .*fused\.load") as no:
      read(tmp_path / "small")
    assert_one_paragraph(no.value)


def test_folders_of_others_are_left_alone(block, tmp_path):
  fused, small, *_ = block
  (tmp_path / "notes.txt").write_text("mine")
  with pytest.raises(InputError, match="repjax did not write"):
    fused.save(small, tmp_path)
  with pytest.raises(InputError, match="holds no folded parameters"):
    fused.load(tmp_path)
  with pytest.raises(InputError, match="holds no folded parameters"):
    fused.load(tmp_path / "missing")
