"""State dicts in and out: every published layout, the authors' outputs, and every refusal."""

import itertools
import json
import math
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import repjax
from repjax import weights
from repjax.errors import InputError
from repjax.weights import recognition, sources
from tests import helpers
from tests.weights import cases
from tests.weights.cases import KINDS, TINY, TINY_PLUS, assert_same_bits

MODELS = sorted(helpers.counts())
KINDS_OF_MODELS = ("repvgg_a0", "repvgg_b1g4", "repvgg_d2se", "repvggplus_l2pse")
WITH_GATES = TINY | {"se": "pre", "se_reduction": 4}


def sources_of(model):
  return [source for source, models in helpers.key_lists().items() if model in models]


def address(array):
  """Returns the place and the layout of an array's numbers in memory."""
  facts = array.__array_interface__
  return facts["data"][0], facts["shape"], facts["strides"] or array.strides


def refusal(model, state, **arguments):
  """Returns the headline and the lines of the text with which `from_torch` refuses a state dict."""
  with pytest.raises(InputError) as caught:
    weights.from_torch(model, state, **arguments)
  headline, *lines = str(caught.value).split("\n  ")
  return headline, lines


@pytest.fixture(scope="module")
def state():
  """A small network's, with counters; tests copy it before they change it."""
  return cases.random_state("repvgg_a0", **TINY)


@pytest.fixture
def few_models(monkeypatch):
  """Leaves three models to search, since tracing all of them takes seconds."""
  monkeypatch.setattr(recognition, "list_models", lambda: ["repvgg_a0", "repvgg_a1", "repvgg_b0"])


# Published weights


def renamed_keys(model, source, kind):
  """Returns official names by the names in a different source, after checking its key list."""
  shapes = helpers.keys("official", model)[kind]
  names = cases.renamed({name: name for name in shapes}, source)
  assert {name: shapes[official] for name, official in names.items()} == (
    helpers.keys(source, model)[kind]
  )
  return names


@pytest.mark.parametrize("model", helpers.spread(MODELS, KINDS_OF_MODELS[:2]))
def test_every_checkpoint_is_known_and_its_tensors_have_their_places(model):
  hint = f"/models/{model.replace('_', '-').upper()}-v1.pth"
  for kind, source in itertools.product(KINDS, sources_of(model)):
    shapes = helpers.keys(source, model)[kind]
    state = {name: np.broadcast_to(np.float32(1), shape) for name, shape in shapes.items()}
    assert weights.recognize(state, hint=hint) == (model, source, kind, 1000)
    wanted, official = (
      sources.expected(model, naming, kind, 1000, {}) for naming in (source, "official")
    )
    assert {name: list(entry.shape) for name, entry in wanted.items()} == shapes
    for name, counterpart in renamed_keys(model, source, kind).items():
      assert wanted[name][:2] == official[counterpart][:2], name


@pytest.mark.parametrize("model", MODELS)
def test_published_names_and_shapes_have_the_published_counts(model):
  # The test before holds the models to the same lists.
  counts = helpers.counts()[model]
  for kind, buffers in (("train", counts["bn_buffers"]), ("deploy", 0)):
    shapes = helpers.keys("official", model)[kind]
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    assert sum(size for name, size in sizes.items() if "running_" in name) == buffers
    assert sum(sizes.values()) == counts[f"{kind}_params"] + buffers


@pytest.mark.parametrize("model", ["repvgg_a0", "repvgg_d2se", "repvggplus_l2pse"])
def test_checkpoints_come_in_and_go_out_as_they_were(model):
  for kind in KINDS:
    official = cases.numbered(helpers.keys("official", model)[kind])
    expected = weights.from_torch(model, official)
    assert expected.keys() == {"train": {"params", "batch_stats"}, "deploy": {"params"}}[kind]
    for source in sources_of(model):
      state = cases.renamed(official, source)
      variables = weights.from_torch(model, state)
      assert jax.tree.map(address, variables) == jax.tree.map(address, expected)
      assert_same_bits(weights.to_torch(model, variables, source), state)


