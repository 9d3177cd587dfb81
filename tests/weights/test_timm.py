"""timm's own networks against ours: weights there and back, logits in every form, maps."""

import functools
import importlib.util
import sys
from unittest import mock

import numpy as np
import pytest

import repjax
from repjax import weights
from tests import helpers
from tests.helpers import assert_close, quick_jit
from tests.weights.cases import assert_same_bits

torch = pytest.importorskip("torch")

TORCHVISION = (
  *("torchvision", "torchvision.datasets", "torchvision.models", "torchvision.ops"),
  *("torchvision.models.feature_extraction", "torchvision.ops.misc"),
  *("torchvision.transforms", "torchvision.transforms.functional"),
)
TO_F64 = {"param_dtype": np.float64}


def import_timm():
  """Imports timm, or skips this module if timm is not installed.

  timm imports torchvision, which timm's RepVGG does not use. If torchvision is missing, a stand-in
  that has every name takes its place during the import.
  """
  stand_ins = () if importlib.util.find_spec("torchvision") else TORCHVISION
  sys.modules.update({name: mock.MagicMock() for name in stand_ins})
  try:
    return pytest.importorskip("timm")
  finally:
    for name in stand_ins:
      del sys.modules[name]


timm = import_timm()
pytestmark = pytest.mark.usefixtures("x64")


@pytest.fixture(scope="module")
def network():
  """timm's RepVGG-A0 in float64 with random weights and statistics."""
  torch.manual_seed(0)
  network = timm.create_model("repvgg_a0", pretrained=False).double().eval()
  for name, tensor in network.state_dict().items():
    if name.endswith(("running_var", "bn.weight", "identity.weight")):
      tensor.uniform_(0.5, 1.5)
    elif name.endswith(("running_mean", "bias")):
      tensor.uniform_(-0.3, 0.3)
  return network


@pytest.fixture(scope="module")
def images():
  return helpers.random_input(2, 64, 64, 3)


@pytest.fixture(scope="module")
def expected(network, images):
  return logits_of(network, images)


def logits_of(network, images):
  """Computes the logits of timm's network for images (N, H, W, 3)."""
  with torch.no_grad():
    return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def ours(variables, images, deploy=False):
  model = repjax.create_model("repvgg_a0", deploy=deploy, **helpers.F64)
  return quick_jit(model.apply)(variables, images)


def test_the_training_form_computes_what_timm_does(network, images, expected):
  variables = weights.from_torch("repvgg_a0", network.state_dict(), **TO_F64)
  assert_close(ours(variables, images), expected, 1e-12)
  params = quick_jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  assert_close(ours({"params": params}, images, deploy=True), expected, 1e-12)


def test_timms_own_deploy_form_computes_the_same_here(network, images, expected):
  from timm.utils import reparameterize_model

  plain = reparameterize_model(network)
  state = plain.state_dict()
  assert weights.recognize(state, "repvgg_a0") == ("repvgg_a0", "timm", "deploy", 1000)
  variables = weights.from_torch("repvgg_a0", state, **TO_F64)
  assert variables.keys() == {"params"}
  assert_close(ours(variables, images, deploy=True), expected, 1e-12)


def test_timm_loads_what_comes_back(network, images, expected):
  variables = weights.from_torch("repvgg_a0", network.state_dict(), **TO_F64)
  state = weights.to_torch("repvgg_a0", variables, "timm")
  other = timm.create_model("repvgg_a0", pretrained=False).double().eval()
  for name, tensor in network.state_dict().items():
    if name.endswith("num_batches_tracked"):
      state[name] = tensor.numpy()
  other.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=True)
  back, held = (
    {name: tensor.numpy() for name, tensor in each.state_dict().items()}
    for each in (other, network)
  )
  assert_same_bits(back, held)
  np.testing.assert_array_equal(logits_of(other, images), expected)


