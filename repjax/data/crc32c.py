"""CRC-32C, the checksum in TFRecord files, by table look-ups in NumPy."""

import functools

import numpy as np

POLYNOMIAL = 0x82F63B78  # Castagnoli's, bits reversed
LANE = 128  # bytes whose checksums are looked up at once


def masked_crc32c(data: bytes) -> int:
  """The CRC-32C of some bytes, rotated and shifted as TFRecord files hold it.

  The checksum is linear over XOR: every byte adds a value that depends on it and its place only.
  The bytes are laid out in lanes; within a lane those values come from one table, and two
  neighbouring lanes become one by a table that moves the left one over the right.

  References:
    Koopman, 32-Bit Cyclic Redundancy Codes for Internet Applications, DSN 2002.
    The TFRecord format. https://www.tensorflow.org/tutorials/load_data/tfrecord
  """
  crc = crc32c(data)
  return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def crc32c(data: bytes) -> int:
  """The CRC-32C of some bytes."""
  if len(data) < LANE:
    return _bytewise(data)
  values = np.zeros(-(-len(data) // LANE) * LANE, np.uint8)
  values[-len(data) :] = np.frombuffer(data, np.uint8)
  # To start at all ones, as is the rule, is to start at zero with the first four bytes inverted;
  # then zeros in front change nothing.
  values[values.size - len(data) :][:4] ^= 0xFF
  lanes = values.reshape(-1, LANE)
  crcs = np.bitwise_xor.reduce(np.take(_places(), lanes + 256 * np.arange(LANE)), axis=1)
  length = LANE
  while crcs.size > 1:
    crcs = np.pad(crcs, (crcs.size % 2, 0))
    crcs = _moved(crcs[::2], _shift(length)) ^ crcs[1::2]
    length *= 2
  return int(crcs[0]) ^ 0xFFFFFFFF


def _bytewise(data: bytes) -> int:
  table, crc = _table(), 0xFFFFFFFF
  for byte in data:
    crc = int(table[(crc ^ byte) & 0xFF]) ^ (crc >> 8)
  return crc ^ 0xFFFFFFFF


@functools.cache
def _table() -> np.ndarray:
  """What each value of the last byte adds."""
  crcs = np.arange(256, dtype=np.uint32)
  for _ in range(8):
    crcs = np.where(crcs & 1, (crcs >> 1) ^ np.uint32(POLYNOMIAL), crcs >> 1)
  return crcs


@functools.cache
def _places() -> np.ndarray:
  """What each value of a byte adds, place by place in a lane."""
  rows = [_table()]
  for _ in range(LANE - 1):
    rows.append(_table()[rows[-1] & 0xFF] ^ (rows[-1] >> 8))
  return np.concatenate(rows[::-1])


@functools.cache
def _shift(length: int) -> np.ndarray:
  """What each of a checksum's four bytes becomes with `length` zero bytes behind it, (4, 256)."""
  if length > 1:
    half = _shift(length // 2)  # lengths are powers of two
    return _moved(half, half)
  crcs = np.arange(256, dtype=np.uint32) << np.array([[0], [8], [16], [24]], np.uint32)
  return _table()[crcs & 0xFF] ^ (crcs >> 8)


def _moved(crcs: np.ndarray, shift: np.ndarray) -> np.ndarray:
  first, second, third, fourth = (shift[k][(crcs >> 8 * k) & 0xFF] for k in range(4))
  return first ^ second ^ third ^ fourth
