"""The versions that a chunk server gives out, and until when somebody reads the bytes of one.

Invariant: after `unread` has said so, nobody reads a version's bytes: no piece of them is with libzmq, and no delta is being made
of them. Made by `serving`: the publisher's thread opens and withdraws, the server's thread looks up, under `lock`.
"""

from __future__ import annotations

import threading
import time

import zmq

from asyncrl.weight_sync.delta_maker import DeltaMaker
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.opened import Opened
from asyncrl.weight_sync.plan import Plan


class OpenVersions:
    """By version, in the order of opening."""

    def __init__(self, maker: DeltaMaker | None) -> None:
        """`maker` makes the deltas, each against the version opened before, while that is open; None: there are none."""
        self.lock = threading.Lock()
        """Held from looking a version up until its answer was sent: who withdraws it after that knows of the sending."""
        self._maker = maker
        self._open: dict[int, Opened] = {}
        self._closing: dict[int, Opened] = {}
        """Given out no more, and read by somebody still."""

    def open(self, version: int, view: memoryview, plan: Plan, checksums: tuple[int, ...]) -> None:
        """See `serving.ChunkServer.open`."""
        with self.lock:
            if version in self._open:
                raise WeightSyncError(f"version {version} is served already: close it first")
            # Of one that had this number, somebody reads bytes that are not written again: who asks now means these.
            self._closing.pop(version, None)
            base = next(reversed(self._open.values()), None) if self._maker else None
            self._open[version] = Opened(version, view, plan, checksums, base)

    def base_of(self, version: int) -> int:
        """The version against which there are deltas of `version`; -1 for none."""
        with self.lock:
            opened = self._open.get(version)
            return opened.base.number if opened is not None and opened.base is not None else -1

    def find(self, version: int, digest: str) -> Opened | None:
        """The open version with these checksums (`checksum.version_digest`). Under `lock`."""
        opened = self._open.get(version)
        return opened if opened is not None and opened.digest == digest else None

    def is_open(self, opened: Opened) -> bool:
        """Under `lock`."""
        return self._open.get(opened.number) is opened

    def withdraw(self, version: int) -> bool:
        """Give it out no more, nor deltas against it. False if there is nobody who could read its bytes."""
        with self.lock:
            if version in self._open:
                opened = self._closing[version] = self._open.pop(version)
                for other in self._open.values():
                    if other.base is opened:
                        other.base = None
            return version in self._closing

    def unread(self, version: int, deadline: float) -> bool:
        """Of a withdrawn version: True once nobody reads its bytes, False if somebody does at `deadline` (monotonic)."""
        closing = self._closing[version]
        compared = self._maker is not None and not self._maker.forget(closing, deadline)
        if not _all_done(closing.sending, deadline) or compared:
            return False
        del self._closing[version]
        return True


def _all_done(pieces: list[zmq.MessageTracker], deadline: float) -> bool:
    """Waits for libzmq to be done with each. Unblocked by the engines that take them, or whose connections are gone. Ends at
    `deadline` (monotonic)."""
    for piece in pieces:
        try:
            piece.wait(max(deadline - time.monotonic(), 0.0))
        except zmq.NotDone:
            return False
    return True
