"""Tests of benchmarks/inspect_gpu.py: what it reads from XLA's texts, and what XLA makes of models.

The last tests need XLA's compiler for GPUs and no GPU; `.ci/run` fetches the compiler.
"""

import importlib
import json
import os

import pytest

from repjax.deploy.gpu import GRAPHS
from repjax.errors import InputError
from tests.training import tiny

BENCHMARKS = tiny.ROOT / "benchmarks"
PLUGIN = "REPJAX_CUDA_PLUGIN"
needs_compiler = pytest.mark.skipif(
  not os.environ.get(PLUGIN), reason=f"{PLUGIN} does not name XLA's compiler for GPUs"
)


@pytest.fixture
def load(monkeypatch):
  """Imports a file of benchmarks/ by its name."""
  monkeypatch.syspath_prepend(BENCHMARKS)
  return importlib.import_module


PROGRAM = """HloModule jit_f, is_scheduled=true

FileNames
1 "<string>"

%moves (param_0.1: bf16[3,3,4,8]) -> bf16[8,3,3,4] {
  %param_0.1 = bf16[3,3,4,8]{3,2,1,0} parameter(0)
  ROOT %transpose.1 = bf16[8,3,3,4]{3,2,1,0} transpose(%param_0.1), dimensions={3,0,1,2}
}

%sums (param_0.2: bf16[1,6,6,8]) -> f32[8] {
  %param_0.2 = bf16[1,6,6,8]{3,2,1,0} parameter(0)
  %zero = f32[] constant(0)
  %wide = f32[1,6,6,8]{3,2,1,0} convert(%param_0.2)
  ROOT %reduce.1 = f32[8]{0} reduce(%wide, %zero), dimensions={0,1,2}, to_apply=%add
}

%body (state: (s32[], f32[8])) -> (s32[], f32[8]) {
  %state = (s32[], f32[8]{0}) parameter(0)
  %number = s32[] get-tuple-element(%state), index=0
  %value = f32[8]{0} get-tuple-element(%state), index=1
  %next = f32[8]{0} add(%value, %value)
  ROOT %made = (s32[], f32[8]{0}) tuple(%number, %next)
}

ENTRY %main.1 (kernel.1: bf16[3,3,4,8], x.1: bf16[1,6,6,4], b.1: bf16[8]) -> f32[8] {
  %kernel.1 = bf16[3,3,4,8]{3,2,1,0} parameter(0), metadata={op_name="kernel"}
  %x.1 = bf16[1,6,6,4]{3,2,1,0} parameter(1)
  %b.1 = bf16[8]{0} parameter(2)
  %same = bf16[3,3,4,8]{3,2,1,0} bitcast(%kernel.1)
  %moved = bf16[8,3,3,4]{3,2,1,0} fusion(%same), kind=kInput, calls=%moves
  %conv = (bf16[1,6,6,8]{3,2,1,0}, u8[16]{0}) custom-call(%x.1, %moved, %b.1), window={size=3x3 pad=1_1x1_1}, dim_labels=b01f_o01i->b01f, custom_call_target="__cudnn$convBiasActivationForward", metadata={op_name="jit(f)/net/conv"}, backend_config={"cudnn_conv_backend_config":{"activation_mode":"kRelu"}}
  %map = bf16[1,6,6,8]{3,2,1,0} get-tuple-element(%conv), index=0
  %sum = f32[8]{0} fusion(%map), kind=kInput, calls=%sums
  %again = f32[8]{0} copy(%sum)
  %zero.1 = s32[] constant(0)
  %started = (s32[], f32[8]{0}) tuple(%zero.1, %again)
  %loop = (s32[], f32[8]{0}) while(%started), condition=%cond, body=%body, backend_config={"known_trip_count":{"n":"5"}}
  ROOT %out = f32[8]{0} get-tuple-element(%loop), index=1
}
"""  # noqa: E501


def test_kernels_of_a_program_by_kind_and_bytes(load):
  found = load("gpu_kernels").kernels(PROGRAM)
  assert [(each.kind, each.detail, each.bytes, each.times) for each in found] == [
    ("parameter copy", "input fusion", 2 * 2 * 288, 1),
    ("convolution", "relu NHWC", 2 * (144 + 288 + 8 + 288) + 16, 1),
    ("reduction", "input fusion", 2 * 288 + 4 * 8, 1),
    ("copy", "copy", 2 * 4 * 8, 1),
    ("elementwise", "add", 5 * 3 * 4 * 8, 5),
  ]
  assert [each.source for each in found][1] == "jit(f)/net/conv"
  branches = "branch_computations={%body, %none}"
  choice = f"  %choice = (s32[], f32[8]) conditional(%started), {branches}\n  ROOT %out"
  none = "%none (given: f32[]) -> f32[] {\n  %given = f32[] parameter(0)\n}\n\nENTRY"
  program = PROGRAM.replace("  ROOT %out", choice).replace("ENTRY", none)
  assert len(load("gpu_kernels").kernels(program)) == len(found) + 1
  with pytest.raises(ValueError, match="no ENTRY"):
    load("gpu_kernels").kernels("HloModule empty")


