"""Brings engines that come while the learner trains to the present version: a thread that asks the publisher to welcome.

Invariants
----------
- Publisher and socket are used under one lock: by this thread, or by whoever holds `paused()`.
- Who wants `paused()` waits for engines that apply, never for engines that stage: those take the next version instead.
- An error ends the thread and is raised by the next `paused()` or `check()`.
Made by the learner's rank 0 once the first engines have joined.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Protocol

from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.report import SyncReport

logger = logging.getLogger(__name__)

INTERVAL_S: Final = 0.2
"""How long an engine that has joined waits before it is seen, at most."""
CLOSE_S: Final = 5.0
_KEPT: Final = 1000
"""Reports that are kept until they are taken; the oldest go first."""


class Welcoming(Protocol):
    """A publisher, as far as it is used here."""

    def welcome(self, give_way: Callable[[], bool]) -> SyncReport | None: ...


class _Closing(Exception):
    """Ends a welcome under way."""


class Welcomer:
    """The thread. It runs from its making until `close`."""

    def __init__(self, publisher: Welcoming) -> None:
        self._publisher = publisher
        self._lock = threading.Lock()
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._look = threading.Event()
        """There is something to do before the interval is over."""
        self._error: Exception | None = None
        self._reports: deque[SyncReport] = deque(maxlen=_KEPT)
        self._thread = threading.Thread(target=self._run, name="asyncrl-welcome", daemon=True)
        self._thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """The publisher is the caller's. Called from one thread. Raises what ended the thread, if anything did.

        Waits for the lock; a welcome under way gives way, at its deadline (`weight_sync.timeout_s`) at the latest.
        """
        self._wanted.set()
        try:
            with self._lock:
                self.check()
                yield
        finally:
            self._wanted.clear()
            self._look.set()

    def check(self) -> None:
        """Raises what ended the thread, if anything did. Nobody would bring engines to the present version any more, and who
        waits for their rollouts would wait in vain."""
        if self._error is not None:
            raise WeightSyncError(f"welcoming engines ended with an error: {self._error}") from self._error

    def take_reports(self) -> list[SyncReport]:
        """The welcomes since the last call."""
        taken = []
        # Ends: when none is left; the thread adds one per welcome.
        while self._reports:
            taken.append(self._reports.popleft())
        return taken

    def close(self) -> None:
        """End the thread; the publisher is the caller's then. Raises `WeightSyncError` if it does not end."""
        self._closing.set()
        self._look.set()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise WeightSyncError(
                f"the thread that welcomes engines did not end within {CLOSE_S:g} s; the publisher is left open to it"
            )

    def _run(self) -> None:
        """Waits for the interval. Unblocked by time, the end of a pause, or `close`. Ends closed, or with an error."""
        try:
            while not self._closing.is_set():
                if not self._welcome():
                    self._look.wait(INTERVAL_S)
                    self._look.clear()
        except _Closing:
            return
        except Exception as error:
            logger.exception("welcoming engines ended")
            self._error = error

    def _welcome(self) -> bool:
        """Whether there may be more to do at once."""
        if self._wanted.is_set():
            return False
        with self._lock:
            report = self._publisher.welcome(self._give_way)
        if report is None:
            return False
        self._reports.append(report)
        for engine, member in report.engines.items():
            reason = report.out_of_service.get(engine, member.error)
            logger.info(
                "engine=%s welcome version=%d outcome=%s %s", engine, report.version, member.outcome, reason
            )
        return True

    def _give_way(self) -> bool:
        if self._closing.is_set():
            raise _Closing
        return self._wanted.is_set()
