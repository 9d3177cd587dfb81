"""ONNX files compute in ONNX Runtime what the models compute, with operators that runtimes fuse."""

import functools
import importlib
import importlib.util
import json
from collections import Counter
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import repjax
from repjax.errors import InputError
from repjax.layers import RepConv, RepNorm, SqueezeExcite
from repjax.layers.resampling import resize_aligned
from repjax.onnx import of_function, translation
from tests.deploy.tiny import SPEC
from tests.helpers import init_shapes, random_variables, randomise, relative_error

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

MISSING = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
needs_onnx = pytest.mark.skipif(
  bool(MISSING), reason=f"compares with ONNX Runtime: pip install {' '.join(MISSING)}"
)


def results(proto, images):
  """Returns ONNX Runtime's outputs for images (N, H, W, 3), with channels last for maps."""
  runtime: Any = importlib.import_module("onnxruntime")
  options = runtime.SessionOptions()
  options.intra_op_num_threads = 1
  session = runtime.InferenceSession(
    proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
  )
  outputs = session.run(None, {"images": np.ascontiguousarray(images.transpose(0, 3, 1, 2))})
  names = [output.name for output in session.get_outputs()]
  return {
    name: rows.transpose(0, 2, 3, 1) if rows.ndim == 4 else rows
    for name, rows in zip(names, outputs)
  }


def noise(count, size, dtype=np.float32):
  rng = np.random.default_rng(count)
  if dtype == np.uint8:
    return rng.integers(0, 256, (count, size, size, 3), np.uint8)
  return rng.standard_normal((count, size, size, 3)).astype(dtype)


def check(proto):
  """Fails where a model is not well-formed, with types and shapes."""
  importlib.import_module("onnx").checker.check_model(proto, full_check=True)


def operators(proto):
  return dict(Counter(node.op_type for node in proto.graph.node))


def shapes(infos):
  return {
    info.name: [size.dim_param or size.dim_value for size in info.type.tensor_type.shape.dim]
    for info in infos
  }


def agrees(proto, function, size, dtype=np.float32):
  """Fails where ONNX Runtime differs from a function of images, which sees each by itself."""
  check(proto)
  images = noise(3, size, dtype)
  wanted = function(images)
  for count in (1, 3):
    got = results(proto, images[:count])
    expected = wanted if isinstance(wanted, dict) else {next(iter(got)): wanted}
    assert got.keys() == expected.keys()
    for name, rows in got.items():
      assert relative_error(rows, expected[name][:count]) <= 1e-5


REPVGG = {"stage_sizes": (1, 1, 3, 1), "width_multipliers": (0.125, 0.125, 0.0625, 0.0625)}
RESNET = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "stem_features": 6}
REPMLP = RESNET | {"stage_sizes": (1, 2, 2, 1), "tile": 2, "fc3_groups": 1, "local_kernels": (1,)}
REPMLPNET = {"stage_sizes": (1, 2), "widths": (8, 16), "tiles": (8, 4), "share_sets": (1, 4)}
CIFAR = {"stage_sizes": (1, 2, 1), "widths": (4, 6, 8), "tile": 4, "local_kernels": (1, 3)}
PARNET = {"stage_sizes": (1, 2, 1), "widths": (8, 8, 16, 16)}
SMALL = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 16, 16)}
FASTVIT = SMALL | {"expansion": 2, "head_features": 8}
MOBILEONE = REPVGG | {"stage_sizes": (1, 1, 1, 1), "se_sizes": (0, 0, 0, 1)}
PSPNET = {"backbone": "repvgg_a0", "backbone_overrides": REPVGG, "head_features": 8}
PYRAMID = {"Conv", "Relu", "AveragePool", "Concat", "Resize"}
PLAIN = {"Conv", "Relu", "GlobalAveragePool", "Flatten", "Gemm"}
SE = PLAIN | {"Sigmoid", "Reshape", "Mul"}
GATED = SE - {"Relu"} | {"Add", "Concat", "Gather"}
TILED = PLAIN | {"Add", "Reshape", "Transpose", "MatMul", "AveragePool"}
FFN = SE | {"Add", "Div", "Erf"}

