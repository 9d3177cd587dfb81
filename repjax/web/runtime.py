"""ONNX Runtime Web, which runs ONNX files in a browser: where its three files come from.

The files are those of one version of the npm package onnxruntime-web. Their checksums are written
here, so that a file is the same wherever it was found, and nothing else is ever copied.
"""

import contextlib
import hashlib
import http.client
import io
import os
import tarfile
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, NamedTuple

from repjax import disk, names, regular_files
from repjax.cache import cache_folder
from repjax.errors import InputError, printable

VERSION = "1.30.0"


class File(NamedTuple):
  """A file of the package.

  Attributes:
    size: number of bytes.
    sha256: checksum.
  """

  size: int
  sha256: str


FILES = {
  "ort.wasm.min.mjs": File(
    50_126, "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b"
  ),
  "ort-wasm-simd-threaded.mjs": File(
    24_381, "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b"
  ),
  "ort-wasm-simd-threaded.wasm": File(
    14_239_897, "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"
  ),
}
"""Name of a file in `dist/` of the package to its size and checksum.

This build runs on the CPU of the reader. The builds for WebGPU are twice as large.
"""

LICENSE = "onnxruntime-LICENSE.txt"
_PACKAGE = f"onnxruntime-web-{VERSION}.tgz"
_LARGEST = 64 << 20  # bytes of the package, which has 33 MB
_WAYS_OUT = (
  f"On a machine with a network, `npm pack onnxruntime-web@{VERSION}` fetches {_PACKAGE}, and "
  f"--web-runtime {_PACKAGE} (web_runtime in Python) takes it, or a folder with its files"
)
_MIT = """MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""
_NOTICE = f"The files ort*.mjs and ort*.wasm are ONNX Runtime Web {VERSION}.\n\n{_MIT}"

# A name of a file to its bytes, or None where there is no such file.
Read = Callable[[str], bytes | None]


def runtime_files(source: str | os.PathLike[str] | None = None) -> dict[str, bytes]:
  """Returns the files of ONNX Runtime Web by name, and its licence.

  Args:
    source: the package as `npm pack` fetches it, or a folder with its files, such as
      `node_modules/onnxruntime-web`. None: the user's cache, which is filled from the registry of
      npm when it is empty. `NPM_CONFIG_REGISTRY` names a different registry, as for npm.

  Raises:
    InputError: the files are not there or are not those of VERSION, or the registry cannot be
      reached.
  """
  if source is not None:
    found = _read(names.file(source))
  else:
    found = _cached()
    if found is None:
      found = _of_package(io.BytesIO(_downloaded()), "the package from the registry of npm")
      _keep(found)
  return {**found, LICENSE: _NOTICE.encode()}


def _read(source: Path) -> dict[str, bytes]:
  """Reads the files from a package or a folder."""
  if source.is_dir():
    folder = source / "dist" if (source / "dist").is_dir() else source
    return _checked(lambda name: _in_folder(folder, name), str(source))
  try:
    with regular_files.opened(source) as file:
      return _of_package(file, str(source))
  except OSError as error:
    raise InputError(f"{printable(source)} cannot be read: {error.strerror}") from error


def _in_folder(folder: Path, name: str) -> bytes | None:
  """Reads a file of a folder; None if there is none."""
  try:
    return regular_files.read(folder / name, FILES[name].size)
  except FileNotFoundError:
    return None
  except OSError as error:
    raise InputError(f"{printable(folder / name)} cannot be read: {error.strerror}") from error


def _of_package(file: BinaryIO, where: str) -> dict[str, bytes]:
  """Reads the files from a package of npm, which is a compressed archive."""
  try:
    with tarfile.open(fileobj=file, mode="r:gz") as archive:
      members = {member.name: member for member in archive if member.isfile()}

      def member(name: str) -> bytes | None:
        found = members.get(f"package/dist/{name}")
        content = None if found is None else archive.extractfile(found)
        # One byte more than expected tells a larger file.
        return content.read(FILES[name].size + 1) if content else None

      return _checked(member, where)
  except (tarfile.TarError, EOFError, OSError) as error:
    raise InputError(f"{printable(where)} is no package of npm. {_WAYS_OUT}") from error


def _checked(read: Read, where: str) -> dict[str, bytes]:
  """Reads all files, and compares each with its checksum."""
  found = {}
  for name, wanted in FILES.items():
    content = read(name)
    if content is None:
      raise InputError(f"{printable(where)} has no {name}. {_WAYS_OUT}")
    if hashlib.sha256(content).hexdigest() != wanted.sha256:
      raise InputError(
        f"{name} in {printable(where)} is not that of onnxruntime-web {VERSION}, the version with "
        f"which the page was tested. {_WAYS_OUT}"
      )
    found[name] = content
  return found


def _folder() -> Path:
  return cache_folder() / f"onnxruntime-web-{VERSION}"


def _cached() -> dict[str, bytes] | None:
  """Reads the files from the user's cache; None if they are not all there, or damaged."""
  try:
    return _checked(lambda name: _in_folder(_folder(), name), str(_folder()))
  except InputError:
    return None  # It is fetched again, which replaces the files.


def _keep(files: dict[str, bytes]) -> None:
  """Writes the files into the user's cache; where it cannot be written, they are not kept."""
  with contextlib.suppress(InputError):
    for name, content in files.items():
      with disk.replacing_file(_folder() / name) as draft:
        draft.write_bytes(content)


def _downloaded() -> bytes:
  """Fetches the package from the registry of npm."""
  registry = os.environ.get("NPM_CONFIG_REGISTRY") or "https://registry.npmjs.org"
  address = f"{registry.rstrip('/')}/onnxruntime-web/-/{_PACKAGE}"
  try:
    with urllib.request.urlopen(address, timeout=60) as answer:
      return answer.read(_LARGEST)
  except (OSError, ValueError, http.client.HTTPException) as error:
    reason = getattr(error, "reason", None) or error
    raise InputError(
      f"ONNX Runtime Web, which runs the network in the browser, could not be fetched from "
      f"{printable(address)}: {printable(reason)}. {_WAYS_OUT}"
    ) from error
