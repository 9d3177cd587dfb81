"""Functions of any library go wherever the models of repjax go, fused or not."""

import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import repjax
from repjax import analysis, functions, quantization
from repjax.deploy import rewrite
from repjax.errors import InputError
from repjax.program import trace
from repjax.spec import Preprocessing
from tests.deploy.tiny import SPEC
from tests.helpers import assert_close, assert_one_paragraph
from tests.libraries import CLASSES, LIBRARIES, SIZE, Block, NnxBlock, images, linen, of_nnx

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

ONE = jax.local_devices()[:1]
SETTINGS = {"image_size": SIZE, "devices": ONE, "tune": False}
SQUARE = Preprocessing(SIZE, SIZE, mean=(0.3, 0.4, 0.5), std=(0.2, 0.3, 0.4))
PIXELS = np.random.default_rng(2).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)


@pytest.fixture(autouse=True)
def _quickly(quick_programs):
  """Compiles fast and keeps programs in a folder of the session's."""


@functools.cache
def network(library):
  """Returns a function, its parameters and its results for `images()`."""
  function, params = LIBRARIES[library]()
  return function, params, np.asarray(jax.jit(function)(params, images()))


@functools.cache
def fused_network(library="linen"):
  """Returns a fused function, its folded parameters and its results for `images()`."""
  function, params, wanted = network(library)
  fused = repjax.fuse(function, params, images(1))
  return fused, fused.fold(params), wanted


def in_runtime(proto, batch):
  """Returns the first result of an ONNX file."""
  runtime = pytest.importorskip("onnxruntime")
  session = runtime.InferenceSession(proto.SerializeToString())
  return session.run(None, {"images": np.ascontiguousarray(batch.transpose(0, 3, 1, 2))})[0]


@pytest.mark.parametrize("library", LIBRARIES)
def test_compile_takes_a_function_of_any_library_and_fuses_it(library, capsys):
  function, params, wanted = network(library)
  compiled = repjax.deploy.compile(function, params, batch_sizes=(1, 2), **SETTINGS)
  assert_close(compiled(images()), wanted, 1e-5)
  assert "operations merged into" in capsys.readouterr().err
  as_it_is = repjax.deploy.compile(function, params, batch_sizes=(2,), fuse=False, **SETTINGS)
  assert_close(as_it_is(images()), wanted, 1e-5)
  assert capsys.readouterr().err == ""


@pytest.mark.parametrize("library", LIBRARIES)
def test_algorithms_are_chosen_for_every_library(library):
  fused, small, _ = fused_network(library)
  found = rewrite.convolutions_in(fused, small, images())
  assert [one.kernel[:2] for one in found.values()] == [(3, 3), (3, 3)]


