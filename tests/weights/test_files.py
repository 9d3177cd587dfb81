"""`read`: one flat state dict from any of the formats, or an error that says what to do."""

import json
import random
import struct
import sys
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from repjax.errors import InputError
from repjax.weights import files, read
from tests.weights import torch_writer as writer

STATE = {
  "stage0.weight": writer.sample("float32"),
  "stage0.bias": writer.sample("float16", (3,)),
  "stage0.num_batches_tracked": np.asarray(7, np.int64),
}


def save_npz(path, value):
  """Writes a .npz; its entries are the dictionary's."""
  with path.open("wb") as file:
    np.savez(file, **value)
  return path


def save_safetensors(path, value):
  """Writes a .safetensors."""
  save_file(dict(value), path)
  return path


FORMATS = {**writer.FORMATS, "npz": save_npz, "safetensors": save_safetensors}
every_format = pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)


def assert_same(found, expected):
  """Checks that names, dtypes, shapes and bits are the same."""
  assert set(found) == set(expected)
  for name, array in expected.items():
    assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
    assert found[name].tobytes() == array.tobytes()


def refusal(path, **how):
  """Returns the text of the error that reading raises, without the name of the file."""
  with pytest.raises(InputError) as caught:
    read(path, **how)
  assert str(path) in str(caught.value)
  return str(caught.value).replace(str(path), "")


def read_or_refuse(path):
  """Returns what is read, or None if reading ends in an error that names the file."""
  try:
    return read(path)
  except InputError as error:
    if str(path) not in str(error):
      raise AssertionError("the file is not named") from error
    return None


@every_format
@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar", "a.npz", "a.safetensors", "a"])
def test_the_content_decides_and_not_the_name(tmp_path, save, name):
  assert_same(read(save(tmp_path / name, STATE)), STATE)
  assert_same(read(str(tmp_path / name)), STATE)


@pytest.mark.parametrize("save", writer.FORMATS.values(), ids=writer.FORMATS)
@pytest.mark.parametrize(
  "wrapped",
  [
    {"state_dict": STATE},
    {"model": STATE, "epoch": 3, "optimizer": {"state": {}}},
    {"state_dict_ema": STATE, "args": None},
    {"weights": STATE},
    {"state_dict": STATE, "model": {"x": np.ones(2)}},
    {"model": STATE, "state_dict_ema": {"x": np.ones(2)}, "other": {"y": np.ones(2)}},
    {"state_dict": "a text", "model": STATE},
    {"state_dict": {}, "weights": STATE},
    {"state_dict": {"w": 1.5}, "weights": STATE},
    {7: STATE, "epoch": 3},
  ],
  ids=lambda wrapped: "+".join(map(str, wrapped)),
)
def test_a_state_dict_is_found_in_what_wraps_it(tmp_path, save, wrapped):
  assert_same(read(save(tmp_path / "a.pth", wrapped)), STATE)


@pytest.mark.parametrize(
  ("prefix", "count"), [("module.", 1), ("_orig_mod.", 1), ("module.", 2), ("module._orig_mod.", 1)]
)
@every_format
def test_prefixes_of_wrapped_modules_go(tmp_path, save, prefix, count):
  wrapped = {prefix * count + name: array for name, array in STATE.items()}
  assert_same(read(save(tmp_path / "a.pth", wrapped)), STATE)


@every_format
def test_names_that_only_contain_a_prefix_stay(tmp_path, save):
  state = {name: np.ones(1) for name in ("a.module.b", "modules.b", "module", "module_b", "_orig")}
  assert_same(read(save(tmp_path / "a.pth", state)), state)


@every_format
def test_names_that_collide_without_their_prefix_are_refused(tmp_path, save):
  path = save(tmp_path / "a.pth", {"module.w": np.ones(1), "w": np.zeros(1)})
  text = refusal(path)
  assert "holds w twice" in text
  assert "module." in text


SEVERAL = {"state_dict": STATE, "model": {"m": np.ones(1)}, "ema": {"e": np.ones(2)}, "epoch": 1}


class TestEntry:
  @pytest.fixture
  def path(self, tmp_path):
    """A checkpoint of three state dicts."""
    return writer.save_zip(tmp_path / "a.pth", SEVERAL)

  @pytest.mark.parametrize("entry", ["state_dict", "model", "ema"])
  def test_it_chooses_one(self, path, entry):
    assert_same(read(path, entry=entry), SEVERAL[entry])

  @pytest.mark.parametrize("entry", ["epoch", "nothing", ""])
  def test_an_unknown_one_is_refused_and_the_known_listed(self, path, entry):
    text = refusal(path, entry=entry)
    assert f"no state dict called {entry!r}" in text
    assert text.endswith("it has: state_dict, model, ema")

  def test_of_a_bare_state_dict_there_is_none(self, tmp_path):
    path = writer.save_zip(tmp_path / "b.pth", STATE)
    assert refusal(path, entry="model").endswith("it has: (the file itself)")

  def test_of_something_else_there_is_none(self, tmp_path):
    path = writer.save_zip(tmp_path / "b.pth", [1, 2])
    assert refusal(path, entry="model").endswith("it has: none")

  def test_several_without_a_known_name_are_listed(self, tmp_path):
    path = writer.save_zip(tmp_path / "b.pth", {"a": STATE, "b": STATE, "epoch": 1})
    text = refusal(path)
    assert "holds several state dicts, a, b;" in text
    assert "entry=" in text


