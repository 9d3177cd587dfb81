"""Reading ahead: a thread makes the next batches while the devices compute.

The thread and the consumer share two objects. A queue carries what the thread has made, in order. A
semaphore counts the items that the thread may still make before the consumer takes one.
"""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

_LOOK_SECONDS = 0.002  # between two looks at whether the devices are done


class ReadAhead(Iterator[Any]):
  """An iterator over items that a thread makes of a source's items, in the same order.

  The thread alone uses the source, from the first item to closing it, because a generator cannot be
  closed while a different thread is inside it. An error of the source is raised to the consumer
  unchanged, after the items before it.

  The thread ends when the source ends, when `close` is called, or when the ReadAhead is garbage.

  Attributes:
    waited: seconds in which `take` waited for an item while the devices had nothing to do.
  """

  def __init__(self, source: Iterable[Any], make: Callable[[Any], Any], size: int):
    """Starts the thread.

    Args:
      source: items to make something of; it is closed at the end if it has a `close` method.
      make: function of an item of the source.
      size: number of items that may be made and not yet taken, at least 1.
    """
    self.waited = 0.0
    # The thread makes an item first and asks for room for the next one afterwards, so that an
    # initial value of size - 1 allows `size` items.
    self._made, self._room = queue.SimpleQueue(), threading.Semaphore(size - 1)
    self._over = threading.Event()
    # The thread gets no reference to this object. With one, the object would never be garbage, and
    # the finalizer below would never stop the thread.
    self._thread = threading.Thread(
      target=_make_all,
      args=(source, make, self._made, self._room, self._over),
      name="read-ahead",
      daemon=True,  # so that a source which hangs cannot keep the program alive
    )
    self._thread.start()
    self._stop = weakref.finalize(self, _stop, self._over, self._room)

  def __next__(self) -> Any:
    """Returns the next item."""
    return self.take()

  def take(self, running: Any = ()) -> Any:
    """Returns the next item.

    Args:
      running: tree of arrays that are being computed. Time without an item counts as waiting only
        once all of them are done, since before that the devices are busy.

    Raises:
      StopIteration: there are no more items, or this object is closed.
    """
    if self._over.is_set():
      raise StopIteration
    item, error = self._next_made(jax.tree.leaves(running))
    if error is not None:
      self._over.set()
      raise error
    self._room.release()
    return item

  def close(self) -> None:
    """Stops the thread, at the latest after the item that it is making, and waits for its end."""
    self._stop()
    self._thread.join()

  def _next_made(self, running: list[Any]) -> tuple[Any, BaseException | None]:
    """Waits for the next (item, error) from the thread, and adds to `waited`."""
    idle_since = None  # when the devices had nothing more to do
    while True:
      if idle_since is None and all(array.is_ready() for array in running):
        idle_since = time.perf_counter()
      try:
        # While the devices are busy, the wait is cut into short pieces to look at them in between.
        made = self._made.get(timeout=_LOOK_SECONDS if idle_since is None else None)
      except queue.Empty:
        continue
      if idle_since is not None:
        self.waited += time.perf_counter() - idle_since
      return made


def _make_all(
  source: Iterable[Any],
  make: Callable[[Any], Any],
  made: queue.SimpleQueue,
  room: threading.Semaphore,
  over: threading.Event,
) -> None:
  """Makes every item in the thread, and closes the source.

  Args:
    source: items to make something of.
    make: function of an item of the source.
    made: receives (item, None) for each item, and (None, error) at the end.
    room: acquired before each item but the first.
    over: set when nothing more is wanted.
  """
  end: BaseException = StopIteration()
  try:
    try:
      for item in source:
        made.put((make(item), None))
        room.acquire()
        if over.is_set():
          break
    finally:
      getattr(source, "close", lambda: None)()
  except BaseException as error:  # the consumer raises it
    end = error
  made.put((None, end))


def _stop(over: threading.Event, room: threading.Semaphore) -> None:
  """Tells the thread to end, and wakes it if it waits for room."""
  over.set()  # before the release, or the thread could go on with the next item
  room.release()
