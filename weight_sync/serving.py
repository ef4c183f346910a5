"""The learner's side of the `tcp` transport: gives out ranges of the bytes of open versions, and deltas between them.

    server.open(4, view, plan, checksums)     deltas are against the version opened before it, while that is open
    ...                                       engines pull
    server.close_version(4, timeout_s=5)      nobody reads its bytes any more

Invariants
----------
- Nothing is sent but what was asked for, in pieces of at most `chunks.CHUNK_BYTES`; what is on its way to one engine is bounded
  (`credit`), so a slow or hostile one fills no memory and holds up no other.
- Bytes of a version are sent from where they lie, without a copy. They are not written again before `close_version` has
  returned True: until then somebody may read them.
- Who does not hold the run's key gets no byte (`secure`).
- One thread has the socket. An error ends it, and is raised by the next call here.
Made by the publisher; its calls come from one thread at a time.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from typing import Final

import zmq

from asyncrl.weight_sync import sockets
from asyncrl.weight_sync.answering import Answering
from asyncrl.weight_sync.delta_maker import DeltaMaker
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.open_versions import OpenVersions
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.sockets import Secure

logger = logging.getLogger(__name__)

CLOSE_S: Final = 5.0
HELD_MS: Final = 1
"""How often the server looks whether questions that wait for credit can be answered: libzmq wakes nobody when a piece has left."""


class ChunkServer:
    """Serves from its making until `stop`."""

    def __init__(
        self, host: str, secure: Secure | None = None, *, port: int = 0, deltas: bool = True
    ) -> None:
        """Binds `port` of `host`, 0 for a free one. `deltas`: make them."""
        self._secure = secure
        self._context = sockets.context_for(secure)
        try:
            self._socket, self.endpoint = sockets.router(self._context, host, secure, port)
        except BaseException:
            sockets.end(self._context, secure)
            raise
        self._error: Exception | None = None
        self._stopping = False
        self._wake_in, self._wake_out = _wake_pair(self._context)
        self._waking = threading.Lock()
        self._maker = DeltaMaker(self._wake) if deltas else None
        self._versions = OpenVersions(self._maker)
        self._answering = Answering(self._socket, self._versions, self._maker)
        self.bytes_sent, self.ignored = self._answering.bytes_sent, self._answering.ignored
        self._thread = threading.Thread(target=self._run, name="asyncrl-chunks", daemon=True)
        self._thread.start()

    def __enter__(self) -> ChunkServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def open(self, version: int, view: memoryview, plan: Plan, checksums: tuple[int, ...]) -> None:
        """Give out `view` [plan.total_bytes] as `version`, which is not open yet. Raises `WeightSyncError`."""
        self.check()
        self._versions.open(version, view, plan, checksums)

    def base_of(self, version: int) -> int:
        """The version against which there are deltas of `version`; -1 for none."""
        return self._versions.base_of(version)

    def close_version(self, version: int, timeout_s: float) -> bool:
        """Give it out no more. True once nobody reads its bytes; False if somebody still did after `timeout_s`: they must not
        be written to then. A version that is not open is read by nobody."""
        deadline = time.monotonic() + timeout_s
        if not self._versions.withdraw(version):
            return True
        self._wake()  # who waits for its delta, or for one against it
        return self._versions.unread(version, deadline)

    def check(self) -> None:
        """Raises what ended one of the threads, if anything did."""
        if self._error is not None:
            raise WeightSyncError(f"serving chunks ended with an error: {self._error}") from self._error
        if self._maker is not None:
            self._maker.check()

    def stop(self) -> None:
        """End threads and connections; engines get no answer any more. May be called twice. Raises `WeightSyncError` if a
        thread does not end."""
        if self._wake_in.closed:
            return
        if self._maker is not None:
            self._maker.close()
        self._stopping = True
        self._wake()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise WeightSyncError(f"the thread that serves chunks did not end within {CLOSE_S:g} s")
        self._wake_in.close()
        sockets.end(self._context, self._secure)

    def _wake(self) -> None:
        # Full means that it will look anyway; closed means that it has ended.
        with self._waking, contextlib.suppress(zmq.Again, zmq.ZMQError):
            self._wake_in.send(b"", zmq.NOBLOCK)

    def _run(self) -> None:
        """Waits for questions, deltas, and pieces to leave. Unblocked by engines, the delta maker and `stop`, and every
        `HELD_MS` while questions wait for credit. Ends stopped, or with an error."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_out, zmq.POLLIN)
        try:
            while not self._stopping:
                ready = dict(poller.poll(HELD_MS if self._answering.holding else None))
                if self._wake_out in ready:
                    self._wake_out.recv()
                    self._answering.answer_waiting()
                if self._socket in ready:
                    self._answering.take_question()
                self._answering.give_held()
        except Exception as error:
            logger.exception("serving chunks ended")
            self._error = error
        finally:
            self._socket.close(linger=0)
            self._wake_out.close()


def _wake_pair(context: zmq.Context[zmq.Socket[bytes]]) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
    sender, receiver = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    for socket in (sender, receiver):
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, sockets.MESSAGES)
        socket.setsockopt(zmq.RCVHWM, sockets.MESSAGES)
    address = f"inproc://asyncrl-chunks-{id(sender)}"
    receiver.bind(address)
    sender.connect(address)
    return sender, receiver
