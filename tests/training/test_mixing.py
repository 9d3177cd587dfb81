"""Mixup and CutMix against their definitions, written out in numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from repjax.training import mixing

pytest_plugins = ["tests.training.fixtures"]

SIZE = (8, 24)
MIXTURES = [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}]


def make_batch(count=5, seed=0):
  rng = np.random.default_rng(seed)
  images = rng.normal(size=(count, *SIZE, 3)).astype(np.float32)
  return images, rng.dirichlet(np.ones(4), count).astype(np.float32)


DRAW = mixing.draw
mix = mixing.mix


@pytest.fixture(autouse=True)
def _draws_are_compiled(monkeypatch):
  """Compiles what is slow to compile once for each pair of alphas, for batches of any shape."""
  monkeypatch.setattr(mixing, "draw", compiled_draw)


@functools.partial(jax.jit, static_argnums=1, static_argnames=("mixup", "cutmix"))
def compiled_draw(key, size, *, mixup, cutmix):
  return DRAW(key, size, mixup=mixup, cutmix=cutmix)


@jax.jit
def draws_of_mixup(keys, alpha):
  """Of any alpha, since Mixup alone does not ask whether it is zero."""
  return jax.vmap(lambda key: DRAW(key, SIZE, mixup=alpha, cutmix=0.0))(keys)


@functools.cache
def draws(mixup, cutmix, count=4000):
  """`count` independent draws: shares of the pixels (count, H, W), and of the images."""
  keys = jax.random.split(jax.random.key(1), count)
  if cutmix:
    draw = functools.partial(DRAW, size=SIZE, mixup=mixup, cutmix=cutmix)
    own, share = jax.jit(jax.vmap(draw))(keys)
  else:
    own, share = draws_of_mixup(keys, jnp.float32(mixup))
  return np.asarray(own)[:, 0, :, :, 0], np.asarray(share)


@functools.cache
def numpy_boxes(alpha, count=4000):
  """The paper's boxes, pixel by pixel: True inside."""
  rng = np.random.default_rng(2)
  inside = np.zeros((count, *SIZE), bool)
  for box in inside:
    ratio = np.sqrt(1 - rng.beta(alpha, alpha))
    edges = []
    for length in SIZE:
      extent = int(ratio * length)
      first = rng.integers(length) - extent // 2
      edges.append(slice(max(first, 0), min(first + extent, length)))
    box[tuple(edges)] = True
  return inside


@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("seed", range(3))
def test_mixup_is_one_share_of_each_image_and_the_rest_of_the_one_before(count, seed):
  images, targets = make_batch(count)
  mixed, mixed_targets = mix(images, targets, jax.random.key(seed), mixup=1.0)
  first, last = images[0].astype(np.float64), images[-1].astype(np.float64)
  share = np.sum((mixed[0] - last) * (first - last)) / np.sum((first - last) ** 2)
  assert 0 < share < 1
  for i in range(count):
    expected = share * images[i] + (1 - share) * images[i - 1]
    np.testing.assert_allclose(mixed[i], expected, atol=1e-5)
    expected = share * targets[i] + (1 - share) * targets[i - 1]
    np.testing.assert_allclose(mixed_targets[i], expected, atol=1e-5)


@pytest.mark.parametrize("seed", range(8))
def test_cutmix_puts_a_box_of_the_image_before_into_each_and_counts_its_pixels(seed):
  count = 4
  images = np.broadcast_to(np.arange(count, dtype=np.float32)[:, None, None, None], (4, *SIZE, 3))
  targets = np.eye(count, dtype=np.float32)
  mixed, mixed_targets = mix(images, targets, jax.random.key(seed), cutmix=1.0)
  foreign = np.asarray(mixed) != images
  box = foreign[0, :, :, 0]
  assert (foreign == box[None, :, :, None]).all()
  assert (box == np.outer(box.any(1), box.any(0))).all()
  for inside in (box.any(1), box.any(0)):  # in one piece
    assert np.abs(np.diff(np.concatenate([[0], inside, [0]]).astype(int))).sum() in (0, 2)
  for i in range(count):
    assert (np.asarray(mixed[i])[box] == (i - 1) % count).all()
    expected = (1 - box.mean()) * targets[i] + box.mean() * targets[i - 1]
    np.testing.assert_allclose(mixed_targets[i], expected, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0, 4.0])
def test_mixups_share_follows_the_beta_distribution(alpha):
  own, share = draws(alpha, 0.0)
  assert (own == share[:, None, None]).all()
  # Rounded as well: of an alpha of 0.1, a tenth is nearer to 1 than float32 can tell.
  papers = np.random.default_rng(2).beta(alpha, alpha, len(share)).astype(np.float32)
  assert stats.ks_2samp(share, papers).pvalue > 0.001


