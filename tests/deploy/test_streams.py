"""A network in streams on several devices computes what it computes on one."""

import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import repjax
from repjax.deploy.streams import cut_into_pieces
from repjax.errors import InputError
from repjax.models.base import StreamScope
from repjax.spec import Preprocessing
from tests.helpers import assert_close, quick_jit, random_variables

pytest_plugins = ["tests.training.fixtures", "tests.deploy.fixtures"]

ONE, THREE = jax.local_devices()[:1], jax.local_devices()[:3]
SMALL = {
  "stage_sizes": (1, 1, 1),
  "widths": (4, 6, 8, 10),
  "strides": (1, 2),
  "stem_blocks": 1,
  "num_classes": 5,
}
SIZE = 16


def noise(count, size=SIZE):
  return np.random.default_rng(count).standard_normal((count, size, size, 3), np.float32)


@pytest.fixture(scope="module")
def small():
  """A small ParNet in deploy form, which saves folding, and random variables."""
  model = repjax.create_model("parnet_s", deploy=True, **SMALL)
  return model, random_variables(model, noise(1))


def in_streams(model, variables, **settings):
  settings = {"image_size": SIZE, "batch_sizes": (3,), "devices": THREE, "tune": False} | settings
  return repjax.deploy.compile(model, variables, parallel="streams", **settings)


@pytest.fixture(scope="module")
def pair(small, quickly):
  """The small network on one device and in streams, for batches of three."""
  one = repjax.deploy.compile(*small, image_size=SIZE, batch_sizes=(3,), devices=ONE, tune=False)
  return one, in_streams(*small)


def test_three_devices_give_what_one_gives_for_every_number_of_images(pair):
  one, streams = pair
  assert streams.plans[3][:4] == (3, 3, 3, {})
  images = noise(7)
  for count in (0, 1, 2, 3, 4, 7):
    logits = streams(images[:count])
    assert (type(logits), logits.shape, logits.dtype) == (np.ndarray, (count, 5), np.float32)
    if count:
      assert_close(logits, one(images[:count]), 1e-6)


def test_every_scope_is_on_the_device_of_its_stream_alone(pair, small):
  found = {}
  for compiled in pair[1].programs[3].pieces:
    for scope, tree in compiled.tree["params"].items():
      assert scope not in found
      (found[scope],) = {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}
  assert found == {name: THREE[part.stream - 1] for name, part in small[0].stream_scopes.items()}
  assert [scope for scope, device in found.items() if device == THREE[1]] == [
    "downsample2",
    "stream2",
    "fusion2",
  ]


def test_feature_maps_of_all_streams_come_by_name(small, pair):
  model = small[0].clone(features_only=True)
  images = noise(2)
  maps = in_streams(model, small[1], batch_sizes=(2,))(images)
  expected = quick_jit(model.apply)(small[1], images)
  assert list(maps) == list(expected) == ["stage1", "stage2", "stage3", "stage4"]
  for name, each in maps.items():
    assert each.dtype == np.float32
    assert_close(each, expected[name], 1e-6)


def test_normalization_and_softmax_are_compiled_in(small, pair):
  preprocessing = Preprocessing(SIZE, SIZE, "bilinear", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
  images = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3), np.uint8)
  rows = in_streams(*small, probabilities=True, preprocessing=preprocessing)(images)
  normalized = np.asarray(preprocessing.normalize(jnp.asarray(images)))
  assert_close(rows, jax.nn.softmax(pair[0](normalized)), 1e-6)


SIX = """
import pickle, sys
import jax
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 6)
jax.config.update("jax_disable_most_optimizations", True)
import repjax
from repjax.deploy import tuning

tuning.fastest = lambda wanted, device: {one: tuning.suitable(one)[-1] for one in wanted}
name, settings, tree, batches = pickle.load(sys.stdin.buffer)
model = repjax.create_model(name, deploy=True, **settings)
compiled = repjax.deploy.compile(
  model, tree, image_size=batches[0].shape[1], batch_sizes=5, parallel="streams"
)
devices = [[each.id for each in piece.sharding.mesh.devices.flat]
           for piece in compiled.programs[5].pieces[:3]]
sys.stdout.buffer.write(pickle.dumps((
  [compiled(batch) for batch in batches], tuple(compiled.plans[5]), devices
)))
"""