def test_kernels_are_turned_as_convolutions_need_them():
  state = cases.numbered(helpers.keys("official", "repvgg_d2se")["train"])
  params = weights.from_torch("repvgg_d2se", state)["params"]
  block = params["stage1"]["block1"]
  kernel, gate = block["RepConv_0"]["conv3x3"], block["SqueezeExcite_0"]["down"]
  dense, down = state["stage1.1.rbr_dense.conv.weight"], state["stage1.1.se.down.weight"]
  np.testing.assert_array_equal(kernel["conv"]["kernel"], dense.transpose(2, 3, 1, 0))
  np.testing.assert_array_equal(gate["kernel"], down[:, :, 0, 0].T)
  np.testing.assert_array_equal(params["head"]["kernel"], state["linear.weight"].T)


@pytest.mark.usefixtures("x64")
def test_the_authors_outputs_come_out():
  cases.check_golden(helpers.goldens()["repvgg_tiny_se_groups"])


@pytest.mark.parametrize("case", ["repvgg_a0_64", "repvggplus_tiny"])
def test_state_dicts_are_read_as_the_variables_whose_outputs_are_the_authors(case):
  name, num_classes, overrides = cases.golden_network(helpers.goldens()[case])
  shapes = repjax.ModelSpec(name, num_classes, overrides).variable_shapes()
  # The tests of models compute with these.
  expected = helpers.fill_variables(shapes, plus=name == "repvggplus_l2pse")
  names = sources.expected(name, "official", "train", num_classes, overrides)
  state = helpers.fill_state_dict({name: entry.shape for name, entry in names.items()})
  variables = weights.from_torch(name, state, num_classes=num_classes, **overrides)
  jax.tree.map(np.testing.assert_array_equal, variables, expected)


# Other state dicts that are taken


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("model", "source", "overrides"),
  [
    ("repvgg_a0", "official", {"aux_heads": True, **TINY}),
    ("repvgg_a0", "timm", WITH_GATES),
    ("repvgg_b1g4", "mmpretrain", TINY | {"groups": {1: 2, 5: 4}}),
    ("repvggplus_l2pse", "official", TINY_PLUS),
  ],
)
def test_networks_of_other_shapes(model, source, kind, overrides):
  state = cases.random_state(model, kind, source, 7, counters=False, **overrides)
  found = weights.recognize(state, model, **overrides)
  assert found == (model, source, kind, 7)
  variables = weights.from_torch(model, state, num_classes=7, **overrides)
  assert_same_bits(weights.to_torch(model, variables, source), state)
  spec = repjax.ModelSpec(model, 7, overrides)
  expected = spec.variable_shapes(deploy=kind == "deploy")
  assert helpers.shapes(variables) == helpers.shapes(expected)


def test_counters_of_batches_are_dropped(state):
  counters = [name for name in state if name.endswith("num_batches_tracked")]
  assert len(counters) == sum(name.endswith("running_var") for name in state)
  variables = weights.from_torch("repvgg_a0", state, num_classes=10, **TINY)
  back = weights.to_torch("repvgg_a0", variables)
  assert back.keys() == state.keys() - set(counters)


def test_arrays_are_views_where_nothing_asks_for_a_copy(state):
  variables = weights.from_torch("repvgg_a0", state, num_classes=10, **TINY)
  for name, array in weights.to_torch("repvgg_a0", variables).items():
    assert np.shares_memory(array, state[name])
  copies = weights.from_torch("repvgg_a0", state, num_classes=10, param_dtype="float64", **TINY)
  for name, array in weights.to_torch("repvgg_a0", copies).items():
    assert not np.shares_memory(array, state[name])


def test_what_goes_out_is_contiguous():
  for array in cases.random_state("repvgg_a0", **WITH_GATES).values():
    assert array.flags.c_contiguous


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=str)
def test_variables_have_the_dtype_that_was_asked_for(state, dtype):
  variables = weights.from_torch("repvgg_a0", state, num_classes=10, param_dtype=dtype, **TINY)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(dtype)}
  for name, array in weights.to_torch("repvgg_a0", variables).items():
    np.testing.assert_array_equal(array, state[name].astype(dtype))


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_half_precision_comes_in_where_it_is_asked_for(state, dtype):
  half = {name: value.astype(dtype) for name, value in state.items()}
  variables = weights.from_torch("repvgg_a0", half, num_classes=10, param_dtype=dtype, **TINY)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(dtype)}


