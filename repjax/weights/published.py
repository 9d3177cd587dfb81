"""The table of published weights that `repjax.load` fetches by name from the Hugging Face hub.

The rows name repositories of timm, whose licences and preprocessing timm states in its source. An
accuracy is in the table only if a source states one, which `top1_source` names.

References:
  https://github.com/huggingface/pytorch-image-models, timm/models and results/results-imagenet.csv
"""

from typing import NamedTuple

from repjax.spec import ModelSpec, Preprocessing
from repjax.weights.sources import PREPROCESSING


class Pretrained(NamedTuple):
  """Published weights.

  Attributes:
    name: the name that `repjax.load` takes, such as "hf:timm/repvgg_a0.rvgg_in1k".
    model: the name that `create_model` takes.
    license: name of the licence of the weights; None if the source states none.
    preprocessing: steps from images to the input with which the weights are evaluated.
    top1: published top-1 accuracy on ImageNet in percent; None if no source was found.
    top1_source: who has published the accuracy; empty without one.
  """

  name: str
  model: str
  license: str | None
  preprocessing: Preprocessing
  top1: float | None
  top1_source: str


class _Release(NamedTuple):
  """Weights of one family that were released together.

  Attributes:
    tag: end of the repository's name, after the model.
    license: as in `Pretrained`.
    source: who has published the accuracies.
    top1: model to accuracy.
  """

  tag: str
  license: str | None
  source: str
  top1: dict[str, float | None]


_RELEASES = (
  _Release(
    "rvgg_in1k",
    "mit",
    "timm's evaluation of these weights",
    {
      "repvgg_a0": 72.426,
      "repvgg_a1": 74.474,
      "repvgg_a2": 76.488,
      "repvgg_b0": 75.158,
      "repvgg_b1": 78.370,
      "repvgg_b1g4": 77.608,
      "repvgg_b2": 78.788,
      "repvgg_b2g4": 79.396,
      "repvgg_b3": 80.528,
      "repvgg_b3g4": 80.224,
      "repvgg_d2se": 83.550,
    },
  ),
  _Release(
    "apple_in1k",
    "mobileone-license",
    "the MobileOne paper",
    {
      "mobileone_s0": 71.4,
      "mobileone_s1": 75.9,
      "mobileone_s2": 77.4,
      "mobileone_s3": 78.1,
      "mobileone_s4": 79.4,
    },
  ),
  _Release(
    "dist_300e_in1k",
    "apache-2.0",
    "the page of RepViT's authors",
    {
      "repvit_m0_9": 78.7,
      "repvit_m1_0": 80.0,
      "repvit_m1_1": 80.7,
      "repvit_m1_5": 82.3,
      "repvit_m2_3": 83.3,
    },
  ),
  _Release(
    "dist_in1k",
    "apache-2.0",
    "the first version of the page of RepViT's authors",
    {"repvit_m1": 78.5, "repvit_m2": 80.6, "repvit_m3": 81.4},
  ),
  _Release(
    "apple_in1k",
    "fastvit-license",
    "the page of FastViT's authors",
    {
      "fastvit_t8": 76.2,
      "fastvit_t12": 79.3,
      "fastvit_s12": 79.9,
      "fastvit_sa12": 80.9,
      "fastvit_sa24": 82.7,
      "fastvit_sa36": 83.6,
      "fastvit_ma36": 83.9,
    },
  ),
  _Release(
    "tv_in1k",
    "bsd-3-clause",
    "",
    {"resnet18": None, "resnet34": None, "resnet50": None, "resnet101": None, "resnet152": None},
  ),
)


def list_pretrained() -> list[Pretrained]:
  """Returns the published weights that `repjax.load` fetches by name, sorted by name.

  Any other repository of the hub whose weights fit a model of repjax can be loaded as well.

  Example:
    best = max(repjax.list_pretrained(), key=lambda row: row.top1 or 0)
    model, variables, spec = repjax.load(best.name)
  """
  rows = [
    Pretrained(
      f"hf:timm/{model}.{release.tag}",
      model,
      release.license,
      PREPROCESSING.get((model, "timm")) or ModelSpec.usual(model).preprocessing,
      top1,
      release.source if top1 else "",
    )
    for release in _RELEASES
    for model, top1 in release.top1.items()
  ]
  return sorted(rows)


def model_of(source: str) -> str | None:
  """Returns the model of weights in the table, or None for a different repository or a file.

  Args:
    source: as `repjax.load` takes it, with or without a revision and a file.
  """
  repository = source.partition("@")[0]
  start = repository.find(":") + 1
  repository = repository[:start] + repository[start:].partition(":")[0]
  names = {
    f"hf:timm/{model}.{release.tag}": model for release in _RELEASES for model in release.top1
  }
  return names.get(repository)