@pytest.mark.proof
def test_six_devices_share_the_batch_in_two_groups(small, pair, tmp_path):
  batches = [noise(count) for count in (1, 4, 5, 6)]
  given = ("parnet_s", SMALL, jax.tree.map(np.asarray, small[1]), batches)
  root = str(Path(__file__).parents[2])
  done = subprocess.run(
    [sys.executable, "-c", SIX],
    env={"PYTHONPATH": root, "XDG_CACHE_HOME": str(tmp_path)},
    input=pickle.dumps(given),
    capture_output=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr.decode()
  results, plan, devices = pickle.loads(done.stdout)
  assert plan[:3] == (6, 3, 6)
  convolutions = plan[6]  # a plain tuple, which needs no repjax to be read
  assert convolutions["stream3/block0/RepConv_0/conv"] == "winograd4"
  assert convolutions["downsample4/RepConv_0/conv"] == "matmul"
  assert devices == [[0, 3], [1, 4], [2, 5]]
  for batch, logits in zip(batches, results, strict=True):
    assert_close(logits, pair[0](batch), 1e-5)


class TwoStreams(nn.Module):
  """Somebody's network in two streams; each can be made slow."""

  deploy: bool = False
  rounds: int = 0
  dtype: jax.typing.DTypeLike = jnp.float32

  @property
  def stream_scopes(self):
    return {
      "first": StreamScope(1, ("images",)),
      "second": StreamScope(2, ("images",)),
      "head": StreamScope(1, ("first", "second")),
    }

  @property
  def outputs(self):
    return {"logits": "head", "second": "second"}

  def __call__(self, images):
    maps = self.run({"images": images}, self.stream_scopes)
    return {name: maps[scope] for name, scope in self.outputs.items()}

  def run(self, maps, scopes):
    for scope in scopes:
      maps = maps | {
        scope: self._part(scope, *(maps[name] for name in self.stream_scopes[scope].reads))
      }
    return maps

  @nn.compact
  def _part(self, scope, *maps):
    x = nn.Dense(4, dtype=self.dtype, name=scope)(sum(maps))
    if scope == "head":
      return x.mean((1, 2))
    return jax.lax.fori_loop(0, self.rounds, lambda _, x: jnp.sin(x), x)


def test_a_network_of_ones_own_in_two_streams_runs_in_two_groups_on_four_devices():
  model, images = TwoStreams(), noise(5)
  variables = random_variables(model, images)
  compiled = repjax.deploy.compile(
    model, variables, image_size=SIZE, batch_sizes=(1, 2, 3), parallel="streams", tune=False
  )
  assert [plan[:3] for plan in compiled.plans.values()] == [(4, 1, 2), (4, 1, 2), (4, 2, 4)]
  for given in (images, jnp.asarray(images), images[:1], jnp.asarray(images[:3])):
    expected, found = model.apply(variables, given), compiled(given)
    assert found.keys() == expected.keys()
    for name, rows in found.items():
      assert_close(rows, expected[name], 1e-6)


def test_parameters_and_what_is_moved_have_the_dtype():
  model, images = TwoStreams(), noise(3)
  variables = random_variables(model, images)
  streams = in_streams(model, variables, dtype="bfloat16", devices=THREE[:2])
  for compiled in streams.programs[3].pieces:
    made = {info.dtype for name, info in compiled.executable.out_info.items() if name != "head"}
    assert {leaf.dtype for leaf in jax.tree.leaves(compiled.tree)} | made == {jnp.dtype("bfloat16")}
  for name, rows in streams(images).items():
    assert rows.dtype == np.float32
    assert_close(rows, model.apply(variables, images)[name], 2e-2)


@pytest.mark.parametrize("devices", [2, 4])
def test_nothing_is_compiled_in_a_call(devices):
  model = TwoStreams()
  variables = random_variables(model, noise(1))
  streams = in_streams(model, variables, batch_sizes=(2, 3), devices=jax.devices()[:devices])
  images = noise(4)
  on_device = [jnp.asarray(images[:count]) for count in (1, 2, 3, 4)]
  compiles = []

  def listener(name, seconds, **_):
    if "compile" in name:
      compiles.append(name)

  jax.monitoring.register_event_duration_secs_listener(listener)
  try:
    for each in (*on_device, *map(np.asarray, on_device)):
      streams(each)
  finally:
    jax._src.monitoring.unregister_event_duration_listener(listener)
  assert compiles == []


def test_no_stream_waits_for_another_to_be_done():
  model, images = TwoStreams(rounds=20_000), noise(1)
  compiled = in_streams(model, random_variables(model, images), batch_sizes=(1,), devices=THREE[:2])
  compiled(images)
  started = compiled.programs[1].start(images)
  assert not any(leaf.is_ready() for leaf in jax.tree.leaves(started))
  jax.block_until_ready(started)


def test_pieces_are_as_long_as_can_be():
  model = repjax.create_model("parnet_cifar_s")
  pieces = cut_into_pieces(model.stream_scopes, ["head"])
  assert [(piece.stream, piece.name) for piece in pieces] == [
    (1, "downsample0+downsample1+stem"),
    (2, "downsample2"),
    (3, "downsample3+stream3"),
    (1, "stream1+fusion1"),
    (2, "stream2"),
    (2, "fusion2"),
    (3, "fusion3+downsample4+head"),
  ]
  assert [piece.reads for piece in pieces[-2:]] == [("stream2", "fusion1"), ("stream3", "fusion2")]
  assert [piece.moves for piece in pieces] == [
    ("images",),
    ("stem",),
    ("downsample2",),
    (),
    (),
    ("fusion1",),
    ("fusion2",),
  ]
  backbone = model.clone(features_only=True)
  *_, stream1, _, _, last = cut_into_pieces(
    backbone.stream_scopes, jax.tree.leaves(backbone.outputs)
  )
  assert stream1.makes == ("stream1", "fusion1")
  assert last.makes == ("fusion3", "downsample4")


@pytest.mark.parametrize(
  ("changes", "said"),
  [
    ({"parallel": "stream"}, "unknown parallel 'stream'; did you mean streams"),
    ({"devices": None}, "3 devices or a multiple, got 4.*XLA_FLAGS=.*count=3"),
    ({"devices": ONE}, "3 devices or a multiple, got 1"),
    ({"devices": ()}, r"different devices .* got \[\]"),
    ({"devices": ONE * 3}, "different devices"),
    ({"image_size": 15}, "at least 16"),
    ({"dtype": "float64"}, "unknown dtype 'float64'"),
  ],
  ids=str,
)
def test_settings_that_cannot_be_are_refused(small, changes, said):
  settings = {"image_size": SIZE, "batch_sizes": 1, "devices": THREE, "parallel": "streams"}
  with pytest.raises(InputError, match=said):
    repjax.deploy.compile(*small, **settings | changes)


def test_a_network_without_streams_is_refused():
  model = repjax.create_model("repvgg_a0")
  with pytest.raises(InputError, match=r'like ParNet, got RepVGG.*parallel="data"'):
    repjax.deploy.compile(model, {"params": {}}, image_size=224, parallel="streams")
