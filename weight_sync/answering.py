"""What a chunk server answers to the questions of engines.

Invariants: nothing is sent but what was asked for; bytes of a version go out from where they lie, without a copy, and the
version knows of every piece that libzmq may read still. All of it runs in the server's thread. Made and called by `serving`.
"""

from __future__ import annotations

import logging
from collections import Counter

import msgspec
import zmq

from asyncrl.weight_sync import chunks, sockets
from asyncrl.weight_sync.credit import HELD, PIECES, Credit
from asyncrl.weight_sync.delta_maker import DeltaMaker
from asyncrl.weight_sync.open_versions import OpenVersions
from asyncrl.weight_sync.opened import Opened

logger = logging.getLogger(__name__)


class Answering:
    """Over one socket."""

    def __init__(self, socket: zmq.Socket[bytes], versions: OpenVersions, maker: DeltaMaker | None) -> None:
        self.bytes_sent: Counter[int] = Counter()
        """Version -> bytes that went out for it, deltas included."""
        self.ignored: Counter[str] = Counter()
        """Questions that could not be answered, or answers that could not be sent: reason -> count."""
        self._socket = socket
        self._versions = versions
        self._maker = maker
        self._credit = Credit()
        self._waiting: dict[tuple[Opened, int], list[tuple[bytes, int]]] = {}
        """Version and bucket -> engine and question that wait for its delta."""

    @property
    def holding(self) -> bool:
        """Whether questions wait for credit."""
        return self._credit.holding

    def take_question(self) -> None:
        """Receive one, which is there. What asks for bytes is answered by `give_held`."""
        frames = self._socket.recv_multipart()
        try:
            if len(frames) != 2 or frames[0].startswith(b"\0"):
                raise msgspec.DecodeError(f"expected a name and a message, got {len(frames)} frames")
            question = chunks.decode_question(frames[1])
        except msgspec.DecodeError as error:
            self.ignored["malformed question"] += 1
            logger.warning("engine=%r asked a malformed question: %s", frames[0], error)
            return
        if isinstance(question, chunks.Find):
            self._find(frames[0], question)
            return
        too_many = self._credit.ask(frames[0], question)
        if too_many is not None:
            why = f"more than {PIECES} pieces are on their way to you, and more than {HELD} questions wait"
            self._refuse(frames[0], too_many, why)

    def give_held(self) -> None:
        """Answer the questions for which there is credit by now."""
        for engine, question in self._credit.granted():
            self._get(engine, question)

    def answer_waiting(self) -> None:
        """A delta was made, or will not be: answer who waits for it. Who waits for one of a version that was withdrawn gets none."""
        with self._versions.lock:
            for opened, bucket in list(self._waiting):
                if not self._versions.is_open(opened):
                    del self._waiting[opened, bucket]
                elif self._is_known(opened, bucket):
                    for engine, question in self._waiting.pop((opened, bucket)):
                        self._found(engine, question, opened, bucket)

    def _find(self, engine: bytes, question: chunks.Find) -> None:
        bucket = question.bucket
        with self._versions.lock:
            opened = self._versions.find(question.version, question.digest)
            if opened is None:
                self._refuse(engine, question, _not_open(question))
            elif not 0 <= bucket < len(opened.plan.buckets):
                self._refuse(engine, question, f"bucket {bucket} of {len(opened.plan.buckets)}")
            elif not opened.is_based_on(question.base, question.base_digest):
                self._send(engine, chunks.Found(question=question.question, delta_bytes=0))
            elif self._maker is None or opened.base is None or self._is_known(opened, bucket):
                self._found(engine, question.question, opened, bucket)
            elif len(waiting := self._waiting.setdefault((opened, bucket), [])) < sockets.MESSAGES:
                waiting.append((engine, question.question))
                self._maker.want(opened, opened.base, bucket)

    def _is_known(self, opened: Opened, bucket: int) -> bool:
        """Whether its delta was made, or will never be."""
        failed = self._maker is not None and self._maker.error is not None
        return bucket in opened.deltas or opened.base is None or failed

    def _found(self, engine: bytes, question: int, opened: Opened, bucket: int) -> None:
        size = len(opened.deltas.get(bucket, b""))
        self._send(engine, chunks.Found(question=question, delta_bytes=size))

    def _get(self, engine: bytes, question: chunks.Get) -> None:
        with self._versions.lock:
            opened = self._versions.find(question.version, question.digest)
            part = opened.part(question) if opened is not None else _not_open(question)
            if opened is None or isinstance(part, str):
                self._refuse(engine, question, str(part))
                return
            piece = self._send(engine, chunks.Chunk(question=question.question), part)
            if piece is None:
                return
            self._credit.sent(engine, piece)
            if question.delta < 0:
                opened.sending = [*(each for each in opened.sending if not each.done), piece]
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
            self._credit.gone(engine)
            return None


def _not_open(question: chunks.Question) -> str:
    return f"version {question.version} with these checksums is not open"