def test_whatever_numpy_can_read_is_an_array(state):
  class Tensor:
    def __init__(self, array):
      self.shape, self._array = array.shape, array

    def __array__(self, dtype=None, copy=None):
      return self._array

  tensors = {name: Tensor(value) for name, value in state.items()}
  assert weights.recognize(tensors, "repvgg_a0", **TINY) == ("repvgg_a0", "official", "train", 10)
  for wrapped in (tensors, {name: jnp.asarray(value) for name, value in state.items()}):
    variables = weights.from_torch("repvgg_a0", wrapped, num_classes=10, **TINY)
    expected = weights.from_torch("repvgg_a0", state, num_classes=10, **TINY)
    jax.tree.map(np.testing.assert_array_equal, variables, expected)


def test_an_array_that_numpy_cannot_have_is_named(state):
  class OnGpu:
    shape = (10,)

    def __array__(self, dtype=None, copy=None):
      raise TypeError("can't convert cuda:0 device type tensor to numpy")

  with pytest.raises(InputError, match=r"^linear\.bias is no array: can't convert.*\.cpu\(\)"):
    weights.from_torch("repvgg_a0", {**state, "linear.bias": OnGpu()}, num_classes=10, **TINY)


# Which model


@pytest.mark.parametrize(
  ("model", "source", "overrides"),
  [
    ("repvgg_b1g4", "timm", TINY),
    ("repvgg_d2se", "mmpretrain", TINY | {"se_reduction": 4}),
    ("repvggplus_l2pse", "official", TINY_PLUS),
  ],
)
def test_the_model_is_found_by_names_and_shapes(model, source, overrides):
  for kind in KINDS:
    state = cases.random_state(model, kind, source, 10, **overrides)
    assert weights.recognize(state, **overrides) == (model, source, kind, 10)


def test_models_named_in_the_hint_are_tried_first_and_the_longest_name_first(monkeypatch, state):
  tried, candidates = [], recognition.candidates
  monkeypatch.setattr(recognition, "list_models", lambda: ["repvgg_a0", "repvgg_b1", "repvgg_b1g4"])
  monkeypatch.setattr(
    recognition, "candidates", lambda name, *rest: tried.append(name) or candidates(name, *rest)
  )
  found = weights.recognize(state, hint="weights/RepVGG-B1g4-train.pth", **TINY)
  assert tried == ["repvgg_b1g4", "repvgg_b1"]
  assert found.model == "repvgg_b1"  # cut like this it is A0


def test_no_head_is_no_number_of_classes(state):
  backbone = {name: value for name, value in state.items() if not name.startswith("linear")}
  assert weights.recognize(backbone, "repvgg_a0", **TINY).num_classes is None


def test_nothing_fits(few_models, state):
  strange = {f"encoder.{name}": value for name, value in state.items()}
  with pytest.raises(InputError, match=r"no model has tensors of .*encoder\.stage.*--model"):
    weights.recognize(strange)


def test_a_strangers_file_is_refused_without_a_trace_of_our_models(monkeypatch):
  monkeypatch.setattr(recognition, "expected", lambda *args: pytest.fail(f"traced: {args}"))
  stranger = {f"blocks.{n}.conv_pw.weight": np.zeros((8, 8, 1, 1)) for n in range(3)}
  with pytest.raises(InputError, match="no model has tensors"):
    weights.recognize(stranger)


def test_a_classifier_alone_is_nobodys(few_models):
  head = {"linear.weight": np.zeros((1000, 1280)), "linear.bias": np.zeros(1000)}
  with pytest.raises(InputError, match="no model has tensors"):
    weights.recognize(head | {"blocks.0.norm.weight": np.zeros(8)})


def test_the_closest_model_is_taken_where_none_fits(few_models, state):
  found = weights.recognize({**state, "extra": np.zeros(3)}, **TINY)
  assert found.naming == "official"
  assert found.kind == "train"


