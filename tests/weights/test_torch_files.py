"""Files of torch.save: what a state dict holds is read, and nothing in a file is ever run."""

import argparse
import collections
import copyreg
import datetime
import enum
import json
import mmap
import os
import pathlib
import pickle
import random
import re
import struct
import subprocess
import sys
import types
import zipfile

import numpy as np
import pytest

from repjax.errors import InputError
from repjax.weights import read
from repjax.weights.torch_files import files, load, names, pickles, tensors
from tests.helpers import GOLDENS
from tests.weights import torch_writer as writer
from tests.weights.torch_writer import FORMATS, Built, Call, Name, Raw, Storage, tensor

ROOT = GOLDENS.parents[1]
OPTIMIZER = {
  "state": {0: {"step": np.float32(3), "exp_avg": np.ones((2, 2), np.float32)}},
  "param_groups": [{"lr": 0.1, "betas": (0.9, 0.999), "foreach": None, "params": [0]}],
}

every_format = pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)


@pytest.fixture
def path(tmp_path):
  """The one file that a test writes."""
  return tmp_path / "file.pth"


def assert_same(found, expected):
  """Checks that dtypes, shapes and bits are equal; NumPy has no == for float8."""
  assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
  assert found.tobytes() == expected.tobytes()


def read_or_refuse(path):
  """Returns what is read, or None if reading ends in an error that names the file."""
  try:
    return read(path)
  except InputError as error:
    if str(path) not in str(error):
      raise AssertionError("the file is not named") from error
    return None


def refusal(path):
  """Returns the text of the error that reading raises, without the name of the file."""
  with pytest.raises(InputError) as caught:
    read(path)
  assert str(path) in str(caught.value)
  return str(caught.value).replace(str(path), "")


@every_format
@pytest.mark.parametrize("dtype", writer.DTYPES)
def test_every_dtype_comes_back(path, save, dtype):
  array = writer.sample(dtype)
  assert_same(load(save(path, {"w": array}))["w"], array)


@every_format
def test_views_keep_their_strides_offsets_and_share_storages(path, save):
  numbers = np.arange(24, dtype=np.float32)
  storage = Storage(numbers)
  views = {
    "whole": (0, (24,), (1,)),
    "transposed": (0, (4, 6), (1, 4)),
    "slice": (5, (3, 2), (6, 2)),
    "expanded": (7, (3, 2), (0, 1)),
    "scalar": (23, (), ()),
    "empty": (0, (0, 4), (4, 1)),
  }
  found = load(save(path, {name: tensor(storage, *view) for name, view in views.items()}))
  for name, (offset, shape, strides) in views.items():
    expected = np.lib.stride_tricks.as_strided(numbers[offset:], shape, [4 * s for s in strides])
    assert_same(found[name], expected)
  assert np.shares_memory(found["slice"], found["transposed"])


@every_format
def test_arrays_are_read_only_views_of_the_mapped_file(path, save):
  array = load(save(path, {"w": np.arange(64, dtype=np.float32)}))["w"]
  root = array.base
  while isinstance(root, np.ndarray | memoryview):
    root = root.base if isinstance(root, np.ndarray) else root.obj
  assert isinstance(root, mmap.mmap)
  with pytest.raises(ValueError, match="read-only"):
    array[0] = 1
  with pytest.raises(ValueError, match="WRITEABLE"):
    array.flags.writeable = True


@every_format
def test_empty_tensors_and_empty_files_of_tensors_come_back(path, save):
  found = load(save(path, {"a": np.zeros((0,), np.float32), "b": np.zeros((2, 0), np.int64)}))
  assert {name: array.shape for name, array in found.items()} == {"a": (0,), "b": (2, 0)}
  assert load(save(path, {})) == {}


def test_records_of_the_zip_format_may_be_in_any_place(path):
  value = {"w": writer.sample("float32"), "v": writer.sample("int64")}
  records = dict(reversed(writer.records(value).items()))
  with zipfile.ZipFile(path, "w") as archive:  # unaligned
    for name, content in records.items():
      archive.writestr(f"some_name/{name}", content)
  for name, array in load(path).items():
    assert_same(array, value[name])


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@every_format
def test_every_protocol_with_binary_globals_is_read(path, save, protocol):
  array = writer.sample("float32")
  assert_same(load(save(path, {"w": array}, protocol=protocol))["w"], array)


@pytest.mark.parametrize("dtype", writer.DTYPES)
def test_a_zip_marked_big_endian_is_swapped(path, dtype):
  array = writer.sample(dtype)
  found = load(writer.save_zip(path, {"w": array}, byteorder="big"))["w"]
  np.testing.assert_array_equal(np.asarray(found, np.complex128), array.astype(np.complex128))


@pytest.mark.parametrize("mark", ["middle", "LITTLE", "", "little\n", "\xff"])
def test_an_unknown_byte_order_is_refused(path, mark):
  records = writer.records({"w": writer.sample("float32")}) | {"byteorder": mark.encode("latin1")}
  writer.zip_bytes(path, records.items())
  assert "byte" in refusal(path)


def test_legacy_files_are_little_endian_whatever_machine_wrote_them(path):
  # torch swaps when it writes one on a big-endian machine, and never looks at the mark.
  array = writer.sample("float32")
  assert_same(load(writer.save_legacy(path, {"w": array}, little_endian=False))["w"], array)


