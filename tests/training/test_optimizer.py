"""The optimizers against the documentation of PyTorch's, and the rules of weight decay.

The rules are compared with the names in the authors' two training scripts.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import repjax
from repjax.models.repmlp import RepMLP
from repjax.training import optimizer
from repjax.training.custom_l2 import penalised_kernels
from repjax.training.optimizer import DECAY_RULES, bias_mask, decay_mask
from repjax.weights.naming import entries
from repjax.weights.repmlp import BLOCK
from tests.helpers import leaves, official_name, relative_error, spread

pytest_plugins = ["tests.training.fixtures"]


LAYOUT = {
  "stem": {
    "RepConv_0": {
      "conv3x3": {"conv": {"kernel": (3, 3, 2, 4)}, "bn": {"scale": (4,), "bias": (4,)}},
      "conv1x1": {"conv": {"kernel": (1, 1, 2, 4)}, "bn": {"scale": (4,), "bias": (4,)}},
      "identity": {"bn": {"scale": (4,), "bias": (4,)}},
    }
  },
  "AuxHead_stage1": {"RepConv_0": {"kernel": (4, 4)}, "head": {"kernel": (4, 5), "bias": (5,)}},
  "head": {"kernel": (4, 5), "bias": (5,)},
}
# What each rule lets decay in LAYOUT, and how fast biases learn.
RULES = {
  "kernels_and_fast_biases": ("kernel", "identity/bn/scale"),
  "all_but_penalised_kernels": ("head/kernel", "RepConv_0/kernel", "identity/bn/scale"),
  "more_than_one_axis": ("kernel", "identity/bn/scale"),
  "no_vectors": ("kernel",),
}
BIAS_RATES = {"kernels_and_fast_biases": 2, "all_but_penalised_kernels": 2} | dict.fromkeys(
  ("more_than_one_axis", "no_vectors"), 1
)
RATES = [0.5, 0.2, 0.9, 0.0, 0.3]


def drawn(seed, dtype=jnp.float32):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: jnp.asarray(rng.standard_normal(shape), dtype),
    LAYOUT,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def torch_sgd(value, gradients, decay, factor, *, momentum, nesterov):
  """torch.optim.SGD by its documentation, with `factor` on the rate."""
  trace = None
  for gradient, rate in zip(gradients, RATES):
    g = gradient + decay * value
    trace = g if trace is None else momentum * trace + g
    value = value - factor * rate * (g + momentum * trace if nesterov else trace)
  return value


def torch_adamw(value, gradients, decay, factor, *, momentum):
  """torch.optim.AdamW by its documentation, with `factor` on the rate."""
  first = second = 0
  for count, (gradient, rate) in enumerate(zip(gradients, RATES), 1):
    rate *= factor
    value = value - rate * decay * value
    first = momentum * first + (1 - momentum) * gradient
    second = 0.999 * second + 0.001 * gradient**2
    deviation = np.sqrt(second / (1 - 0.999**count)) + 1e-8
    value = value - rate * first / (1 - momentum**count) / deviation
  return value


def clipped(gradients, limit):
  """torch.nn.utils.clip_grad_norm_ by its documentation, without the 1e-6 that it adds."""
  norm = np.sqrt(sum((np.asarray(value) ** 2).sum() for value in jax.tree.leaves(gradients)))
  return jax.tree.map(lambda value: value * min(1, limit / norm), gradients)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("clip_norm", spread([0.0, 12.5, 1e3], [12.5]))
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
  ("name", "options"),
  [
    ("sgd", {"momentum": 0.0, "nesterov": False}),
    ("sgd", {"momentum": 0.9, "nesterov": False}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("adamw", {"momentum": 0.8}),
  ],
  ids=str,
)
def test_several_steps_are_those_of_pytorch(name, options, rule, clip_norm):
  params, gradients = drawn(0, jnp.float64), [drawn(seed, jnp.float64) for seed in range(1, 6)]
  first = leaves(params)
  ours = getattr(optimizer, name)(
    lambda step: jnp.asarray(RATES)[step],
    weight_decay=0.03,
    weight_decay_rule=rule,
    clip_norm=clip_norm,
    **options,
  )
  state, update = ours.init(params), jax.jit(ours.update)
  for gradient in gradients:
    updates, state = update(gradient, state, params)
    params = optax.apply_updates(params, updates)

  limited = [clipped(gradient, clip_norm or np.inf) for gradient in gradients]
  for path, value in leaves(params).items():
    expected = {"sgd": torch_sgd, "adamw": torch_adamw}[name](
      np.asarray(first[path]),
      [np.asarray(leaves(gradient)[path]) for gradient in limited],
      0.03 * path.endswith(RULES[rule]),
      BIAS_RATES[rule] if path.endswith("bias") else 1,
      **options,
    )
    assert relative_error(value, expected) <= 1e-13, path


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_weight_decay_may_follow_the_updates(name):
  # Without gradients, SGD without momentum and AdamW multiply by 1 - rate * decay in each step.
  params, decays = drawn(0, jnp.float64), [0.3, 0.2, 0.1, 0.5, 0.0]
  first, still = leaves(params), jax.tree.map(jnp.zeros_like, params)
  ours = getattr(optimizer, name)(
    lambda step: jnp.asarray(RATES)[step],
    momentum=0.0,
    weight_decay=lambda step: jnp.asarray(decays)[step],
    **({"nesterov": False} if name == "sgd" else {}),
  )
  state, update = ours.init(params), jax.jit(ours.update)
  for _ in RATES:
    updates, state = update(still, state, params)
    params = optax.apply_updates(params, updates)
  left = np.prod(1 - np.asarray(RATES) * decays)
  for path, value in leaves(params).items():
    decaying = path.endswith(RULES["kernels_and_fast_biases"])
    assert relative_error(value, first[path] * (left if decaying else 1)) <= 1e-13, path


def test_the_norms_of_these_gradients_are_above_and_below_a_limit_of_the_test():
  norms = [float(optax.tree.norm(drawn(seed))) for seed in range(1, 6)]
  assert min(norms) < 12.5 < max(norms) < 1e3


def test_the_default_optimizers_state_is_that_of_earlier_checkpoints():
  state = optimizer.sgd(lambda step: 0.1, momentum=0.9, nesterov=False, weight_decay=0.1).init(
    {"head": {"kernel": jnp.ones((2, 3))}}
  )
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  assert {jax.tree_util.keystr(path): leaf.shape for path, leaf in flat} == {
    "[2][0].trace['head']['kernel']": (2, 3),
    "[2][1].count": (),
  }


def true_paths(mask):
  return {path for path, chosen in leaves(mask).items() if chosen}


def test_the_classifier_is_what_depends_on_the_number_of_classes():
  model = {"stage_sizes": (1, 1, 2, 1), "se": "post", "se_reduction": 4, "aux_heads": True}
  shapes = [
    jax.eval_shape(
      repjax.create_model("repvgg_a0", num_classes=classes, **model).init,
      jax.random.key(0),
      jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32),
    )["params"]
    for classes in (3, 5)
  ]
  of_three, of_five = (leaves(tree) for tree in shapes)
  differ = {path for path, leaf in of_three.items() if leaf.shape != of_five[path].shape}
  assert differ == true_paths(optimizer.classifier_mask(shapes[0]))
  assert len(differ) == 8  # kernel and bias of the classifier and of three auxiliary heads


def test_a_norm_in_front_of_a_classifier_is_the_backbones():
  layers = {"bn": {"scale": 1, "bias": 2}, "dense": {"kernel": 3, "bias": 4}}
  params = {"stem": {"kernel": 0}, "head": {"RepHead_0": layers}}
  learning = {"head": {"RepHead_0": {"dense": {"kernel": 3, "bias": 4}}}}
  assert optimizer.head_only(params) == learning
  assert true_paths(optimizer.classifier_mask(params)) == set(leaves(learning))
  learned = {"head": {"RepHead_0": {"dense": {"kernel": 5, "bias": 6}}}}
  whole = optimizer.overlay(params, learned)
  assert whole == {
    "stem": {"kernel": 0},
    "head": {"RepHead_0": layers | {"dense": {"kernel": 5, "bias": 6}}},
  }
  assert params["head"]["RepHead_0"]["dense"] == {"kernel": 3, "bias": 4}
  assert optimizer.overlay(params, params) == params


def steps_of(count, name="sgd", **options):
  """The updates of the last of some steps, and the optimizer's state."""
  ours = make(name, **options)
  params, state = drawn(0), ours.init(drawn(0))
  for seed in range(1, 1 + count):
    updates, state = ours.update(drawn(seed), state, params)
  return updates, state