@pytest.mark.parametrize("function", [weights.recognize, weights.from_torch])
def test_an_unknown_model_or_override_is_refused(function, state):
  arguments = ("repvgg_a9", state)[:: 1 if function is weights.from_torch else -1]
  with pytest.raises(InputError, match="unknown model 'repvgg_a9'; did you mean repvgg_a"):
    function(*arguments)
  arguments = ("repvgg_a0", state)[:: 1 if function is weights.from_torch else -1]
  with pytest.raises(InputError, match="unknown override of repvgg_a0 'stage_size'; did you mean"):
    function(*arguments, stage_size=(1, 1, 1, 1))
  if function is weights.recognize:
    with pytest.raises(InputError, match=r"unknown override of .* 'stage_size'"):
      function(state, stage_size=(1, 1, 1, 1))


# A new classifier


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
  ("model", "overrides", "heads"),
  [
    ("repvgg_a0", TINY, {"head"}),
    (
      "repvggplus_l2pse",
      TINY_PLUS,
      {"head", "AuxHead_stage1", "AuxHead_stage2", "AuxHead_stage3_first"},
    ),
  ],
)
def test_a_dropped_head_is_drawn_as_init_does(model, overrides, heads, kind):
  state = cases.random_state(model, kind, num_classes=5, **overrides)
  variables = weights.from_torch(model, state, num_classes=7, drop_head=True, **overrides)
  old = weights.from_torch(model, state, num_classes=5, **overrides)
  ours = repjax.create_model(model, num_classes=7, deploy=kind == "deploy", **overrides)
  fresh = repjax.init(ours, jax.random.key(0), 224)
  assert helpers.shapes(variables) == helpers.shapes(fresh)
  for path, leaf in helpers.leaves(variables).items():
    is_new = "/head/" in path
    expected = helpers.leaves(fresh if is_new else old)[path]
    np.testing.assert_array_equal(leaf, expected, err_msg=path)
    if is_new:
      heads = heads - {path.split("/")[1]}
  assert heads <= ({"AuxHead_stage1", "AuxHead_stage2", "AuxHead_stage3_first"})
  assert kind == "deploy" or not heads


def test_what_is_dropped_may_be_missing_or_damaged(state):
  expected = weights.from_torch("repvgg_a0", state, num_classes=3, drop_head=True, **TINY)
  damaged = {**state, "linear.weight": np.full((10, 64), np.nan, np.float16)}
  del damaged["linear.bias"]
  ours = weights.from_torch("repvgg_a0", damaged, num_classes=3, drop_head=True, **TINY)
  jax.tree.map(np.testing.assert_array_equal, ours, expected)


def test_another_number_of_classes_is_refused_with_the_way_out(state):
  headline, lines = refusal("repvgg_a0", state, num_classes=12, **TINY)
  assert "with 12 classes" in headline
  assert "The file has 10 classes: pass num_classes=10, or drop" in headline
  assert "drop_head=True" in headline
  assert sorted(lines) == [
    "linear.bias is (10,), wanted (12,)",
    "linear.weight is (10, 64), wanted (12, 64)",
  ]


# Refused state dicts


def test_all_misfits_are_in_one_text(few_models, state):
  bad = dict(state)
  bad["stage1.0.rbr_dense.conv.kernel"] = bad.pop("stage1.0.rbr_dense.conv.weight")
  del bad["stage0.rbr_1x1.bn.bias"]
  bad["optimizer"] = np.zeros(2, np.float32)
  bad["linear.weight"] = bad["linear.weight"][:, :3]
  bad["linear.bias"] = np.arange(10)
  bad["stage4.0.rbr_1x1.bn.weight"] = bad["stage4.0.rbr_1x1.bn.weight"].astype(np.float16)
  mean = bad["stage2.0.rbr_dense.bn.running_mean"] = bad["stage2.0.rbr_dense.bn.running_mean"] * 1
  mean[:3] = np.nan, np.inf, -np.inf
  bad["stage2.0.rbr_dense.bn.running_var"] = -bad["stage2.0.rbr_dense.bn.running_var"]
  headline, lines = refusal("repvgg_a0", bad, num_classes=10, **TINY)
  assert "do not fit repvgg_a0 (read as official names, train form) with 10 classes" in headline
  assert "nothing was converted. Problems: 9." in headline
  assert sorted(lines) == sorted(
    [
      "missing stage0.rbr_1x1.bn.bias (8,)",
      "missing stage1.0.rbr_dense.conv.weight (8, 8, 3, 3), "
      "closest: stage1.0.rbr_dense.conv.kernel",
      "unexpected stage1.0.rbr_dense.conv.kernel (8, 8, 3, 3), "
      "closest: stage1.0.rbr_dense.conv.weight",
      "unexpected optimizer (2,)",
      "linear.weight is (10, 3), wanted (10, 64)",
      "linear.bias holds int64, not floating-point numbers",
      "stage4.0.rbr_1x1.bn.weight is float16",
      "stage2.0.rbr_dense.bn.running_mean holds 3 of 16 numbers that are not finite",
      "stage2.0.rbr_dense.bn.running_var holds negative variances",
    ]
  )


