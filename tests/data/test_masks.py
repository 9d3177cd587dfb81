"""Masks of every kind become classes, and what is no mask is explained."""

import itertools
import zlib

import numpy as np
import pytest
from PIL import Image

from repjax.data import masks
from repjax.data.masks import IGNORED, Rules
from tests.data.images import encoded, rotated
from tests.data.pairs import COLORS, classes_of, with_palette

CLASSES = classes_of(11, 7)
TABLE = masks.lookup({0: 0, 1: 1, 2: 2})
BY_COLOR = Rules(
  TABLE, {color: number for number, color in enumerate(COLORS)} | {(9, 9, 9): IGNORED}
)
RGB = np.asarray(COLORS, np.uint8)[CLASSES]


def grey_of(classes, bits):
  """Returns a grey PNG of few bits, which Pillow can write as a palette of greys only."""
  data = bytearray(encoded(with_palette(classes), bits=bits))
  start = data.index(b"PLTE") - 4
  end = start + 12 + int.from_bytes(data[start : start + 4])
  del data[start:end]  # IHDR's colour type 3 is an index into this palette, and 0 is grey
  data[25] = 0
  data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
  return bytes(data)


@pytest.mark.parametrize(
  "data",
  [
    encoded(CLASSES),
    encoded(with_palette(CLASSES)),
    encoded(with_palette(CLASSES), bits=2),
    grey_of(CLASSES, 2),
    grey_of(CLASSES, 4),
  ],
  ids=["grey", "palette", "palette of 2 bits", "grey of 2 bits", "grey of 4 bits"],
)
def test_index_masks_are_their_values(data):
  found = masks.classes_of_values(data, TABLE)
  np.testing.assert_array_equal(found, CLASSES)
  assert found.dtype == np.uint8


def test_a_mask_of_one_bit_has_two_classes():
  found = masks.classes_of_values(encoded(Image.fromarray(CLASSES > 0)), TABLE)
  np.testing.assert_array_equal(found, CLASSES > 0)


def test_masks_are_turned_as_exif_asks():
  for orientation in (3, 6):
    found = masks.classes_of_values(rotated(Image.fromarray(CLASSES), orientation, "PNG"), TABLE)
    np.testing.assert_array_equal(found, np.rot90(CLASSES, {3: 2, 6: -1}[orientation]))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_masks_of_colours_are_read_by_the_table(mode):
  image = with_palette(CLASSES) if mode == "P" else Image.fromarray(RGB).convert(mode)
  np.testing.assert_array_equal(BY_COLOR.classes(encoded(image)), CLASSES)


def test_a_palette_in_a_different_order_is_read_by_its_colours():
  image = with_palette(2 - CLASSES, COLORS[::-1])
  np.testing.assert_array_equal(BY_COLOR.classes(encoded(image)), CLASSES)


def test_values_and_colours_may_be_ignored():
  values = np.array([[0, 1], [7, 255]], np.uint8)
  table = masks.lookup({0: 1, 1: 0, 7: IGNORED})
  np.testing.assert_array_equal(
    masks.classes_of_values(encoded(values), table), [[1, 0], [IGNORED, IGNORED]]
  )
  pixels = np.array([[COLORS[1], (9, 9, 9)]], np.uint8)
  np.testing.assert_array_equal(BY_COLOR.classes(encoded(pixels)), [[1, IGNORED]])


ODD = np.where(np.arange(77).reshape(7, 11) == 25, 77, CLASSES).astype(np.uint8)  # row 2, column 3
ODD_RGB = np.where(ODD[..., None] == 77, 5, RGB).astype(np.uint8)
SEE_THROUGH = np.dstack([RGB, np.where(ODD == 77, 0, 255)]).astype(np.uint8)


@pytest.mark.parametrize(
  ("image", "kind", "said"),
  [
    (ODD, "PNG", r"pixel \(3, 2\) has the value 77, which is none of the 4 known"),
    (
      np.where(ODD[..., None] == 77, 5, RGB).astype(np.uint8),
      "PNG",
      r"\(3, 2\).*colour \(5, 5, 5\)",
    ),
    (SEE_THROUGH, "PNG", "transparent"),
    (Image.fromarray(CLASSES).convert("LA"), "PNG", "kind LA"),
    (CLASSES.astype(np.uint16), "PNG", "16 bits"),
    (CLASSES, "JPEG", "a mask is a PNG, and this is a JPEG"),
  ],
)
def test_what_is_no_mask_is_explained(image, kind, said):
  with pytest.raises(ValueError, match=said):
    BY_COLOR.classes(encoded(image, kind))


def test_colours_without_a_table_are_refused():
  with pytest.raises(ValueError, match="mask of colours"):
    Rules(TABLE, None).classes(encoded(RGB))


def test_a_mask_that_claims_too_many_pixels_is_not_decoded():
  data = bytearray(encoded(CLASSES))
  data[16:24] = (2**14).to_bytes(4) * 2
  data[29:33] = zlib.crc32(data[12:29]).to_bytes(4)
  with pytest.raises(ValueError, match="claims 16384 x 16384"):
    masks.classes_of_values(bytes(data), TABLE)


def test_masks_are_written_and_read_again():
  classes = np.array([[0, 254, IGNORED]], np.uint8)
  table = masks.lookup({value: value for value in range(255)})
  np.testing.assert_array_equal(masks.classes_of_values(masks.encoded(classes), table), classes)


def test_the_palette_is_that_of_pascal_voc():
  palette = masks.palette(255)
  assert palette[:4] == ((0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0))
  assert palette[20] == (0, 64, 128)
  assert len(set(palette)) == len(palette)
  apart = [sum(map(abs, np.subtract(a, b))) for a, b in itertools.combinations(palette[:21], 2)]
  assert min(apart) >= 64
