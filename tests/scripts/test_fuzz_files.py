"""The fuzzer finds nothing in the quick readers, and everything in readers that are bad."""

import pytest

from tests.training import tiny

pytest_plugins = ["tests.training.fixtures"]

PROGRAM = """
import collections, os, pathlib, sys, time
sys.path.insert(0, "scripts")
import fuzz_files
from repjax.errors import InputError

def make(folder):
  (folder / "a").write_bytes(bytes(range(100)))
  (folder / "b.json").write_text('{"a": [1, {"b": "c"}]}')

def picky(path):
  if path.read_bytes() != bytes(range(100)):
    raise InputError(f"{path} is damaged")

def only_changed(act):
  original = (bytes(range(100)), b'{"a": [1, {"b": "c"}]}')
  return lambda path: None if path.read_bytes() in original else act(path)

bad = {
  "KeyError in program.py:<lambda>": lambda path: {}[1],
  "hang": lambda path: time.sleep(60),
  "memory": lambda path: len(b"x" * 150 * 2**20),
  "written": lambda path: pathlib.Path("left").touch(),
  "signal 11": lambda path: os.kill(os.getpid(), 11),
}
keep = pathlib.Path(sys.argv[1])
for signature, act in bad.items():
  fuzz_files.READERS["bad"] = fuzz_files.Reader(make, only_changed(act), seconds=1, megabytes=100)
  attempts, findings = fuzz_files.fuzz(["bad"], 0.3, 0, keep)
  assert {key for _, key in findings} == {signature}, (signature, list(findings))
  assert (keep / "bad-1" / "finding.txt").read_text().startswith(signature)
sys.argv[1:] = "--seconds 4 --readers pictures tfrecords lists --keep".split() + [str(keep)]
fuzz_files.main()
"""


@pytest.mark.proof
def test_good_readers_have_no_findings_and_bad_ones_have_theirs(tmp_path, cache_home):
  script = tmp_path / "program.py"
  script.write_text(PROGRAM)
  finished = tiny.run_python(str(script), str(tmp_path / "kept"), cwd=tiny.ROOT, cache=cache_home)
  assert finished.returncode == 0, finished.stdout + finished.stderr
  assert finished.stdout.splitlines()[-1].endswith("attempts, 0 different findings")