@pytest.mark.parametrize("alpha", [0.01, 0.05])
def test_a_very_small_alpha_gives_shares_of_nearly_zero_or_one(alpha):
  _, share = draws(alpha, 0.0)
  assert np.isfinite(share).all()
  assert (share >= 0).all()
  assert (share <= 1).all()
  variance = 0.25 / (2 * alpha + 1)
  assert abs(share.mean() - 0.5) < 4 * np.sqrt(variance / len(share))
  assert share.astype(np.float64).var() == pytest.approx(variance, rel=0.02)


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_cutmixs_boxes_are_distributed_as_the_papers(alpha):
  own, share = draws(0.0, alpha)
  inside = numpy_boxes(alpha)
  np.testing.assert_allclose(share, own.mean((1, 2)), rtol=1e-6)
  assert stats.ks_2samp(share, 1 - inside.mean((1, 2))).pvalue > 0.001
  for axis in (1, 2):  # extents after clipping
    ours, papers = (boxes.any(axis).sum(-1) for boxes in (own == 0, inside))
    assert stats.ks_2samp(ours, papers).pvalue > 0.001
  covered = (own == 0).mean(0)  # of every pixel, how often
  assert np.abs(covered - inside.mean(0)).max() < 5 * np.sqrt(2 * 0.25 / len(own))


def test_with_both_on_each_is_taken_half_of_the_time_with_its_own_alpha():
  own, share = draws(8.0, 1.0)
  mixup = own.min((1, 2)) == own.max((1, 2))
  mixup &= (share > 0) & (share < 1)
  assert abs(mixup.mean() - 0.5) < 0.03
  assert stats.ks_1samp(share[mixup].astype(np.float64), stats.beta(8.0, 8.0).cdf).pvalue > 0.001
  assert stats.ks_2samp(share[~mixup], 1 - numpy_boxes(1.0).mean((1, 2))).pvalue > 0.001


@pytest.mark.parametrize("alphas", MIXTURES, ids=str)
def test_targets_stay_probabilities_and_nothing_changes_shape_or_type(alphas):
  images, targets = make_batch()
  for seed in range(10):
    mixed, mixed_targets = mix(images, targets, jax.random.key(seed), **alphas)
    np.testing.assert_allclose(mixed_targets.sum(-1), 1, atol=1e-6)
    assert (mixed_targets >= 0).all()
  assert (mixed.shape, mixed.dtype) == (images.shape, images.dtype)
  assert (mixed_targets.shape, mixed_targets.dtype) == (targets.shape, targets.dtype)
  half, _ = mix(images.astype(jnp.bfloat16), targets, jax.random.key(0), **alphas)
  assert half.dtype == jnp.bfloat16


@pytest.mark.parametrize("alphas", MIXTURES, ids=str)
def test_a_key_fixes_the_mixture(alphas):
  images, targets = make_batch()
  one, again, other = (
    np.asarray(mix(images, targets, jax.random.key(seed), **alphas)[0]) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, again)
  assert not np.array_equal(one, other)


@pytest.mark.parametrize("alphas", MIXTURES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_normalising_images_and_smoothing_targets_may_come_before_or_after(alphas, seed):
  images, targets = make_batch()
  key = jax.random.key(seed)

  def normalise(x):
    return (x - 0.4) / 0.3

  def smooth(t):
    return 0.9 * t + 0.1 / t.shape[-1]

  before = mix(normalise(images), smooth(targets), key, **alphas)
  after_images, after_targets = mix(images, targets, key, **alphas)
  np.testing.assert_allclose(before[0], normalise(np.asarray(after_images)), atol=1e-5)
  np.testing.assert_allclose(before[1], smooth(np.asarray(after_targets)), atol=1e-6)


@pytest.mark.parametrize("alphas", MIXTURES[:2], ids=str)
def test_gradients_flow_to_both_images_by_their_shares(alphas):
  images, targets = make_batch()
  key = jax.random.key(3)
  weights = np.random.default_rng(1).normal(size=images.shape).astype(np.float32)
  gradient = jax.grad(lambda x: jnp.sum(weights * mix(x, targets, key, **alphas)[0]))(images)
  own, _ = mixing.draw(key, SIZE, **{"mixup": 0.0, "cutmix": 0.0, **alphas})
  own = np.asarray(own)[0]
  for i in range(len(images)):
    after = weights[(i + 1) % len(images)]
    np.testing.assert_allclose(gradient[i], own * weights[i] + (1 - own) * after, atol=1e-5)


@pytest.mark.parametrize(
  ("share", "expected"), [(0.7, [3, 1, 2]), (0.5, [3, 1, 2]), (0.4, [2, 3, 1]), (0.0, [2, 3, 1])]
)
def test_the_dominant_label_is_the_one_with_the_larger_share(share, expected):
  labels = jnp.array([3, 1, 2])
  np.testing.assert_array_equal(mixing.dominant(labels, jnp.float32(share)), expected)


def test_one_image_alone_cannot_be_mixed():
  images, targets = make_batch(1)
  with pytest.raises(ValueError, match="at least 2 images on each device, got 1"):
    mixing.mix(images, targets, jax.random.key(0), mixup=0.4)
