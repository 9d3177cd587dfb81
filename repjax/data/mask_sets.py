"""The data sets whose examples have masks, and how the masks name classes."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import tensorflow_datasets as tfds

from repjax.data.builders import metadata_of
from repjax.data.masks import IGNORED, MOST_CLASSES, Color, colors_of
from repjax.errors import InputError


class MaskSet(NamedTuple):
  """The features of a set that are image and mask, and the classes of the mask's values.

  Attributes:
    image: the feature that is the image.
    mask: the feature that is the mask.
    class_names: the names of the classes.
    classes: each value of a mask to its class, or to 255 where it does not count.
    colors: the colour of each class in pictures; empty where the set names none.
    file_names: features that may hold the name of the original file.
  """

  image: str
  mask: str
  class_names: tuple[str, ...]
  classes: Mapping[int, int]
  colors: tuple[Color, ...] = ()
  file_names: tuple[str, ...] = ("file_name",)


# Name, value in the masks, colour. All other values up to 33 are not evaluated.
_CITYSCAPES: tuple[tuple[str, int, Color], ...] = (
  ("road", 7, (128, 64, 128)),
  ("sidewalk", 8, (244, 35, 232)),
  ("building", 11, (70, 70, 70)),
  ("wall", 12, (102, 102, 156)),
  ("fence", 13, (190, 153, 153)),
  ("pole", 17, (153, 153, 153)),
  ("traffic light", 19, (250, 170, 30)),
  ("traffic sign", 20, (220, 220, 0)),
  ("vegetation", 21, (107, 142, 35)),
  ("terrain", 22, (152, 251, 152)),
  ("sky", 23, (70, 130, 180)),
  ("person", 24, (220, 20, 60)),
  ("rider", 25, (255, 0, 0)),
  ("car", 26, (0, 0, 142)),
  ("truck", 27, (0, 0, 70)),
  ("bus", 28, (0, 60, 100)),
  ("train", 31, (0, 80, 100)),
  ("motorcycle", 32, (0, 0, 230)),
  ("bicycle", 33, (119, 11, 32)),
)
MASK_SETS: Mapping[str, MaskSet] = {
  "cityscapes": MaskSet(
    "image_left",
    "segmentation_label",
    tuple(name for name, _, _ in _CITYSCAPES),
    dict.fromkeys(range(34), IGNORED)
    | {value: number for number, (_, value, _) in enumerate(_CITYSCAPES)},
    tuple(color for _, _, color in _CITYSCAPES),
    ("image_id",),
  ),
  "oxford_iiit_pet": MaskSet(
    "image",
    "segmentation_mask",
    ("pet", "background", "border"),
    {1: 0, 2: 1, 3: 2},
    ((220, 20, 60), (0, 0, 0), (255, 255, 255)),
  ),
}
"""Sets of TFDS whose features do not say what their masks mean.

References:
  Cordts et al., The Cityscapes Dataset, CVPR 2016; the labels of the authors' scripts.
    https://github.com/mcordts/cityscapesScripts
  Parkhi et al., Cats and Dogs, CVPR 2012; the trimaps. https://www.robots.ox.ac.uk/~vgg/data/pets
"""


def find(name: str, builder: tfds.core.DatasetBuilder) -> MaskSet | None:
  """Returns how a set stores its pairs, or None where it has none.

  The pairs of a set that is not in MASK_SETS are the feature "image" and its only `LabeledImage`,
  whose values are the classes.

  Raises:
    InputError: the set has more classes than a mask can name.
  """
  features: Any = builder.info.features
  known = MASK_SETS.get(builder.name)
  if known is not None:
    return known if {known.image, known.mask} <= set(features) else None
  if not hasattr(features, "keys") or "image" not in features:
    return None
  labelled = [key for key in features if isinstance(features[key], tfds.features.LabeledImage)]
  if len(labelled) != 1 or not features[labelled[0]].num_classes:
    return None
  names = tuple(features[labelled[0]].names)
  if len(names) > MOST_CLASSES or len(set(names)) < len(names):
    raise InputError(
      f"{name} has {len(names)} names of classes for its masks, {len(set(names))} of them "
      f"different, and a mask names at most {MOST_CLASSES}. Prepare the set again"
    )
  colors = colors_of(metadata_of(builder).get("class_colors", ()))
  classes = {number: number for number in range(len(names))}
  return MaskSet("image", labelled[0], names, classes, colors if len(colors) == len(names) else ())
