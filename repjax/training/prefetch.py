"""Reading ahead: a thread makes the next batches while the devices compute."""

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

_LOOK_SECONDS = 0.002  # between two looks at whether the devices are done


class ReadAhead(Iterator[Any]):
  """Iterates over what a thread makes of a source's items, in their order.

  The thread alone uses the source, from the first item to closing it, because a generator cannot be
  closed while another thread is inside it. What the source raises comes out behind the items before
  it, as it is. A thread ends with its source, by `close`, or when nobody holds its ReadAhead.

  Attributes:
    waited: seconds for which `take` had nothing to give although nothing was running any more.
  """

  def __init__(self, source: Iterable[Any], make: Callable[[Any], Any], size: int):
    """Starts the thread.

    Args:
      source: closed at the end, if it has a `close`.
      make: what to make of an item.
      size: items that may be made and not yet taken.
    """
    self.waited = 0.0
    self._made, self._room = queue.SimpleQueue(), threading.Semaphore(size - 1)
    self._over = threading.Event()
    self._thread = threading.Thread(
      target=_make_all,
      args=(source, make, self._made, self._room, self._over),
      name="read-ahead",
      daemon=True,
    )
    self._thread.start()
    self._stop = weakref.finalize(self, _stop, self._over, self._room)

  def __next__(self) -> Any:
    return self.take()

  def take(self, running: Any = ()) -> Any:
    """The next item.

    Args:
      running: arrays that are being computed. Time without an item counts as waiting only from the
        moment when they are done.

    Raises:
      StopIteration: there are no more items, or this is closed.
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
    """Stops the thread, at the latest behind the item that it is about to make."""
    self._stop()
    self._thread.join()

  def _next_made(self, running: list[Any]) -> tuple[Any, BaseException | None]:
    """What the thread has made next; waiting for it is timed from when `running` is done."""
    idle_since = None
    while True:
      if idle_since is None and all(array.is_ready() for array in running):
        idle_since = time.perf_counter()
      try:
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
  """The thread. It holds no ReadAhead, so that one which nobody holds any more can stop it."""
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
  except BaseException as error:  # for the consumer to raise
    end = error
  made.put((None, end))


def _stop(over: threading.Event, room: threading.Semaphore) -> None:
  over.set()
  room.release()
