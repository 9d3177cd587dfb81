"""8 bits: laws of rounding and rescaling, ONNX Runtime's QDQ form, layers left out, the script."""

import importlib
import importlib.util
import itertools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.algebra import rescale_between
from repjax.deploy.quantization import correction, equalization, processor, runtime, weights
from repjax.deploy.quantization.graph import constants, layers_of, with_constants
from repjax.deploy.quantization.sensitivity import compared
from repjax.errors import InputError
from repjax.spec import Preprocessing
from tests.helpers import quick_jit, random_variables, relative_error
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

MISSING = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(
  bool(MISSING), reason=f"ONNX Runtime's quantizer makes the files: pip install {' '.join(MISSING)}"
)
SPEC = repjax.ModelSpec(
  "repvgg_a0",
  10,
  {name: list(value) for name, value in tiny.OVERRIDES.items()},
  Preprocessing(16, 16, "bilinear", (0.3,) * 3, (0.35,) * 3),
  tuple(str(digit) for digit in range(10)),
)
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (24, 16, 16, 3), np.uint8)
SCOPES = ["stem", *(f"stage{stage}/block0" for stage in (1, 2, 3, 4)), "head"]


def made(name, overrides, size=16, preprocessing=None):
  """A model in deploy form with random variables, as an ONNX file."""
  model = repjax.create_model(name, num_classes=10, deploy=True, **overrides)
  variables = random_variables(model, np.zeros((1, size, size, 3), np.float32))
  return repjax.deploy.to_onnx(model, variables, image_size=size, preprocessing=preprocessing)


@pytest.fixture(scope="module")
def proto(quickly):
  """A small RepVGG that takes uint8 images, which no test may change."""
  del quickly
  return made("repvgg_a0", tiny.OVERRIDES, preprocessing=SPEC.preprocessing)


@pytest.fixture(scope="module")
def wanted(proto):
  return runtime.logits_of(proto, IMAGES)


def node_named(proto, scope):
  (name,) = (layer.name for layer in layers_of(proto) if layer.title.startswith(scope))
  return name


def int8_weights(proto):
  """The scopes whose weights are int8."""
  names = [
    name.split("/", 1)[1]
    for name, array in constants(proto).items()
    if array.dtype == np.int8 and array.ndim > 1
  ]
  return {scope for scope in SCOPES for name in names if name.startswith(scope)}


@pytest.mark.parametrize("bits", [8, 7])
@pytest.mark.parametrize(
  ("shape", "inputs"),
  [((3, 3, 4, 6), (0, 1, 2)), ((5, 7), (0,)), ((2, 2, 2, 3, 2, 2, 3), (1, 2, 3))],
)
def test_a_weight_moves_by_half_a_step_at_most(shape, inputs, bits):
  kernel = RNG.standard_normal(shape).astype(np.float32)
  kernel[..., 0] *= 1e-3  # outputs of other sizes have steps of their own
  kernel[..., 1] = 0
  whole, scale = weights.quantized(kernel, inputs, bits)
  assert whole.dtype == jnp.int8
  assert scale.shape == tuple(1 if axis in inputs else size for axis, size in enumerate(shape))
  moved = np.abs(np.asarray(weights.rounded(kernel, inputs, bits)) - kernel)
  assert (moved <= np.asarray(scale) * 0.50001).all()
  largest = np.abs(np.asarray(whole, np.int32)).max(inputs)
  assert set(np.unique(largest)) == {0, 127 if bits == 8 else 64}


def test_a_tree_keeps_its_form_and_only_kernels_are_rounded():
  params = {
    "a": {"conv": {"kernel": jnp.ones((3, 3, 2, 4)) * 0.3, "bias": jnp.full(4, 0.123)}},
    "head": {"kernel": jnp.asarray(RNG.standard_normal((4, 3)), jnp.float32)},
    "scale": {"kernel": jnp.full(3, 0.777)},
  }
  new = quick_jit(repjax.deploy.round_weights)(params)
  assert jax.tree.structure(new) == jax.tree.structure(params)
  assert relative_error(new["a"]["conv"]["kernel"], params["a"]["conv"]["kernel"]) < 1e-6
  assert 1e-4 < relative_error(new["head"]["kernel"], params["head"]["kernel"]) < 1 / 254
  for kept in (("a", "conv", "bias"), ("scale", "kernel")):
    before, after = params, new
    for key in kept:
      before, after = before[key], after[key]
    assert (before == after).all()