CONFIG = Name("mmengine.config", "ConfigDict")
LEFTOVERS = {
  "namespace": Call(Name("argparse", "Namespace"), state={"lr": 0.1}),
  "path": Call(Name("pathlib", "PosixPath"), "runs", "a"),
  "path of Python 3.13": Call(Name("pathlib._local", "PosixPath"), "runs", "a"),
  "defaultdict": Call(Name("collections", "defaultdict"), Name("__builtin__", "list")),
  "datetime": Call(Name("datetime", "datetime"), b"\x07\xe8\x01\x01\0\0\0\0\0\0"),
  "numpy scalar": Call(
    Name("numpy.core.multiarray", "scalar"),
    Call(Name("numpy", "dtype"), "f8", False, True, state=(3, "<", None, None, None, -1, -1, 0)),
    b"\0" * 8,
  ),
  "numpy array": Call(
    Name("numpy._core.multiarray", "_reconstruct"),
    Name("numpy", "ndarray"),
    (0,),
    b"b",
    state=(1, (2,), Name("numpy", "dtype"), False, b"\0" * 8),
  ),
  "config": Call(CONFIG, state={"model": Call(CONFIG, state={"depth": 3})}),
  "enum": Call(Name("package.kinds", "Kind.Inner"), 2),
  "device": Call(Name("torch", "device"), "cuda", 0),
  "method": Call(Name("builtins", "getattr"), CONFIG, "update"),
  "any": Name("typing", "Any"),
  "keys of a class": Raw(b"}cpackage.kinds\nKind\nK\2\x85RK\1s"),
  "keys of tuples": {(224, 224): 0.5, ("a", 1): 2},
  "nothing": None,
  "numbers": [1, 2.5, 10**30, True, "text", b"bytes", {3, 4}, (1, (2, 3))],
}


@every_format
@pytest.mark.parametrize("leftover", LEFTOVERS.values(), ids=LEFTOVERS)
def test_what_training_leaves_in_a_checkpoint_does_no_harm(path, save, leftover):
  weight = writer.sample("float32")
  save(path, {"args": leftover, "state_dict": {"w": weight}, "nested": [{"a": leftover}]})
  assert_same(read(path)["w"], weight)


@every_format
def test_a_training_checkpoint_gives_its_state_dict(path, save):
  weight = writer.sample("float32")
  value = {"model": {"w": weight}, "optimizer": OPTIMIZER, "epoch": 7, **LEFTOVERS}
  found = load(save(path, value))
  assert_same(found["model"]["w"], weight)
  assert_same(found["optimizer"]["state"][0]["exp_avg"], np.ones((2, 2), np.float32))
  assert found["epoch"] == 7
  assert found["numbers"][:4] == [1, 2.5, 10**30, True]


# Each asks for a function; what it would do shows as a file called `sentinel` or a loaded `decoy`.
FUNCTIONS = [
  ("os", "system"),
  ("posix", "system"),
  ("nt", "system"),
  ("subprocess", "Popen"),
  ("subprocess", "check_output"),
  ("pty", "spawn"),
  ("builtins", "eval"),
  ("builtins", "exec"),
  ("builtins", "__import__"),
  ("builtins", "open"),
  ("builtins", "compile"),
  ("builtins", "type"),
  ("builtins", "range"),
  ("builtins", "map"),
  ("builtins", "setattr"),
  ("__builtin__", "eval"),
  ("__builtin__", "file"),
  ("__builtin__", "ValueError"),
  ("copy_reg", "Anything"),
  ("posix", "DirEntry"),
  ("io", "open"),
  ("_io", "FileIO"),
  ("runpy", "run_path"),
  ("runpy", "_run_code"),
  ("importlib", "import_module"),
  ("importlib._bootstrap", "_load"),
  ("pickle", "loads"),
  ("_pickle", "loads"),
  ("marshal", "loads"),
  ("copyreg", "add_extension"),
  ("operator", "attrgetter"),
  ("functools", "partial"),
  ("types", "FunctionType"),
  ("types", "CodeType"),
  ("ctypes", "CDLL"),
  ("code", "InteractiveInterpreter"),
  ("multiprocessing.util", "Finalize"),
  ("threading", "Thread"),
  ("logging.config", "DictConfigurator"),
  ("timeit", "timeit"),
  ("shutil", "rmtree"),
  ("webbrowser", "open"),
  ("socket", "create_connection"),
  ("sys", "exit"),
  ("torch.hub", "load"),
  ("torch", "load"),
  ("torch.storage", "_load_from_bytes"),
  ("torch.serialization", "os.system"),
  ("torch.jit", "load"),
  ("torch._utils", "_rebuild_xla_tensor"),
  ("numpy", "load"),
  ("numpy", "fromfile"),
  ("numpy.testing._private.utils", "runstring"),
  ("pip", "main"),
  ("pip._internal", "main"),
  ("collections", "OrderedDict.fromkeys"),
  ("decoy", "run"),
  ("decoy", "_Run"),
]


@pytest.fixture
def trap(tmp_path, monkeypatch):
  """Fails a test whose file was obeyed: by a new file, or by the import of a module in reach."""
  (tmp_path / "decoy").mkdir()
  source = "import pathlib\npathlib.Path('sentinel').touch()\ndef run(*_): pass\nclass Run: pass\n"
  (tmp_path / "decoy" / "__init__.py").write_text(source)
  monkeypatch.syspath_prepend(tmp_path)
  monkeypatch.chdir(tmp_path)
  loaded = set(sys.modules)
  yield "touch sentinel"
  assert not (tmp_path / "sentinel").exists()
  assert [name for name in set(sys.modules) - loaded if not name.startswith("encodings.")] == []


@every_format
@pytest.mark.parametrize(("module", "name"), FUNCTIONS, ids=".".join)
def test_a_file_that_asks_for_a_function_is_refused(path, save, trap, module, name):
  save(path, {"state_dict": {"w": writer.sample("float32")}, "b": Call(Name(module, name), trap)})
  text = refusal(path)
  assert f"{module}.{name}" in text
  assert "nothing was run" in text.replace("\n", " ")


