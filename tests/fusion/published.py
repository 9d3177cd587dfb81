"""Models of published libraries as functions of float64 parameters, small where they allow it."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.fusion.nets import Net

SIZES = ((2, 64, 64), (1, 48, 80), (2, 61, 63), (1, 47, 45))
"""Their maps have even sizes after the stem: ResNet-D takes no others."""


def wide(tree: Any) -> Any:
  """Returns the shapes of a tree with float64 in place of each floating dtype."""

  def one(leaf: Any) -> Any:
    floating = jnp.issubdtype(leaf.dtype, jnp.floating)
    return jax.ShapeDtypeStruct(leaf.shape, jnp.float64 if floating else leaf.dtype)

  return jax.tree.map(one, tree)


def jax_resnet(block: str, stem: str, products: tuple[int, int], **settings: Any) -> Net:
  """Returns a residual network of jax-resnet, which is written in Flax Linen."""
  library = pytest.importorskip("jax_resnet.resnet")
  block, stem = getattr(library, block), getattr(library, stem)
  sizes = {"stage_sizes": (1, 1), "hidden_sizes": (16, 32), "n_classes": 5}
  model = library.ResNet(block, stem_cls=stem, **sizes)
  params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return Net(model.apply, wide(params), products, sizes=SIZES, **settings)


def flaxmodels(products: tuple[int, int]) -> Net:
  """Returns ResNet-18 of flaxmodels, which normalises its images itself.

  Its norms compute in float32 whatever the dtype of the model is.
  """
  library = pytest.importorskip("flaxmodels")
  model = library.ResNet18(output="logits", pretrained=None, num_classes=5, dtype="float64")
  init = functools.partial(model.init, train=False)
  params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  function = functools.partial(model.apply, train=False)
  return Net(function, wide(params), products, sizes=SIZES, tolerance=1e-6)


def haiku(made: Callable[[Any], Any], products: tuple[int, int], **settings: Any) -> Net:
  """Returns a network of Haiku; `made` takes the module `haiku.nets`."""
  hk = pytest.importorskip("haiku")
  model = hk.transform_with_state(lambda x, train=False: made(hk.nets)(x, train))
  init = functools.partial(model.init, train=True)
  variables = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  return Net(
    lambda variables, images: model.apply(*variables, None, images)[0],
    wide(variables),
    products,
    sizes=SIZES,
    **settings,
  )


def jaxonmodels(products: tuple[int, int], **settings: Any) -> Net:
  """Returns a residual network of jaxonmodels, which is written in Equinox."""
  eqx = pytest.importorskip("equinox")
  library = pytest.importorskip("jaxonmodels.vision.resnet")
  make = eqx.nn.make_with_state(library.ResNet)
  key = jax.random.key(0)
  model, state = make(library.BasicBlock, [1, 1, 1, 1], num_classes=5, key=key)
  # By its name the statistics are drawn positive: the state has no names of its own.
  tree = {"model": eqx.nn.inference_mode(model), "variances": state}
  params, static = eqx.partition(tree, eqx.is_array)

  def function(params, images):
    model, state = eqx.combine(params, static).values()
    call = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    return call(images, state)[0]

  return Net(function, wide(params), products, channels_first, sizes=SIZES, **settings)


def equimo(products: tuple[int, int], **settings: Any) -> Net:
  """Returns MobileNetV3 of Equimo, which is written in Equinox, with group norms."""
  eqx = pytest.importorskip("equinox")
  library = pytest.importorskip("equimo.models.mobilenet")
  layers = [
    (16, 16, 3, 2, True, "relu"),
    (24, 72, 3, 2, False, "relu"),
    (24, 88, 3, 1, False, "relu"),
  ]
  model = library.MobileNetv3(3, layers, last_channels=32, num_classes=5, key=jax.random.key(0))
  params, static = eqx.partition(model, eqx.is_array)

  def function(params, images):
    model = eqx.combine(params, static)
    return jax.vmap(lambda image: model(image, jax.random.key(0), inference=True))(images)

  return Net(function, wide(params), products, channels_first, sizes=SIZES, **settings)


def of_nnx(make: Callable[[], Any], products: tuple[int, int], **settings: Any) -> Net:
  """Returns a network of Flax NNX."""
  model = nnx.eval_shape(make)
  model.eval()
  graph, state = nnx.split(model)
  return Net(lambda state, x: nnx.merge(graph, state)(x), wide(state), products, **settings)


def bonsai(products: tuple[int, int], **settings: Any) -> Net:
  """Returns a residual network of bottlenecks of Bonsai, which is written in Flax NNX."""
  library = pytest.importorskip("bonsai.models.resnet.modeling")
  config = library.ModelCfg([1, 1, 1, 1], num_classes=5)
  return of_nnx(lambda: library.ResNet(config, rngs=nnx.Rngs(0)), products, sizes=SIZES, **settings)


def channels_first(batch: int, height: int, width: int) -> tuple[int, ...]:
  """Returns the shape of images with channels first."""
  return batch, 3, height, width


def published() -> dict[str, Callable[[], Net]]:
  """Returns all models by library and name, each as a function that makes it."""
  narrow = {"channels_per_group": (16, 32, 48, 64), "blocks_per_group": (1, 1, 1, 1)}
  return {
    "jax-resnet: ResNet": lambda: jax_resnet("ResNetBlock", "ResNetStem", (8, 8)),
    "jax-resnet: ResNet-D": lambda: jax_resnet("ResNetDBlock", "ResNetDStem", (10, 10)),
    "jax-resnet: ResNeSt": lambda: jax_resnet("ResNeStBottleneckBlock", "ResNetDStem", (15, 15)),
    "flaxmodels: ResNet-18": lambda: flaxmodels((21, 21)),
    "Haiku: ResNet": lambda: haiku(lambda nets: nets.ResNet(num_classes=5, **narrow), (18, 18)),
    # The first norm follows a pool, and is read by a convolution and by the sum of the block.
    "Haiku: ResNet v2": lambda: haiku(
      lambda nets: nets.ResNet(num_classes=5, resnet_v2=True, **narrow), (18, 18), norms=1
    ),
    "Haiku: MobileNetV1": lambda: haiku(
      lambda nets: nets.MobileNetV1((1, 2, 1), (16, 32, 32), 5), (8, 8)
    ),
    "jaxonmodels: ResNet": lambda: jaxonmodels((13, 13)),
    "Equimo: MobileNetV3": lambda: equimo((13, 13)),
    "Bonsai: ResNet": lambda: bonsai((18, 18)),
  }