FAMILIES: dict[str, tuple[str, dict[str, Any], int, set[str]]] = {
  "repvgg": ("repvgg_a0", REPVGG, 64, PLAIN),
  "repvgg in groups, dilated": ("repvgg_b1g2", REPVGG | {"output_stride": 8}, 33, PLAIN),
  "repvgg silu": ("repvgg_a0", REPVGG | {"act": "silu"}, 64, PLAIN - {"Relu"} | {"Sigmoid", "Mul"}),
  "repvgg se": ("repvgg_d2se", REPVGG | {"se_reduction": 2}, 64, SE),
  "repvggplus": ("repvggplus_l2pse", REPVGG | {"se_reduction": 2}, 64, SE),
  "resnet18": ("resnet18", RESNET, 64, PLAIN | {"Add", "MaxPool"}),
  "resnet50": ("resnet50", RESNET | {"widths": (16, 16, 16, 16)}, 64, PLAIN | {"Add", "MaxPool"}),
  "vgg": (
    "vgg16",
    {"widths": (2, 4, 4, 6, 8), "hidden": 16},
    224,
    {"Conv", "Relu", "MaxPool", "Flatten", "Gemm"},
  ),
  "vgg on few pixels": (
    "vgg16",
    {"widths": (2, 4, 4, 6, 8), "hidden": 16},
    64,
    {"Conv", "Relu", "MaxPool", "Flatten", "Gemm", "AveragePool", "Slice", "Concat"},
  ),
  "repmlp": ("repmlp_cifar", CIFAR, 16, TILED | {"MaxPool"}),
  "repmlp light": ("repmlp_resnet50_light", REPMLP, 64, TILED - {"MatMul"} | {"MaxPool"}),
  "repmlpnet": ("repmlpnet_t224", REPMLPNET, 32, FFN),
  "repmlpnet of tiles": ("repmlpnet_t224", REPMLPNET, 64, FFN | {"Transpose", "MatMul"}),
  "parnet": ("parnet_s", PARNET, 64, GATED),
  "mobileone": ("mobileone_s4", MOBILEONE, 64, SE),
  "repvit": ("repvit_m0_9", SMALL, 64, FFN),
  "pspnet": ("pspnet", PSPNET, 41, {*PYRAMID, "GlobalAveragePool"}),
  "pspnet of uneven bins": ("pspnet", PSPNET, 33, {*PYRAMID, "GlobalAveragePool", "Slice"}),
  "fastvit": ("fastvit_sa12", FASTVIT, 64, FFN | {"MatMul", "Slice", "Softmax", "Transpose"}),
}
"""A title to a model, what makes it small, the image size, and the operators of its graph."""


@functools.cache
def family(title, **overrides):
  """Builds a small model, its deploy form's variables, and the image size."""
  name, small, size, _ = FAMILIES[title]
  model = repjax.create_model(name, num_classes=5, deploy=True, **small, **overrides)
  return model, random_variables(model, noise(1, size)), size


@needs_onnx
@pytest.mark.parametrize("title", FAMILIES)
def test_every_family_agrees_and_is_made_of_few_operators(title):
  model, variables, size = family(title)
  proto = repjax.onnx.to_onnx(model, variables, image_size=size)
  assert set(operators(proto)) == FAMILIES[title][3]
  assert shapes(proto.graph.input) == {"images": ["batch", 3, size, size]}
  maps = [size, size] if model.task == "segmentation" else []
  assert shapes(proto.graph.output) == {"logits": ["batch", 5, *maps]}
  agrees(proto, functools.partial(jax.jit(model.apply), variables), size)


@needs_onnx
def test_a_repvgg_is_convolutions_and_nothing_else():
  model, variables, size = family("repvgg")
  proto = repjax.onnx.to_onnx(model, variables, image_size=size)
  kinds = [node.op_type for node in proto.graph.node]
  assert kinds == ["Conv", "Relu"] * 7 + ["GlobalAveragePool", "Flatten", "Gemm"]
  assert all(len(node.input) == 3 for node in proto.graph.node if node.op_type in ("Conv", "Gemm"))
  # Each layer's scope is in its name, and a weight is what PyTorch would hold.
  assert proto.graph.node[0].name == "RepVGG/stem/RepConv_0/conv/Conv"
  weights = {row.name: list(row.dims) for row in proto.graph.initializer}
  assert weights["RepVGG/stem/RepConv_0/conv/weight"] == [8, 3, 3, 3]
  assert len(weights) == 2 * 8
  assert (proto.opset_import[0].version, proto.ir_version) == (17, 8)