def obeyed(module, name, argument):
  """Opcodes that call a function of one argument, by their names."""
  text = b"X" + struct.pack("<I", len(argument)) + argument.encode()
  parts = [struct.pack("<I", len(part)) + part.encode() for part in (module, name)]
  short = b"c" + f"{module}\n{name}\n".encode()
  long = b"X" + parts[0] + b"X" + parts[1] + b"\x93"
  return {
    "REDUCE": short + b"(" + text + b"tR",
    "TUPLE1": short + text + b"\x85R",
    "STACK_GLOBAL": long + text + b"\x85R",
    "INST": b"(" + text + b"i" + f"{module}\n{name}\n".encode(),
    "OBJ": b"(" + short + text + b"o",
    "NEWOBJ": short + text + b"\x85\x81",
    "NEWOBJ_EX": short + text + b"\x85}\x92",
    "BUILD": short + b"}b",
    "only named": short,
    "dropped": short + b"0N",
    "behind a memo": short + b"q\xfa0h\xfa" + text + b"\x85R",
  }


@every_format
@pytest.mark.parametrize("opcodes", obeyed("os", "system", ""))
def test_no_opcode_reaches_a_function(path, save, trap, opcodes):
  save(path, {"w": writer.sample("float32"), "x": Raw(obeyed("os", "system", trap)[opcodes])})
  assert "os.system" in refusal(path)


@every_format
@pytest.mark.parametrize("opcodes", sorted(set(obeyed("decoy", "Run", "")) - {"BUILD"}))
def test_a_class_of_someone_else_is_never_imported(path, save, trap, opcodes):
  weight = writer.sample("float32")
  run = obeyed("decoy", "Run", trap)[opcodes]
  save(path, {"state_dict": {"w": weight}, "x": Raw(run)})
  assert_same(read(path)["w"], weight)


@pytest.mark.parametrize("part", ["magic", "version", "system", "object", "keys"])
def test_no_part_of_the_legacy_format_runs_code(path, trap, part):
  parts = writer.legacy_parts({"w": writer.sample("float32")})
  parts[part] = b"\x80\x02" + obeyed("os", "system", trap)["REDUCE"] + b"."
  path.write_bytes(b"".join(parts.values()))
  assert "os.system" in refusal(path)


@every_format
@pytest.mark.parametrize(
  "place",
  [
    lambda payload: {"a": {"b": [{"c": (1, payload)}]}},
    lambda payload: {payload: 1},
    lambda payload: tensor(payload),
    lambda payload: tensor(Storage(np.zeros(4, np.float32)), payload),
    lambda payload: Call(Name("collections", "OrderedDict"), state={"_metadata": payload}),
    lambda payload: Call(Name("argparse", "Namespace"), state={"x": payload}),
    lambda payload: Call(Name("torch", "Size"), payload),
    lambda payload: Call(Name("torch._tensor", "_rebuild_from_type_v2"), payload, 1, (), 1),
    lambda payload: Raw(b"(" + writer.pickled(("storage", payload))[0][2:-1] + b"tQ"),
  ],
)
def test_a_call_is_refused_wherever_it_hides(path, save, trap, place):
  save(path, {"w": writer.sample("float32"), "unused": place(Call(Name("os", "system"), trap))})
  assert "os.system" in refusal(path)


@every_format
@pytest.mark.parametrize(
  "chain",
  [
    Call(Name("builtins", "getattr"), Name("collections", "OrderedDict"), "fromkeys"),
    Call(Name("builtins", "getattr"), Name("torch._utils", "_rebuild_tensor_v2"), "__globals__"),
    Call(Name("__builtin__", "getattr"), Name("torch", "Size"), "__globals__"),
    Call(Name("builtins", "getattr"), "text", "__class__"),
    Call(Name("builtins", "getattr"), Name("builtins", "getattr"), "__globals__"),
  ],
)
def test_attributes_of_what_is_real_are_out_of_reach(path, save, trap, chain):
  save(path, {"w": writer.sample("float32"), "x": chain})
  assert "getattr" in refusal(path)


@every_format
def test_attributes_of_placeholders_lead_nowhere(path, save, trap):
  for name in ("__subclasses__", "__init__", "__globals__", "mro", "__base__"):
    method = Call(Name("builtins", "getattr"), Name("decoy", "Run"), name)
    save(path, {"state_dict": {"w": writer.sample("float32")}, "x": method})
    assert list(read(path)) == ["w"]
    assert not callable(load(path)["x"])


@every_format
@pytest.mark.parametrize("code", [240, 2**9, 2**17])
def test_no_extension_code_reaches_a_function_even_one_that_is_in_use(path, save, trap, code):
  called = []
  sys.modules["tests.weights.registered"] = module = types.ModuleType("registered")
  module.function = called.append
  copyreg.add_extension(module_name := "tests.weights.registered", "function", code)
  try:
    small, middle = struct.pack("<B", code & 255), struct.pack("<H", code & 65535)
    opcode = b"\x82" + small if code < 256 else b"\x83" + middle
    opcode = opcode if code < 65536 else b"\x84" + struct.pack("<i", code)
    assert pickle.loads(b"\x80\x02" + opcode + b".") == called.append  # and so it is cached
    save(path, {"w": writer.sample("float32"), "x": Raw(opcode + b"U\x01x\x85R")})
    refusal(path)
    assert called == []
  finally:
    copyreg.remove_extension(module_name, "function", code)
    copyreg._extension_cache.pop(code, None)
    del sys.modules["tests.weights.registered"]


def fields_of_objects():
  """Returns a dictionary that NumPy takes for a dtype of pointers, with an itemsize."""
  fields = Call(Name("collections", "OrderedDict"), [("names", ["a"]), ("formats", ["O"])])
  return Built(fields, {"itemsize": 8})


