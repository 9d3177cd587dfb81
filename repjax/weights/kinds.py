"""Recognizes files that are no checkpoints of a known format, so that an error can name them."""

import re
from pathlib import Path

from repjax import regular_files

_KINDS = (
  (b"version https://git-lfs", "the placeholder that Git LFS leaves: run `git lfs pull`"),
  (b"<?xml", "an XML file, as OpenVINO has. Get the checkpoint that it was made from"),
  (b"<", "a web page. Download the file itself"),
  (b"\x89HDF\r\n", "an HDF5 file, as Keras writes them. Write its arrays with numpy.savez"),
  (b"\x93NUMPY", "one array of NumPy. Write all arrays by name with numpy.savez"),
  (b"GGUF", "a GGUF file, which holds rounded weights. Get the weights before they were rounded"),
  (b"\x1f\x8b", "packed by gzip. Unpack it first: gunzip FILE"),
  (b"BZh", "packed by bzip2. Unpack it first: bunzip2 FILE"),
  (b"\xfd7zXZ", "packed by xz. Unpack it first: unxz FILE"),
  (b"\x28\xb5\x2f\xfd", "packed by zstd. Unpack it first: unzstd FILE"),
  (b"7z\xbc\xaf", "packed by 7-Zip. Unpack it first"),
  (b"Rar!", "packed by RAR. Unpack it first"),
  (
    b"model_checkpoint_path",
    "a text that names a checkpoint of TensorFlow. Write its arrays with numpy.savez",
  ),
)
"""First bytes of a file to what the file is, and the way out."""

# A table of 1 to 15 fields, the first of which has a name of 1 to 31 letters.
_MESSAGE_PACK = re.compile(rb"[\x81-\x8f][\xa1-\xbf][\w.]")

_INDEX = (
  "the index of a checkpoint in several files, and holds no weights. Read each file that it names "
  "with repjax.weights.read, merge the dictionaries, and write one file with "
  "safetensors.numpy.save_file"
)


def kind_of_file(path: Path) -> str:
  """Returns what a file is, for an error message, or "" if its first bytes do not tell."""
  with regular_files.opened(path) as file:
    head = file.read(4096)
  start = head.lstrip()
  for magic, what in _KINDS:
    if (head if len(magic) > 1 else start).startswith(magic):
      return what
  if head[4:8] == b"TFL3":
    return "a TFLite file. Get the checkpoint that it was made from"
  if _MESSAGE_PACK.match(head):
    return (
      "packed by MessagePack, as Flax does. Read it with flax.serialization.msgpack_restore, and "
      "write its arrays with numpy.savez"
    )
  if head[257:262] == b"ustar":
    return "a tar archive. Unpack it first: tar xf FILE"
  if start.startswith((b"{", b"[")) and _is_text(head):
    return _INDEX if b'"weight_map"' in head or path.name.endswith("index.json") else "a JSON file"
  if head.startswith(b"\x08") and any(
    maker in head[:64] for maker in (b"pytorch", b"onnx", b"tf2")
  ):
    return "an ONNX file. Get the checkpoint that it was made from"
  return ""


def is_text(path: Path) -> bool:
  """Checks whether a file is a text, by its beginning."""
  with regular_files.opened(path) as file:
    return _is_text(file.read(4096))


def kind_of_folder(path: Path) -> str:
  """Returns the way out for a folder in the place of a checkpoint file."""
  if (path / ".metadata").is_file():
    return (
      "It is a distributed checkpoint. Join it first: python -m "
      "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
    )
  if (path / "zero_to_fp32.py").is_file():
    return "It is a checkpoint of DeepSpeed. Join it first: python zero_to_fp32.py FOLDER FILE"
  return "Give the path of a checkpoint file"


def _is_text(head: bytes) -> bool:
  try:
    head[:4000].decode()
  except UnicodeDecodeError as error:
    return error.start > len(head) - 8  # A character is cut in two at the end.
  return b"\0" not in head
