"""A shard's process: one ZMQ ROUTER, one thread, one loop around the shard.

The loop takes what has arrived, lets the shard decide, writes what changed to the log with one commit, and only then
answers: nothing is acknowledged that is not with the operating system (or on the disk, as `durability` says). Requests that
wait are kept with their deadline and tried again after every change. While the log's disk is full nothing changes: what was
decided is kept and answered once it is written, the rest is refused by name. Frames that are no request get an error or
silence. It ends on `Stop`, or with the traceback of a broken invariant.
"""

from __future__ import annotations

import logging
import resource
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import xxhash
import zmq

from asyncrl.buffer import wire
from asyncrl.buffer.accounts import by_state
from asyncrl.buffer.arena import ArenaRefused, AttachedArena
from asyncrl.buffer.config import BufferConfig
from asyncrl.buffer.errors import ArenaUnknown, BadRequest, DiskFull, EngineBarred, LeaseLost
from asyncrl.buffer.keys import Authenticator, ServerKeys, secure_server
from asyncrl.buffer.records import LedgerSettings
from asyncrl.buffer.shard import Body, Handover, Shard
from asyncrl.buffer.staleness import coarse
from asyncrl.buffer.waiting import Look, Waiting, WaitingRoom

logger = logging.getLogger(__name__)

_TICK_S = 1.0
"""Longest sleep of the loop: how late a lease may be taken back, or a request that waits get what others passed over."""
_BURST = 512
"""Requests taken before the log is written and they are answered."""
_IDLE_ARENA_S = 600.0
"""An arena whose owner has been silent for so long is let go; its owner is told when it comes back."""
_LARGEST_FRAME_BYTES = 2**30

_WAITS = {
    wire.Capacity: "prompts wait for staleness",
    wire.Admit: "prompts wait for a snapshot",
    wire.Lease: "engines wait for prompts",
    wire.ReadBatch: "learner waits for rollouts",
}


@dataclass(slots=True)
class Attachment:
    arena: AttachedArena
    used: float