@every_format
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("name", ["dtype", "count", "bytes", "itemsize", "__class__"])
def test_attributes_of_a_storage_change_nothing(path, save, name, slots):
  storage = Storage(np.full(4, 0x41414141, np.int32))
  value = {"dtype": fields_of_objects(), "count": 10**6, "bytes": b"x" * 64}.get(name, 8)
  state = (None, {name: value}) if slots else {name: value}
  save(path, {"w": tensor(Built(storage, state), 0, (2,), (1,))})
  found = read_or_refuse(path)
  if found is not None:
    assert_same(found["w"], storage.values[:2])


@every_format
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize(
  "inner",
  [
    Name("torch._utils", "_rebuild_tensor_v2"),
    Name("torch._utils", "_rebuild_parameter"),
    Name("torch._tensor", "_rebuild_from_type_v2"),
    Name("torch", "Size"),
    Name("builtins", "getattr"),
    Name("collections", "OrderedDict"),
    Name("torch", "FloatStorage"),
    Name("torch", "device"),
  ],
  ids=lambda inner: inner.name,
)
def test_a_file_leaves_nothing_behind(path, save, tmp_path, inner, slots):
  modules = (files, names, pickles, tensors)
  functions = [value for each in modules for value in vars(each).values() if callable(value)]

  def marks():
    held = ("__dict__", "__defaults__", "__kwdefaults__", "__doc__", "__name__")
    return [[repr(getattr(made, name, None)) for name in held] for made in functions]

  before, weight = marks(), writer.sample("float32")
  attributes = {"__defaults__": (1, 2), "extra": 1, "__name__": "x"}
  for name, value in attributes.items():
    state = (None, {name: value}) if slots else {name: value}
    save(path, {"state_dict": {"w": weight}, "x": Built(inner, state)})
    read_or_refuse(path)
  assert marks() == before
  assert_same(read(save(tmp_path / "good.pth", {"w": weight}))["w"], weight)


@every_format
@pytest.mark.parametrize("name", ["items", "__class__", "__len__", "keys", "append"])
def test_attributes_of_a_dictionary_change_nothing(path, save, name):
  weight = writer.sample("float32")
  function = Name("torch", "Size")
  pairs = Call(Name("collections", "OrderedDict"), [("w", weight)])
  save(path, {"state_dict": Built(pairs, (None, {name: function}))})
  found = read_or_refuse(path)
  if found is not None:
    assert_same(found["w"], weight)


HUGE = 2**62
OUTSIDE = {
  "longer than the storage": (0, (5,), (1,)),
  "past its end by the offset": (1, (4,), (1,)),
  "past its end by the strides": (0, (2,), (4,)),
  "past its end in two axes": (0, (2, 2), (2, 2)),
  "beginning at its end": (4, (1,), (1,)),
  "a negative offset": (-1, (1,), (1,)),
  "a negative size": (0, (-1,), (1,)),
  "a negative stride": (3, (2,), (-1,)),
  "a huge offset": (HUGE, (1,), (1,)),
  "a huge size": (0, (HUGE,), (1,)),
  "a huge stride": (0, (2,), (HUGE,)),
  "an offset that wraps around": (2**64, (4,), (1,)),
  "a stride that wraps around": (0, (2,), (2**62 + 1,)),
  "sizes that wrap around": (0, (2**32, 2**32), (0, 0)),
  "too many axes": (0, (1,) * 100, (1,) * 100),
  "strides of another rank": (0, (2, 2), (1,)),
  "a size that is no number": (0, ("a",), (1,)),
  "a size that is a fraction": (0, (2.0,), (1,)),
  "a shape that is text": (0, "ab", "ab"),
  "a shape that is a number": (0, 4, 1),
  "no offset": (None, (4,), (1,)),
}


@every_format
@pytest.mark.parametrize("view", OUTSIDE.values(), ids=OUTSIDE)
def test_a_tensor_outside_its_storage_is_refused(path, save, view):
  storage = Storage(np.arange(4, dtype=np.float32))
  beside = writer.sample("float32", (100,))
  save(path, {"before": beside, "w": tensor(storage, *view), "after": beside + 1})
  refusal(path)


@every_format
@pytest.mark.parametrize(
  "count", [-1, -4, -100, -HUGE, HUGE, 2**64 + 4, 5, 4.0, "4", None, (4,), [4]], ids=str
)
def test_a_storage_that_is_not_as_long_as_it_says_is_refused(path, save, count):
  storage = Storage(np.arange(4, dtype=np.float32))
  storage.count = count
  save(path, {"w": tensor(storage, 0, (1,))})
  refusal(path)


@pytest.mark.parametrize(
  "keys", [[], ["0"], ["1"], ["0", "0"], ["0", "1", "2"], [("0",)], 7, None, [10**5000]]
)
def test_keys_other_than_the_storages_are_refused(path, keys):
  parts = writer.legacy_parts({"v": np.ones(4, np.float32), "w": np.ones(4, np.float32)})
  parts["keys"] = pickle.dumps(keys, 2)
  path.write_bytes(b"".join(parts.values()))
  refusal(path)


DEEP = {
  "lists": lambda depth: Raw(b"]" * depth + b"a" * (depth - 1)),
  "tuples": lambda depth: Raw(b")" + b"\x85" * depth),
  "dictionaries": lambda depth: Raw(b"}" + b"K\0}" * depth + b"s" * depth),
  "calls": lambda depth: Raw(b"ctorch\nSize\n" * depth + b")" + b"\x85R" * depth),
  "sets": lambda depth: Raw(b"(" * depth + b"\x91" * depth),
}


