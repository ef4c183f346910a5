"""The learner's side of the `tcp` transport: gives out ranges of the bytes of open versions, and deltas between them.

    server.open(4, view, plan, checksums)     deltas are against the version opened before it, while that is open
    ...                                       engines pull
    server.close_version(4, timeout_s=5)      nobody reads its bytes any more

Invariants
----------
- Nothing is sent but what was asked for, in pieces of at most `chunks.CHUNK_BYTES`; what one engine has asked for and has not
  taken is at most `CREDIT` pieces, so a slow or hostile one fills no memory and holds up no other.
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
from collections import Counter
from typing import Final

import msgspec
import zmq

from asyncrl.weight_sync import chunks, sockets
from asyncrl.weight_sync.delta_maker import DeltaMaker
from asyncrl.weight_sync.errors import WeightSyncError
from asyncrl.weight_sync.opened import Opened
from asyncrl.weight_sync.plan import Plan
from asyncrl.weight_sync.sockets import Secure

logger = logging.getLogger(__name__)

CREDIT: Final = 2 * chunks.WINDOW
"""An engine that comes back has its questions open once more beside those that went to its old connection."""
CLOSE_S: Final = 5.0
_WAKE: Final = "inproc://asyncrl-chunks-wake"


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
        self.bytes_sent: Counter[int] = Counter()
        """Version -> bytes that went out for it, deltas included."""
        self.ignored: Counter[str] = Counter()
        """Questions that could not be answered, or answers that could not be sent: reason -> count."""
        self._lock = threading.Lock()
        self._open: dict[int, Opened] = {}
        """By version, in the order of opening."""
        self._closing: dict[int, Opened] = {}
        """Given out no more, and read by somebody still."""
        self._credit: dict[bytes, list[zmq.MessageTracker]] = {}
        """Engine -> pieces on their way to it."""
        self._waiting: dict[tuple[int, int], list[tuple[bytes, int]]] = {}
        """(version, bucket) -> engine and question that wait for its delta."""
        self._error: Exception | None = None
        self._stopping = False
        self._wake_in, self._wake_out = _wake_pair(self._context)
        self._waking = threading.Lock()
        self._maker = DeltaMaker(self._wake) if deltas else None
        self._thread = threading.Thread(target=self._run, name="asyncrl-chunks", daemon=True)
        self._thread.start()

    def __enter__(self) -> ChunkServer:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def open(self, version: int, view: memoryview, plan: Plan, checksums: tuple[int, ...]) -> None:
        """Give out `view` [plan.total_bytes] as `version`, which is not open yet. Raises `WeightSyncError`."""
        self.check()
        with self._lock:
            if version in self._open:
                raise WeightSyncError(f"version {version} is served already: close it first")
            # Of one that had this number, somebody reads bytes that are not written again: who asks now means these.
            self._closing.pop(version, None)
            base = next(reversed(self._open.values()), None) if self._maker else None
            self._open[version] = Opened(version, view, plan, checksums, base)

    def base_of(self, version: int) -> int:
        """The version against which there are deltas of `version`; -1 for none."""
        with self._lock:
            opened = self._open.get(version)
            return opened.base.number if opened is not None and opened.base is not None else -1

    def close_version(self, version: int, timeout_s: float) -> bool:
        """Give it out no more. True once nobody reads its bytes; False if somebody still did after `timeout_s`: they must not
        be written to then. A version that is not open is read by nobody."""
        deadline = time.monotonic() + timeout_s
        with self._lock:
            if version in self._open:
                opened = self._closing[version] = self._open.pop(version)
                for key in [key for key in self._waiting if key[0] == version]:
                    del self._waiting[key]
                for other in self._open.values():
                    if other.base is opened:
                        other.base = None
            closing = self._closing.get(version)
        if closing is None:
            return True
        self._wake()  # who waits for a delta against it
        compared = self._maker is not None and not self._maker.forget(closing, deadline)
        if not _all_done(closing.sending, deadline) or compared:
            return False
        del self._closing[version]
        return True

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
        """Waits for questions and deltas. Unblocked by engines, the delta maker and `stop`. Ends stopped, or with an error."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        poller.register(self._wake_out, zmq.POLLIN)
        try:
            while not self._stopping:
                ready = dict(poller.poll())
                if self._wake_out in ready:
                    self._wake_out.recv()
                    self._answer_waiting()
                if self._socket in ready:
                    self._take_question()
        except Exception as error:
            logger.exception("serving chunks ended")
            self._error = error
        finally:
            self._socket.close(linger=0)
            self._wake_out.close()

    def _take_question(self) -> None:
        frames = self._socket.recv_multipart()
        try:
            if len(frames) != 2 or frames[0].startswith(b"\0"):
                raise msgspec.DecodeError(f"expected a name and a message, got {len(frames)} frames")
            question = chunks.decode_question(frames[1])
        except msgspec.DecodeError as error:
            self.ignored["malformed question"] += 1
            logger.warning("engine=%r asked a malformed question: %s", frames[0], error)
            return
        with self._lock:
            opened = self._open.get(question.version)
            if opened is None or opened.digest != question.digest:
                self._refuse(
                    frames[0], question, f"version {question.version} with these checksums is not open"
                )
            elif isinstance(question, chunks.Find):
                self._find(frames[0], question, opened)
            else:
                self._get(frames[0], question, opened)

    def _find(self, engine: bytes, question: chunks.Find, opened: Opened) -> None:
        if not 0 <= question.bucket < len(opened.plan.buckets):
            self._refuse(engine, question, f"bucket {question.bucket} of {len(opened.plan.buckets)}")
        elif not opened.is_based_on(question.base, question.base_digest):
            self._send(engine, chunks.Found(question=question.question, delta_bytes=0))
        elif (
            self._maker is None
            or self._maker.error is not None
            or opened.base is None
            or question.bucket in opened.deltas
        ):
            self._found(engine, question.question, opened, question.bucket)
        elif (
            len(waiting := self._waiting.setdefault((opened.number, question.bucket), [])) < sockets.MESSAGES
        ):
            waiting.append((engine, question.question))
            self._maker.want(opened, opened.base, question.bucket)

    def _found(self, engine: bytes, question: int, opened: Opened, bucket: int) -> None:
        size = len(opened.deltas.get(bucket, b""))
        self._send(engine, chunks.Found(question=question, delta_bytes=size))

    def _answer_waiting(self) -> None:
        with self._lock:
            for number, bucket in list(self._waiting):
                opened = self._open[number]
                failed = self._maker is not None and self._maker.error is not None
                if bucket in opened.deltas or opened.base is None or failed:
                    for engine, question in self._waiting.pop((number, bucket)):
                        self._found(engine, question, opened, bucket)

    def _get(self, engine: bytes, question: chunks.Get, opened: Opened) -> None:
        part = opened.part(question)
        on_their_way = [each for each in self._credit.get(engine, []) if not each.done]
        if isinstance(part, str) or len(on_their_way) >= CREDIT:
            why = part if isinstance(part, str) else f"more than {CREDIT} pieces are on their way to you"
            self._refuse(engine, question, why)
            return
        tracker = self._send(engine, chunks.Chunk(question=question.question), part)
        if tracker is None:
            return
        self._credit[engine] = [*on_their_way, tracker]
        if question.delta < 0:
            opened.sending = [*(each for each in opened.sending if not each.done), tracker]
        self.bytes_sent[opened.number] += question.size

    def _refuse(self, engine: bytes, question: chunks.Question, reason: str) -> None:
        self.ignored["refused"] += 1
        logger.warning("engine=%r refused: %s", engine, reason)
        self._send(engine, chunks.Refused(question=question.question, reason=reason))

    def _send(
        self, engine: bytes, answer: chunks.Answer, part: memoryview | None = None
    ) -> zmq.MessageTracker | None:
        """None if it could not be sent: a connection that is gone asks again once it is back."""
        frames: list[bytes | memoryview] = [engine, chunks.encode(answer)]
        try:
            if part is None:
                self._socket.send_multipart(frames, zmq.NOBLOCK)
                return None
            self._socket.send_multipart(frames, zmq.NOBLOCK | zmq.SNDMORE)
            return self._socket.send(part, zmq.NOBLOCK, copy=False, track=True)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self.ignored["unreachable"] += 1
            self._credit.pop(engine, None)
            return None


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


def _all_done(trackers: list[zmq.MessageTracker], deadline: float) -> bool:
    for tracker in trackers:
        try:
            tracker.wait(max(deadline - time.monotonic(), 0.0))
        except zmq.NotDone:
            return False
    return True
