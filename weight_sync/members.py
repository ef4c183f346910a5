"""The publisher's end of the connections to its engines: who takes versions, and the socket on which they are talked to.

Invariants: the endpoint stays the same; attempts never repeat; what arrives between two syncs is taken in before the next.
Kept by a publisher, which is the only one to call it, from one thread at a time.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Set

from asyncrl.weight_sync import sockets, wire
from asyncrl.weight_sync.errors import EnginesMissing
from asyncrl.weight_sync.exchange import messages
from asyncrl.weight_sync.roster import Roster
from asyncrl.weight_sync.sockets import Secure


class Members:
    """The engines of one publisher."""

    def __init__(self, host: str, secure: Secure | None = None) -> None:
        """Binds a free port of `host`. `secure` is called on the socket before that."""
        self._secure = secure
        self._context = sockets.context_for(secure)
        try:
            self.socket, self.endpoint = sockets.router(self._context, host, secure)
        except BaseException:
            sockets.end(self._context, secure)
            raise
        self.roster = Roster()
        self.ignored: Counter[str] = Counter()
        """Messages that changed nothing since the last sync: reason -> count."""
        self.hear: Callable[[str, wire.ToPublisher], None] = self._hear
        """Told of everything that `take_in` finds; another takes it over where updates are under way all the time."""
        self._attempt = 0

    @property
    def engines(self) -> dict[str, int]:
        """Engines that the next version goes to, and the version that each runs, -1 for none."""
        self.take_in()
        return dict(self.roster.versions)

    def next_attempt(self) -> int:
        self._attempt += 1
        return self._attempt

    def wait_for(self, engine_ids: Set[str], timeout_s: float) -> None:
        """Return when all of `engine_ids` have joined. Raises `EnginesMissing` after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        # Waits for: joins. Unblocked by: engines that connect. Ends: all joined, or the deadline.
        while missing := frozenset(engine_ids) - self.engines.keys():
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise EnginesMissing(
                    f"expected {len(engine_ids)} engines at {self.endpoint} within {timeout_s:g} s, missing: "
                    f"{', '.join(sorted(missing))}. Look in their logs, or raise the pool's start_timeout_s.",
                    missing,
                )
            self.socket.poll(math.ceil(left_s * 1000))

    def take_in(self) -> None:
        """What came since the last call is heard."""
        for engine_id, message in messages(self.socket, self.ignored):
            self.hear(engine_id, message)

    def _hear(self, engine_id: str, message: wire.ToPublisher) -> None:
        """Joins and farewells; anything else answers an attempt that is over."""
        if isinstance(message, wire.Join | wire.Leave):
            self.roster.note(engine_id, message)
        else:
            self.ignored[f"{type(message).__name__.lower()} after its attempt"] += 1

    def close(self) -> None:
        """Free the port. May be called twice."""
        if not self.socket.closed:
            sockets.close(self.socket)
            sockets.end(self._context, self._secure)
