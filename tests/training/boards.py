"""TensorBoard's files as TensorBoard reads them."""

import struct

from tensorboardX.proto.event_pb2 import Event, SessionLog


def events(folder):
  """Yields every event in the files of a folder, in the order of their names."""
  for path in sorted(folder.iterdir()):
    data = path.read_bytes()
    while data:
      (length,) = struct.unpack("<Q", data[:8])
      yield Event.FromString(data[12 : 12 + length])
      data = data[16 + length :]


def shown(folder):
  """Returns the (step, value) pairs that TensorBoard shows for each tag.

  The start of a session at a step drops earlier records of this step and later ones.
  """
  scalars = {}
  for event in events(folder):
    if event.session_log.status == SessionLog.START:
      scalars = {
        tag: [point for point in points if point[0] < event.step] for tag, points in scalars.items()
      }
    for value in event.summary.value:
      scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
  return scalars