@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize(
  ("form", "depth"),
  [("zip", 900), ("zip", 5_000), ("zip", 100_000), ("legacy", 900), ("legacy", 5_000)],
)
def test_depth_ends_in_an_input_error_at_most(path, form, kind, depth):
  save = FORMATS[form]
  save(path, {"state_dict": {"w": writer.sample("float32")}, "x": DEEP[kind](depth)})
  read_or_refuse(path)


@every_format
@pytest.mark.parametrize("depth", [900, 5_000])
def test_a_deep_key_ends_in_an_input_error(path, save, depth):
  save(path, {"w": 1, "x": Raw(b"}" + DEEP["tuples"](depth) + b"K\x01s")})
  refusal(path)
  save(path, Raw(b"}" + DEEP["tuples"](depth) + b"K\x01s"))
  refusal(path)


def test_a_deep_key_of_the_legacy_format_ends_in_an_input_error(path):
  parts = writer.legacy_parts({"w": writer.sample("float32")})
  parts["keys"] = b"\x80\x02]" + DEEP["tuples"](5_000) + b"a."
  path.write_bytes(b"".join(parts.values()))
  refusal(path)


@every_format
def test_a_value_that_holds_itself_ends_in_an_input_error_at_most(path, save):
  save(path, {"state_dict": {"w": writer.sample("float32")}, "x": Raw(b"]q\xfah\xfaa")})
  found = read_or_refuse(path)
  assert found is None or list(found) == ["w"]


@every_format
def test_shown_names_cannot_write_to_the_terminal(path, save):
  save(path, {"x": Name("os\x1b[2J\nAll is well", "system" + "m" * 10**6)}, protocol=4)
  text = refusal(path)
  assert "\x1b" not in text
  assert len(text) < 2000


def copies(function, argument, count):
  """Returns the pickle of a list with `count` calls of a function, all with one argument."""
  named = f"c{function.module}\n{function.name}\n".encode() + b"q\xfb0"
  calls = b"h\xfbh\xfa\x85R" * count
  return Raw(argument + b"q\xfa0" + named + b"(" + calls + b"l")


NUMBERS = b"](" + b"K\0" * 10**5 + b"e"
PAIRS = b"](" + b"".join(b"J" + struct.pack("<i", k) + b"N\x86" for k in range(10**4)) + b"e"
BOMBS = {
  "a memo index": lambda: Raw(b"Nr" + struct.pack("<I", 2**26)),
  "a greater memo index": lambda: Raw(b"Nr" + struct.pack("<I", 2**32 - 1)),
  "a memo index in text": lambda: Raw(b"Np%d\n" % 2**26),
  "a frame": lambda: Raw(b"\x95" + struct.pack("<Q", 2**40) + b"N"),
  "bytes": lambda: Raw(b"\x8e" + struct.pack("<Q", 2**40)),
  "text": lambda: Raw(b"\x8d" + struct.pack("<Q", 2**40)),
  "a bytearray": lambda: Raw(b"\x96" + struct.pack("<Q", 2**40)),
  "a count of a call": lambda: Call(Name("builtins", "bytearray"), 10**12),
  "a range": lambda: Call(Name("builtins", "list"), Call(Name("builtins", "range"), 10**12)),
  "a number": lambda: Raw(b"I" + b"9" * 10**6 + b"\n"),
  "a long number": lambda: Raw(b"\x8b" + struct.pack("<i", 2**31 - 1)),
  "a deep key": lambda: Raw(b"}" + DEEP["tuples"](2 * 10**5) + b"Ns"),
  "a deep element of a set": lambda: Raw(b"(" + DEEP["tuples"](2 * 10**5) + b"\x91"),
  "a key that takes for ever to hash": lambda: Raw(b"})" + b"2\x86" * 60 + b"Ns"),
  "lists within lists": lambda: Raw(
    b"]" + b"".join(b"q%c0](h%ch%ce" % (k, k, k) for k in range(100))
  ),
  "tuples within tuples": lambda: Raw(b")" + b"2\x86" * 60),
  "copies of a list": lambda: copies(Name("torch", "Size"), NUMBERS, 4000),
  "copies of a dictionary": lambda: copies(Name("collections", "OrderedDict"), PAIRS, 2000),
  "classes": lambda: Raw(b"(" + b"cA\nB\n" * 200_000 + b"l"),
  "a deep persistent id": lambda: Raw(b"(" + DEEP["tuples"](2 * 10**5) + b"tQ"),
  "marks": lambda: Raw(b"(" * 10**5),
}


SLOW_BOMBS = {"a number", "classes", "copies of a dictionary", "a deep key"}
"""Those on which the reader of pickles, which is the same for both formats, takes its time."""


def _compressed_zeros(path, name):
  """A few MB that unpack to 200 MB."""
  records = writer.records({"w": writer.sample("float32")})
  zeros = bytes(2**24)
  with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
    for record, content in records.items():
      with archive.open(f"archive/{record}", "w") as file:
        if record == name == "data.pkl":
          file.write(b"\x80\x02B" + struct.pack("<I", 12 * len(zeros)))
        for _ in range(12 * (record == name)):
          file.write(zeros)
        file.write(b"0" + content if record == name == "data.pkl" else content)