def test_timm_loads_our_deploy_form(network, images, expected):
  from timm.utils import reparameterize_model

  variables = weights.from_torch("repvgg_a0", network.state_dict(), **TO_F64)
  params = quick_jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
  state = weights.to_torch("repvgg_a0", {"params": params}, "timm")
  plain = reparameterize_model(network)
  plain.load_state_dict({name: torch.tensor(value) for name, value in state.items()}, strict=True)
  assert_close(logits_of(plain, images), expected, 1e-12)


def test_parameters_with_a_gradient_are_refused_with_the_way_out(network):
  with pytest.raises(repjax.errors.InputError, match=r"is no array: .*detach\(\)\.cpu\(\)"):
    weights.from_torch("repvgg_a0", dict(network.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_tensors_are_refused_with_the_way_out(network, dtype):
  state = {name: tensor.to(dtype) for name, tensor in network.state_dict().items()}
  with pytest.raises(repjax.errors.InputError, match=r"\.float\(\)|astype\('float32'\)"):
    weights.from_torch("repvgg_a0", state)


MOBILE = ("mobileone_s1", "mobileone_s4", "repvit_m0_9", "repvit_m1", "fastvit_t8", "fastvit_sa12")


@pytest.mark.parametrize("name", MOBILE)
class TestMobile:
  @staticmethod
  @functools.cache
  def build(name):
    """timm's network with random weights and statistics, images, logits and maps."""
    torch.manual_seed(0)
    network = timm.create_model(name, pretrained=False).double().eval()
    for key, tensor in network.state_dict().items():
      if key.endswith("running_var") or (key.endswith("weight") and tensor.ndim == 1):
        tensor.uniform_(0.5, 1.5)
      elif key.endswith(("running_mean", "bias", "gamma")):
        tensor.uniform_(-0.3, 0.3)
    images = helpers.random_input(2, 64, 96, 3)
    with torch.no_grad():
      x = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
      maps = network.forward_intermediates(x, intermediates_only=True)[-4:]
      return network, images, network(x).numpy(), [each.numpy() for each in maps]

  def test_both_forms_compute_the_logits_and_every_map(self, name):
    network, images, logits, maps = self.build(name)
    variables = weights.from_torch(name, network.state_dict(), **TO_F64)
    params = quick_jit(repjax.reparameterize)(variables["params"], variables["batch_stats"])
    for held, deploy in ((variables, False), ({"params": params}, True)):
      model = repjax.create_model(name, deploy=deploy, **helpers.F64)
      assert_close(quick_jit(model.apply)(held, images), logits, 1e-12)
      found = quick_jit(model.clone(features_only=True).apply)(held, images)
      assert len(found) == len(maps) == 4
      for ours, theirs in zip(found.values(), maps):
        assert_close(helpers.nchw(ours), theirs, 1e-12)

  def test_timms_own_deploy_form_computes_the_same_here(self, name):
    from timm.utils import reparameterize_model

    network, images, logits, _ = self.build(name)
    state = reparameterize_model(network).state_dict()
    assert weights.recognize(state, name) == (name, "timm", "deploy", 1000)
    variables = weights.from_torch(name, state, **TO_F64)
    assert variables.keys() == {"params"}
    model = repjax.create_model(name, deploy=True, **helpers.F64)
    # timm's conversion of a RepViT makes layers in float32.
    tolerance = 1e-5 if name.startswith("repvit") else 1e-12
    assert_close(quick_jit(model.apply)(variables, images), logits, tolerance)

  def test_timm_loads_what_comes_back(self, name):
    network, *_ = self.build(name)
    held = network.state_dict()
    variables = weights.from_torch(name, held, **TO_F64)
    state = weights.to_torch(name, variables, "timm")
    counters = {key for key in held if key.endswith("num_batches_tracked")}
    assert state.keys() == held.keys() - counters
    assert_same_bits(state, {key: held[key].numpy() for key in state})