def test_bytes_and_memory_order(load):
  kernels = load("gpu_kernels")
  shapes = {
    "f32[]": 4,
    "pred[3]": 3,
    "(bf16[2,3]{1,0}, u8[5]{0})": 17,
    "f8e4m3fn[7]": 7,
    "s4[6]": 3,
  }
  assert {shape: kernels.size_of(shape) for shape in shapes} == shapes
  assert kernels.memory_order("bf01", "f32[1,8,6,6]{3,2,1,0}") == "NCHW"
  assert kernels.memory_order("b01f", "f32[1,6,6,8]{2,1,3,0}") == "NCHW"


def test_launches_inside_and_outside_of_graphs(load):
  sequence = """001: kCustomKernel [source] first grid: [1, 1, 1]
000: kCommandBuffer [prev=001]
    002: kConvolution  [prev=001] kConvolution
    003: kSequential
        004: kCustomKernel in a sequence
005: kGemm after the graph
000: kCommandBuffer
    006: kCopy
"""
  assert load("gpu_compiler").count_launches(sequence) == (2, 3, 2)


def test_a_compiler_that_is_missing_or_of_another_version_is_named(load, monkeypatch, tmp_path):
  compiler = load("gpu_compiler")
  monkeypatch.delenv(PLUGIN, raising=False)
  with pytest.raises(InputError, match=f"{PLUGIN} does not name .*--fetch"):
    compiler.devices.__wrapped__("h100")
  monkeypatch.setenv(PLUGIN, str(tmp_path / "none.so"))
  with pytest.raises(InputError, match=r"none\.so, which is no file"):
    compiler.devices.__wrapped__("h100")
  plugin = tmp_path / compiler.PLUGIN
  plugin.touch()
  monkeypatch.setenv(PLUGIN, str(plugin))
  with pytest.raises(InputError, match="unknown version"):
    compiler.devices.__wrapped__("h100")
  (tmp_path / "version.py").write_text('import os\n\n_version = "0.1.2"\n')
  with pytest.raises(InputError, match=r"0\.1\.2.*must have the same version"):
    compiler.devices.__wrapped__("h100")
  with pytest.raises(InputError, match="h100"):
    compiler.devices.__wrapped__("h1000")


def test_a_file_of_another_program_is_refused(load, tmp_path):
  file = tmp_path / "other.json"
  file.write_text(json.dumps({"results": [{"model": "a"}]}))
  with pytest.raises(InputError, match=r"other\.json is no file of inspect_gpu"):
    load("inspect_gpu").read(file)


@needs_compiler
def test_a_comparison_with_an_earlier_file(load, tmp_path, capsys):
  inspect, file = load("inspect_gpu"), tmp_path / "folder" / "before.json"
  same = ["--models", "repvgg_a0", "--image-size", "64"]
  inspect.run(inspect.parse([*same, "--json", str(file)]))
  capsys.readouterr()
  inspect.run(inspect.parse([*same, "--graphs", "--largest", "1", "--against", str(file)]))
  (change,) = [line for line in capsys.readouterr().out.splitlines() if "->" in line]
  (row,) = inspect.read(file).values()
  assert f"kernels {row['kernels']} -> {row['kernels']} (+0%)" in change
  assert "launches" in change
  assert row["kinds"]["convolution"]["relu NHWC"]["kernels"] == 22


# Model, form, dtype, batch size: the most kernels, and the most MiB that they move.
HELD = {
  ("repvgg_a2", "deploy", "bfloat16", 1): (26, 62),
  ("repvgg_a2", "deploy", "bfloat16", 128): (27, 1735),
  ("resnet50", "deploy", "bfloat16", 1): (58, 104),
  ("parnet_s", "deploy", "bfloat16", 1): (90, 82),
  ("parnet_s", "deploy", "bfloat16", 128): (112, 4990),
  ("repvgg_a2", "evaluate", "float32", 128): (50, 3520),
  ("mobileone_s0", "deploy", "bfloat16", 128): (69, 2758),
  ("mobileone_s0", "sums", "bfloat16", 128): (48, 2011),
}


@needs_compiler
@pytest.mark.parametrize("held", HELD, ids=str)
def test_what_a_gpu_would_run(load, held, optimized):
  model, form, dtype, batch_size = held
  wanted = load("gpu_programs").Wanted(model, form, dtype, batch_size, 224)
  row = load("inspect_gpu").inspect("h100", wanted)
  kernels, mib = HELD[held]
  assert row["kernels"] <= kernels
  assert row["moved_mib"] <= mib
  copies = row["kinds"].get("parameter copy", {}).values()
  if form in ("deploy", "sums"):
    # Small vectors aside, no parameter is moved to a new place in a call.
    assert sum(counts["bytes"] for counts in copies) < 2**20


@needs_compiler
def test_with_graphs_a_network_is_one_launch(load, optimized):
  wanted = load("gpu_programs").Wanted("repvgg_a2", "deploy", "bfloat16", 1, 224)
  inspect = load("inspect_gpu").inspect
  plain, graphs = inspect("h100", wanted), inspect("h100", wanted, GRAPHS)
  assert (plain["launches"], plain["in_graphs"]) == (plain["kernels"], 0)
  assert (graphs["launches"], graphs["in_graphs"]) == (1, plain["kernels"])