@pytest.mark.skipif(sys.platform != "linux", reason="counts pages as Linux does")
def test_bombs_cost_little(tmp_path):
  for form, save in FORMATS.items():
    for name in BOMBS.keys() - (SLOW_BOMBS if form == "legacy" else set()):
      bomb = BOMBS[name]
      save(tmp_path / f"{form}: {name}", {"state_dict": {"w": np.ones(4)}, "x": bomb()})
  for name in ("data.pkl", "byteorder"):
    _compressed_zeros(tmp_path / f"zip: zeros in {name}", name)
  paths = sorted(map(str, tmp_path.iterdir()))
  done = subprocess.run(
    [sys.executable, "-m", "tests.weights.bombs", *paths],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    check=True,
  )
  costs = {pathlib.Path(path).name: cost for path, cost in json.loads(done.stdout).items()}
  assert len(costs) == 2 * len(BOMBS) - len(SLOW_BOMBS) + 2
  assert {
    name: cost
    for name, cost in costs.items()
    if cost["error"] not in ("InputError", "none") or cost["seconds"] > 5 or cost["megabytes"] > 150
  } == {}


@pytest.mark.parametrize("missing", ["data.pkl", "data/0"])
def test_a_missing_record_is_named(path, missing):
  records = writer.records({"w": writer.sample("float32")})
  del records[missing]
  writer.zip_bytes(path, records.items())
  assert missing in refusal(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_compressed_tensors_are_refused(path, compression):
  records = writer.records({"w": np.zeros(4, np.float32)})
  with zipfile.ZipFile(path, "w") as archive:
    for name, content in records.items():
      method = compression if name == "data/0" else zipfile.ZIP_STORED
      archive.writestr(f"archive/{name}", content, method)
  assert "compressed" in refusal(path)


def test_encrypted_records_are_refused(path):
  writer.save_zip(path, {"w": writer.sample("float32")})
  content = bytearray(path.read_bytes())
  begin = content.find(b"PK\x01\x02")
  while begin >= 0:
    content[begin + 8] |= 1
    begin = content.find(b"PK\x01\x02", begin + 1)
  path.write_bytes(content)
  assert "encrypted" in refusal(path)


@pytest.mark.parametrize("name", ["../../outside", "/outside", "..\\outside", "data/../../outside"])
def test_names_in_an_archive_touch_no_other_file(path, tmp_path, name):
  value = {"w": writer.sample("float32")}
  records = writer.records(value) | {name: b"x"}
  writer.zip_bytes(path, records.items())
  assert_same(read(path)["w"], value["w"])
  assert os.listdir(tmp_path) == [path.name]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_the_same_record_twice_is_refused_or_the_directory_decides(path):
  records = writer.records({"w": np.arange(4, dtype=np.float32)})
  other = ("data/0", np.full(4, 9, np.float32).tobytes())
  writer.zip_bytes(path, [*records.items(), other])
  found = read_or_refuse(path)
  assert found is None or found["w"][0] in (0, 9)


@pytest.mark.parametrize("field", [26, 28])
@pytest.mark.parametrize("value", [0, 7, 0xFFFF])
def test_a_local_header_that_lies_reads_nothing_outside_the_file(path, field, value):
  writer.save_zip(path, {"w": writer.sample("float32", (8,))})
  with zipfile.ZipFile(path) as archive:
    begin = archive.getinfo("archive/data/0").header_offset
  content = bytearray(path.read_bytes())
  struct.pack_into("<H", content, begin + field, value)
  path.write_bytes(content)
  found = read_or_refuse(path)
  assert found is None or found["w"].nbytes == 32


def sample_bytes(save, path):
  """Returns the bytes of a small file with every kind of part, and the value in the file."""
  value = {
    "state_dict": {"w": writer.sample("float32"), "b": writer.sample("bfloat16", (3,))},
    "args": LEFTOVERS["namespace"],
    "epoch": 3,
  }
  return save(path, value).read_bytes(), value["state_dict"]


@every_format
def test_a_file_cut_short_anywhere_is_refused(path, save):
  content, _ = sample_bytes(save, path)
  for length in range(len(content)):
    path.write_bytes(content[:length])
    refusal(path)


@every_format
def test_damage_ends_in_an_input_error_at_most(path, save):
  content, _ = sample_bytes(save, path)
  rng = random.Random(0)
  for _ in range(400):
    damaged = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8))):
      damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    path.write_bytes(damaged)
    read_or_refuse(path)


@pytest.mark.parametrize("part", ["magic", "version", "system", "object", "keys"])
def test_damage_to_one_part_of_the_legacy_format_ends_in_an_input_error_at_most(path, part):
  parts = writer.legacy_parts({"w": writer.sample("float32"), "v": (1, [LEFTOVERS["enum"]])})
  rng = random.Random(part)
  for _ in range(60):
    damaged = bytearray(parts[part])
    damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
    path.write_bytes(b"".join((parts | {part: damaged}).values()))
    read_or_refuse(path)


@pytest.mark.parametrize("spoil", [{"magic": 7}, {"version": 1000}, {"system": {}}, {"system": 1}])
def test_a_stream_that_is_not_torchs_is_refused(path, spoil):
  parts = writer.legacy_parts({"w": writer.sample("float32")})
  path.write_bytes(b"".join((parts | {k: pickle.dumps(v, 2) for k, v in spoil.items()}).values()))
  refusal(path)


@pytest.mark.parametrize("pid", ["text", 7, None, (), ("storage",), ("module", 1, 2, 3)])
@every_format
def test_a_persistent_id_that_is_no_storage_is_refused(path, save, pid):
  save(path, {"w": Raw(writer.pickled(pid)[0][2:-1] + b"Q")})
  refusal(path)


def test_a_module_in_a_legacy_file_is_refused_for_what_it_is(path):
  pid = ("module", Name("package.nets", "Net"), "nets.py", "class Net: pass")
  writer.save_legacy(path, Raw(writer.pickled(pid)[0][2:-1] + b"Q"))
  text = refusal(path)
  assert "state_dict()" in text
  assert "truncated" not in text


