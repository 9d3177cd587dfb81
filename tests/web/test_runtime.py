"""ONNX Runtime Web: found in a cache, a package or a folder, and never anything else."""

import hashlib
import io
import tarfile
import urllib.error

import pytest

from repjax.errors import InputError
from repjax.web import runtime
from tests.helpers import assert_one_paragraph

CONTENT = {name: name.encode() * 3 for name in runtime.FILES}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
  """Small files in place of the real ones, an empty cache, and no network."""
  files = {
    name: runtime.File(len(content), hashlib.sha256(content).hexdigest())
    for name, content in CONTENT.items()
  }
  monkeypatch.setattr(runtime, "FILES", files)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  answers = []

  def answer(address, timeout):
    answers.append(address)
    raise urllib.error.URLError("no route\nto host")

  monkeypatch.setattr(runtime.urllib.request, "urlopen", answer)
  return answers


def package(files=CONTENT):
  """Returns the bytes of a package of npm."""
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w:gz") as archive:
    for name, content in files.items():
      member = tarfile.TarInfo(f"package/dist/{name}")
      member.size = len(content)
      archive.addfile(member, io.BytesIO(content))
  return file.getvalue()


def is_right(found):
  """Tells if files are the three of the package, with a licence."""
  assert b"Microsoft" in found.pop(runtime.LICENSE)
  return found == CONTENT


def test_a_package_and_folders_are_read(tmp_path):
  (tmp_path / "ort.tgz").write_bytes(package())
  assert is_right(runtime.runtime_files(tmp_path / "ort.tgz"))
  (tmp_path / "module" / "dist").mkdir(parents=True)
  for name, content in CONTENT.items():
    (tmp_path / "module" / "dist" / name).write_bytes(content)
  assert is_right(runtime.runtime_files(tmp_path / "module"))
  assert is_right(runtime.runtime_files(tmp_path / "module" / "dist"))


def test_the_registry_is_asked_once(monkeypatch):
  asked = []

  def answer(address, timeout):
    asked.append(address)
    return io.BytesIO(package())

  monkeypatch.setattr(runtime.urllib.request, "urlopen", answer)
  monkeypatch.setenv("NPM_CONFIG_REGISTRY", "https://example.org/npm/")
  assert is_right(runtime.runtime_files())
  assert is_right(runtime.runtime_files())
  version = runtime.VERSION
  assert asked == [
    f"https://example.org/npm/onnxruntime-web/-/onnxruntime-web-{version}.tgz",
  ]
  damaged = runtime.cache_folder() / f"onnxruntime-web-{version}" / next(iter(CONTENT))
  damaged.write_bytes(b"damaged")
  assert is_right(runtime.runtime_files())
  assert len(asked) == 2


def test_without_a_network_the_message_says_how_to_go_on():
  with pytest.raises(InputError, match=r"no route.*npm pack onnxruntime-web@.*--web-runtime") as it:
    runtime.runtime_files()
  assert_one_paragraph(it.value)


@pytest.mark.parametrize(
  ("content", "reason"),
  [
    (b"no archive", "no package of npm"),
    (package()[:-30], "no package of npm"),
    (package({"other.js": b""}), r"has no ort\.wasm"),
    (package(dict.fromkeys(CONTENT, b"other")), "not that of onnxruntime-web"),
    (package({name: each + b"more" for name, each in CONTENT.items()}), "not that of"),
  ],
  ids=["text", "cut", "empty", "other", "larger"],
)
def test_other_files_are_refused(content, reason, tmp_path):
  (tmp_path / "ort.tgz").write_bytes(content)
  with pytest.raises(InputError, match=reason) as it:
    runtime.runtime_files(tmp_path / "ort.tgz")
  assert_one_paragraph(it.value)


def test_a_place_that_does_not_exist_is_named(tmp_path):
  with pytest.raises(InputError, match=r"nowhere.*No such file"):
    runtime.runtime_files(tmp_path / "nowhere")