@pytest.mark.parametrize(
  ("value", "held"),
  [
    ([STATE], "list"),
    ("text", "str"),
    (None, "NoneType"),
    (np.ones(3), "ndarray"),
    ({}, "dictionary"),
    ({"epoch": 3}, "a dictionary of epoch"),
    ({"a": {"b": STATE}}, "a dictionary of a"),
    ({1: np.ones(1)}, "a dictionary of 1"),
  ],
  ids=str,
)
@pytest.mark.parametrize("save", writer.FORMATS.values(), ids=writer.FORMATS)
def test_what_holds_no_state_dict_is_named(tmp_path, save, value, held):
  text = refusal(save(tmp_path / "a.pth", value))
  assert "holds no state dict" in text
  assert held in text
  assert "torch.save(model.state_dict(), FILE)" in text


def test_a_missing_file_is_named(tmp_path):
  assert "does not exist" in refusal(tmp_path / "a.pth")
  assert "hf:" not in refusal(tmp_path / "a.pth")
  with pytest.raises(InputError, match="or hf:timm/net for the hub"):
    read(Path("timm/net"))


def test_a_folder_is_refused(tmp_path):
  refusal(tmp_path)


@pytest.mark.parametrize("size", range(9))
def test_a_file_too_short_to_be_any_is_refused(tmp_path, size):
  (tmp_path / "a.pth").write_bytes(b"\x80" * size)
  assert f"has {size} bytes" in refusal(tmp_path / "a.pth")


@pytest.mark.parametrize(
  "content",
  [
    b"<!DOCTYPE html><html>Not found</html>",
    b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 102\n",
    b"just some text, long enough",
    b"\0" * 100,
    b"\xff" * 100,
    b"PK\x05\x06" + b"\0" * 18,
    b"\x1f\x8b" + b"x" * 100,
    b"(" * 100,
    b"\x80\x02}.         ",
    (2**31).to_bytes(8, "little") + b"{",
    (2**63).to_bytes(8, "little") + b"{",
    (2).to_bytes(8, "little") + b"{}",
    (1).to_bytes(8, "little") + b"{",
  ],
  ids=lambda content: repr(content[:12]),
)
def test_something_else_is_refused(tmp_path, content):
  (tmp_path / "a.pth").write_bytes(content)
  refusal(tmp_path / "a.pth")


def test_a_zip_of_something_else_is_refused(tmp_path):
  with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
    archive.writestr("readme.txt", "text")
  refusal(tmp_path / "a.pth")


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
  path = writer.save_zip(tmp_path / "a.pth", STATE)

  def denied(*_, **__):
    raise PermissionError(13, "Permission denied", str(path))

  monkeypatch.setattr("repjax.regular_files.opened", denied)
  assert "Permission denied" in refusal(path)


