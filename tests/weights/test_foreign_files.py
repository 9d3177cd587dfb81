"""Files of other programs and hostile files: each is named for what it is, and costs little."""

import json
import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from repjax.errors import InputError
from repjax.weights import read
from tests.weights import torch_writer as writer
from tests.weights.torch_writer import Call, Name, Raw, Storage, tensor

STATE = {"w": writer.sample("float32")}


def refusal(path):
  """Returns the text with which `read` refuses a file, which is one printable line."""
  with pytest.raises(InputError) as caught:
    read(path)
  text = str(caught.value)
  assert str(path) in text
  assert text.isprintable()
  return text.replace(str(path), "")


class TestFilesOfOtherPrograms:
  """None of them is called truncated, and each text has a way out."""

  def said(self, path, content):
    path.write_bytes(content)
    text = refusal(path)
    assert "truncated" not in text
    assert "fetch it again" not in text
    return text

  @pytest.mark.parametrize("protocol", [0, 2, 4, 5])
  def test_pickled_numpy_arrays(self, tmp_path, protocol):
    content = pickle.dumps({"w": np.ones((3, 4), np.float32)}, protocol)
    assert "numpy.savez" in self.said(tmp_path / "a.pkl", content)

  def test_paddle(self, tmp_path):
    value = {"w": np.ones(3), "StructuredToParameterName@@": {"w": "linear_0.w_0"}}
    assert "paddle.load" in self.said(tmp_path / "a.pdparams", pickle.dumps(value, 4))

  @pytest.mark.parametrize("indent", [None, 2])
  def test_the_index_of_a_checkpoint_in_several_files(self, tmp_path, indent):
    names = {f"layer{number}.weight": "model-00001-of-00002.safetensors" for number in range(300)}
    index = json.dumps({"metadata": {"total_size": 9}, "weight_map": names}, indent=indent)
    text = self.said(tmp_path / "model.safetensors.index.json", index.encode())
    assert "merge" in text

  @pytest.mark.parametrize(
    ("head", "said"),
    [
      (b"\x89HDF\r\n\x1a\n", "Keras"),
      (b"\x93NUMPY\x01\0", "numpy.savez"),
      (b"GGUF\x03\0\0\0", "GGUF"),
      (b"\x1f\x8b\x08\0", "gunzip"),
      (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
      (b"\n<!DOCTYPE html>", "web page"),
      (b"weights".ljust(257, b"\0") + b"ustar\x0000", "tar xf"),
      (b"\x08\x08\x12\x07pytorch\x1a\x062.4.0", "ONNX"),
      (b'{"epoch": 3}', "JSON"),
      (b"\x1c\0\0\0TFL3", "TFLite"),
      (b"\x82\xa6params\x81\xa4head", "msgpack_restore"),
      (b'model_checkpoint_path: "model.ckpt-1"\n', "TensorFlow"),
      (b'<?xml version="1.0"?>\n<net name="a">', "OpenVINO"),
    ],
    ids=lambda value: repr(value[:12]),
  )
  def test_known_first_bytes(self, tmp_path, head, said):
    assert said in self.said(tmp_path / "a.bin", head + b" " * 600)

  @pytest.mark.parametrize("name", ["model.weights.h5", "archive/readme.txt"])
  def test_other_zip_archives(self, tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
      archive.writestr(name, "x")
    assert name in self.said(tmp_path / "a.zip", (tmp_path / "a.zip").read_bytes())

  def test_pipes_and_devices(self, tmp_path):
    os.mkfifo(tmp_path / "a.pth")
    (tmp_path / "b.pth").symlink_to("/dev/zero")
    assert "pipe" in refusal(tmp_path / "a.pth")
    assert "device" in refusal(tmp_path / "b.pth")

  def test_folders_of_distributed_checkpoints(self, tmp_path):
    (tmp_path / ".metadata").touch()
    assert "dcp_to_torch" in refusal(tmp_path)

  @pytest.mark.parametrize("save", writer.FORMATS.values(), ids=writer.FORMATS)
  def test_distributed_tensors(self, tmp_path, save):
    kind = Name("torch.distributed.tensor", "DTensor")
    rebuild = Name("torch._utils", "_rebuild_wrapper_subclass")
    state = {"_local_tensor": writer.sample("float32"), "_spec": Call(Name("torch", "_Spec"))}
    value = Call(
      Name("torch._tensor", "_rebuild_from_type_v2"),
      rebuild,
      kind,
      (kind, Name("torch", "float32"), (2, 3), (3, 1), 0, None, None, False),
      state,
    )
    assert "full_tensor()" in refusal(save(tmp_path / "a.pth", {"w": value}))

  @pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "F8_E8M0"])
  def test_floats_of_eight_bits_in_safetensors(self, tmp_path, kind):
    header = json.dumps({"w": {"dtype": kind, "shape": [16], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    text = refusal(tmp_path / "a")
    assert f"holds w in {kind}" in text
    assert "attribute" not in text


class TestClaims:
  """The sizes that a file claims are compared with its bytes before anything is allocated."""

  @pytest.mark.parametrize("save", writer.FORMATS.values(), ids=writer.FORMATS)
  @pytest.mark.parametrize(
    "view",
    [(0, (2**43,), (0,)), (0, (1000, 2**20), (0, 0)), (3, (2**21, 1), (0, 1))],
    ids=str,
  )
  def test_a_tensor_that_repeats_few_numbers(self, tmp_path, save, view):
    storage = Storage(np.arange(4, dtype=np.float32))
    assert "contiguous()" in refusal(save(tmp_path / "a.pth", {"w": tensor(storage, *view)}))

  def test_many_tensors_that_repeat_few_numbers(self, tmp_path):
    storage = Storage(np.arange(4, dtype=np.float32))
    value = {f"w{number}": tensor(storage, 0, (2**16,), (0,)) for number in range(40)}
    assert "contiguous()" in refusal(writer.save_zip(tmp_path / "a.pth", value))

  def test_a_tensor_that_repeats_a_little_is_read(self, tmp_path):
    storage = Storage(np.arange(4, dtype=np.float32))
    path = writer.save_zip(tmp_path / "a.pth", {"w": tensor(storage, 1, (1000,), (0,))})
    np.testing.assert_array_equal(read(path)["w"], np.ones(1000, np.float32))

  @pytest.mark.parametrize("opcode", [b"\x96", b"\x8e", b"\x8d", b"\x95"], ids=bytes.hex)
  def test_bytes_that_an_opcode_names(self, tmp_path, opcode):
    bomb = Raw(opcode + struct.pack("<Q", 2**28) + b"N")
    path = writer.save_zip(tmp_path / "a.pth", {"state_dict": STATE, "x": bomb})
    tracemalloc.start()
    try:
      refusal(path)
      assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
      tracemalloc.stop()

  def test_a_packed_file_of_zeros(self, tmp_path):
    np.savez_compressed(tmp_path / "a.npz", w=np.zeros(2**22, np.float32))
    assert "times as large" in refusal(tmp_path / "a.npz")

  def test_an_array_larger_than_its_bytes(self, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "load", lambda *_, **__: pytest.fail("allocates"))
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (65536,), }\n"
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
      archive.writestr("w.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header)
    assert "larger than its bytes" in refusal(tmp_path / "a.npz")


class TestTextsThatATerminalWouldObey:
  """No text of a file reaches a terminal with its control characters."""

  ESCAPE = "\x1b]0;owned\x07\nall is well\r\x9b2J\u202e"

  def test_entries(self, tmp_path):
    value = {f"a{self.ESCAPE}": STATE, "b": STATE}
    assert "several state dicts" in refusal(writer.save_zip(tmp_path / "a", value))

  def test_tensors(self, tmp_path):
    refusal(writer.save_zip(tmp_path / "a", {f"w{self.ESCAPE}": np.ones(3)}))

  def test_classes(self, tmp_path):
    value = Call(Name("package", f"Net{self.ESCAPE}"))
    refusal(writer.save_zip(tmp_path / "a", value, protocol=4))

  def test_functions(self, tmp_path):
    refusal(writer.save_zip(tmp_path / "a", {"x": Name("os", self.ESCAPE)}, protocol=4))

  def test_records_of_archives(self, tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
      archive.writestr(f"w{self.ESCAPE}.npy", b"nothing")
    refusal(tmp_path / "a.npz")

  def test_texts_of_safetensors(self, tmp_path):
    for entry in (
      {self.ESCAPE: {"dtype": self.ESCAPE, "shape": [1], "data_offsets": [0, 4]}},
      {self.ESCAPE: {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}},
      {self.ESCAPE: {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}},
    ):
      header = json.dumps(entry).encode()
      (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
      refusal(tmp_path / "a")
