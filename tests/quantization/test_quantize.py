"""Files in ONNX Runtime's QDQ form, layers that stay in float, and the sensitivity of layers."""

import importlib
import importlib.util
from collections import Counter

import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.quantization import equalization, runtime
from repjax.quantization.graph import constants, layers_of
from repjax.quantization.sensitivity import compared
from tests.helpers import assert_close, random_variables
from tests.quantization.int8 import IMAGES, SCOPES, int8_weights, made, needs_onnx
from tests.training import tiny

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

RNG = np.random.default_rng(0)


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
    (
      "pspnet",  # with maps of classes, which are resized in float
      {
        "backbone": "repvgg_a0",
        "backbone_overrides": {"stage_sizes": (1, 1, 1, 1), "width_multipliers": (0.125,) * 4},
        "head_features": 8,
        "bins": (1, 2),
      },
      {"backbone/stem/RepConv_0", "pyramid/RepConv_bins2", "head/RepConv_0", "head/classifier"},
    ),
  ],
)
def test_other_families_are_quantized_too(name, overrides, titles):
  proto = made(name, overrides, size=32)
  found = [layer.title for layer in layers_of(proto)]
  assert titles <= set(found)
  assert len(set(found)) == len(found)
  assert not any("." in title or "->" in title for title in found)
  assert bool(equalization.pairs_of(proto)) == (name != "parnet_s")
  images = RNG.standard_normal((4, 32, 32, 3)).astype(np.float32)
  # Correction runs the network once for each layer, of which ParNet has many.
  small = repjax.quantization.quantize(proto, images, correct_bias=name != "parnet_s")
  error, _ = compared(runtime.logits_of(small, images), runtime.logits_of(proto, images))
  assert 1e-4 < error < 0.2


def node_named(proto, scope):
  (name,) = (layer.name for layer in layers_of(proto) if layer.title.startswith(scope))
  return name


@needs_onnx
@pytest.mark.parametrize("activations", ["uint8", "int8"])
@pytest.mark.parametrize("calibration", ["minmax", "entropy", "percentile"])
def test_a_file_in_qdq_form_is_near(small_proto, small_logits, activations, calibration):
  small = repjax.quantization.quantize(
    small_proto, IMAGES, activations=activations, calibration=calibration
  )
  importlib.import_module("onnx").checker.check_model(small, full_check=True)
  error, _ = compared(runtime.logits_of(small, IMAGES), small_logits)
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
    constants(small_proto)[layer.weight].shape[layer.axis] for layer in layers_of(small_proto)
  )


@needs_onnx
def test_layers_that_are_left_out_stay_in_float(small_proto, small_logits):
  left = [node_named(small_proto, scope) for scope in SCOPES[2:]]
  small = repjax.quantization.quantize(small_proto, IMAGES, float_layers=left)
  assert int8_weights(small) == set(SCOPES[:2])
  everything = repjax.quantization.quantize(small_proto, IMAGES)
  errors = [
    compared(runtime.logits_of(each, IMAGES), small_logits)[0] for each in (small, everything)
  ]
  assert errors[0] < errors[1]


@needs_onnx
def test_layers_in_float_stay_so_when_onnx_runtime_loads_the_file(small_proto):
  ort = importlib.import_module("onnxruntime")
  left = [node_named(small_proto, scope) for scope in ("stage2/block0", "head")]
  file = repjax.quantization.quantize(small_proto, IMAGES, float_layers=left).SerializeToString()
  found, wanted = (
    ort.InferenceSession(
      file, providers=["CPUExecutionProvider"], disabled_optimizers=disabled
    ).run(None, runtime.fed(IMAGES))[0]
    for disabled in ([], ["WeightBiasQuantization"])
  )
  assert_close(found, wanted, 1e-6)


@needs_onnx
def test_the_report_has_the_worst_layer_first(uneven, small_proto):
  # One scale for a kernel is too coarse for most channels of stage 2, and one for what stage 3
  # reads for its input.
  plain = {"per_channel": False, "equalize": "none", "correct_bias": False}
  rows = repjax.quantization.sensitivity(uneven, IMAGES, **plain)
  assert {row.layer.split("/RepConv")[0] for row in rows[:2]} == {"stage2/block0", "stage3/block0"}
  assert [row.error for row in rows] == sorted((row.error for row in rows), reverse=True)
  assert [row.node for row in rows] != [layer.name for layer in layers_of(small_proto)]
  assert {row.node for row in rows} == {layer.name for layer in layers_of(small_proto)}
  assert all(0 <= row.changed <= 1 for row in rows)
  assert rows[0].error > 3 * rows[2].error


@needs_onnx
def test_what_cannot_be_quantized_is_said(small_proto):
  names = [layer.name for layer in layers_of(small_proto)]
  for images in (IMAGES[:0], IMAGES[:, :8], IMAGES.astype(np.float32)):
    with pytest.raises(
      InputError, match=r"images \(N, 16, 16, 3\) of uint8, .* at least one image"
    ):
      repjax.quantization.quantize(small_proto, images)
  for setting, text in (
    ({"calibration": "min"}, "unknown calibration 'min'"),
    ({"activations": "int4"}, "unknown kind of activations 'int4'; did you mean"),
    ({"equalize": "all"}, "unknown equalization 'all'"),
    ({"float_layers": ["stem"]}, "unknown layer 'stem'"),
    ({"float_layers": names}, "all 6 layers are to stay in"),
  ):
    with pytest.raises(InputError, match=text):
      repjax.quantization.quantize(small_proto, IMAGES, **setting)
  model = repjax.create_model("repvgg_a0", num_classes=10, deploy=True, **tiny.OVERRIDES)
  variables = random_variables(model, np.zeros((1, 16, 16, 3), np.float32))
  half = repjax.onnx.to_onnx(model, variables, image_size=16, dtype="float16")
  for function in (
    repjax.quantization.quantize_weights,
    lambda p: repjax.quantization.quantize(p, IMAGES),
  ):
    with pytest.raises(InputError, match="in float32, and this one has float16"):
      function(half)