def make(name, **options):
  if name == "sgd":
    options["nesterov"] = True
  return getattr(optimizer, name)(lambda step: 0.3, momentum=0.9, weight_decay=0.03, **options)


CHOICES = pytest.mark.parametrize(
  ("name", "options"),
  [
    ("sgd", {}),
    ("sgd", {"weight_decay_rule": "all_but_penalised_kernels", "clip_norm": 2.0}),
    ("adamw", {"weight_decay_rule": "more_than_one_axis", "clip_norm": 2.0}),
  ],
  ids=str,
)


@CHOICES
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("factor", [0.1, 0.3, 2.0])
def test_the_backbones_rate_scales_its_updates_exactly_and_no_others(factor, steps, name, options):
  plain, state = steps_of(steps, name, **options)
  scaled, scaled_state = steps_of(steps, name, **options, backbone_rate=factor)
  for path, update in leaves(scaled).items():
    own = 1 if path.startswith(("head/", "AuxHead_stage1/head/")) else factor
    np.testing.assert_array_equal(update, leaves(plain)[path] * np.float32(own), err_msg=path)
  # So that a run may continue at another factor.
  assert jax.tree.structure(scaled_state) == jax.tree.structure(state)
  jax.tree.map(np.testing.assert_array_equal, scaled_state, state)


