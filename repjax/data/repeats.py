"""Repeated augmentation: an epoch shows fewer images, several times each."""

import sys
from typing import Any

import grain


class Repeats(grain.MapDataset):
  """An endless order of examples, of which each epoch shows a part, several times each.

  An epoch has as many places as there are examples, so its number of steps stays. The copies of an
  example are augmented independently, because augmentation draws from the place.

  In a batch, copies of an example are about 1 / repeats of the batch apart. So Mixup and CutMix,
  which blend neighbours, blend different images. Devices take contiguous shares of a batch. Where
  there are at least as many devices as copies, no device gets two copies of an example in one
  batch. The order does not depend on the number of devices.

  References:
    Hoffer et al., Augment Your Batch, CVPR 2020. https://arxiv.org/abs/1901.09335
    Berman et al., MultiGrain, 2019, section 3.2. https://arxiv.org/abs/1902.05509
    https://github.com/facebookresearch/deit at 0c4b8f6, samplers.py: three copies, and an epoch
      that keeps its length.
  """

  def __init__(self, examples: grain.MapDataset, *, repeats: int, batch_size: int):
    """Takes an order and repeats its examples.

    Args:
      examples: the order of one epoch. A later epoch is at higher indices, as Grain does it.
      repeats: copies of each example.
      batch_size: examples of a batch, over all shards.
    """
    super().__init__(examples)
    self._repeats = repeats
    self._batch_size = batch_size
    # All first copies come before all second ones. Those of one example are neighbours otherwise.
    self._places = [place for copy in range(repeats) for place in range(copy, batch_size, repeats)]

  def __len__(self) -> int:
    return sys.maxsize

  def __getitem__(self, index: Any) -> Any:
    if isinstance(index, slice):
      return self.slice(index)
    return self.parents[0][self._index_of_example(index)]

  def _index_of_example(self, index: int) -> int:
    """Returns where the parent has the example at a place of the endless order."""
    batch, place = divmod(index, self._batch_size)
    length = len(self.parents[0])
    epoch, place = divmod(batch * self._batch_size + self._places[place], length)
    return epoch * length + place // self._repeats
