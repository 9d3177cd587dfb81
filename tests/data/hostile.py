"""Encoded images that are unusual, damaged or hostile, written byte by byte."""

import struct
import zlib

import numpy as np

from tests.data.images import encoded, noise


def chunk(name, content):
  """Returns a chunk of a PNG with the right checksum."""
  checksum = struct.pack(">I", zlib.crc32(name + content))
  return struct.pack(">I", len(content)) + name + content + checksum


def png(values, depth, colour, **extra):
  """Returns a PNG of any bit depth.

  Args:
    values: whole numbers (H, W) or (H, W, channels).
    depth: bits of a value.
    colour: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGB and alpha.
    extra: contents of chunks by name, such as PLTE and tRNS.
  """
  height, width = values.shape[:2]
  rows = values.reshape(height, -1)
  bits = (rows[..., None] >> np.arange(depth - 1, -1, -1)) & 1  # the highest bit first
  packed = np.packbits(bits.astype(np.uint8).reshape(height, -1), axis=1)
  header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
  data = b"".join(b"\0" + row.tobytes() for row in packed)  # no filter
  inner = b"".join(chunk(name.encode(), content) for name, content in extra.items())
  return (
    b"\x89PNG\r\n\x1a\n"
    + chunk(b"IHDR", header)
    + inner
    + chunk(b"IDAT", zlib.compress(data))
    + chunk(b"IEND", b"")
  )


def bmp(pixels, alpha):
  """Returns a BMP of 32 bits with an alpha channel; `pixels` are RGB (H, W, 3)."""
  height, width = pixels.shape[:2]
  stored = np.dstack([pixels[..., ::-1], np.full((height, width), alpha, np.uint8)])[::-1]
  size = stored.nbytes
  header = struct.pack("<IiiHHIIiiII", 124, width, height, 1, 32, 3, size, 0, 0, 0, 0)
  header += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
  header = header.ljust(124, b"\0")
  return b"BM" + struct.pack("<IHHI", 138 + size, 0, 0, 138) + header + stored.tobytes()


def claiming(width, height):
  """Returns a JPEG of a few hundred bytes whose header claims a size."""
  data = bytearray(encoded(np.zeros((8, 8), np.uint8), "JPEG"))
  frame = data.index(b"\xff\xc0")
  data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
  return bytes(data)


def claiming_webp(width, height):
  """Returns a WebP image of few bytes whose header claims a size, at most 16384."""
  data = bytearray(encoded(np.zeros((8, 8, 3), np.uint8), "WEBP", lossless=True))
  assert data[12:16] == b"VP8L"
  bits = int.from_bytes(data[21:25], "little") & ~0xFFFFFFF
  data[21:25] = (bits | width - 1 | (height - 1) << 14).to_bytes(4, "little")
  return bytes(data)


def claiming_png(width, height):
  """Returns a PNG of one pixel whose header claims a size."""
  header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
  data = png(np.zeros((1, 1), int), 8, 0)
  return data[:8] + chunk(b"IHDR", header) + data[33:]


def many_scans(count):
  """Returns a progressive JPEG whose last scan is there `count` times."""
  data = encoded(noise(16, 16), "JPEG", progressive=True)
  last = data.rindex(b"\xff\xda")
  return data[:last] + data[last:-2] * count + data[-2:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