def test_a_renamed_key_leads_to_the_closest_of_its_shape(state):
  bad = dict(state)
  bad["linear.b"] = bad.pop("linear.bias")
  bad["linear.w"] = bad.pop("linear.weight")
  _, lines = refusal("repvgg_a0", bad, num_classes=10, **TINY)
  assert sorted(lines) == [
    "missing linear.bias (10,), closest: linear.b",
    "missing linear.weight (10, 64), closest: linear.w",
    "unexpected linear.b (10,), closest: linear.bias",
    "unexpected linear.w (10, 64), closest: linear.weight",
  ]


def test_a_mixture_of_both_kinds_is_called_so(state):
  deploy = cases.random_state("repvgg_a0", "deploy", **TINY)
  mixed = {**state, **{name: deploy[name] for name in deploy if name.startswith("stage2")}}
  headline, lines = refusal("repvgg_a0", mixed, num_classes=10, **TINY)
  assert "train form" in headline
  assert "mixes both kinds: of the deploy form are stage2.0.rbr_reparam." in headline
  assert sorted(line.split()[:2] for line in lines) == [
    ["unexpected", "stage2.0.rbr_reparam.bias"],
    ["unexpected", "stage2.0.rbr_reparam.weight"],
  ]
  half = {name: value for name, value in state.items() if name.startswith("stage1")}
  headline, _ = refusal("repvgg_a0", {**deploy, **half}, num_classes=10, **TINY)
  assert "mixes both kinds" in headline


