"""PSPNet and FCN: networks that classify every pixel, over the maps of any classifier of repjax.

The backbone is a classifier without its head. Every convolution after it is a RepConv of one branch
too, so that `reparameterize` converts backbone and head in one call. The deploy form holds
convolutions with bias, activations, fixed matrix products for pooling and resizing, and whatever
the backbone's deploy form holds. No norm of the heads and no auxiliary head is left.

References:
  Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, sections 3.2 and 3.3.
    https://arxiv.org/abs/1612.01105
  Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015.
    https://arxiv.org/abs/1411.4038
  Ding et al., RepVGG, CVPR 2021, for the dilation of RepVGG.
    https://arxiv.org/abs/2101.03697
  Ding et al., RepMLP, 2021, for the variant with RepMLP. https://arxiv.org/abs/2105.01883
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.core import FrozenDict

from repjax.errors import InputError
from repjax.layers import linear
from repjax.layers.base import training_of
from repjax.layers.resampling import pool_bins, resize_aligned
from repjax.models.base import Block, Classifier, Network, last_of
from repjax.models.checks import check_number, is_list, is_whole
from repjax.models.registry import CLASSIFIERS, checked, hashable
from repjax.schema import shown

USUAL_SIZE = 713
"""Side in pixels of the crops of Cityscapes on which the papers train and measure."""
DILATIONS = ("none", "full", "fast", "last")
FAST_BLOCKS = 4
"""Blocks of the last but one stage that dilate in RepVGG's fast PSPNet."""
_MOST_BINS = 64
# Steps of the total stride in which a canvas is looked for: enough for tiles of 31 x 32 pixels.
_TRIED = 1024
# Attributes that training sets for a whole network, or that belong to the network's own arguments.
_SHARED = ("remat", "axis_name", "running_variance", "statistics", "features_only")


class FCNHead(Block):
  """A 3x3 conv-BN, an activation, dropout of whole channels, and a 1x1 convolution to the classes.

  Scopes: `RepConv_0` and `classifier`. Under a name that begins with `AuxHead` the head is
  auxiliary, and the deploy form of the network has none: `fold_aux_head` removes the scope.

  Attributes:
    num_classes: number of output channels.
    features: number of channels between the two convolutions.
    dropout: rate at which channels are dropped in training.
  """

  num_classes: int
  features: int
  dropout: float

  @nn.compact
  def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
    """Maps (N, H, W, C) to logits (N, H, W, num_classes)."""
    x = self.activate(self.conv_bn("0", self.features, 3)(x, train))
    x = nn.Dropout(self.dropout, broadcast_dims=(1, 2), deterministic=not train)(x)
    return linear(x, self.num_classes, name="classifier", **self.dtypes())