@pytest.mark.parametrize("library", ["nnx", "plain"])
def test_tuned_functions_compute_the_same(library, monkeypatch):
  tuning = pytest.importorskip("repjax.deploy.tuning")
  monkeypatch.setattr(
    tuning, "time_algorithms", lambda conv, names, device: {n: [9 - len(n)] for n in names}
  )
  function, params, wanted = network(library)
  settings = {**SETTINGS, "tune": True, "batch_sizes": (3,)}
  compiled = repjax.deploy.compile(function, params, **settings)
  assert set(compiled.plans[3].convolutions.values()) == {"winograd2"}
  assert_close(compiled(images()), wanted, 1e-5)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_what_fuse_returns_is_compiled(library):
  fused, small, wanted = fused_network(library)
  compiled = repjax.deploy.compile(fused, small, batch_sizes=(1, 2), **SETTINGS)
  assert_close(compiled(images()), wanted, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_module_of_others_is_fused_in_evaluation(dtype, capsys):
  _, variables, wanted = network("linen")
  compiled = repjax.deploy.compile(Block(), variables, batch_sizes=(3,), dtype=dtype, **SETTINGS)
  assert "Block: " in capsys.readouterr().err
  assert_close(compiled(images()), wanted, 1e-5 if dtype == "float32" else 3e-2)


class Mixed(nn.Module):
  """A module whose norm computes in float32 in any case."""

  dtype: Any = jnp.float32

  @nn.compact
  def __call__(self, x):
    x = nn.Conv(8, (3, 3), dtype=jnp.float32)(x)
    x = nn.BatchNorm(use_running_average=True, dtype=jnp.float32)(x)
    return x.astype(self.dtype).mean((1, 2))


def test_a_module_that_computes_wider_is_not_fused_and_says_so(capsys):
  variables = Mixed().init(jax.random.key(0), images())
  settings = {"batch_sizes": (3,), "dtype": "bfloat16", **SETTINGS}
  with jax.numpy_dtype_promotion("standard"):
    compiled = repjax.deploy.compile(Mixed(), variables, **settings)
  assert "not fused, since parts of it compute in float32" in capsys.readouterr().err
  assert_close(compiled(images()), Mixed().apply(variables, images()), 3e-2)


def test_a_mistake_of_fuse_names_the_way_out(monkeypatch):
  def mistaken(*arguments):
    raise InputError("fuse made a mistake")

  monkeypatch.setattr(functions, "fuse", mistaken)
  function, params, wanted = network("plain")
  with pytest.raises(InputError, match=r"fuse made a mistake.*fuse=False"):
    repjax.deploy.compile(function, params, batch_sizes=(3,), **SETTINGS)
  compiled = repjax.deploy.compile(function, params, batch_sizes=(3,), fuse=False, **SETTINGS)
  assert_close(compiled(images()), wanted, 1e-5)


def test_deploy_forms_of_repjax_are_not_touched(small, capsys):
  results = [
    repjax.deploy.compile(*small, batch_sizes=(2,), fuse=fuse, **SETTINGS)(images(2))
    for fuse in (True, False)
  ]
  np.testing.assert_array_equal(*results)
  assert capsys.readouterr().err == ""


def test_half_precision_is_the_functions_own():
  function, params, wanted = network("plain")
  compiled = repjax.deploy.compile(function, params, batch_sizes=(3,), dtype="bfloat16", **SETTINGS)
  assert_close(compiled(images()), wanted, 3e-2)
  function, params, _ = network("linen")
  with (
    jax.numpy_dtype_promotion("standard"),
    pytest.raises(InputError, match="Block computes in float32 although"),
  ):
    repjax.deploy.compile(function, params, dtype="bfloat16", **SETTINGS)
  fused, small, _ = fused_network()
  with pytest.raises(InputError, match=r"takes images of float32.*asked to compute in float16"):
    repjax.deploy.compile(fused, small, dtype="float16", **SETTINGS)


@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_onnx_files(library):
  fused, small, wanted = fused_network(library)
  proto = repjax.onnx.to_onnx(fused, small, image_size=SIZE)
  assert_close(in_runtime(proto, images()), wanted, 1e-5)
  operators = [node.op_type for node in proto.graph.node]
  assert operators.count("Conv") == 2
  assert not {"Sub", "Mul"} & {*operators}
  function, params, _ = network(library)
  plain = repjax.onnx.to_onnx(function, params, image_size=SIZE)
  assert_close(in_runtime(plain, images()), wanted, 1e-5)


def test_int8_files_and_their_simulation():
  fused, small, wanted = fused_network()
  proto = repjax.onnx.to_onnx(fused, small, image_size=SIZE)
  int8 = quantization.quantize(proto, images(), weight_bits=8)
  assert_close(in_runtime(int8, images()), wanted, 0.1)
  roundings = quantization.roundings_of(proto, images())
  simulate = quantization.simulated(fused, small, roundings, image_size=SIZE)
  file = quantization.quantize_by(proto, roundings)
  assert_close(jax.jit(simulate)(small, images()), in_runtime(file, images()), 1e-5)


@pytest.mark.parametrize("library", ["linen", "nnx", "plain"])
def test_costs_are_counted(library):
  function, params, _ = network(library)
  fused, _, _ = fused_network(library)
  before = analysis.summary(function, SIZE, params)
  both = analysis.summary(fused, SIZE)
  assert both.train == before.train
  assert before.deploy is None
  assert both.deploy.macs == fused.report.after.multiplications
  assert both.train.macs == fused.report.before.multiplications
  assert analysis.depth(fused) == analysis.depth(function, SIZE, params) == 3
  if library == "linen":
    module = analysis.summary(Block(), SIZE)
    assert module.train == before.train
    assert {stage[0]: stage[2] for stage in module.stages} == {
      stage[0]: stage[2] for stage in before.stages
    }


@pytest.mark.parametrize("library", ["fused", "nnx", "module"])
def test_exports_are_read_back(library, tmp_path):
  pytest.importorskip("flatbuffers")
  _, variables, wanted = network("nnx" if library == "nnx" else "linen")
  model, params = {
    "fused": fused_network()[:2],
    "nnx": network("nnx")[:2],
    "module": (Block(), variables),
  }[library]
  facts = repjax.deploy.export(model, params, SQUARE, tmp_path / "made", normalize=False)
  assert facts["output"] == ("logits" if library == "module" else "results")
  assert json.loads((tmp_path / "made/export.json").read_text())["preprocessing"]["std"][0] == 0.2
  compiled = repjax.deploy.load_exported(tmp_path / "made", batch_sizes=(2,), devices=ONE)
  assert_close(compiled(images()), wanted, 1e-5)


def test_an_export_to_onnx_is_checked(tmp_path):
  pytest.importorskip("onnxruntime")
  facts = repjax.deploy.export(*fused_network()[:2], SQUARE, tmp_path / "made", format="onnx")
  assert facts["checked"]["relative_error"] < 1e-5


def test_a_predictor_of_a_function():
  fused, small, _ = fused_network()
  names = [f"class {n}" for n in range(CLASSES)]
  settings = {"batch_sizes": (4,), "devices": ONE, "tune": False}
  predictor = repjax.deploy.Predictor.of(fused, small, SQUARE, names, **settings)
  wanted = jax.nn.softmax(fused(small, SQUARE.normalize(jnp.asarray(PIXELS))))
  assert_close(predictor(list(PIXELS)), wanted, 1e-5)
  assert predictor.top(PIXELS[0])[0][0][0] in names
  assert predictor.spec is None
  with pytest.raises(InputError, match="class_names has 2 names, and the model has 5 classes"):
    repjax.deploy.Predictor.of(fused, small, SQUARE, names[:2], **settings)


def test_names_of_models():
  assert functions.name_of(linen()[0]) == "Block"
  assert functions.name_of(of_nnx()[0]) == "the function"
  assert functions.name_of(images) == "images"
  assert functions.name_of(SPEC.create_model()) == "RepVGG"


def jitter(params, x):
  return x.mean((1, 2)) @ params["head"] * jax.random.normal(params["key"], ())


def by_value(params, x):
  return x[x > 0] if params["head"].sum() > 0 else x


HEAD = {"head": np.ones((3, 4), np.float32)}
BAD = {
  "text": (lambda p, x: x, {"a": {"b": "relu"}}, "tree of arrays, but a/b is 'relu'"),
  "shapes": (linen()[0], jax.eval_shape(lambda: linen()[1]), "tree of arrays, but .*/mean is Sha"),
  "a module of NNX": (NnxBlock(nnx.Rngs(0)), {}, "NnxBlock is a module of flax.nnx.*nnx.split"),
  "nothing to call": ((1, 2), {}, "a model is .* got tuple"),
  "values": (by_value, HEAD, "cannot trace .* depends on the values of its arguments"),
  "numbers": (lambda p, x: x[x > 0], HEAD, "cannot trace .* depends on the values"),
  "sizes": (lambda p, x: jnp.zeros(x.sum().astype(int)), HEAD, "cannot trace .* depends on"),
  "rows": (lambda p, x: x.mean((0, 1, 2)) @ p["head"], HEAD, r"one row for each image.*\(4,\)"),
  "nothing": (lambda p, x: {}, HEAD, "returned none"),
  "a word": (lambda p, x: "word", HEAD, "must return arrays.*'word', of type str"),
  "objects": (linen()[0], {"head": np.array([None])}, "arrays, but head is an array of object"),
  "a third": (lambda p, x, y: x, HEAD, r"and 1 argument, .*\(p, x, y\).*functools\.partial"),
  "a name": (lambda p, x: p["lost"], HEAD, r"KeyError: 'lost'.*head float32\[3, 4\].*`fold`"),
}


@pytest.mark.parametrize("case", BAD)
def test_functions_that_cannot_be_are_refused(case):
  function, params, said = BAD[case]
  with pytest.raises(InputError, match=said) as caught:
    repjax.deploy.compile(function, params, batch_sizes=(2,), **SETTINGS)
  assert_one_paragraph(caught.value)


def test_fused_functions_that_do_not_fit_are_refused():
  fused, small, _ = fused_network()
  other = {**small, "params/Conv_9/kernel": jnp.ones((3, 3, 3, 8))}
  half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), small)
  for wrong in (other, half, {}, network("linen")[1]):
    with pytest.raises(InputError, match="not from its own fold") as caught:
      repjax.deploy.compile(fused, wrong, **SETTINGS)
    assert_one_paragraph(caught.value)
  two = repjax.fuse(lambda p, x, y: (x + y).mean((1, 2)) @ p["head"], HEAD, images(), images())
  with pytest.raises(InputError, match=r"must take images .* alone"):
    repjax.deploy.compile(two, two.fold(HEAD), **SETTINGS)