@needs_onnx
def test_weights_alone_give_what_rounded_weights_give_in_jax():
  model = repjax.create_model("repvgg_a0", num_classes=10, deploy=True, **tiny.OVERRIDES)
  images = RNG.standard_normal((3, 16, 16, 3)).astype(np.float32)
  params = random_variables(model, images)["params"]
  apply = quick_jit(lambda params: model.apply({"params": params}, images))
  proto = repjax.deploy.to_onnx(model, {"params": params}, image_size=16)
  small = repjax.deploy.quantize_weights(proto)
  importlib.import_module("onnx").checker.check_model(small, full_check=True)
  expected = apply(quick_jit(repjax.deploy.round_weights)(params))
  got = runtime.logits_of(small, images, unpacked=True)
  assert relative_error(got, expected) <= 1e-5
  assert relative_error(got, apply(params)) > 1e-4
  assert int8_weights(small) == set(SCOPES)
  assert small.ByteSize() < 0.5 * proto.ByteSize()


@needs_onnx
def test_pairs_are_layers_with_nothing_but_relu_and_means_between(proto):
  pairs = [(pair.first.title, pair.second.title) for pair in equalization.pairs_of(proto)]
  titles = [layer.title for layer in layers_of(proto)]
  assert [title.split("/RepConv")[0] for title in titles] == SCOPES
  assert pairs == list(itertools.pairwise(titles))


@pytest.fixture(scope="module")
def resnet(quickly):
  """A small ResNet that takes floats, which no test may change."""
  del quickly
  overrides = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 8, 8), "stem_features": 8}
  return made("resnet18", overrides, size=64)  # at 32 px no mean would lie behind the last sum


@needs_onnx
@pytest.mark.parametrize("by", ["weights", "activations"])
def test_additions_end_a_pair(resnet, by):
  # To rescale one of the two would change the sum.
  images = RNG.standard_normal((4, 64, 64, 3)).astype(np.float32)
  new = equalization.equalized_by(by, resnet, images)
  assert relative_error(runtime.logits_of(new, images), runtime.logits_of(resnet, images)) <= 1e-5
  pairs = [(pair.first.title, pair.second.title) for pair in equalization.pairs_of(resnet)]
  blocks = [f"stage{stage}/block0/RepConv_conv" for stage in (1, 2, 3, 4)]
  assert pairs == [(f"{block}1", f"{block}2") for block in blocks]
  before, after = constants(resnet), constants(new)
  moved = {
    layer.title
    for layer in layers_of(resnet)
    if (before[layer.weight] != after[layer.weight]).any()
  }
  assert moved == set(itertools.chain(*pairs))


@needs_onnx
@pytest.mark.parametrize(
  ("name", "overrides", "titles"),
  [
    (
      "parnet_s",  # with a network's method within another's, and gates; SiLU lets no scale pass
      {"stage_sizes": (1, 1, 1), "widths": (8, 8, 8, 8)},
      {"downsample0/RepConv_0", "downsample0/gate", "stream1/block0/RepConv_0", "head"},
    ),
    (
      "repmlp_cifar",  # with matrices in a batch
      {"stage_sizes": (1, 1), "widths": (4, 4), "tile": 4, "local_kernels": (1,)},
      {"stage1/RepConv_widen", "stage1/block0/repmlp/RepDense_0/dense", "head"},
    ),
  ],
)
def test_other_families_are_quantized_too(name, overrides, titles):
  proto = made(name, overrides, size=32)
  found = [layer.title for layer in layers_of(proto)]
  assert titles <= set(found)
  assert len(set(found)) == len(found)
  assert not any("." in title or "->" in title for title in found)
  assert bool(equalization.pairs_of(proto)) == (name == "repmlp_cifar")
  images = RNG.standard_normal((4, 32, 32, 3)).astype(np.float32)
  # Correction runs the network once for each layer, of which ParNet has many.
  small = repjax.deploy.quantize(proto, images, correct_bias=name == "repmlp_cifar")
  error, _ = compared(runtime.logits_of(small, images), runtime.logits_of(proto, images))
  assert 1e-4 < error < 0.2


