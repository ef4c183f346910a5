"""The learner's sockets under the run's keys: only who holds the client's key joins, and reads weights.

Called by the learner's rank 0, which makes one before its publisher and closes it after that.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import zmq

from asyncrl.buffer.keys import Authenticator, ServerKeys, secure_server
from asyncrl.weight_sync.sockets import Secured


class Door:
    """One context, in which keys are looked at. `secure` is for the sockets that are bound in it."""

    def __init__(self, keys: ServerKeys) -> None:
        self._context: zmq.Context[zmq.Socket[Any]] = zmq.Context()
        self._authenticator = Authenticator(self._context, keys)
        self.secure = Secured(self._context, partial(secure_server, keys=keys))

    def close(self) -> None:
        """After its sockets. May be called twice."""
        if not self._context.closed:
            self._authenticator.close()
            self._context.term()