class PyramidPooling(Block):
  """Means over grids of bins, each with a 1x1 conv-BN and an activation, beside the map itself.

  Each mean is resized to the size of the map, with aligned corners. Scopes: `RepConv_bins1`,
  `RepConv_bins2`, ...

  Attributes:
    bins: number of rows and columns of each grid.

  References:
    Zhao et al., Pyramid Scene Parsing Network, CVPR 2017, section 3.2.
      https://arxiv.org/abs/1612.01105
  """

  bins: Sequence[int]

  @nn.compact
  def __call__(self, x: jax.Array, train: bool) -> jax.Array:
    """Maps (N, H, W, C) to (N, H, W, 2 C), if C divides by the number of grids."""
    features = max(1, x.shape[-1] // len(self.bins))
    levels = [x]
    for bins in self.bins:
      y = self.activate(self.conv_bn(f"bins{bins}", features, 1)(pool_bins(x, bins), train))
      levels.append(resize_aligned(y, x.shape[1:3]))
    return jnp.concatenate(levels, -1)


class Segmenter(Network, kw_only=True):
  """A network that classifies every pixel: the maps of a classifier, and a head that reads them.

  The base of `PSPNet` and `FCN`. A subclass says in `classify_pixels` how the last map becomes
  logits. They are resized to the images with aligned corners, see
  `repjax.layers.resampling.resize_aligned`.

  Images have any size that the backbone takes. At 8 k + 1 pixels, such as 713, a backbone with a
  total stride of 8 computes a map whose pixels lie exactly under the pixels of the logits. At other
  sizes, even or odd, the map is stretched by less than the total stride, at the bottom and right,
  and mean IoU falls. `canvas` returns a size at which maps lie exactly.

  A call with an auxiliary head and `train` returns (logits, {"aux": logits}). Both are of the
  images' size. With `features_only` a network returns the maps of its backbone.

  Scopes: `backbone` is a classifier's scopes without its head. All others are new in a network that
  starts from a classifier: `head`, `AuxHead_<stage>`, and `pyramid` of a PSPNet.

  Attributes besides those of `Network`:
    backbone: name of a classifier, as in `create_model`.
    backbone_overrides: attributes of the backbone that replace those of its variant. `act` is here
      the activation of the heads, and the backbone keeps its own.
    dilation: where the backbone dilates, with a total stride of 8. "full" dilates all 3x3
      convolutions of the last two stages. "fast" dilates those of the last stage and of the four
      blocks before. "last" dilates those of the last stage. The rate is 4 in the last stage and 2
      before. "none" leaves the backbone as it is, with its own total stride, usually 32.
    head_features: number of channels between the two convolutions of the head.
    aux: build the auxiliary head, which reads the last map but one. It disappears in deploy form.
    aux_features: number of channels of the auxiliary head.
    frozen_backbone: in training, run the backbone and the auxiliary head as in evaluation, and
      return no logits of the latter. Training sets this where the head alone learns.
  """

  task: ClassVar[str] = "segmentation"

  backbone: str = "repvgg_b1g2"
  backbone_overrides: Mapping[str, Any] = FrozenDict()
  dilation: str = "none"
  head_features: int = 512
  aux: bool = True
  aux_features: int = 256
  frozen_backbone: bool = False
  dropout: float = 0.1

  def __post_init__(self):
    check_number("head_features", self.head_features)
    check_number("aux_features", self.aux_features)
    check_backbone(vars(self), "")
    build_backbone(self)  # checks which attributes fit together
    super().__post_init__()

  @property
  def image_size(self) -> int:
    """The side in pixels of the images that the model is made for.

    The size is 713, or that of the backbone if the backbone does not take 713.
    """
    backbone = build_backbone(self)
    if _takes(backbone, USUAL_SIZE, USUAL_SIZE):
      return USUAL_SIZE
    return getattr(backbone, "image_size", USUAL_SIZE)

  @nn.nowrap
  def check_images(self, images: jax.Array) -> None:
    """Raises InputError if the backbone cannot take images of this shape."""
    try:
      build_backbone(self).check_images(images)
    except InputError as error:
      raise InputError(
        f"the backbone of this {type(self).__name__} cannot take these images: {error}"
      ) from error

  @nn.nowrap
  def canvas(self, size: Sequence[int]) -> tuple[int, int]:
    """Returns the smallest canvas for images of a size whose maps lie exactly under the logits.

    With a total stride of s, its sides are s k + 1 pixels. A backbone with tiles, such as RepMLP,
    takes some of these sides only. If a backbone takes none of them, the canvas is the smallest one
    that the backbone takes.

    Args:
      size: (height, width) of the images in pixels.

    Returns:
      (height, width) of the canvas, neither below that of the images.

    Raises:
      InputError: the backbone takes no such canvas.
    """
    backbone = build_backbone(self)
    stride = backbone.total_stride()
    for step in (stride, 1):
      rows, columns = (-(-(side - 1) // step) * step + 1 for side in size)
      # Whether a side fits does not depend on the other side, so a square is found first.
      start = max(rows, columns)
      sides = range(start, start + _TRIED * stride, step)
      square = next((side for side in sides if _takes(backbone, side, side)), None)
      if square is not None:
        high = range(rows, square + 1, step)
        height = next(side for side in high if _takes(backbone, side, square))
        wide = range(columns, square + 1, step)
        return height, next(side for side in wide if _takes(backbone, height, side))
    height, width = size
    raise InputError(
      f"the backbone {self.backbone} takes no canvas for images of {width} x {height} pixels. "
      "Windows have one size for all images: pass the size that the network was trained on as "
      "config.eval_window, window or --window"
    )

  @nn.nowrap
  def maps(self, x: jax.Array, train: bool) -> Mapping[str, jax.Array]:
    """Runs the backbone, and returns the output of each stage."""
    learns = train and not self.frozen_backbone
    return build_backbone(self).clone(parent=self, name="backbone")(x, learns)

  @nn.nowrap
  def predict(self, maps: Mapping[str, jax.Array], size: Sequence[int], train: bool) -> Any:
    """Returns logits (N, H, W, num_classes) and, in training, those of the auxiliary head."""
    logits = resize_aligned(self.classify_pixels(last_of(maps), train), size)
    if not self.aux or self.deploy:
      return logits
    # The head runs in evaluation too, so that `init` creates it. XLA drops what nobody reads.
    if len(maps) < 2:
      raise InputError(
        f"the auxiliary head reads the last map but one, and {self.backbone} has one map here. Set "
        "aux=False"
      )
    name = list(maps)[-2]
    build = self.builder(FCNHead)
    head = build(self.num_classes, self.aux_features, self.dropout, name=f"AuxHead_{name}")
    learns = train and not self.frozen_backbone
    auxiliary = resize_aligned(head(maps[name], learns), size)
    return (logits, {"aux": auxiliary}) if learns else logits

  # Not called `head`: bridges to NNX confuse a method with the scope of the same name.
  @nn.nowrap
  def classify_pixels(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits (N, h, w, num_classes) of the last map (N, h, w, C)."""
    build = self.builder(FCNHead)
    return build(self.num_classes, self.head_features, self.dropout, name="head")(x, train)

  @nn.nowrap
  def start(self, variables: dict[str, Any]) -> dict[str, Any]:
    """Returns freshly drawn variables, those of the backbone as the backbone starts them."""
    own = {half: tree["backbone"] for half, tree in variables.items()}
    started = build_backbone(self).start(own)
    return {half: {**tree, "backbone": started[half]} for half, tree in variables.items()}


class FCN(Segmenter, kw_only=True):
  """A backbone and one `FCNHead`: a 3x3 convolution, a 1x1 convolution, and nothing else.

  The smallest head, for small machines. By default the backbone does not dilate, and there is no
  auxiliary head. Attributes are those of `Segmenter`.

  References:
    Long et al., Fully Convolutional Networks for Semantic Segmentation, CVPR 2015.
      https://arxiv.org/abs/1411.4038
  """

  head_features: int = 256
  aux: bool = False


class PSPNet(Segmenter, kw_only=True):
  """Pyramid pooling over the last map of a backbone, and an `FCNHead`.

  The map is averaged over grids of 1, 2, 3 and 6 bins, see `PyramidPooling`. The head reads these
  means beside the map itself. An auxiliary head on the last map but one helps training.

  What RepVGG's paper leaves open. For the fast networks the paper says which layers dilate, not
  their rates. Here they have the rates of the same layers of the full network, 2 and 4, and the
  total stride is 8 as there. The first convolution of a dilated stage dilates as all others do, as
  in the authors' code.

  ResNet is the baseline of the papers. With ResNet-50 and 19 classes, the deploy form has 46.56
  million parameters and 350,004 million multiply-accumulates at 713 pixels: the numbers that
  RepMLP's paper prints. So the baseline has one 7x7 convolution as its stem, as here, where the
  code of PSPNet has three 3x3 convolutions.

  `pspnet_repmlp` is the PSPNet of RepMLP's paper as far as the paper describes it. The maps of
  713 pixels have 90 x 90 pixels in c3 and c4, which do not dilate: only the last stage does. The
  Global Perceptrons are narrowed by 4 in c3 and by 8 in c4. Four choices are ours:

  - Tiles are 10 x 10, so that a map has 9 x 9. 10 is also the tile of the paper's networks for 320
    pixels, from which FC3 can start. A tile of 7, as at 224 pixels, does not divide 90.
  - Local kernels are 1, 3, 5 and 7, and groups are 8, as in those networks.
  - The last stage dilates by 4, as in the code of PSPNet.
  - The total stride is 8.

  The network has 160 million parameters in deploy form, for 19 classes, and 341,449 million
  multiply-accumulates. How many the network of the paper has was not found, so the two need not be
  the same.

  Attributes besides those of `Segmenter`:
    bins: number of rows and columns of each grid. Each grid gets an equal share of as many channels
      as the map has: a quarter, of four grids.

  References:
    Zhao et al., Pyramid Scene Parsing Network, CVPR 2017. https://arxiv.org/abs/1612.01105
    Ding et al., RepVGG, CVPR 2021. https://arxiv.org/abs/2101.03697
  """

  dilation: str = "full"
  bins: Sequence[int] = (1, 2, 3, 6)

  def __post_init__(self):
    bins = self.bins
    fits = is_list(bins) and bins and all(is_whole(each) and each <= _MOST_BINS for each in bins)
    if not fits or len(set(bins)) != len(bins):
      raise InputError(
        f"bins takes different whole numbers from 1 to {_MOST_BINS}, for example (1, 2, 3, 6), got "
        f"{shown(bins)}"
      )
    super().__post_init__()

  @nn.nowrap
  def classify_pixels(self, x: jax.Array, train: bool) -> jax.Array:
    """Returns logits (N, h, w, num_classes) of the last map (N, h, w, C)."""
    pyramid = self.builder(PyramidPooling)(self.bins, name="pyramid")
    return super().classify_pixels(pyramid(x, train), train)


def check_backbone(attributes: Mapping[str, Any], prefix: str) -> None:
  """Raises InputError if the backbone of a segmenter is unknown, or an override of the backbone.

  Args:
    attributes: attributes of a segmenter, with `backbone` and `backbone_overrides` if not default.
    prefix: words before the name of an attribute in the message.
  """
  name = attributes.get("backbone", Segmenter.backbone)
  overrides = attributes.get("backbone_overrides", {})
  if not isinstance(overrides, Mapping):
    raise InputError(f"{prefix}backbone_overrides takes attributes by name, got {shown(overrides)}")
  where = f"{prefix}backbone_overrides."
  checked(CLASSIFIERS, "backbone", name, overrides, where)
  for name in _SHARED:
    if name in overrides:
      raise InputError(
        f"{where}{name} belongs to the whole network, backbone and head. Set {prefix}{name} instead"
      )


# Functions, not methods: interceptors of methods cannot take a module that is not set up yet.
def build_backbone(network: Segmenter) -> Classifier:
  """Builds the backbone of a segmenter, outside of its scope."""
  found, row = CLASSIFIERS[network.backbone]
  attributes = {**row, **hashable(network.backbone_overrides)}
  return found(
    **attributes,
    **_dilated(network, found, attributes),
    features_only=True,
    remat=network.remat,
    deploy=network.deploy,
    **training_of(network),
    dtype=network.dtype,
    param_dtype=network.param_dtype,
    parent=None,
  )


def _takes(backbone: Classifier, height: int, width: int) -> bool:
  """Tells if a backbone takes images of this size."""
  images: Any = jax.ShapeDtypeStruct((1, height, width, 3), jnp.float32)
  try:
    backbone.check_images(images)
  except InputError:
    return False
  return True


def _dilated(
  network: Segmenter, found: type[Classifier], attributes: Mapping[str, Any]
) -> dict[str, Any]:
  """Returns the attributes with which a backbone dilates as `dilation` says.

  Raises:
    InputError: `dilation` is unknown, the backbone has no such attributes, or they are set already.
  """
  kind = network.dilation
  if kind not in DILATIONS:
    raise InputError(f"dilation is one of {', '.join(DILATIONS)}, got {shown(kind)}")
  if kind == "none":
    return {}
  set_already = {"output_stride", "dilated_blocks"} & network.backbone_overrides.keys()
  if set_already:
    raise InputError(
      f"dilation={kind!r} sets output_stride and dilated_blocks of the backbone, and "
      f"backbone_overrides has {' and '.join(sorted(set_already))} too. Leave these out, or set "
      'dilation="none"'
    )
  if not hasattr(found, "dilated_blocks"):
    way = '. backbone_overrides={"output_stride": 8} dilates it too, by a different rule'
    raise InputError(
      f"dilation={kind!r} is for backbones of the families RepVGG and ResNet, and "
      f'{network.backbone} is a {found.__name__}. Set dilation="none"'
      + (way if hasattr(found, "output_stride") else "")
    )
  sizes = attributes.get("stage_sizes", getattr(found, "stage_sizes", ()))
  if len(sizes) < 2:
    return {}  # the backbone itself refuses the sizes
  *_, before, last = sizes
  blocks = {"full": before + last, "fast": min(FAST_BLOCKS, before) + last, "last": last}
  return {"output_stride": 8, "dilated_blocks": blocks[kind]}


_REPMLP: dict[str, Any] = {
  "tile": 10,
  "local_kernels": (1, 3, 5, 7),
  "fc3_groups": 8,
  "reduction": (4, 8),
}

VARIANTS: dict[str, tuple[type[Segmenter], Mapping[str, Any]]] = {
  "fcn": (FCN, {}),
  "pspnet": (PSPNet, {}),
  "pspnet_repmlp": (
    PSPNet,
    {
      "backbone": "repmlp_resnet50_bottleneck_g8",
      "dilation": "last",
      "backbone_overrides": FrozenDict(_REPMLP),
    },
  ),
}
"""Name of a segmenter to its class, and to the attributes of the variant."""