@needs_onnx
@pytest.mark.parametrize("images", [None, IMAGES])
def test_an_equalized_file_computes_the_same(proto, wanted, images):
  new = equalization.equalized(proto, images)
  assert relative_error(runtime.logits_of(new, IMAGES), wanted) <= 1e-5
  before, after = constants(proto), constants(new)
  assert all(
    relative_error(after[layer.weight], before[layer.weight]) > 1e-2 for layer in layers_of(proto)
  )


@needs_onnx
def test_corrected_biases_give_every_layer_its_mean_back(proto):
  layers = layers_of(proto)
  new = correction.corrected(proto, IMAGES)
  wanted = correction._means(proto, layers, IMAGES)

  def off(proto):
    means = correction._means(correction.with_rounded_weights(proto), layers, IMAGES)
    return [relative_error(means[layer.result], wanted[layer.result]) for layer in layers]

  assert max(off(new)) <= 1e-5
  assert min(off(proto)) > 1e-4
  before, after = constants(proto), constants(new)
  for layer in layers:
    assert (before[layer.weight] == after[layer.weight]).all()


@needs_onnx
def test_layers_in_float_are_neither_rounded_nor_corrected(proto):
  first, *others = layers_of(proto)
  new = correction.corrected(proto, IMAGES, but=[layer.name for layer in others])
  before, after = constants(proto), constants(new)
  changed = {name for name in before if (before[name] != after[name]).any()}
  assert changed == {first.bias}
  coarse = constants(correction.with_rounded_weights(proto, but=[first.name]))
  changed = {name for name in before if (before[name] != coarse[name]).any()}
  assert changed == {layer.weight for layer in others}


@needs_onnx
@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_a_file_in_qdq_form_is_near(proto, wanted, activations, calibration):
  small = repjax.deploy.quantize(proto, IMAGES, activations=activations, calibration=calibration)
  importlib.import_module("onnx").checker.check_model(small, full_check=True)
  error, _ = compared(runtime.logits_of(small, IMAGES), wanted)
  assert 1e-4 < error < 0.1
  assert int8_weights(small) == set(SCOPES)
  operators = Counter(node.op_type for node in small.graph.node)
  arrays = constants(small)
  zeros = {
    int(arrays[node.input[2]])
    for node in small.graph.node
    if node.op_type == "QuantizeLinear" and arrays[node.input[2]].ndim == 0
  }
  if activations == "int8":
    # Layers, ReLUs and the mean are as they were; what layers read is rounded.
    assert (zeros, operators["Relu"], operators["QuantizeLinear"]) == ({0}, 5, 6)
  else:
    assert "Relu" not in operators  # the zero point cuts off what it would
    assert 0 in zeros
    assert len(zeros) > 1
  scales = [array for name, array in arrays.items() if name.endswith("weight_scale")]
  assert sorted(map(np.size, scales)) == sorted(
    constants(proto)[layer.weight].shape[layer.axis] for layer in layers_of(proto)
  )


@needs_onnx
def test_layers_that_are_left_out_stay_in_float(proto, wanted):
  left = [node_named(proto, scope) for scope in ("stage2/block0", "head")]
  small = repjax.deploy.quantize(proto, IMAGES, float_layers=left)
  assert int8_weights(small) == set(SCOPES) - {"stage2/block0", "head"}
  everything = repjax.deploy.quantize(proto, IMAGES)
  errors = [compared(runtime.logits_of(each, IMAGES), wanted)[0] for each in (small, everything)]
  assert errors[0] < errors[1]


@pytest.fixture(scope="module")
def uneven(proto):
  """The same function, with channels between stage 2 and 3 of very different ranges."""
  first, second = (
    layer for layer in layers_of(proto) if layer.title.startswith(("stage2", "stage3"))
  )
  arrays = constants(proto)
  convs = [equalization._conv(arrays, layer) for layer in (first, second)]
  scale = jnp.exp(jnp.asarray(3 * RNG.standard_normal(convs[0].bias.size), jnp.float32))
  convs = rescale_between(*convs, scale)
  for layer, conv in zip((first, second), convs):
    arrays |= equalization._arrays(layer, conv)
  return with_constants(proto, arrays)