class BufferService:
    """`run` serves one shard until `Stop`. `endpoint` is known after construction; `port` 0 takes any."""

    def __init__(
        self,
        *,
        settings: LedgerSettings,
        config: BufferConfig,
        folder: Path,
        keys: ServerKeys,
        host: str = "127.0.0.1",
        port: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shard = Shard(settings, config, folder, clock)
        self._memory_bytes = config.memory_bytes // settings.shards
        self._clock = clock
        self._waiting = WaitingRoom()
        self._waited_s: dict[str, float] = defaultdict(float)
        self._replies: list[list[bytes | memoryview]] = []
        self._arenas: dict[bytes, Attachment] = {}
        self._disk_full = ""
        self._held: list[list[bytes | memoryview]] = []
        """Answers to what is decided and not written: they wait for the disk."""
        self._stopping = False
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # each client has a descriptor or two
        self._context = zmq.Context[zmq.Socket[bytes]]()
        self._authenticator = Authenticator(self._context, keys)
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)  # who comes back is the same asker, not a second one
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST_FRAME_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, 10_000)
        self._socket.setsockopt(zmq.SNDHWM, 10_000)
        secure_server(self._socket, keys)
        self.endpoint = self._bind(host, port)

    def _bind(self, host: str, port: int) -> str:
        try:
            if not port:
                # Above what Linux gives to outgoing connections: nobody must have taken it when a restart wants it back.
                port = self._socket.bind_to_random_port(f"tcp://{host}", min_port=61_000)
            else:
                self._socket.bind(f"tcp://{host}:{port}")
        except zmq.ZMQError:
            self._close()
            raise
        return f"tcp://{host}:{port}"

    def run(self) -> None:
        """Waits for requests and for the deadlines of waiting ones; ends on `Stop` or a broken invariant."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        try:
            while not self._stopping:
                poller.poll(self._sleep_ms())
                self._take_requests()
                if self._disk_full:
                    self._refuse_late()
                else:
                    self._shard.expire()
                    self._shard.seal()
                    self._serve_waiting()
                self._settle()
        finally:
            self._close()

    def _close(self) -> None:
        self._shard.close()
        self._socket.close()
        self._authenticator.close()
        self._context.term()

    # ---- the loop's steps --------------------------------------------------------------------------------------

    def _sleep_ms(self) -> int:
        next_deadline = self._waiting.next_deadline()
        return int(1000 * max(0.0, min(_TICK_S, next_deadline - self._clock()))) + 1

    def _take_requests(self) -> None:
        for _ in range(_BURST):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(frames)

    def _take(self, frames: list[bytes]) -> None:
        if not 3 <= len(frames) <= 4 or len(frames[1]) != 8:
            logger.warning("passed over %d frames from %s: no request", len(frames), frames[0].hex())
            return
        address, request_id, header = frames[0], frames[1], frames[2]
        try:
            request = _decode(header)
            body = self._body(address, request, frames)
            if isinstance(request, (wire.Lease, wire.ReadBatch, wire.Capacity, wire.Admit)):
                self._waiting.put((address, request_id), request, body, self._clock())
            else:
                self._reply(address, request_id, self._answer(address, request, body))
        except (
            msgspec.MsgspecError,
            BadRequest,
            LeaseLost,
            DiskFull,
            ArenaUnknown,
        ) as problem:
            # The asker's mistake, told to the asker. Anything else is ours and ends the process.
            self._refuse(address, request_id, problem)

    def _body(self, address: bytes, request: wire.Request, frames: list[bytes]) -> Body:
        if isinstance(request, wire.Append) and request.region is not None:
            body = self._arena(address).view(request.region)
            # An asker that gave up may have used the region again before this request was read.
            if xxhash.xxh3_64_intdigest(body) != request.body_hash:
                raise BadRequest("append: the body in the arena is not what was sent; nothing was taken")
            return body
        return frames[3] if len(frames) == 4 else b""

    def _answer(self, address: bytes, request: wire.Request, body: Body) -> wire.Reply:
        if isinstance(request, wire.Attach):
            return self._attach(address, request)
        if isinstance(request, wire.Status):
            return self._report()
        if self._disk_full and not isinstance(request, wire.Heartbeat):
            raise DiskFull(self._disk_full)
        reply = self._shard.carry_out(request, body)
        if isinstance(request, wire.Stop):
            self._stopping = True
        return reply

    def _serve_waiting(self) -> None:
        now = self._clock()
        self._waiting.serve(self._attempt)
        for waiting in self._waiting.clear() if self._stopping else self._waiting.late(now):
            if isinstance(waiting.request, wire.Admit):
                cause = (
                    "the buffer is stopping" if self._stopping else "a snapshot was being made all the time"
                )
                self._refuse(*waiting.key, BadRequest(f"nothing was admitted: {cause}"))
            else:
                self._reply(*waiting.key, _empty(waiting.request))
            self._count_wait(waiting, now)

    def _attempt(self, waiting: Waiting) -> Look:
        try:
            answer = self._shard.attempt(waiting.request, waiting.body, waiting.number)
            if answer is None:
                passed = isinstance(waiting.request, wire.Lease) and self._shard.ledger.held_back
                return Look.NOT_FOR_IT if passed else Look.NOTHING
            if isinstance(answer, Handover):
                self._hand_over(waiting, answer)
            else:
                self._reply(*waiting.key, answer)
        except (BadRequest, LeaseLost) as problem:
            self._refuse(*waiting.key, problem)
        except DiskFull:
            return Look.NOTHING  # the commit of this round meets it too; what was given away is given again
        self._count_wait(waiting, self._clock())
        return Look.ANSWERED

    def _count_wait(self, waiting: Waiting, now: float) -> None:
        self._waited_s[_WAITS[type(waiting.request)]] += now - waiting.since

    def _refuse_late(self) -> None:
        for waiting in self._waiting.late(self._clock()):
            self._refuse(*waiting.key, DiskFull(self._disk_full))

    def _settle(self) -> None:
        """Has the changes written, then answers. Where the disk is full the answers wait for the next round."""
        try:
            self._shard.commit()
        except DiskFull as error:
            if not self._disk_full:
                logger.error("%s", error)
                self._held, self._replies = self._replies, []
            self._disk_full = str(error)
        else:
            if self._disk_full:
                logger.warning("the log has room again")
                self._disk_full = ""
            self._replies = [*self._held, *self._replies]
            self._held = []
        for frames in self._replies:
            self._socket.send_multipart(frames, copy=False)
        self._replies.clear()

    # ---- replies -----------------------------------------------------------------------------------------------

    def _reply(
        self, address: bytes, request_id: bytes, reply: wire.Reply, body: memoryview | None = None
    ) -> None:
        frames: list[bytes | memoryview] = [address, request_id, wire.encode(reply)]
        if body is not None:
            frames.append(body)
        self._replies.append(frames)

    def _refuse(self, address: bytes, request_id: bytes, problem: Exception) -> None:
        kind = type(problem).__name__
        if not isinstance(problem, LeaseLost | DiskFull | ArenaUnknown | EngineBarred):
            kind = BadRequest.__name__
        self._reply(address, request_id, wire.Problem(kind=kind, message=str(problem)))

    def _hand_over(self, waiting: Waiting, batch: Handover) -> None:
        near = isinstance(waiting.request, wire.ReadBatch) and waiting.request.from_files
        places = self._shard.places(batch) if near else None
        reply = wire.Batch(selection=batch.selection, layout=batch.layout, places=places)
        self._reply(*waiting.key, reply, None if near else self._shard.body(batch))

    # ---- arenas ------------------------------------------------------------------------------------------------

    def _attach(self, address: bytes, request: wire.Attach) -> wire.Attached:
        now = self._clock()
        for idle in [a for a, held in self._arenas.items() if now - held.used > _IDLE_ARENA_S]:
            self._arenas.pop(idle).arena.close()
        try:
            self._arenas[address] = Attachment(AttachedArena(request.location), now)
        except ArenaRefused as reason:
            return wire.Attached(refused=str(reason))
        return wire.Attached(refused="")

    def _arena(self, address: bytes) -> AttachedArena:
        held = self._arenas.get(address)
        if held is None:
            raise ArenaUnknown("no arena of this client is attached (any more): attach it, then ask again")
        held.used = self._clock()
        return held.arena

    # ---- status ------------------------------------------------------------------------------------------------

    def _report(self) -> wire.Report:
        now = self._clock()
        waits = dict(self._waited_s)
        for waiting in self._waiting:
            cause = _WAITS[type(waiting.request)]
            waits[cause] = waits.get(cause, 0.0) + now - waiting.since
        ledger, files = self._shard.ledger, self._shard.store.files
        book = ledger.book
        return wire.Report(
            version=ledger.version,
            serving=book.serving,
            states=by_state(book),
            counts=ledger.counts(),
            held_groups=len(book.groups),
            capacity_groups=ledger.capacity,
            spanning_trained=book.spanning_trained,
            most_versions=book.most_versions,
            waits_s=waits,
            frontier=book.frontier,
            quarantined=len(book.quarantined),
            lengths=coarse(book.lengths),
            dropped_lengths=coarse(book.dropped_lengths),
            memory_bytes=self._memory_bytes,
            held_bytes=files.held_bytes,
            disk_full=self._disk_full,
            rotations=self._shard.rotations,
            longest_rotation_s=self._shard.longest_rotation_s,
            recovery=self._shard.store.recovery,
        )


def _decode(header: bytes) -> wire.Request:
    try:
        request: wire.Request = wire.decode_request(header)
        return request
    except RecursionError as error:
        raise BadRequest("the header is nested deeper than any request is") from error
    except UnicodeDecodeError as error:  # no MsgspecError
        raise BadRequest(
            f"a string in the header is not UTF-8 ({error.reason} at byte {error.start} of it)"
        ) from error


def _empty(request: wire.Waits) -> wire.Reply:
    if isinstance(request, wire.Lease):
        return wire.Leases(rollouts=[])
    return wire.Number(value=0)