def strided(params, x):
  """Branches that align in another way at odd sizes than at even ones."""
  spec = ("NHWC", "HWIO", "NHWC")
  parts = [
    jax.lax.conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=spec)
    for kernel in params
  ]
  return jax.nn.relu(parts[0] + parts[1]).mean((1, 2))


def test_sizes_that_need_other_parameters_are_refused():
  params = [np.ones((3, 3, 3, 4), np.float32), np.ones((1, 1, 3, 4), np.float32)]
  fused = repjax.fuse(strided, params, images())
  with pytest.raises(InputError, match="need different fused parameters"):
    repjax.deploy.compile(fused, fused.fold(params), **{**SETTINGS, "image_size": SIZE + 1})
  compiled = repjax.deploy.compile(fused, fused.fold(params), **SETTINGS)
  with pytest.raises(InputError, match="compiled for images"):
    compiled(images(1, SIZE + 1))


def test_costs_of_functions_need_parameters_and_a_size():
  function, params, _ = network("plain")
  with pytest.raises(InputError, match="parameters are wanted too"):
    analysis.summary(function, SIZE)
  with pytest.raises(InputError, match="pass image_size"):
    analysis.depth(function, params=params)
  with pytest.raises(InputError, match="tree of arrays, but a is 'relu'"):
    analysis.summary(function, SIZE, {"a": "relu"})
  with pytest.raises(InputError, match="cannot trace"):
    analysis.depth(by_value, SIZE, HEAD)