@needs_onnx
def test_the_report_has_the_worst_layer_first(uneven, proto):
  # One scale for a kernel is too coarse for most channels of stage 2, and one for what stage 3
  # reads for its input.
  plain = {"per_channel": False, "equalize": "none", "correct_bias": False}
  rows = repjax.deploy.sensitivity(uneven, IMAGES, **plain)
  assert {row.layer.split("/RepConv")[0] for row in rows[:2]} == {"stage2/block0", "stage3/block0"}
  assert [row.error for row in rows] == sorted((row.error for row in rows), reverse=True)
  assert [row.node for row in rows] != [layer.name for layer in layers_of(proto)]
  assert {row.node for row in rows} == {layer.name for layer in layers_of(proto)}
  assert all(0 <= row.changed <= 1 for row in rows)
  assert rows[0].error > 3 * rows[2].error


@needs_onnx
@pytest.mark.parametrize("ranges", ["weights", "activations"])
def test_equalizing_mends_what_uneven_channels_spoil(uneven, wanted, ranges):
  many = np.resize(IMAGES, (256, *IMAGES.shape[1:]))  # ranges of few are not trusted
  errors = [
    compared(
      runtime.logits_of(
        repjax.deploy.quantize(uneven, many, per_channel=False, equalize=equalize), IMAGES
      ),
      wanted,
    )[0]
    for equalize in ("none", ranges)
  ]
  assert errors[1] < 0.5 * errors[0]


@needs_onnx
def test_ranges_of_few_images_are_not_trusted(proto):
  tensors = [pair.between for pair in equalization.pairs_of(proto)]
  for count, floor in ((2, 1.0), (2 * equalization.ENOUGH, 0.5)):
    images = np.resize(IMAGES, (count, *IMAGES.shape[1:]))
    for ranges in equalization._largest(proto, tensors, images).values():
      assert ranges.min() == pytest.approx(floor * ranges.max())


@needs_onnx
@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("scope", ["stem", "stage2/block0"])
def test_the_first_layer_that_is_not_finite_is_named(proto, scope, value):
  layer = next(layer for layer in layers_of(proto) if layer.title.startswith(scope))
  bias = constants(proto)[layer.bias].copy()
  bias[0] = value
  broken = with_constants(proto, {layer.bias: bias})
  for call in (correction.corrected, equalization.equalized):
    with pytest.raises(InputError, match=f"the layer {layer.title} gives NaN or infinite values"):
      call(broken, IMAGES)


@needs_onnx
def test_what_cannot_be_quantized_is_said(proto):
  for images in (IMAGES[:0], IMAGES[:, :8], IMAGES.astype(np.float32)):
    with pytest.raises(InputError, match=r"at least one image \(N, 16, 16, 3\) of uint8"):
      repjax.deploy.quantize(proto, images)
  for setting, text in (
    ({"calibration": "min"}, "unknown calibration 'min'"),
    ({"activations": "int4"}, "unknown kind of activations 'int4'; did you mean"),
    ({"equalize": "all"}, "unknown equalization 'all'"),
    ({"float_layers": ["stem"]}, "unknown layer 'stem'"),
    ({"float_layers": [layer.name for layer in layers_of(proto)]}, "all 6 layers are to stay in"),
  ):
    with pytest.raises(InputError, match=text):
      repjax.deploy.quantize(proto, IMAGES, **setting)
  model = repjax.create_model("repvgg_a0", num_classes=10, deploy=True, **tiny.OVERRIDES)
  variables = random_variables(model, np.zeros((1, 16, 16, 3), np.float32))
  half = repjax.deploy.to_onnx(model, variables, image_size=16, dtype="float16")
  for function in (repjax.deploy.quantize_weights, lambda p: repjax.deploy.quantize(p, IMAGES)):
    with pytest.raises(InputError, match="in float32, and this one has float16"):
      function(half)


@pytest.fixture
def workdir(tmp_path, proto):
  """A deploy folder with a config, as an import has it, of random variables."""
  del proto
  model = SPEC.create_model(deploy=True)
  params = random_variables(model, np.zeros((1, 16, 16, 3), np.float32))["params"]
  folder = tmp_path / "run"
  repjax.disk.write_tree(folder / "params", params)
  SPEC.write(folder)
  config = json.loads(tiny.config(tmp_path, dataset="synthetic").to_json_best_effort())
  (folder / "config.json").write_text(json.dumps(config))
  return folder


