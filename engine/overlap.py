"""Stages that run at the same time: a thread reads ahead, another writes behind, with a bounded queue each.

What a stage raises is raised again where the main thread next meets it; none is lost. The threads help because the
tokenizer, the model and Arrow all release the interpreter while they work.
"""

from collections.abc import Callable, Generator, Iterable
from queue import Empty, Queue
from threading import Event, Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")
_DEPTH = 2  # one item in work, one waiting: more only takes memory
# a producer that waits for what never comes must not keep an error from being told; its thread is a daemon
_GRACE_SECONDS = 1.0


class _End:
    """The last thing in a queue: no more items, or an exception instead of them."""

    def __init__(self, error: BaseException | None = None):
        self.error = error


def ahead(items: Iterable[T]) -> Generator[T, None, None]:
    """The same items, made by a thread of its own while the consumer is busy; closing the generator ends the thread."""
    queue: Queue[T | _End] = Queue(_DEPTH)
    stopped = Event()

    def produce() -> None:
        end = _End()
        try:
            for item in items:
                queue.put(item)
                if stopped.is_set():
                    return
        except BaseException as error:
            end = _End(error)
        queue.put(end)

    thread = Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        while not isinstance(item := queue.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        _drain(queue)  # so that a put that waits comes to its end, and the thread with it
        thread.join(_GRACE_SECONDS)


def _drain(queue: Queue) -> None:
    try:
        while True:
            queue.get_nowait()
    except Empty:
        pass  # that is what was wanted


class Behind(Generic[T]):
    """Calls `action(item)` for each item that is `put`, in order, in a thread of its own.

    Leaving the `with` block, with an exception too, waits until all that was put is done. After an item that fails no
    other is begun.
    """

    def __init__(self, action: Callable[[T], object]):
        self._action = action
        self._queue: Queue[T | _End] = Queue(_DEPTH)
        self._error: BaseException | None = None
        self._thread = Thread(target=self._run, name="behind", daemon=True)
        self._thread.start()

    def put(self, item: T) -> None:
        """Waits while the queue is full; raises what `action` raised for an earlier item."""
        self._raise()
        self._queue.put(item)

    def _run(self) -> None:
        while not isinstance(item := self._queue.get(), _End):
            if self._error is None:
                try:
                    self._action(item)
                except BaseException as error:
                    self._error = error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._queue.put(_End())
        self._thread.join()
        if error is None:
            self._raise()