@needs_onnx
@pytest.mark.parametrize("title", ["repvgg", "repmlp", "parnet"])
def test_features_go_by_their_stages_names(title):
  model, variables, size = family(title, features_only=True)
  proto = repjax.onnx.to_onnx(model, variables, image_size=size)
  assert "Transpose" not in operators(proto) or title == "repmlp"
  agrees(proto, functools.partial(jax.jit(model.apply), variables), size)


def summed(x, size, padding, stride=2):
  """Sums over windows of pixels."""
  window, strides = (1, size, size, 1), (1, stride, stride, 1)
  return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, strides, padding)


class Outsider(nn.Module):
  """A user's own network: layers of ours, and what lies between them."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    start = {"branches": ("conv3x3", "conv1x1"), "strides": 2, "padding_mode": "edge"}
    x = RepConv(8, **start, deploy=self.deploy)(x, train)
    x = nn.relu(x)
    y = RepConv(8, ("conv3x3", "conv1x3"), groups=4, deploy=self.deploy)(x, train)
    y = RepNorm(deploy=self.deploy)(nn.hard_swish(y) + x, train)
    y = SqueezeExcite(2)(jnp.concatenate([summed(x, 2, "SAME", 1) / 4, y], -1))
    first, second = jnp.split(nn.max_pool(y, (3, 3), (2, 2), "SAME"), 2, -1)
    y = nn.LayerNorm()(first * jnp.tanh(second[..., ::-1]))
    tokens = y.reshape(y.shape[0], -1, y.shape[-1])  # (N, HW, C)
    weights = nn.softmax(tokens @ tokens.swapaxes(1, 2) / 3)
    tokens = nn.gelu(nn.Dense(6)(weights @ tokens), approximate=False)
    return nn.Dense(5)(tokens.max(1))


@needs_onnx
def test_gelu_has_the_form_that_onnx_runtime_merges(tmp_path):
  ort: Any = importlib.import_module("onnxruntime")

  def function(params, images):
    return nn.gelu(images @ params, approximate=False).mean((1, 2))

  proto = repjax.onnx.to_onnx(function, np.ones((3, 4), np.float32), image_size=8)
  options = ort.SessionOptions()
  options.optimized_model_filepath = str(tmp_path / "merged.onnx")
  options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
  ort.InferenceSession(proto.SerializeToString(), options, ["CPUExecutionProvider"])
  found = operators(importlib.import_module("onnx").load(tmp_path / "merged.onnx"))
  assert "Gelu" in found
  assert not {"Erf", "Div"} & set(found)


@needs_onnx
def test_a_fused_block_has_its_bias_in_a_convolution_and_no_padding_of_its_own():
  def conv(x, kernel, stride):
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=NHWC)

  def block(params, images):
    x = conv(nn.relu(conv(images, params["first"], 2)), params["second"], 1)
    x = x * params["scale"][None, None, None] + params["shift"][None, None, None]
    # A stride of 2 jumps over the last pixel.
    return nn.relu(x + conv(images, params["shortcut"], 2)).mean((1, 2))

  shapes = {"first": (3, 3, 3, 4), "second": (3, 3, 4, 4), "shortcut": (1, 1, 3, 4)}
  shapes |= {"scale": (4,), "shift": (4,)}
  rng = np.random.default_rng(0)
  params = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
  fused = repjax.fuse(block, params, noise(1, 8))
  proto = repjax.onnx.to_onnx(fused, fused.fold(params), image_size=8)
  counts = operators(proto)
  assert (counts["Conv"], counts["Add"]) == (3, 1)
  assert "Pad" not in counts
  agrees(proto, functools.partial(jax.jit(block), params), 8)


@needs_onnx
def test_a_users_own_model_in_training_form_agrees():
  model = Outsider()
  variables = random_variables(model, noise(1, 16))
  proto = repjax.onnx.to_onnx(model, variables, image_size=16)
  assert {"Softmax", "Erf"} <= set(operators(proto))
  agrees(proto, functools.partial(jax.jit(model.apply), variables), 16)


@needs_onnx
@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "wrap"])
@pytest.mark.parametrize(
  ("size", "padding", "strides", "dilation", "groups"),
  [
    ((3, 3), None, 1, 1, 1),
    ((1, 3), (0, 2), (2, 1), 1, 3),
    ((3, 3), 2, 2, (2, 1), 1),
    ((5, 5), 0, 3, 1, 3),
  ],
)
def test_convolutions_of_every_kind(mode, size, padding, strides, dilation, groups):
  layer = RepConv(
    6,
    (f"conv{size[0]}x{size[1]}",),
    strides=strides,
    groups=groups,
    dilation=dilation,
    padding=padding,
    padding_mode=mode,
    deploy=True,
  )
  variables = random_variables(layer, noise(1, 9))
  proto = of_traced(lambda tree, x: layer.apply(tree, x), variables, 9)
  assert operators(proto).get("Transpose", 0) == 0
  agrees(proto, functools.partial(layer.apply, variables), 9)


@needs_onnx
def test_negative_padding_takes_pixels_away():
  kernel, pads = W[:4, :3].reshape(2, 2, 3, 1), ((-1, 1), (0, -2))

  def function(x):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), pads, dimension_numbers=NHWC)

  def expected(x):  # XLA on CPUs gives NaN where it shall crop and pad at once
    padded = jax.lax.pad(x, 0.0, ((0, 0, 0), (-1, 1, 0), (0, -2, 0), (0, 0, 0)))
    return jax.lax.conv_general_dilated(padded, kernel, (1, 1), "VALID", dimension_numbers=NHWC)

  agrees(of_traced(lambda tree, x: function(x), {}, 8), expected, 8)


def of_traced(function, tree, size):
  return of_function(function, tree, size, np.dtype(np.float32), False)


W = np.random.default_rng(5).standard_normal((6, 4)).astype(np.float32)
MAPS = W[0, :3].reshape(1, 1, 1, 3)
FUNCTIONS = {
  "shuffle": lambda x: x.reshape(*x.shape[:3], 3, 1) @ W[:1],
  "negative padding": lambda x: jax.lax.pad(x, 0.5, ((0, 0, 0), (-1, 2, 0), (1, -2, 0), (0, 1, 0))),
  "slices": lambda x: x[:, 1:5:2][:, :, ::-1][..., 1:],
  "last rows, a column, some channels": lambda x: x[:, -2:, 3, 1:],
  "picked rows": lambda x: x[:, np.array([2, 7, 2])].sum((1, 2)),
  "picked channels": lambda x: jnp.take(x, np.array([1, 0]), 3).mean(3),
  "softmax over products": lambda x: jax.nn.softmax(jnp.einsum("nhwc,nhvc->nhwv", x, x)),
  "sum and its mean": lambda x: x.sum((1, 2)) + x.mean((1, 2)),
  "means of tiles": lambda x: x.reshape(-1, 2, 4, 4, 2, 3).mean((2, 4)),
  "mean of channels": lambda x: x - x.mean(-1, keepdims=True),
  "mean over rows": lambda x: x.mean(1),
  "relu twice": lambda x: jax.nn.relu(jnp.maximum(x, 0.5)),
  "softmax over pixels": lambda x: jax.nn.softmax(x, 1),
  "softmax over channels": jax.nn.softmax,
  "no softmax": lambda x: jnp.exp(x - x.max(-1, keepdims=True)) / jnp.exp(x).sum(-1)[..., None],
  "softmax of another maximum": lambda x: (e := jnp.exp(x - x.max(1, keepdims=True)))
  / e.sum(-1, keepdims=True),
  "relu that repeats": lambda x: jnp.maximum(x[:, :1], jnp.zeros((1, 8, 8, 3))),
  "no bias": lambda x: conv(x) + np.arange(8, dtype=np.float32).reshape(1, 8, 1, 1),
  "unlike sums": lambda x: x.sum(-1, keepdims=True) / 7 + x / 1,
  "tall transposition": lambda x: x.transpose(0, 3, 2, 1).reshape(x.shape[0], -1),
  "no common digits": lambda x: x.reshape(-1, 12, 16) + x.reshape(-1, 16, 12).swapaxes(1, 2),
  "product of pixels": lambda x: jnp.einsum("nhwc,nhvc->nhwv", x, x),
  "kernel on the left": lambda x: jnp.einsum("kh,nhwc->nkwc", W[:, :1].repeat(8, 1), x),
  "kernel over rows": lambda x: jnp.einsum("nhwc,hk->nwkc", x, W.repeat(2, 0)[:8]),
  "where and clip": lambda x: jnp.where(x > 0.3, jnp.clip(x, -1, 1), -x),
  "powers": lambda x: x**3 + jnp.square(x) + jax.lax.rsqrt(x * x + 1) + jnp.abs(x) ** 0.5,
  "erfc": lambda x: jax.lax.erfc(x) + jax.lax.erfc(-x * 0.5),
  "stack": lambda x: jnp.stack([x[..., 0], x[..., 1] * 2], 1),
  "least and product": lambda x: x.min((1, 2)) + x[:, :2, 0].prod(1),
  "channels across": lambda x: x * MAPS + x[:, :1, :1],
  "a scalar of each": lambda x: x / jnp.sqrt((x * x).sum((1, 2, 3), keepdims=True)),
  "bias that is shared": lambda x: (y := conv(x)) + MAPS + (y + 2 * MAPS),
  "max pool that is shifted": lambda x: jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 3, 2, 1), (1, 2, 1, 1), ((0, 0), (1, 0), (0, 1), (0, 0))
  ),
  "pool over channels": lambda x: jax.lax.reduce_window(
    x, -jnp.inf, jax.lax.max, (1, 1, 1, 2), (1, 1, 1, 1), "VALID"
  ),
  "sum pool": lambda x: summed(x, 2, "VALID") - summed(x, 3, "SAME") / 9,
  "resize": lambda x: resize_aligned(x[:, :5, :6], (9, 4)) + resize_aligned(x[:, :1, :], (9, 4)),
  "resize twice": lambda x: resize_aligned(resize_aligned(x, (3, 8)), (7, 5)),
  "transposed convolution": lambda x: (
    jax.lax.conv_transpose(x, KERNEL, (2, 2), "SAME", dimension_numbers=NHWC) + MAPS
  ),
  "transposed convolution that cuts and pads": lambda x: spread(x, ((-1, 9), (3, -2))),
  "transposed convolution of groups": lambda x: spread(
    x[..., [0, 1, 2, 1]], ((2, 1), (0, 4)), KERNEL[..., :2, [0, 1, 2, 2, 0, 1]], groups=2
  ),
  "images as they are": lambda x: x,
  "numbers beside images": lambda x: {"a": x.mean((1, 2)), "b": x.mean((1, 2))},
  "repeated": lambda x: jnp.broadcast_to(x[:, :1, :1], x.shape).reshape(x.shape[0], -1),
}  # fmt: skip
NHWC = ("NHWC", "HWIO", "NHWC")
KERNEL = np.random.default_rng(6).standard_normal((3, 3, 3, 3)).astype(np.float32)


def conv(x):
  return jax.lax.conv_general_dilated(x, KERNEL, (1, 1), "SAME", dimension_numbers=NHWC)


def spread(x, padding, kernel=None, groups=1):
  """Computes a transposed convolution at strides (3, 2) with a dilated kernel."""
  return jax.lax.conv_general_dilated(
    *(x, KERNEL if kernel is None else kernel, (1, 1), padding),
    lhs_dilation=(3, 2),
    rhs_dilation=(2, 1),
    dimension_numbers=NHWC,
    feature_group_count=groups,
  )


@needs_onnx
@pytest.mark.parametrize("title", FUNCTIONS)
def test_what_stands_between_layers_agrees(title):
  function = FUNCTIONS[title]
  proto = of_traced(lambda tree, x: function(x), {}, 8)
  agrees(proto, lambda images: function(jnp.asarray(images)), 8)


@needs_onnx
def test_uint8_images_probabilities_and_the_training_form(small):
  proto = repjax.onnx.to_onnx(
    *small, image_size=16, preprocessing=SPEC.preprocessing, probabilities=True
  )
  assert [node.op_type for node in proto.graph.node][:3] == ["Cast", "Mul", "Add"]
  assert proto.graph.node[-1].op_type == "Softmax"
  assert shapes(proto.graph.output) == {"probabilities": ["batch", 10]}

  def function(images):
    normalized = SPEC.preprocessing.normalize(jnp.asarray(images))
    return jax.nn.softmax(jax.jit(small[0].apply)(small[1], normalized))

  agrees(proto, function, 16, dtype=np.uint8)


@needs_onnx
def test_half_precision_and_images_that_are_not_square():
  model, variables, _ = family("repvgg")
  proto = repjax.onnx.to_onnx(model, variables, image_size=(64, 96), dtype="float16")
  assert shapes(proto.graph.input) == {"images": ["batch", 3, 64, 96]}
  check(proto)
  kinds = {row.data_type for row in proto.graph.initializer}
  images = noise(2, 96)[:, :64].astype(np.float16)
  got = results(proto, images)["logits"]
  assert got.dtype == np.float32
  assert relative_error(got, jax.jit(model.apply)(variables, images.astype(np.float32))) <= 1e-2
  assert len(kinds) == 1


@needs_onnx
def test_the_command_writes_a_folder_and_compares(run_command, small_folder, small, tmp_path):
  printed = run_command(
    "export",
    "--workdir",
    small_folder,
    "--to",
    tmp_path / "out",
    "--format",
    "onnx",
    "--normalized",
  )
  first, second, third, last = printed.splitlines()
  assert first == (
    "repvgg_a0, float32, ONNX opset 17: float32 (N, 3, 16, 16) -> logits float32 (N, 10)"
  )
  assert second.startswith("well-formed; ONNX Runtime ")
  assert second.endswith(" at batch sizes 1 and 3")
  assert third == f"saved: {tmp_path / 'out'}"
  assert last == f"labels without repjax: python {tmp_path / 'out' / 'run_onnx.py'} IMAGE"
  facts = json.loads((tmp_path / "out" / "export.json").read_text())
  assert (facts["format"], facts["opset"]) == ("onnx", 17)
  assert 0 < facts["checked"]["relative_error"] <= 1e-5
  assert {path.name for path in (tmp_path / "out").iterdir()} == {
    "export.json",
    "manifest.json",
    "model.json",
    "model.onnx",
    "params",
    "run_onnx.py",
  }
  onnx: Any = importlib.import_module("onnx")
  proto = onnx.load(tmp_path / "out" / "model.onnx")
  agrees(proto, functools.partial(jax.jit(small[0].apply), small[1]), 16)
  with pytest.raises(InputError, match="holds an ONNX file, which ONNX Runtime"):
    repjax.deploy.load_exported(tmp_path / "out")


@needs_onnx
def test_a_file_that_differs_or_could_not_be_compared_says_so(
  run_command, small_folder, tmp_path, monkeypatch
):
  export = importlib.import_module("repjax.deploy.export")
  for found, said in (
    ({}, "not compared with JAX, since onnxruntime is not installed"),
    ({"onnxruntime": "1", "batch_sizes": [1], "relative_error": 0.1}, "MORE THAN 1e-05"),
  ):
    monkeypatch.setattr(export, "checked", lambda *arguments, found=found: found)
    target = tmp_path / str(len(found))
    assert said in run_command(
      "export", "--workdir", small_folder, "--to", target, "--format", "onnx"
    )


@needs_onnx
@pytest.mark.parametrize(
  "branches",
  [("conv3x3", "conv1x1_conv3x3", "conv3x3_d2"), ("dirac3x3", "conv1x1_avg3x3", "avg3x3", "skip")],
  ids=" ".join,
)
def test_branches_of_a_training_form(branches):
  layer = RepConv(3, branches)
  variables = random_variables(layer, noise(1, 7))
  proto = of_traced(lambda tree, x: layer.apply(tree, x), variables, 7)
  check(proto)
  agrees(proto, functools.partial(layer.apply, variables), 7)


@needs_onnx
def test_one_result_may_have_several_names():
  def function(tree, x):
    y = x * tree["scale"]
    return {"first": y, "second": y, "third": x, "fourth": x}

  tree = {"scale": jnp.asarray([2.0, 3.0, 4.0]).reshape(1, 1, 1, 3)}
  proto = of_function(function, tree, 5, np.dtype(np.float32), False)
  check(proto)
  agrees(proto, functools.partial(function, tree), 5)
  with pytest.raises(InputError, match="called 'images' like the input"):
    of_function(lambda tree, x: {"images": x}, tree, 5, np.dtype(np.float32), False)


@needs_onnx
def test_numbers_that_are_none_are_refused_before_anything_is_written(small, tmp_path):
  bad = jax.tree.map(lambda leaf: leaf * np.nan, small[1])
  with pytest.raises(InputError, match=r"computes something else than JAX.* is nan"):
    repjax.deploy.export(small[0], bad, SPEC, tmp_path / "out", format="onnx")
  assert not (tmp_path / "out").exists()


class Sorted(nn.Module):
  """A model that sorts, which the translation has no operator for."""

  deploy: bool = False

  @nn.compact
  def __call__(self, x, train=False):
    return jnp.sort(nn.Dense(2, name="rows")(x.mean((1, 2))))


@needs_onnx
def test_what_there_is_no_operator_for_is_named_with_its_place_and_the_way_out():
  model = Sorted()
  variables = randomise(init_shapes(model, noise(1, 8)))
  with pytest.raises(InputError, match=r"primitive 'sort'.* in the scope Sorted.*; it has: abs,.*"):
    repjax.onnx.to_onnx(model, variables, image_size=8)
  with pytest.raises(InputError, match="stablehlo"):
    repjax.onnx.to_onnx(model, variables, image_size=8)


def ones(x, *shape):
  return jnp.ones((x.shape[0], *shape))


def pairs(x):
  """Products of pixels of each image with those of each other: (8, N, N)."""
  rows = x.mean((2, 3))
  return (rows[:, None] * rows[None]).transpose(2, 0, 1)


REFUSED = {
  "of any size: .*shapes only in ways": lambda x: x * float(x.shape[0]),
  'transposed convolution.*format="stablehlo".*conv_general_dilated. outside all': lambda x: (
    jax.lax.conv_general_dilated(
      x, KERNEL, (2, 1), [(0, 0)] * 2, lhs_dilation=(3, 2), dimension_numbers=NHWC
    )
  ),
  "cuts off all pixels": lambda x: spread(x, ((25, -25), (0, 0))),
  "draws random numbers.*inference mode": lambda x: (
    x + jax.random.normal(jax.random.key(0), (1, *x.shape[1:]))
  ),
  "deviation over its batch.*inference mode": lambda x: nn.BatchNorm(
    use_running_average=False
  ).init_with_output(jax.random.key(0), x)[0],
  "computes with the number of images": lambda x: x - x.mean(0, keepdims=True),
  "repeats numbers for each image": lambda x: jnp.concatenate(
    [x, jnp.ones((x.shape[0], 1, 8, 3))], 1
  ),
  "two axes as long as the batch": lambda x: pairs(x).reshape(2, 4, x.shape[0], x.shape[0]),
  "numbers that repeat for each": lambda x: ones(x, 1, 1, 3) + ones(x, 1, 8, 1),
  "indices that are computed": lambda x: jnp.take(x, x[:, :2, 0, 0].astype(int), 3),
  "between numbers": lambda x: jax.lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1), (0, 0, 0), (0, 0, 0))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused(message):
  def translated():
    function = REFUSED[message]
    graph, outputs, _, _ = translation.translated(
      lambda tree, x: function(x), {}, (8, 8), np.dtype(np.float32)
    )
    for value in outputs.values():
      graph.arrange(value, value.axes)

  with pytest.raises(InputError, match=message):
    translated()


def test_a_key_from_which_nothing_is_drawn_is_no_hindrance():
  def function(tree, x):
    jax.random.fold_in(jax.random.key(0), 1)
    return x * 2.0

  graph, *_ = translation.translated(function, {}, (8, 8), np.dtype(np.float32))
  assert [node.op for node in graph.nodes.values()].count("Mul") == 1


def test_bfloat16_and_unknown_formats_are_refused(small, tmp_path, monkeypatch):
  monkeypatch.setattr("repjax.onnx.need_onnx", lambda: None)
  with pytest.raises(InputError, match="in float32 or float16: few runtimes read bfloat16"):
    repjax.onnx.to_onnx(*small, image_size=16, dtype=jnp.bfloat16)
  with pytest.raises(InputError, match="unknown format 'onx'; did you mean onnx"):
    repjax.deploy.export(*small, SPEC, tmp_path / "out", format="onx")


@needs_onnx
def test_more_than_a_file_holds_is_refused(small, monkeypatch):
  monkeypatch.setattr("repjax.onnx.proto.LIMIT", 100)
  with pytest.raises(InputError, match="GB of parameters, and an ONNX file holds 2 GB"):
    repjax.onnx.to_onnx(*small, image_size=16)


def test_without_onnx_the_way_out_is_said(small, run_command, small_folder, tmp_path, monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    "importlib.util.find_spec",
    lambda name, *rest: None if name == "onnx" else find_spec(name, *rest),
  )
  with pytest.raises(InputError, match=r"pip install 'repjax\[onnx\]'"):
    repjax.onnx.to_onnx(*small, image_size=16)
  with pytest.raises(SystemExit, match=r"^error: for ONNX files, the package onnx"):
    run_command("export", "--workdir", small_folder, "--to", tmp_path / "out", "--format", "onnx")
  assert list(tmp_path.iterdir()) == []