@needs_onnx
def test_the_script_writes_a_folder_and_a_table(run_script, workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(processor, "saturates", lambda: True)
  target = tmp_path / "below" / "int8"
  few = ("--images", 16, "--rounds", 2, "--float-layers", 1)
  printed = run_script("quantize", "--workdir", workdir, "--to", target, *few)
  assert "no VNNI" not in printed  # of weights in 7 bits
  lines = printed.splitlines()
  facts = json.loads((target / "export.json").read_text())
  assert lines[1].split()[0] == facts["sensitivity"][0]["layer"]
  assert lines[1].endswith("left in float32")
  assert facts["settings"]["float_layers"] == [facts["sensitivity"][0]["node"]]
  table = {line.split("  ")[0]: line.split() for line in lines if "%" in line}
  assert f"{facts['accuracy']['int8']:.2%}" in table["int8"]
  for name in ("float32", "bfloat16, JAX", "int8 weights", "int8"):
    assert name in table
  assert "calibrated with 16 of its train split" in printed
  names = {"model.onnx", "export.json", "model.json"}
  if importlib.util.find_spec("matplotlib"):
    names |= {"sensitivity.png"}
    assert (target / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
  assert {path.name for path in target.iterdir()} == names
  runtime.session(importlib.import_module("onnx").load(target / "model.onnx"))
  with pytest.raises(InputError, match="which ONNX Runtime, OpenVINO or TensorRT runs and JAX"):
    repjax.deploy.load_exported(target)
  with pytest.raises(SystemExit, match="already; give another path"):
    run_script("quantize", "--workdir", workdir, "--to", target)


@needs_onnx
def test_a_file_of_int8_weights_comes_without_a_ranking(run_script, workdir, tmp_path, monkeypatch):
  monkeypatch.setattr("repjax.deploy.sensitivity", None)  # which must not be called
  few = ("--images", 16, "--rounds", 2, "--weights-only", "--weight-bits", 8)
  monkeypatch.setattr(processor, "saturates", lambda: True)
  printed = run_script("quantize", "--workdir", workdir, "--to", tmp_path / "small", *few)
  assert "no VNNI" not in printed
  assert "layer alone in int8" not in printed
  assert {path.name for path in (tmp_path / "small").iterdir()} == {
    *("model.onnx", "export.json", "model.json")
  }
  facts = json.loads((tmp_path / "small" / "export.json").read_text())
  assert facts["dtype"] == "int8 weights"
  assert not facts.keys() & {"settings", "sensitivity"}


@needs_onnx
def test_symmetric_activations_take_weights_in_8_bits(run_script, workdir, tmp_path, monkeypatch):
  monkeypatch.setattr(processor, "saturates", lambda: True)
  few = ("--images", 16, "--rounds", 2, "--activations", "int8", "--no-bias-correction")
  printed = run_script("quantize", "--workdir", workdir, "--to", tmp_path / "int8", *few)
  assert "no VNNI" not in printed  # sums of int8 and int8 do not overflow
  settings = json.loads((tmp_path / "int8" / "export.json").read_text())["settings"]
  assert (settings["activations"], settings["weight_bits"]) == ("int8", 8)


@needs_onnx
def test_mistakes_end_the_script_in_one_paragraph(
  run_script, workdir, tmp_path, monkeypatch, capsys
):
  def text(*arguments):
    with pytest.raises(SystemExit) as stop:
      run_script("quantize", *arguments)
    return stop.value.code

  assert text("--workdir", tmp_path / "no").startswith(f"error: {tmp_path}/no/model.json does not")
  assert "error: 5000 images to calibrate with are asked for, and the split has 1024" in text(
    "--workdir", workdir, "--images", 5000
  )
  assert "--weights-only takes the weights of all layers" in text(
    "--workdir", workdir, "--weights-only", "--float-layers", 1
  )
  assert "are the same, synthetic's test split, which would" in text(
    "--workdir", workdir, "--calibration-split", "test"
  )
  assert "unknown data set 'digit'; did you mean digits" in text(
    "--workdir", workdir, "--dataset", "digit"
  )
  monkeypatch.setattr(processor, "saturates", lambda: True)
  assert "--float-layers takes 0 to 5, got 6" in text(
    *("--workdir", workdir, "--float-layers", 6, "--images", 1, "--weight-bits", 8)
  )
  assert "note: this CPU has no VNNI" in capsys.readouterr().out
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec",
    lambda name, *rest: None if name == "onnxruntime" else find_spec(name, *rest),
  )
  assert text("--workdir", workdir).startswith("error: 8 bits need the package onnxruntime")