def test_views_of_pytorch_0_3_are_refused_by_name(path):
  pid = ("storage", Name("torch", "FloatStorage"), "0", "cpu", 4, ("1", 0, 2))
  writer.save_legacy(path, {"w": Raw(writer.pickled(pid)[0][2:-1] + b"Q")})
  assert "PyTorch 0.3 or older" in refusal(path)


@every_format
@pytest.mark.parametrize("dtype", ["complex64", "uint16"])
def test_a_view_that_is_not_stored_as_it_reads_is_refused(path, save, dtype):
  call = writer.dense(writer.sample(dtype))
  call.arguments = (*call.arguments, {"conj": True})
  save(path, {"w": call})
  assert "conj" in refusal(path)


@every_format
@pytest.mark.parametrize("kind", ["sparse_tensor", "sparse_csr_tensor", "qtensor", "nested_tensor"])
def test_tensors_that_are_not_dense_are_refused_by_name(path, save, kind):
  save(path, {"w": Call(Name("torch._utils", f"_rebuild_{kind}"), 1, 2)})
  assert re.search("sparse, quantized or nested", refusal(path))


@every_format
@pytest.mark.parametrize(
  "function",
  [Name("collections", "OrderedDict"), Name("torch", "Size"), Name("torch", "device"), 7],
)
def test_a_tensor_of_an_unknown_kind_is_refused(path, save, function):
  kind = Name("torch._tensor", "_rebuild_from_type_v2")
  of_type = Name("torch", "Tensor")
  save(path, {"state_dict": {"w": np.ones(2)}, "x": Call(kind, function, of_type, ([],), {})})
  refusal(path)


@every_format
def test_old_ways_to_pickle_a_tensor_are_read(path, save):
  array = writer.sample("float32")
  old, parameter = writer.dense(array), Name("torch._utils", "_rebuild_parameter")
  old.function, old.arguments = Name("torch._utils", "_rebuild_tensor"), old.arguments[:4]
  with_state = Name("torch._utils", "_rebuild_parameter_with_state")
  value = {
    "old": old,
    "parameter": Call(parameter, array, True, None),
    "with state": Call(with_state, array + 1, True, None, {"note": 1}),
  }
  found = load(save(path, value))
  assert_same(found["old"], array)
  assert_same(found["parameter"], array)
  assert_same(found["with state"], array + 1)


@every_format
def test_strings_of_python_2_are_read(path, save):
  key = Raw(b"U\x03w\xe9x")  # SHORT_BINSTRING
  save(path, Raw(b"}" + key + writer.pickled(1)[0][2:-1] + b"s"))
  assert load(path) == {"w\xe9x": 1}


@every_format
def test_dictionaries_of_python_2_are_read(path, save):
  array = writer.sample("float32")
  pairs = [["w", array], ["v", array + 1]]
  found = read(save(path, Call(Name("collections", "OrderedDict"), pairs)))
  assert_same(found["w"], array)
  assert_same(found["v"], array + 1)


@pytest.mark.parametrize("dtype", ["complex32", "float4_e2m1fn_x2", "bits8", "quint4x2"])
def test_a_dtype_without_an_array_is_named_and_not_called_code(path, dtype):
  call = writer.dense(writer.sample("uint16"))
  call.arguments = (*call.arguments[:-1], Name("torch", dtype))
  writer.save_zip(path, {"w": call})
  text = refusal(path)
  assert dtype in text
  assert "run code" not in text


def test_a_torchscript_program_is_refused_by_name(path):
  records = writer.records({"w": writer.sample("float32")}) | {"constants.pkl": b"\x80\x02)."}
  writer.zip_bytes(path, records.items())
  assert "TorchScript" in refusal(path)


@every_format
def test_a_whole_pickled_module_is_refused_with_the_way_out(path, save):
  save(path, Call(Name("torch.nn.modules.linear", "Linear"), state={"training": True}))
  text = refusal(path)
  assert "it is Linear" in text
  assert "model.state_dict()" in text


@pytest.fixture
def torch():
  """The real one, where it is installed."""
  return pytest.importorskip("torch")


@pytest.fixture(params=[True, False], ids=["zip", "legacy"])
def torch_save(request, torch, path):
  """torch.save into the test's file in either format."""

  def save(value):
    torch.save(value, path, _use_new_zipfile_serialization=request.param)
    return path

  save.is_zip = request.param
  return save