DOORS = {
  "predictor": lambda *given: repjax.deploy.Predictor.of(*given, SQUARE),
  "export": lambda *given: repjax.deploy.export(*given, SQUARE, "never made"),
  "onnx": functools.partial(repjax.onnx.to_onnx, image_size=SIZE),
  "simulated": lambda *given: quantization.simulated(*given, None, image_size=SIZE),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("case", ["text", "values", "a module of NNX", "a third", "a name"])
def test_every_door_refuses_the_same(door, case, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  function, params, said = BAD[case]
  with pytest.raises(InputError, match=said):
    DOORS[door](function, params)
  assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
  "call",
  [
    repjax.deploy.Predictor.of,
    lambda *given: repjax.deploy.export(*given, "never made"),
    lambda *given: repjax.deploy.compile(*given[:2], preprocessing=given[2], **SETTINGS),
    lambda *given: repjax.onnx.to_onnx(*given[:2], image_size=SIZE, preprocessing=given[2]),
  ],
)
def test_what_is_no_preprocessing_is_refused(call, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(InputError, match=r"must be a repjax\.spec\.Preprocessing.* got 32\.") as no:
    call(lambda p, x: x.mean((1, 2)) @ p["head"], HEAD, 32)
  assert_one_paragraph(no.value)
  assert not [*tmp_path.iterdir()]


def test_probabilities_need_logits():
  with pytest.raises(InputError, match=r"one array of logits .* an array \(N, 16, 16, 3\)"):
    repjax.deploy.compile(
      lambda p, x: x * p["head"].sum(), HEAD, batch_sizes=(2,), probabilities=True, **SETTINGS
    )


def test_a_predictor_names_the_results_that_are_no_logits():
  with pytest.raises(InputError, match=r"logits \(N, K\).* a dict of a \(N, 4\).* alone") as told:
    repjax.deploy.Predictor.of(
      lambda p, x: {"a": x.mean((1, 2)) @ p["head"]}, HEAD, SQUARE, batch_sizes=(2,), devices=ONE
    )
  assert_one_paragraph(told.value)


@pytest.mark.parametrize(
  ("kind", "way_out"),
  [("stablehlo", r"repjax\.deploy\.load_exported\('"), ("onnx", r"ONNX Runtime: .*model\.onnx")],
)
def test_an_export_of_a_function_says_so_and_load_explains(kind, way_out, tmp_path):
  def head(params, x):
    return x.mean((1, 2)) @ params["head"]

  facts = repjax.deploy.export(head, HEAD, SQUARE, tmp_path / "made", format=kind)
  assert "no model.json" in facts["model"]
  for load in (repjax.load, repjax.deploy.Predictor):
    with pytest.raises(InputError, match=f"made is the export of a function .*{way_out}"):
      load(tmp_path / "made")


def by_batch(params, x):
  y = nn.BatchNorm(use_running_average=False).init_with_output(jax.random.key(0), x)[0]
  return y.mean((1, 2)) @ params["head"]


def by_chance(params, x):
  return jitter({**params, "key": jax.random.key(0)}, x)


@pytest.mark.parametrize(
  ("function", "said"),
  [(by_batch, "deviation over its batch"), (by_chance, "draws random numbers")],
)
def test_an_export_in_training_mode_warns_with_the_way_out(function, said, tmp_path):
  with pytest.warns(UserWarning, match=rf"{said}.*inference mode"):
    repjax.deploy.export(function, HEAD, SQUARE, tmp_path / "made", platforms=("cpu",))


def test_statistics_of_parameters_alone_are_no_training_mode():
  def standardized(params, x):
    head = params["head"]
    return x.mean((1, 2)) @ (head / jnp.sqrt(jnp.var(head, 0, keepdims=True) + 1))

  traced = trace(standardized, HEAD, images())
  assert functions.reason_of_training(traced) is None
  assert functions.reason_of_training(trace(by_batch, HEAD, images()))


def test_random_numbers_are_no_operator_of_onnx():
  pytest.importorskip("onnx")
  params = {**HEAD, "key": jax.random.key(0)}
  with pytest.raises(InputError, match=r"draws random numbers.*inference mode"):
    repjax.onnx.to_onnx(jitter, params, image_size=SIZE)
