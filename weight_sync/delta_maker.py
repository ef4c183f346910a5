"""The thread that makes the deltas of open versions, so that the learner does not wait for them.

Invariants
----------
- A delta is made when the first engine asks for it, once, and kept with its version; those of a version take at most
  `delta.PAYS` of its bytes.
- A version's bytes are read, as a version or as a base, only until `forget` has returned.
- An error ends the thread and is raised by `check`; what it did not make is then sent in full.
Made by `serving`, called by it, `open_versions` and `answering`.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec

from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.opened import Opened

logger = logging.getLogger(__name__)

CLOSE_S: Final = 10.0


class _Wanted(msgspec.Struct, frozen=True, eq=False):
    version: Opened
    base: Opened
    bucket: int


class DeltaMaker:
    """The thread. It runs from its making until `close`."""

    def __init__(self, made: Callable[[], None]) -> None:
        """`made` is called in the thread after each delta."""
        self.error: Exception | None = None
        """What ended the thread, if anything did."""
        self._made = made
        self._changed = threading.Condition()
        self._wanted: deque[_Wanted] = deque()
        """Each bucket of an open version at most once."""
        self._at_work: _Wanted | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="asyncrl-deltas", daemon=True)
        self._thread.start()

    def want(self, version: Opened, base: Opened, bucket: int) -> None:
        """Have it made, unless it will be. Both versions are open."""
        with self._changed:
            known = [*self._wanted, *([self._at_work] if self._at_work else [])]
            if not any(each.version is version and each.bucket == bucket for each in known):
                self._wanted.append(_Wanted(version, base, bucket))
                self._changed.notify_all()

    def forget(self, version: Opened, deadline: float) -> bool:
        """True once its bytes are read no more; False if they still are at `deadline` (monotonic seconds). Nothing is to be
        wanted of it meanwhile."""
        with self._changed:
            self._wanted = deque(each for each in self._wanted if not _reads(each, version))
            # Waits for: the bucket at work. Unblocked by: the thread. Ends: it is done, or the deadline.
            while self._at_work is not None and _reads(self._at_work, version):
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                self._changed.wait(left_s)
            return True

    def check(self) -> None:
        """Raises what ended the thread, if anything did."""
        if self.error is not None:
            raise WeightSyncError(f"making deltas ended with an error: {self.error}") from self.error

    def close(self) -> None:
        """End the thread after the bucket at work. May be called twice. Raises `WeightSyncError` if it does not end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise WeightSyncError(f"the thread that makes deltas did not end within {CLOSE_S:g} s")

    def _run(self) -> None:
        """Waits for buckets. Unblocked by `want`, or by `close`. Ends closed, or with an error."""
        try:
            while (wanted := self._take()) is not None:
                self._make(wanted)
                self._made()
        except Exception as error:
            logger.exception("making deltas ended")
            self.error = error
            self._made()  # who waits for a delta is to look

    def _take(self) -> _Wanted | None:
        with self._changed:
            while not self._wanted and not self._closing:
                self._changed.wait()
            if self._closing:
                return None
            # Under the lock, so that `forget` sees it in one place or the other.
            self._at_work = self._wanted.popleft()
            return self._at_work

    def _make(self, wanted: _Wanted) -> None:
        try:
            wanted.version.deltas[wanted.bucket] = wanted.version.make(wanted.bucket, wanted.base)
        finally:
            with self._changed:
                self._at_work = None
                self._changed.notify_all()


def _reads(wanted: _Wanted, version: Opened) -> bool:
    return version is wanted.version or version is wanted.base