class TestSafetensors:
  @pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int64", "bool", "uint8"])
  def test_dtypes_stay(self, tmp_path, dtype):
    state = {"w": writer.sample(dtype)}
    assert_same(read(save_safetensors(tmp_path / "a", state)), state)

  @pytest.mark.parametrize(
    ("kind", "size"),
    [
      *(("F8_E4M3", 16), ("F8_E5M2", 16), ("F8_E8M0", 16), ("F4", 8), ("F6_E2M3", 12)),
      *(("C64", 128), ("X9", 16)),
    ],
  )
  def test_kinds_that_numpy_lacks_are_an_input_error_at_most(self, tmp_path, kind, size):
    text = json.dumps({"w": {"dtype": kind, "shape": [16], "data_offsets": [0, size]}}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + b"\x38" * size)
    found = read_or_refuse(tmp_path / "a")
    assert found is None or found["w"].shape == (16,)

  @pytest.mark.parametrize(
    "entry",
    [
      {"dtype": "F32", "shape": [4], "data_offsets": [0, 1000]},
      {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
      {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 0]},
      {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
      {"dtype": "F32", "shape": [1]},
      [],
    ],
    ids=str,
  )
  def test_a_header_that_lies_is_refused(self, tmp_path, entry):
    text = json.dumps({"w": entry}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + bytes(16))
    refusal(tmp_path / "a")

  def test_without_its_package_it_says_what_to_install(self, tmp_path, monkeypatch):
    path = save_safetensors(tmp_path / "a", STATE)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert refusal(path).endswith(
      "the package safetensors must be installed: pip install 'repjax[hub]'"
    )

  def test_other_formats_do_without_its_package(self, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    assert_same(read(writer.save_zip(tmp_path / "a", STATE)), STATE)


class TestNpz:
  def test_compressed_ones_are_read(self, tmp_path):
    with (tmp_path / "a").open("wb") as file:
      np.savez_compressed(file, **STATE)
    assert_same(read(tmp_path / "a"), STATE)

  def test_bfloat16_does_not_turn_into_something_else_silently(self, tmp_path):
    found = read_or_refuse(save_npz(tmp_path / "a", {"w": writer.sample("bfloat16")}))
    assert found is None or found["w"].dtype == jnp.bfloat16

  def test_objects_in_it_are_never_unpickled(self, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    held = np.empty(1, object)
    held[0] = Payload()
    path = save_npz(tmp_path / "a", {"w": np.ones(1), "x": held})
    assert "pickle" in refusal(path)
    assert not (tmp_path / "sentinel").exists()

  @pytest.mark.parametrize(
    "header",
    [
      "{'descr': '<f4', 'fortran_order': False, 'shape': (10**12,), }",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }",
      "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }",
      "{'descr': '|O', 'fortran_order': False, 'shape': (1,), }",
      "{'descr': [('a', '|O')], 'fortran_order': False, 'shape': (1,), }",
      "{'descr': 'x9', 'fortran_order': False, 'shape': (1,), }",
      "{'descr': '<f4'}",
      "[" * 3000,
      "__import__('os').system('touch sentinel')",
      "",
      "{",
    ],
  )
  def test_a_header_that_lies_is_refused(self, tmp_path, monkeypatch, header):
    monkeypatch.chdir(tmp_path)
    text = header.encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(8)
    with zipfile.ZipFile("a", "w") as archive:
      archive.writestr("w.npy", content)
    refusal(tmp_path / "a")
    assert not (tmp_path / "sentinel").exists()

  @pytest.mark.parametrize("content", [b"", b"text", b"\x80\x02}."])
  def test_an_array_that_is_none_is_refused(self, tmp_path, content):
    with zipfile.ZipFile(tmp_path / "a", "w") as archive:
      archive.writestr("w.npy", content)
    refusal(tmp_path / "a")

  def test_an_encrypted_one_is_refused(self, tmp_path):
    content = bytearray(save_npz(tmp_path / "a", STATE).read_bytes())
    for mark, field in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
      begin = content.find(mark)
      while begin >= 0:
        content[begin + field] |= 1
        begin = content.find(mark, begin + 1)
    (tmp_path / "a").write_bytes(content)
    refusal(tmp_path / "a")


class Payload:
  """Creates a file when it is unpickled."""

  def __reduce__(self):
    return open, ("sentinel", "w")


@every_format
def test_a_file_cut_short_anywhere_is_refused(tmp_path, save):
  path = save(tmp_path / "a.pth", STATE)
  content = path.read_bytes()
  for length in range(0, len(content), max(1, len(content) // 150)):
    path.write_bytes(content[:length])
    refusal(path)


@every_format
def test_damage_ends_in_an_input_error_at_most(tmp_path, save):
  path = save(tmp_path / "a.pth", STATE)
  content, rng = path.read_bytes(), random.Random(1)
  for _ in range(500):
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
      damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    path.write_bytes(damaged)
    read_or_refuse(path)


@pytest.mark.parametrize("save", [writer.save_zip, save_npz], ids=["pth", "npz"])
def test_damage_to_an_archives_directory_ends_in_an_input_error_at_most(tmp_path, save):
  path = save(tmp_path / "a.pth", STATE)
  content, rng = path.read_bytes(), random.Random(2)
  begin = content.find(b"PK\x01\x02")
  for position in range(begin, len(content)):
    damaged = bytearray(content)
    damaged[position] = rng.choice((0, 255, damaged[position] ^ 1, damaged[position] ^ 128))
    path.write_bytes(damaged)
    read_or_refuse(path)


def test_state_dicts_lists_them_by_entry():
  assert files.state_dicts(STATE) == {"": STATE}
  assert files.state_dicts({"a": STATE, "b": 1, "c": {}}) == {"a": STATE}
  assert files.state_dicts([STATE]) == {}


@pytest.mark.parametrize("held", [{}, {"readme.txt": b"hello"}], ids=["nothing", "a text"])
def test_an_npz_without_arrays_is_called_so(tmp_path, held):
  path = tmp_path / "a.npz"
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in held.items():
      archive.writestr(name, content)
  with pytest.raises(InputError, match=r"a\.npz holds no arrays.*numpy\.savez"):
    read(path)
