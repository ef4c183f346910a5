"""A stage of work that runs beside its caller: while one bucket is sent, the next one is gathered.

    caller:  make 0 | put 0 | make 1 | put 1 (waits for the work on 0) | make 2 ...
    thread:         | work on 0      | work on 1 ...

Invariants
----------
- At most one item is in work, and one is being made or waits to be taken: two buckets of memory, however many there are.
- Items are worked on in the order in which they came, each once; after an error, none.
- An error of the work is raised by the caller's next call, and by every one after it.
- The thread ends with `finish` or `close`. Work under way is never broken off: after `close` nothing is touched any more.
Called by the learner, from one thread.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Final, Generic, TypeVar

from asyncrl.weight_sync.errors import WeightSyncError

CLOSE_S: Final = 60.0
"""How long `close` waits for work under way, which is one bucket's."""

Item = TypeVar("Item")


class Pipeline(Generic[Item]):
    """The thread. `work` is called there, on one item after the other."""

    def __init__(self, work: Callable[[Item], None]) -> None:
        self._work = work
        self._condition = threading.Condition()
        self._waiting: list[Item] = []
        """The item that is to be worked on next, if any."""
        self._busy = False
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="asyncrl-pipeline", daemon=True)
        self._thread.start()

    def __enter__(self) -> Pipeline[Item]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def put(self, item: Item, deadline: float) -> None:
        """Hands `item` over, and returns once it is in work, so that the caller may make the next one.

        `deadline`: by `time.monotonic`. Raises `WeightSyncError` if the work on the item before is not over by then, or what
        the work raised.
        """
        with self._condition:
            self._wait("an item", deadline)
            self._waiting.append(item)
            self._busy = True
            self._condition.notify_all()

    def finish(self, deadline: float) -> None:
        """Returns when all work is done. Raises as `put` does. The pipeline takes nothing more."""
        with self._condition:
            self._wait("the end", deadline)
        self.close()

    def close(self) -> None:
        """Ends the thread, after the work under way; what is not in work yet is dropped. May be called twice.

        Raises `WeightSyncError` if that work is not over within `CLOSE_S`: it may still read and write what it was given.
        """
        with self._condition:
            self._closing = True
            self._waiting.clear()
            self._condition.notify_all()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise WeightSyncError(
                f"a pipeline that is closed: expected the work on one item to end within {CLOSE_S:g} s"
            )

    def _wait(self, what: str, deadline: float) -> None:
        # Waits for: the work on the item before. Unblocked by: the thread, when it is over or failed. Ends: then, or at the
        # deadline.
        while self._busy and self._error is None:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise WeightSyncError(
                    f"a pipeline that waits to hand over {what}: expected the work on the item before to be over by its "
                    f"deadline. Raise weight_sync.timeout_s, or look at what is slow."
                )
            self._condition.wait(left_s)
        if self._error is not None:
            raise self._error
        if self._closing:
            raise WeightSyncError(f"a pipeline was handed {what} after it was closed")

    def _run(self) -> None:
        # Waits for: items. Unblocked by: `put`. Ends: at `close`, or with the first error.
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    return
                item = self._waiting.pop()
            try:
                self._work(item)
            except BaseException as error:  # noqa: BLE001 - raised by the caller's next call
                self._end(error)
                return
            # The thread may wait long for the next item: this one's memory is to be free by then.
            del item
            self._end(None)

    def _end(self, error: BaseException | None) -> None:
        with self._condition:
            self._busy, self._error = False, error
            self._condition.notify_all()
