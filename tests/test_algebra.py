"""Every law of the algebra against convolutions computed by their definition, in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from repjax import algebra
from repjax.algebra import AffineParams, BranchScales, ConvParams
from tests.helpers import convolve, quick_jit, random_input, randomise, relative_error

pytestmark = pytest.mark.usefixtures("x64")

EPSILON = 1e-3  # not the default anywhere, so that a forgotten epsilon shows
EXACT = 1e-12


def random_conv(height, width, inputs, outputs, seed=0):
  return ConvParams(
    jnp.asarray(random_input(height, width, inputs, outputs, seed=seed)),
    jnp.asarray(random_input(outputs, seed=seed + 100)),
  )


def random_norm(features, seed=0, dtype=np.float64):
  leaf = jax.ShapeDtypeStruct((features,), dtype)
  drawn = randomise(
    {"bn": {"scale": leaf, "bias": leaf}, "stats": {"mean": leaf, "var": leaf}}, seed
  )
  return drawn["bn"], drawn["stats"]


def normalise(y, bn, stats):
  bn, stats = jax.tree.map(np.asarray, (bn, stats))
  return (y - stats["mean"]) / np.sqrt(stats["var"] + EPSILON) * bn["scale"] + bn["bias"]


class TestBnAffine:
  def test_applying_the_map_is_normalising(self):
    x, norm = random_input(50, 6), random_norm(6)
    scale, bias = algebra.bn_affine(*norm, EPSILON)
    assert relative_error(x * np.asarray(scale) + np.asarray(bias), normalise(x, *norm)) <= EXACT

  @pytest.mark.parametrize("missing", ["scale", "bias", "mean", "var"])
  def test_a_missing_vector_is_named(self, missing):
    bn, stats = random_norm(6)
    del (bn if missing in bn else stats)[missing]
    with pytest.raises(ValueError, match=f"missing: {missing}$"):
      algebra.bn_affine(bn, stats, EPSILON)

  @pytest.mark.parametrize("shape", [(5,), (6, 1), ()])
  def test_vectors_of_other_shapes_are_refused(self, shape):
    bn, stats = random_norm(6)
    with pytest.raises(ValueError, match="one common shape"):
      algebra.bn_affine(bn, {**stats, "var": jnp.ones(shape)}, EPSILON)

  def test_scalars_are_refused(self):
    with pytest.raises(ValueError, match="one common shape"):
      algebra.bn_affine(*jax.tree.map(lambda leaf: leaf[0], random_norm(1)), EPSILON)


class TestAffineBn:
  @pytest.mark.parametrize("shape", [(6,), (2, 3)])
  def test_the_norm_computes_the_map(self, shape):
    affine = AffineParams(*(jnp.asarray(random_input(*shape, seed=seed)) for seed in (1, 2)))
    stats = {"mean": affine.scale - 2, "var": jnp.abs(affine.bias)}
    bn = algebra.affine_bn(affine, stats, EPSILON)
    x = random_input(50, *shape)
    assert (
      relative_error(normalise(x, bn, stats), x * affine.scale[None] + affine.bias[None]) <= EXACT
    )

  def test_it_undoes_bn_affine(self):
    bn, stats = random_norm(6)
    again = algebra.affine_bn(algebra.bn_affine(bn, stats, EPSILON), stats, EPSILON)
    for name in ("scale", "bias"):
      assert relative_error(again[name], bn[name]) <= EXACT

  def test_half_precision_is_computed_in_float32(self):
    bn, stats = random_norm(6, dtype=jnp.bfloat16)
    affine = AffineParams(bn["scale"], bn["bias"])
    assert algebra.affine_bn(affine, stats, EPSILON)["bias"].dtype == jnp.float32


class TestRebaseBn:
  @pytest.mark.parametrize("var", [0.0, 1e-12, 7.0])
  def test_a_norm_of_new_statistics_computes_the_same(self, var):
    x, (bn, old) = random_input(50, 6), random_norm(6)
    new = {"mean": old["mean"] + 3, "var": jnp.full((6,), var)}
    rebased = algebra.rebase_bn(bn, old, new, EPSILON)
    assert relative_error(normalise(x, rebased, new), normalise(x, bn, old)) <= EXACT


class TestFuseBn:
  @pytest.mark.parametrize("groups", [1, 2])
  @pytest.mark.parametrize("size", [(1, 1), (3, 3), (4, 2)])
  def test_fuse_then_apply_is_apply_then_normalise(self, size, groups):
    x, conv, norm = random_input(2, 7, 6, 4), random_conv(*size, 4 // groups, 6), random_norm(6)
    how = {"strides": (2, 1), "padding": (1, 2), "dilation": (1, 2), "groups": groups}
    fused = algebra.fuse_bn(conv, *norm, EPSILON)
    expected = normalise(convolve(x, *conv, **how), *norm)
    assert relative_error(convolve(x, *fused, **how), expected) <= EXACT

  def test_a_norm_of_another_length_is_refused(self):
    with pytest.raises(ValueError, match=r"over 5 channels cannot follow .* with 6 outputs"):
      algebra.fuse_bn(random_conv(3, 3, 4, 6), *random_norm(5), EPSILON)


class TestPadKernel:
  @pytest.mark.parametrize(
    ("small", "large", "before"),
    [
      ((1, 1), (3, 3), None),
      ((1, 3), (3, 5), None),
      ((2, 2), (4, 4), None),
      ((3, 3), (3, 3), None),
      ((2, 2), (3, 3), (1, 1)),
      ((2, 2), (3, 3), (0, 1)),
      ((1, 2), (4, 3), (3, 0)),
    ],
  )
  @pytest.mark.parametrize(("strides", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2))])
  def test_the_larger_kernel_with_more_padding_is_the_same(
    self, small, large, before, strides, dilation
  ):
    x, conv = random_input(1, 8, 7, 2), random_conv(*small, 2, 3)
    how = {"strides": strides, "dilation": dilation}
    front = before or [(big - little) // 2 for big, little in zip(large, small)]
    after = [big - little - taps for big, little, taps in zip(large, small, front)]
    padding = [(d * a, d * b) for d, a, b in zip(dilation, front, after)]
    padded = algebra.pad_kernel(conv.kernel, large, before)
    assert padded.shape == (*large, 2, 3)
    actual = convolve(x, padded, padding=padding, **how)
    assert relative_error(actual, convolve(x, conv.kernel, **how)) <= EXACT

  @pytest.mark.parametrize("large", [(2, 3), (4, 3), (1, 5), (3, 2)])
  def test_what_cannot_be_centred_is_refused(self, large):
    with pytest.raises(ValueError, match=rf"3x3 kernel cannot be centred in {large[0]}x{large[1]}"):
      algebra.pad_kernel(jnp.ones((3, 3, 1, 1)), large)

  @pytest.mark.parametrize("before", [(3, 0), (0, 3), (-1, 0), (0, -1)])
  def test_taps_in_front_that_do_not_fit_are_refused(self, before):
    with pytest.raises(ValueError, match=r"3x3 kernel with .* does not fit in 5x5"):
      algebra.pad_kernel(jnp.ones((3, 3, 1, 1)), (5, 5), before)

  def test_the_dtype_is_kept(self):
    assert algebra.pad_kernel(jnp.ones((1, 1, 1, 1), jnp.bfloat16), (3, 3)).dtype == jnp.bfloat16


class TestDilateKernel:
  @pytest.mark.parametrize("rate", [1, 2, 3])
  @pytest.mark.parametrize("size", [(3, 3), (1, 4), (2, 3), (1, 1)])
  @pytest.mark.parametrize(("strides", "dilation"), [((1, 1), (1, 1)), ((2, 1), (1, 2))])
  def test_the_larger_kernel_without_dilation_is_the_same(self, rate, size, strides, dilation):
    x, conv = random_input(1, 9, 14, 4, seed=rate), random_conv(*size, 2, 6)
    dilated = algebra.dilate_kernel(conv.kernel, rate)
    assert dilated.shape[:2] == tuple((taps - 1) * rate + 1 for taps in size)
    how = {"strides": strides, "padding": (4, 4), "groups": 2}
    wider = {"dilation": (rate * dilation[0], rate * dilation[1])}
    expected = convolve(x, conv.kernel, **how | wider)
    assert relative_error(convolve(x, dilated, dilation=dilation, **how), expected) <= EXACT

  def test_taps_are_copied_in_their_dtype(self):
    kernel = jnp.asarray(random_input(3, 2, 1, 2), jnp.bfloat16)
    dilated = algebra.dilate_kernel(kernel, 2)
    assert dilated.dtype == jnp.bfloat16
    np.testing.assert_array_equal(dilated[::2, ::2], kernel)
    assert jnp.count_nonzero(dilated) == kernel.size

  def test_taps_cannot_coincide(self):
    with pytest.raises(ValueError, match="at least 1, got 0"):
      algebra.dilate_kernel(jnp.ones((3, 3, 1, 1)), 0)

  def test_axes_have_rates_of_their_own(self):
    kernel = algebra.dilate_kernel(jnp.ones((3, 2, 1, 1)), (2, 3))
    assert kernel.shape == (5, 4, 1, 1)
    assert kernel.sum() == 6


class TestDiracKernel:
  @pytest.mark.parametrize(("inputs", "outputs"), [(4, 4), (3, 5), (5, 3)])
  @pytest.mark.parametrize("size", [(3, 3), (1, 5)])
  def test_it_is_a_scaled_input_and_a_normalised_convolution(self, inputs, outputs, size):
    x, conv = random_input(2, 7, 6, inputs), random_conv(*size, inputs, outputs)
    diagonal, gain = random_input(outputs, seed=7), random_input(outputs, seed=8)
    how = {"padding": (size[0] // 2, size[1] // 2)}
    norms = np.sqrt(np.square(np.asarray(conv.kernel)).sum((0, 1, 2)))
    expected = convolve(x, conv.kernel, **how) * gain / norms
    shared = min(inputs, outputs)
    expected[..., :shared] += x[..., :shared] * diagonal[:shared]
    kernel = algebra.dirac_kernel(conv.kernel, diagonal, gain)
    assert relative_error(convolve(x, kernel, **how), expected) <= EXACT

  def test_the_length_of_a_filter_does_not_matter_and_zeros_stay_zeros(self):
    kernel, ones = random_conv(3, 3, 2, 2).kernel, jnp.ones(2)
    longer = algebra.dirac_kernel(5 * kernel, ones, ones)
    assert relative_error(longer, algebra.dirac_kernel(kernel, ones, ones)) <= EXACT
    of_zeros = algebra.dirac_kernel(jnp.zeros_like(kernel), ones, ones)
    assert jnp.array_equal(of_zeros, algebra.identity_kernel(2, 1, (3, 3), kernel.dtype))
    gradient = jax.grad(lambda k: algebra.dirac_kernel(k, ones, ones).sum())(0 * kernel)
    assert jnp.isfinite(gradient).all()

  def test_an_even_size_has_no_centre(self):
    with pytest.raises(ValueError, match="odd sizes, got 2x3"):
      algebra.dirac_kernel(jnp.ones((2, 3, 1, 1)), jnp.ones(1), jnp.ones(1))


class TestIdentityKernel:
  @pytest.mark.parametrize("groups", [1, 2, 8])
  @pytest.mark.parametrize("size", [(1, 1), (3, 3), (5, 1)])
  def test_the_convolution_returns_its_input(self, size, groups):
    x = random_input(2, 5, 4, 8)
    kernel = algebra.identity_kernel(8, groups, size, jnp.float64)
    assert kernel.shape == (*size, 8 // groups, 8)
    padding = (size[0] // 2, size[1] // 2)
    np.testing.assert_array_equal(convolve(x, kernel, padding=padding, groups=groups), x)

  @pytest.mark.parametrize("size", [(2, 3), (3, 2)])
  def test_an_even_size_has_no_centre(self, size):
    with pytest.raises(ValueError, match=f"odd sizes, got {size[0]}x{size[1]}"):
      algebra.identity_kernel(4, 1, size, jnp.float64)

  @pytest.mark.parametrize("kernel", [algebra.identity_kernel, algebra.average_pool_kernel])
  def test_channels_must_divide_into_groups(self, kernel):
    with pytest.raises(ValueError, match="6 channels do not divide into 4 groups"):
      kernel(6, 4, (3, 3), jnp.float64)

  @pytest.mark.parametrize("kernel", [algebra.identity_kernel, algebra.average_pool_kernel])
  def test_the_dtype_is_the_one_asked_for(self, kernel):
    assert kernel(4, 2, (3, 3), jnp.bfloat16).dtype == jnp.bfloat16


def average_pool(x, size, strides):
  """Windows that start inside the unpadded map and fit into it."""
  rows = range(0, x.shape[1] - size[0] + 1, strides[0])
  columns = range(0, x.shape[2] - size[1] + 1, strides[1])
  pooled = [[x[:, r : r + size[0], c : c + size[1]].mean((1, 2)) for c in columns] for r in rows]
  return np.array(pooled).transpose(2, 0, 1, 3)  # (N, H', W', C)


class TestAveragePoolKernel:
  @pytest.mark.parametrize("groups", [1, 4])
  @pytest.mark.parametrize(
    ("size", "strides", "padding"),
    [((2, 2), (2, 2), (0, 0)), ((3, 3), (1, 1), (1, 1)), ((1, 4), (1, 2), (0, 1))],
  )
  def test_the_convolution_averages(self, size, strides, padding, groups):
    x = random_input(2, 6, 8, 4)
    kernel = algebra.average_pool_kernel(4, groups, size, jnp.float64)
    assert kernel.shape == (*size, 4 // groups, 4)
    padded = np.pad(x, ((0, 0), *((pad, pad) for pad in padding), (0, 0)))
    actual = convolve(x, kernel, strides=strides, padding=padding, groups=groups)
    assert relative_error(actual, average_pool(padded, size, strides)) <= EXACT

  @pytest.mark.parametrize("size", [8, 9, 5, 1])
  def test_pool_then_1x1_at_stride_2_is_a_3x3_at_stride_2(self, size):
    # Odd maps: the pool sees one zero after the end and still divides by 4.
    x, pointwise = random_input(2, size, size, 3), random_conv(1, 1, 3, 5)
    odd = size % 2
    padded = np.pad(x, ((0, 0), (0, odd), (0, odd), (0, 0)))
    expected = convolve(average_pool(padded, (2, 2), (2, 2)), *pointwise)
    # The two commute, as both are linear and the pool acts on each channel alone.
    no_bias = ConvParams(pointwise.kernel, jnp.zeros_like(pointwise.bias))
    pool = algebra.average_pool_kernel(5, 1, (2, 2), jnp.float64)
    merged = algebra.compose(no_bias, ConvParams(pool, pointwise.bias))
    kernel = algebra.pad_kernel(merged.kernel, (3, 3), before=(1, 1))
    actual = convolve(x, kernel, merged.bias, strides=(2, 2), padding=(1, 1))
    assert relative_error(actual, expected) <= EXACT


class TestAdd:
  def test_the_sum_of_outputs_is_the_output_of_the_sum(self):
    x, how = random_input(2, 6, 5, 4), {"strides": (2, 1), "padding": (1, 0), "groups": 2}
    convs = [random_conv(3, 2, 2, 6, seed) for seed in range(3)]
    expected = sum(convolve(x, *conv, **how) for conv in convs)
    assert relative_error(convolve(x, *algebra.add(*convs), **how), expected) <= EXACT

  def test_one_convolution_is_its_own_sum(self):
    conv = random_conv(3, 3, 2, 4)
    for actual, expected in zip(algebra.add(conv), conv):
      np.testing.assert_array_equal(actual, expected)

  def test_other_shapes_are_refused(self):
    with pytest.raises(ValueError, match=r"2 with kernels .*\(3, 3, 2, 4\), \(1, 1, 2, 4\)"):
      algebra.add(random_conv(3, 3, 2, 4), random_conv(1, 1, 2, 4))

  def test_other_bias_shapes_are_refused(self):
    conv = random_conv(3, 3, 2, 4)
    with pytest.raises(ValueError, match="only convolutions of one shape"):
      algebra.add(conv, ConvParams(conv.kernel, conv.bias[:1]))

  def test_nothing_is_refused(self):
    with pytest.raises(ValueError, match="got 0"):
      algebra.add()


class TestCompose:
  @staticmethod
  def pair(groups, size=(3, 3)):
    return (
      random_conv(1, 1, 4 // groups, 8, seed=3),
      random_conv(*size, 8 // groups, 12, seed=4),
    )

  @pytest.mark.parametrize("groups", [1, 2, 4])
  @pytest.mark.parametrize(
    ("size", "strides", "dilation"),
    [((3, 3), (1, 1), (1, 1)), ((3, 2), (2, 1), (1, 2)), ((1, 1), (1, 1), (1, 1))],
  )
  def test_exact_everywhere_without_padding(self, size, strides, dilation, groups):
    x, (first, second) = random_input(2, 7, 8, 4), self.pair(groups, size)
    how = {"strides": strides, "dilation": dilation, "groups": groups}
    expected = convolve(convolve(x, *first, groups=groups), *second, **how)
    actual = convolve(x, *quick_jit(algebra.compose)(first, second), **how)
    assert relative_error(actual, expected) <= EXACT

  @pytest.mark.parametrize("groups", [1, 2, 4])
  def test_exact_at_the_border_padded_with_what_zero_becomes(self, groups):
    x, (first, second) = random_input(2, 5, 6, 4), self.pair(groups)
    padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))  # the first step turns its zeros into b1
    expected = convolve(convolve(padded, *first, groups=groups), *second, groups=groups)
    merged = algebra.compose(first, second)
    actual = convolve(x, *merged, padding=(1, 1), groups=groups)
    assert relative_error(actual, expected) <= EXACT

  def test_zero_padding_between_the_two_is_wrong_at_the_border_only(self):
    x, (first, second) = random_input(2, 5, 6, 4), self.pair(1)
    zero_padded = convolve(convolve(x, *first), *second, padding=(1, 1))
    actual = convolve(x, *algebra.compose(first, second), padding=(1, 1))
    inside = np.s_[:, 1:-1, 1:-1]
    assert relative_error(actual[inside], zero_padded[inside]) <= EXACT
    difference = np.abs(actual - zero_padded).max((0, 3))  # (H, W)
    difference[1:-1, 1:-1] = np.inf
    assert difference.min() > 0.1

  def test_the_first_must_be_1x1(self):
    with pytest.raises(ValueError, match=r"must be 1x1, got \(3, 1, 4, 8\)"):
      algebra.compose(random_conv(3, 1, 4, 8), random_conv(3, 3, 8, 8))

  @pytest.mark.parametrize(("width", "outputs"), [(3, 8), (16, 8), (2, 6), (0, 8)])
  def test_channels_that_do_not_match_are_refused(self, width, outputs):
    second = ConvParams(jnp.ones((3, 3, width, outputs)), jnp.ones(outputs))
    with pytest.raises(ValueError, match=f"reads {width} channels a group"):
      algebra.compose(random_conv(1, 1, 4, 8), second)


def apply_dense(x, kernel, bias):
  """The fully connected layer that `conv_to_dense` writes, on x (N, h, w, C)."""
  x = x.reshape(*x.shape[:3], kernel.shape[0], -1)  # (N, h, w, g, C/g)
  y = np.einsum("nhwgc,ghwcvuo->nvugo", x, np.asarray(kernel))
  y = y + np.asarray(bias).transpose(1, 2, 0, 3)
  return y.reshape(*y.shape[:3], -1)


class TestAbsorbAffine:
  @pytest.mark.parametrize("inputs", [1, 3])
  def test_the_layer_sees_what_the_map_returns(self, inputs):
    x = random_input(5, 4, inputs)  # (N, C, n)
    scale, shift, bias = (random_input(size, seed=seed) for seed, size in enumerate((4, 4, 6)))
    kernel = random_input(4 * inputs, 6, seed=2)
    merged = quick_jit(algebra.absorb_affine)(AffineParams(scale, shift), kernel, bias)
    merged_kernel, merged_bias = map(np.asarray, merged)
    expected = (x * scale[:, None] + shift[:, None]).reshape(5, -1) @ kernel + bias
    assert relative_error(x.reshape(5, -1) @ merged_kernel + merged_bias, expected) <= EXACT

  def test_inputs_must_be_a_multiple_of_the_channels(self):
    with pytest.raises(ValueError, match=r"an affine map of 4 channels .* with 6 inputs"):
      algebra.absorb_affine(AffineParams(np.ones(4), np.ones(4)), np.ones((6, 2)), np.ones(2))


def random_scales(features, identity=True):
  """Returns scales of both signs."""
  vectors = (jnp.asarray(random_input(features, seed=seed)) for seed in (5, 6, 7))
  s3, s1, s0 = vectors
  return BranchScales(s3, s1, s0 if identity else None)


class TestScaledBranches:
  @staticmethod
  def branches(x, k3, k1, scales, groups=1, strides=(1, 1)):
    """The sum of the branches by their definition."""
    y = convolve(x, k3, strides=strides, padding=(1, 1), groups=groups) * np.asarray(scales.conv3x3)
    y = y + convolve(x, k1, strides=strides, groups=groups) * np.asarray(scales.conv1x1)
    return y if scales.identity is None else y + x * np.asarray(scales.identity)

  @pytest.mark.parametrize(
    ("inputs", "features", "groups", "strides", "identity"),
    [(4, 4, 1, 1, True), (6, 6, 3, 1, True), (4, 6, 1, 1, False), (4, 4, 2, 2, False)],
  )
  def test_one_kernel_computes_the_sum(self, inputs, features, groups, strides, identity):
    x, scales = random_input(2, 6, 5, inputs), random_scales(features, identity)
    k3 = random_conv(3, 3, inputs // groups, features, seed=1).kernel
    k1 = random_conv(1, 1, inputs // groups, features, seed=2).kernel
    strides = (strides, strides)
    kernel = algebra.scale_branches(k3, k1, scales)
    merged = convolve(x, kernel, strides=strides, padding=(1, 1), groups=groups)
    assert relative_error(merged, self.branches(x, k3, k1, scales, groups, strides)) <= EXACT

  @pytest.mark.parametrize("groups", [1, 2])
  @pytest.mark.parametrize("identity", [False, True])
  def test_a_step_of_the_branches_is_a_multiplied_step_of_the_kernel(self, groups, identity):
    gradient = random_conv(3, 3, 4 // groups, 4, seed=3).kernel
    k3 = random_conv(3, 3, 4 // groups, 4, seed=1).kernel
    k1 = random_conv(1, 1, 4 // groups, 4, seed=2).kernel
    scales = random_scales(4, identity)

    def loss(k3, k1, s0):
      return jnp.vdot(gradient, algebra.scale_branches(k3, k1, scales._replace(identity=s0)))

    moves = jax.grad(loss, argnums=(0, 1, 2) if identity else (0, 1))(k3, k1, scales.identity)
    s0 = scales.identity - moves[2] if identity else None
    moved = algebra.scale_branches(k3 - moves[0], k1 - moves[1], scales._replace(identity=s0))
    multiplier = algebra.gradient_multiplier(gradient.shape, scales, 2)
    expected = algebra.scale_branches(k3, k1, scales) - multiplier * gradient
    assert relative_error(moved, expected) <= EXACT

  def test_adams_multiplier_is_the_sum_of_sizes(self):
    scales = random_scales(4)
    multiplier = np.asarray(algebra.gradient_multiplier((3, 3, 4, 4), scales, 1))
    s3, s1 = (np.abs(np.asarray(scale)) for scale in scales[:2])
    np.testing.assert_allclose(multiplier[0, 2, 1], s3)
    np.testing.assert_allclose(multiplier[1, 1], s3 + s1 + np.eye(4))


class TestConvToDense:
  @pytest.mark.parametrize(
    ("tile", "size", "inputs", "outputs", "groups"),
    [
      ((4, 5), (3, 3), 4, 4, 1),
      ((5, 3), (3, 3), 4, 8, 2),
      ((3, 4), (1, 3), 8, 4, 4),
      ((4, 6), (3, 5), 6, 2, 2),
      ((5, 5), (5, 5), 2, 2, 1),  # a kernel of the tile's size
      ((2, 3), (5, 7), 2, 4, 1),  # a kernel larger than the tile
      ((2, 3), (9, 9), 4, 8, 4),
      ((1, 4), (1, 1), 4, 2, 2),
    ],
  )
  def test_the_layer_is_the_convolution_over_a_tile(self, tile, size, inputs, outputs, groups):
    x, conv = random_input(2, *tile, inputs), random_conv(*size, inputs // groups, outputs)
    kernel, bias = quick_jit(lambda conv: algebra.conv_to_dense(conv, tile, groups))(conv)
    assert kernel.shape == (groups, *tile, inputs // groups, *tile, outputs // groups)
    assert bias.shape == (groups, *tile, outputs // groups)
    expected = convolve(x, *conv, padding=(size[0] // 2, size[1] // 2), groups=groups)
    assert relative_error(apply_dense(x, kernel, bias), expected) <= EXACT

  def test_every_value_is_a_kernel_value_or_zero_bit_for_bit(self):
    conv = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), random_conv(3, 3, 2, 4))
    kernel, bias = quick_jit(lambda conv: algebra.conv_to_dense(conv, (3, 4), 2))(conv)
    assert kernel.dtype == bias.dtype == jnp.bfloat16
    assert set(np.unique(kernel).tolist()) == {0.0, *np.unique(conv.kernel).tolist()}

  @pytest.mark.parametrize("size", [(2, 3), (3, 4)])
  def test_an_even_kernel_is_refused(self, size):
    with pytest.raises(ValueError, match="only a kernel of odd size"):
      algebra.conv_to_dense(random_conv(*size, 2, 4), (4, 4))

  def test_outputs_must_divide_into_groups(self):
    with pytest.raises(ValueError, match="in 4 equal groups"):
      algebra.conv_to_dense(random_conv(3, 3, 2, 6), (4, 4), groups=4)


KERNEL = (3, 3, 2, 4)
POINTWISE = (1, 1, 2, 4)
ARITHMETIC = {
  "absorb_affine": (
    lambda k, p, v: algebra.absorb_affine(AffineParams(v, v), k[0, 0].T, v[:2]),
    tuple,
  ),
  "bn_affine": (lambda k, p, v: algebra.bn_affine(*norm_of(v), EPSILON), AffineParams),
  "fuse_bn": (lambda k, p, v: algebra.fuse_bn(ConvParams(k, v), *norm_of(v), EPSILON), ConvParams),
  "add": (lambda k, p, v: algebra.add(ConvParams(k, v), ConvParams(k, v)), ConvParams),
  "compose": (
    lambda k, p, v: algebra.compose(ConvParams(p[:, :, :, :2], v[:2]), ConvParams(k, v)),
    ConvParams,
  ),
}
REARRANGING = {
  "pad_kernel": (lambda k, p, v: algebra.pad_kernel(k, (5, 5)), jax.Array),
  "conv_to_dense": (lambda k, p, v: algebra.conv_to_dense(ConvParams(k, v), (2, 3)), tuple),
}


def norm_of(vector):
  return {"scale": vector, "bias": vector}, {"mean": vector, "var": vector}


@pytest.mark.parametrize("name", ARITHMETIC)
@pytest.mark.parametrize(
  ("given", "wanted"),
  [("bfloat16", "float32"), ("float16", "float32"), ("float32", "float32"), ("float64", "float64")],
)
def test_arithmetic_is_done_in_float32_or_wider(name, given, wanted):
  function, kind = ARITHMETIC[name]
  shapes = [jax.ShapeDtypeStruct(shape, jnp.dtype(given)) for shape in (KERNEL, POINTWISE, (4,))]
  result = jax.eval_shape(function, *shapes)
  assert isinstance(result, kind)
  assert {leaf.dtype for leaf in jax.tree.leaves(result)} == {jnp.dtype(wanted)}


@pytest.mark.parametrize("wide", range(4))
def test_one_wide_vector_widens_a_whole_norm(wide):
  vectors = [
    jax.ShapeDtypeStruct((4,), jnp.float64 if i == wide else jnp.bfloat16) for i in range(4)
  ]

  def affine(scale, bias, mean, var):
    return algebra.bn_affine({"scale": scale, "bias": bias}, {"mean": mean, "var": var}, EPSILON)

  assert {leaf.dtype for leaf in jax.eval_shape(affine, *vectors)} == {jnp.dtype(jnp.float64)}


@pytest.mark.parametrize("name", ARITHMETIC | REARRANGING)
def test_gradients_flow(name):
  function, _ = (ARITHMETIC | REARRANGING)[name]
  arguments = [1.5 + random_input(*shape) ** 2 for shape in (KERNEL, POINTWISE, (4,))]

  def energy(*arguments):
    # Squares, because a mere sum would let gradients of opposite signs cancel.
    return sum((leaf**2).sum() for leaf in jax.tree.leaves(function(*arguments)))

  gradients = quick_jit(jax.grad(energy, argnums=(0, 1, 2)))(*arguments)
  flat = np.concatenate([np.ravel(gradient) for gradient in gradients])
  assert np.isfinite(flat).all()
  assert np.abs(flat).max() > 0


def test_a_norm_over_a_constant_channel_has_finite_gradients():
  def total(gamma, var):
    bn, stats = {"scale": gamma, "bias": gamma}, {"mean": gamma, "var": var}
    return sum(leaf.sum() for leaf in algebra.bn_affine(bn, stats, 1e-5))

  for gradient in quick_jit(jax.grad(total, argnums=(0, 1)))(np.ones(3), np.zeros(3)):
    assert np.isfinite(gradient).all()


def test_folding_commutes_with_vmap():
  convs = [random_conv(1, 1, 2, 4, seed) for seed in (0, 1)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *convs)
  norm = random_norm(4)
  together = quick_jit(jax.vmap(lambda conv: algebra.fuse_bn(conv, *norm, EPSILON)))(stacked)
  for index, conv in enumerate(convs):
    alone = algebra.fuse_bn(conv, *norm, EPSILON)
    for a, b in zip(together, alone):
      assert relative_error(a[index], b) <= EXACT


def test_wide_dtype_is_float64_as_soon_as_one_is():
  dtypes = (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64)
  for pair in itertools.combinations_with_replacement(dtypes, 2):
    wanted = jnp.float64 if jnp.float64 in pair else jnp.float32
    assert algebra.wide_dtype(*pair) == jnp.dtype(wanted)


class TestMergeGroups:
  @pytest.mark.parametrize(("groups", "fewer"), [(6, 3), (6, 2), (6, 1), (2, 1), (3, 3)])
  def test_fewer_groups_compute_the_same(self, groups, fewer):
    x, conv = random_input(2, 5, 6, 12), random_conv(3, 3, 12 // groups, 6)
    merged = algebra.merge_groups(conv.kernel, groups, fewer)
    assert merged.shape == (3, 3, 12 // fewer, 6)
    wanted = convolve(x, conv.kernel, groups=groups)
    assert relative_error(convolve(x, merged, groups=fewer), wanted) <= EXACT

  @pytest.mark.parametrize(("groups", "fewer"), [(4, 3), (5, 1)])
  def test_groups_that_do_not_divide_are_refused(self, groups, fewer):
    with pytest.raises(ValueError, match=f"in {groups} groups cannot be written in {fewer}"):
      algebra.merge_groups(jnp.ones((1, 1, 2, 12)), groups, fewer)


class TestChainKernels:
  @pytest.mark.parametrize("groups", [1, 2])
  @pytest.mark.parametrize(
    ("first", "second"), [((3, 3), (1, 1)), ((1, 2), (3, 1)), ((2, 3), (3, 2))]
  )
  @pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
  def test_one_convolution_computes_both(self, groups, first, second, stride, dilation):
    x = random_input(2, 14, 13, 4)
    k1 = random_conv(*first, 4 // groups, 6).kernel
    k2 = random_conv(*second, 6 // groups, 2, seed=1).kernel
    wanted = convolve(x, k1, strides=(stride, stride), groups=groups)
    wanted = convolve(wanted, k2, dilation=(dilation, dilation), groups=groups)
    chain = algebra.chain_kernels(k1, k2, groups, (1, 1), (stride * dilation,) * 2)
    got = convolve(x, chain, strides=(stride, stride), groups=groups)
    assert relative_error(got, wanted) <= EXACT

  def test_channels_that_do_not_match_are_refused(self):
    with pytest.raises(ValueError, match="do not follow one another"):
      algebra.chain_kernels(jnp.ones((1, 2, 3)), jnp.ones((1, 4, 3)), 1, (1,), (1,))


class TestVectorsOfOtherLengths:
  """Broadcasting would repeat a vector of one number, and so hide that trees do not fit."""

  KERNEL = np.ones((3, 3, 4, 4), np.float32)

  @pytest.mark.parametrize("length", [1, 3])
  def test_they_are_refused(self, length):
    odd, whole = np.ones(length, np.float32), np.ones(4, np.float32)
    norm = {"scale": whole, "bias": whole}, {"mean": whole, "var": whole}
    point = self.KERNEL[:1, :1]
    calls = [
      lambda: algebra.fuse_bn(ConvParams(self.KERNEL, odd), *norm, 1e-5),
      lambda: algebra.dirac_kernel(self.KERNEL, odd, whole),
      lambda: algebra.dirac_kernel(self.KERNEL, whole, odd),
      lambda: algebra.absorb_affine(AffineParams(whole, whole), point[0, 0], odd),
      lambda: algebra.scale_branches(self.KERNEL, point, BranchScales(whole, odd, None)),
    ]
    for call in calls:
      with pytest.raises(ValueError, match=rf"\({length},\).*4 outputs"):
        call()

  def test_kernels_that_do_not_lie_beside_each_other_are_refused(self):
    whole = np.ones(4, np.float32)
    with pytest.raises(ValueError, match="same channels"):
      algebra.scale_branches(self.KERNEL, self.KERNEL[:1, :1, :1], BranchScales(whole, whole, None))