@CHOICES
def test_an_optimizer_for_a_frozen_backbone_holds_and_changes_the_classifier_alone(name, options):
  params, gradients = drawn(0), {"head": drawn(1)["head"]}
  frozen = make(name, **options, backbone_rate=0.0)
  state = frozen.init(params)
  arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim]
  moments = {"sgd": 1, "adamw": 2}[name]
  assert sorted(leaf.shape for leaf in arrays) == moments * [(4, 5)] + moments * [(5,)]
  updates, _ = frozen.update(gradients, state, params)
  assert updates.keys() == {"head"}
  # The limit to the norm is then one to the classifier's.
  alone = make(name, **options)
  expected, _ = alone.update(
    gradients, alone.init({"head": params["head"]}), {"head": params["head"]}
  )
  jax.tree.map(np.testing.assert_array_equal, updates, expected)


NAMED = functools.partial(official_name, plus=True)


@pytest.fixture(scope="module")
def params():
  """The parameters, as shapes, of a RepVGG with every kind of scope there is."""
  model = repjax.create_model(
    "repvgg_a0", stage_sizes=(1, 1, 2, 1), se="post", se_reduction=4, aux_heads=True
  )
  images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
  return jax.eval_shape(model.init, jax.random.key(0), images)["params"]


def decays_in_june(name, axes):
  # train.py at 9a1de4a: no decay where the name holds "bias" or "bn".
  del axes
  return not any(word in name for word in ("bias", "bn"))


def decays_with_custom_l2(name, axes):
  # The same with `use_custwd`.
  return decays_in_june(name, axes) and not any(word in name for word in ("rbr_dense", "rbr_1x1"))


