"""Image files are read by several threads."""

from repjax.data.reading import in_order


def test_few_images_are_in_memory_at_a_time():
  started = []

  def read(number):
    started.append(number)
    return number

  for consumed, number in enumerate(in_order(read, zip(range(500)), 2)):
    assert number == consumed
    assert len(started) <= consumed + 8
  assert len(started) == 500