def bits(tensor):
  """Returns the bytes of a torch tensor in the order of its elements."""
  torch = pytest.importorskip("torch")
  tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
  return bytes(tensor.reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def assert_like_torch(found, tensor):
  """Checks that the array has the tensor's dtype, shape and bits."""
  assert found.dtype.name == str(tensor.dtype).removeprefix("torch.")
  assert found.shape == tuple(tensor.shape)
  assert found.tobytes() == bits(tensor)


@pytest.mark.parametrize("dtype", writer.DTYPES)
def test_torch_writes_what_we_read(torch, torch_save, dtype):
  numbers = torch.arange(6).reshape(2, 3) / 2
  tensors = {"w": numbers.to(getattr(torch, dtype)), "s": torch.tensor(1).to(getattr(torch, dtype))}
  found = load(torch_save(tensors))
  for name, expected in tensors.items():
    assert_like_torch(found[name], expected)


@every_format
@pytest.mark.parametrize("dtype", writer.DTYPES)
def test_torch_reads_what_the_writer_of_these_tests_writes(torch, path, save, dtype):
  if save is writer.save_legacy and dtype in writer.UNTYPED:
    pytest.skip("torch cannot read its own such files")
  array = writer.sample(dtype)
  storage = Storage(np.arange(12, dtype=np.float32))
  value = {"w": array, "v": tensor(storage, 1, (2, 3), (1, 4)), "u": tensor(storage, 0, (12,))}
  found = torch.load(save(path, value), weights_only=True)
  assert bits(found["w"]) == array.tobytes()
  assert found["v"].tolist() == [[1, 5, 9], [2, 6, 10]]
  assert found["v"].untyped_storage().data_ptr() == found["u"].untyped_storage().data_ptr()


def test_torchs_views_are_read(torch, torch_save):
  base = torch.arange(24.0)
  tensors = {
    "base": base,
    "transposed": base.reshape(4, 6).t(),
    "channels last": base.reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
    "slice": base[5:20:3],
    "block": base.reshape(4, 6)[1:3, 2:5],
    "expanded": base[:1].expand(3, 4),
    "scalar": base[7],
    "empty": base[:0],
    "no rows": torch.zeros(3, 0, 2),
    "parameter": torch.nn.Parameter(base[2:4]),
    "buffer": torch.nn.Buffer(base[2:6]),
  }
  found = load(torch_save(tensors))
  for name, expected in tensors.items():
    assert_like_torch(found[name], expected)
  assert np.shares_memory(found["base"], found["block"])


def test_torchs_conjugate_and_negative_views_are_not_misread(torch, torch_save):
  numbers = torch.tensor([1 + 2j, 3 + 4j])
  for view in (numbers.conj(), numbers.conj().imag):
    found = read_or_refuse(torch_save({"w": view}))
    if found is not None:
      assert_like_torch(found["w"], view)


def test_tensors_with_attributes_are_read(torch, torch_save):
  plain, parameter = torch.ones(2), torch.nn.Parameter(torch.ones(3))
  plain.note, parameter.note = "a", {"b": torch.zeros(1)}
  found = load(torch_save({"plain": plain, "parameter": parameter}))
  assert_like_torch(found["plain"], plain)
  assert_like_torch(found["parameter"], parameter)


def test_state_dicts_of_modules_are_read(torch, torch_save):
  net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.PReLU())
  state = net.state_dict()
  assert state._metadata
  for wrapped in (
    state,
    torch.nn.DataParallel(net).state_dict(),
    torch.compile(net).state_dict(),
    {"state_dict": state, "epoch": 1},
    dict(net.named_parameters()) | dict(net.named_buffers()),
  ):
    found = read(torch_save(wrapped))
    assert set(found) == set(state)
    for name, expected in state.items():
      assert_like_torch(found[name], expected)


class Colour(enum.Enum):
  """An enumeration like those in configurations."""

  RED = 1


class Config(dict):
  """A dictionary with attributes, like those of configurations."""

  def __init__(self, **items):
    super().__init__(items)
    self.extra = {"depth": 3}


def test_whole_training_checkpoints_are_read(torch, torch_save):
  net = torch.nn.Linear(3, 2)
  optimizer = torch.optim.AdamW(net.parameters())
  net(torch.ones(1, 3)).sum().backward()
  optimizer.step()
  schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
  checkpoint = {
    "model": net.state_dict(),
    "optimizer": optimizer.state_dict(),
    "lr_scheduler": schedule.state_dict(),
    "epoch": 3,
    "best": np.float64(0.5),
    "mean": np.arange(3.0),
    "counts": collections.Counter("aab"),
    "args": argparse.Namespace(lr=0.1, out=pathlib.Path("runs"), colour=Colour.RED),
    "config": Config(a=Config(b=1)),
    "history": collections.defaultdict(list, loss=[1.0]),
    "when": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC),
    "took": datetime.timedelta(seconds=1),
    "device": torch.device("cpu"),
    "dtype": torch.float16,
    "shape": torch.Size([1, 2]),
    "rng": torch.get_rng_state(),
    "set": {1, 2},
    "none": None,
  }
  found = load(torch_save(checkpoint))
  for name, expected in net.state_dict().items():
    assert_like_torch(found["model"][name], expected)
  assert_like_torch(found["rng"], checkpoint["rng"])
  moment = checkpoint["optimizer"]["state"][0]["exp_avg"]
  assert_like_torch(found["optimizer"]["state"][0]["exp_avg"], moment)
  assert found["epoch"] == 3
  assert set(read(torch_save(checkpoint))) == {"weight", "bias"}


def test_whole_modules_of_torch_are_refused_with_the_way_out(torch, torch_save):
  for value in (torch.nn.Linear(2, 2), {"model": torch.nn.Linear(2, 2), "epoch": 1}):
    text = refusal(torch_save(value))
    assert "state_dict()" in text
    assert "truncated" not in text


def test_tensors_of_torch_that_are_not_dense_are_refused_by_name(torch, torch_save):
  dense = torch.eye(2)
  for sparse in (
    dense.to_sparse(),
    torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
    torch.nested.nested_tensor([dense[0]]),
  ):
    assert "sparse, quantized or nested" in refusal(torch_save({"w": sparse}))


def test_a_torchscript_program_of_torch_is_refused_by_name(torch, path):
  torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(path)
  assert "TorchScript" in refusal(path)


def test_an_archive_that_torch_wrote_without_checksums_is_read(torch, path):
  torch.serialization.set_crc32_options(False)
  try:
    torch.save({"w": torch.ones(3)}, path)
  finally:
    torch.serialization.set_crc32_options(True)
  assert_like_torch(read(path)["w"], torch.ones(3))


def test_torch_reads_no_more_of_the_marks_of_byte_order_than_we(torch, path):
  array = writer.sample("complex64")
  writer.save_zip(path, {"w": array}, byteorder="big")
  assert bits(torch.load(path, weights_only=True)["w"]) == array.tobytes()
  writer.save_legacy(path, {"w": array}, little_endian=False)
  assert bits(torch.load(path, weights_only=True)["w"]) == array.tobytes()