@pytest.mark.parametrize(
  ("given", "asked"),
  [
    ("repvgg_a0", "repvgg_a1"),
    ("repvgg_a1", "repvgg_b0"),  # as wide, less deep
    ("repvgg_b0", "repvgg_a1"),
  ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_model_say_of_which(few_models, given, asked, kind):
  state = cases.numbered(helpers.keys("official", given)[kind])
  headline, lines = refusal(asked, state)
  assert re.search(rf"those of {given}\b", headline)
  assert lines


def test_weights_of_another_model_say_of_which_when_the_head_is_dropped(few_models):
  state = cases.numbered(helpers.keys("official", "repvgg_a0")["train"])
  headline, _ = refusal("repvgg_a1", state, num_classes=10, drop_head=True)
  assert re.search(r"those of repvgg_a0\b", headline)


@pytest.mark.parametrize(
  ("model", "naming", "kind", "overrides"),
  [
    ("repvgg_a0", "official", "train", TINY),
    ("repvgg_a0", "timm", "train", {"stage_sizes": [1, 3, 2, 1]}),
    ("repvgg_a0", "mmpretrain", "deploy", {"width_multipliers": [0.5, 0.5, 0.25, 0.5]}),
    ("resnet18", "official", "train", {"stage_sizes": [1, 1, 1, 1], "widths": [16, 32, 32, 64]}),
  ],
)
def test_missing_overrides_are_read_off_the_shapes(model, naming, kind, overrides):
  state = cases.random_state(model, kind, naming, 10, **overrides)
  headline, lines = refusal(model, state, num_classes=10)
  assert f"--overrides '{json.dumps(overrides)}'" in headline
  assert re.search(r"Problems: \d\d+\.", headline)
  assert len(lines) <= 6


def test_overrides_that_do_not_fit_are_not_proposed(monkeypatch):
  # The search for the model would trace all models of the family.
  monkeypatch.setattr(recognition, "list_models", lambda: ["repvgg_a0", "repvgg_a1", "resnet18"])
  state = cases.random_state("repvgg_a0", "train", "official", 10, **TINY)
  name = "stage1.0.rbr_1x1.conv.weight"
  headline, _ = refusal("repvgg_a0", state | {name: state[name][:, 1:]}, num_classes=10)
  assert "--overrides '" not in headline  # with values
  assert "--model" in headline


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=str)
def test_half_precision_is_refused_with_the_way_out(state, dtype):
  half = {name: value.astype(dtype) for name, value in state.items()}
  for param_dtype in (np.float32, np.float64):
    arguments = {"num_classes": 10, "param_dtype": param_dtype}
    headline, lines = refusal("repvgg_a0", half, **arguments, **TINY)
    assert "--allow-half" in headline
    count = sum(not name.endswith("tracked") for name in state)
    assert f"Problems: {count}." in headline
    # The scopes with the most tensors are told; the classifier has two.
    assert len(lines) == 6
    assert all(line.endswith(f" is {np.dtype(dtype)}") for line in lines[:5])
    assert lines[5] == "and 2 more"


def test_single_precision_widens_to_double(state):
  variables = weights.from_torch("repvgg_a0", state, num_classes=10, param_dtype=float, **TINY)
  assert variables["params"]["head"]["bias"].dtype == np.float64


@pytest.mark.parametrize(
  ("value", "said"),
  [
    (np.arange(10), "holds int64, not floating-point numbers"),
    (np.zeros(10, bool), "holds bool, not floating-point numbers"),
    (np.zeros(10, complex), "holds complex128, not floating-point numbers"),
    (np.array(["a"] * 10), "holds <U1, not floating-point numbers"),
    (None, "is (), wanted (10,)"),
    (np.zeros((10, 1), np.float32), "is (10, 1), wanted (10,)"),
    (np.full(10, np.inf, np.float32), "holds 10 of 10 numbers that are not finite"),
  ],
  ids=["int", "bool", "complex", "text", "none", "column", "infinite"],
)
def test_tensors_that_hold_no_weights_are_refused(state, value, said):
  _, lines = refusal("repvgg_a0", {**state, "linear.bias": value}, num_classes=10, **TINY)
  assert f"linear.bias {said}" in lines


def test_variances_may_be_zero(state):
  name = "stage0.rbr_1x1.bn.running_var"
  weights.from_torch(
    "repvgg_a0", {**state, name: np.zeros_like(state[name])}, num_classes=10, **TINY
  )


@pytest.mark.parametrize(
  ("state", "said"),
  [
    ({}, "the state dict is empty"),
    (
      {"fc.weight": np.zeros((10, 2))},
      r"no name in .*repvgg_a0's .*official or timm or mmpretrain",
    ),
  ],
  ids=["empty", "other"],
)
def test_names_of_no_naming_are_refused(state, said):
  with pytest.raises(InputError, match=said):
    weights.from_torch("repvgg_a0", state)


# Refused exports


def test_a_naming_without_that_model_is_refused():
  variables = cases.random_variables("repvggplus_l2pse", **TINY_PLUS)
  with pytest.raises(InputError, match=r"'timm' has no names for repvggplus.*there are: official"):
    weights.to_torch("repvggplus_l2pse", variables, "timm")
  with pytest.raises(InputError, match="'keras' has no names for repvgg_a0; there are: official"):
    weights.to_torch("repvgg_a0", cases.random_variables("repvgg_a0", **TINY), "keras")
  with pytest.raises(InputError, match="'repvgg_a9'; did you mean"):
    weights.to_torch("repvgg_a9", variables)


@pytest.mark.parametrize("source", ["timm", "mmpretrain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_a_naming_does_not_cover_is_refused(source, kind):
  variables = cases.random_variables("repvgg_a0", kind, aux_heads=True, **TINY)
  with pytest.raises(InputError, match=rf"{source} names of repvgg_a0 do not cover \w+"):
    weights.to_torch("repvgg_a0", variables, source)


def test_leaves_without_a_name_are_refused():
  variables = {"params": {"head": {"kernel": np.zeros((2, 2)), "alpha": np.zeros(2)}}}
  with pytest.raises(InputError, match="do not cover head/alpha: alpha is none of kernel, scale"):
    weights.to_torch("repvgg_a0", variables)
