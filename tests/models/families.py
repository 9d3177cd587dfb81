"""One small network of every family. A new family is one more row of `FAMILIES`."""

from typing import Any, NamedTuple

import repjax
from tests.helpers import F64, spread


class Family(NamedTuple):
  """A variant that overrides make small enough for a test.

  Attributes:
    overrides: attributes that make the variant small.
    stages: stride and number of channels of each feature map, by name.
    blocks: number of blocks that `remat` recomputes.
    dropouts: number of places where dropout applies.
  """

  overrides: dict[str, Any]
  stages: dict[str, tuple[int, int]]
  blocks: int
  dropouts: int = 1


_REPVGG = {"stage_sizes": (1, 1, 2, 1), "width_multipliers": (0.125, 0.0625, 0.0625, 0.03125)}
_FOUR = {"stage1": (4, 8), "stage2": (8, 8), "stage3": (16, 16), "stage4": (32, 16)}
_RESNET = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "stem_features": 6}
_REPMLP = _RESNET | {"stage_sizes": (1, 2, 1, 1), "repmlp_stages": (2,), "tile": 2}
_REPMLP |= {"fc3_groups": 1, "local_kernels": (1,)}
_REPMLPNET = {"stage_sizes": (1, 1), "widths": (8, 16), "tiles": (4, 2), "share_sets": (2, 2)}
_CIFAR = {"stage_sizes": (1, 1), "widths": (4, 6), "tile": 4, "local_kernels": (1, 3)}
_MOBILEONE = {"stage_sizes": (1, 1, 1, 1), "se_sizes": (0, 0, 0, 1)}
_MOBILEONE |= {"width_multipliers": (0.125, 0.0625, 0.0625, 0.03125)}
_REPVIT = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 16, 16)}
_FASTVIT = {"stage_sizes": (1, 1, 1, 1), "widths": (8, 8, 16, 16), "expansion": 2}
_FASTVIT |= {"head_features": 8}
_PSPNET = {"backbone": "repvgg_a0", "backbone_overrides": _REPVGG, "dilation": "fast"}
_PSPNET |= {"head_features": 8, "aux_features": 6, "bins": (1, 3)}
_FCN = {"backbone": "resnet18", "backbone_overrides": _RESNET, "head_features": 8}
_EIGHTH = {"stage1": (4, 8), "stage2": (8, 8), "stage3": (8, 16), "stage4": (8, 16)}
_VGG = {"stage2": (4, 4), "stage3": (8, 4), "stage4": (16, 6), "stage5": (32, 8)}

FAMILIES: dict[str, Family] = {
  "repvgg_a0": Family(_REPVGG, _FOUR, 6),
  "repvggplus_l2pse": Family(_REPVGG | {"se_reduction": 2}, _FOUR, 6),
  "resnet18": Family(_RESNET, _FOUR, 4),
  "repmlp_resnet50_light": Family(_REPMLP, _FOUR, 5),
  "vgg16": Family({"widths": (2, 4, 4, 6, 8), "hidden": 12}, _VGG, 13, dropouts=2),
  "repmlpnet_t224": Family(_REPMLPNET, {"stage1": (4, 8), "stage2": (8, 16)}, 2),
  "parnet_s": Family({"stage_sizes": (1, 1, 1), "widths": (8, 8, 16, 16)}, _FOUR, 11),
  "repmlp_cifar": Family(_CIFAR, {"stage1": (1, 4), "stage2": (2, 6)}, 2),
  "mobileone_s4": Family(_MOBILEONE, _FOUR, 9),
  "repvit_m0_9": Family(_REPVIT, _FOUR, 7),
  "fastvit_sa12": Family(_FASTVIT, _FOUR, 11),
  "pspnet": Family(_PSPNET, _EIGHTH, 9, dropouts=2),
  "fcn": Family(_FCN, _FOUR, 5),
}
"""Name of the variant to its family."""

EVERY = spread(FAMILIES, FAMILIES.keys() - {"vgg16", "mobileone_s4", "repvit_m0_9", "fcn"})
"""All families; those of layers that others have, too, as proofs."""

THOROUGH = spread(FAMILIES, ("repvgg_a0", "repmlpnet_t224"))
"""All families, for costly tests: those whose layers differ most, and the others as proofs."""


def small(name: str, **overrides: Any) -> Any:
  """Builds the small network of a family with three classes, in float32."""
  attributes: dict[str, Any] = {"num_classes": 3} | FAMILIES[name].overrides | overrides
  return repjax.create_model(name, **attributes)


def backbone(name: str, deploy: bool = False, **overrides: Any) -> Any:
  """Builds the small network of a family in float64, without its classifier."""
  return small(name, features_only=True, deploy=deploy, **overrides, **F64)