def decays_at_head(name, axes):
  # train/optimizer.py at eae7c52, set_weight_decay.
  return "identity.weight" in name or not (axes == 1 or name.endswith(".bias"))


def decays_in_timm(name, axes):
  # timm/optim, param_groups_weight_decay.
  return axes > 1 and not name.endswith(".bias")


@pytest.mark.parametrize(
  ("rule", "by_name"),
  [
    ("kernels_and_fast_biases", decays_in_june),
    ("all_but_penalised_kernels", decays_with_custom_l2),
    ("more_than_one_axis", decays_at_head),
    ("no_vectors", decays_in_timm),
  ],
)
def test_what_decays_is_what_the_authors_script_lets_decay(params, rule, by_name):
  expected = {path: by_name(NAMED(path), leaf.ndim) for path, leaf in leaves(params).items()}
  assert leaves(decay_mask(DECAY_RULES[rule], params)) == expected
  assert len(set(expected.values())) == 2


@pytest.mark.parametrize(
  ("rule", "by_name"),
  [
    ("kernels_and_fast_biases", decays_in_june),
    ("more_than_one_axis", decays_at_head),
    ("no_vectors", decays_in_timm),
  ],
)
def test_norms_over_tiles_decay_no_more_than_their_vectors_in_pytorch(rule, by_name):
  shapes = jax.eval_shape(RepMLP(4, 2).init, jax.random.key(0), jnp.ones((1, 4, 4, 4)))
  mask = leaves(decay_mask(DECAY_RULES[rule], shapes["params"]))
  for name, entry in entries(BLOCK, {"params": shapes["params"]}).items():
    assert mask["/".join(entry.path[1:])] == by_name(name, len(entry.shape)), name


def test_there_is_a_test_for_every_rule():
  assert DECAY_RULES.keys() == {
    "kernels_and_fast_biases",
    "all_but_penalised_kernels",
    "more_than_one_axis",
    "no_vectors",
  }


def test_what_decays_in_words(params):
  mask = leaves(decay_mask(DECAY_RULES["kernels_and_fast_biases"], params))
  paths = [path.split("/") for path, decays in mask.items() if decays]
  assert {tuple(path[-2:]) for path in paths} == {
    ("conv", "kernel"),
    ("head", "kernel"),
    ("down", "kernel"),
    ("up", "kernel"),
    ("bn", "scale"),
  }
  assert {path[-3] for path in paths if path[-1] == "scale"} == {"identity"}
  scales = {path.split("/")[-3] for path in mask if path.endswith("scale")}
  assert scales == {"identity", "conv3x3", "conv1x1"}


def test_a_layer_of_one_branch_is_not_spared_with_the_penalised_ones(params):
  mask = leaves(decay_mask(DECAY_RULES["all_but_penalised_kernels"], params))
  kernels = {path for path, decays in mask.items() if decays and path.endswith("conv/kernel")}
  assert kernels == {
    f"AuxHead_{stage}/RepConv_0/conv3x3/conv/kernel"
    for stage in ("stage1", "stage2", "stage3_first")
  }
  spared = {"/".join(path) for path in penalised_kernels(params)}
  assert spared == {path for path in mask if path.endswith("conv/kernel")} - kernels


def test_biases_are_what_the_script_calls_so(params):
  expected = {path: "bias" in NAMED(path) for path in leaves(params)}
  assert leaves(bias_mask(params)) == expected


def test_a_vector_that_is_no_norms_scale_and_a_bias_of_two_axes_differ_by_rule():
  params = {"layer": {"kernel": jnp.ones(3), "bias": jnp.ones((2, 3)), "table": jnp.ones((2, 3))}}
  by_name, by_axes = (
    leaves(decay_mask(DECAY_RULES[rule], params))
    for rule in ("kernels_and_fast_biases", "more_than_one_axis")
  )
  assert by_name == {"layer/kernel": True, "layer/bias": False, "layer/table": False}
  assert by_axes == {"layer/kernel": False, "layer/bias": False, "layer/table": True}
