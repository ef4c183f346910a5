"""The buffer process: one ZMQ ROUTER, one thread, one loop around the ledger, the columns and the log.

The loop takes every request that has arrived, lets the ledger decide, writes what changed to the log with one flush,
and only then answers: nothing is acknowledged that is not with the operating system. Requests that wait (lease, read,
capacity) are kept with their deadline and tried again after every change. It ends on `Stop`, or with the traceback of
a broken invariant.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import zmq

from asyncrl.buffer import wire
from asyncrl.buffer.columns import Columns, Prompt, slices
from asyncrl.buffer.config import BufferConfig, StalenessConfig
from asyncrl.buffer.errors import BadRequest, LeaseLost
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.log import Log
from asyncrl.buffer.schema import PROMPTS, SEGMENTS

logger = logging.getLogger(__name__)

_TICK_S = 1.0
"""Longest sleep of the loop: how late a lease may be taken back."""
_BURST = 256
"""Requests taken before the log is flushed and they are answered."""

_WAITS = {
    wire.Capacity: "prompts wait for staleness",
    wire.Lease: "engines wait for prompts",
    wire.ReadBatch: "learner waits for rollouts",
}


@dataclass(slots=True)
class Waiting:
    """A request that could not be answered yet."""

    address: bytes
    request_id: bytes
    request: wire.Capacity | wire.Lease | wire.ReadBatch
    since: float
    deadline: float


class BufferService:
    """`run` serves until `Stop`. `endpoint` is known after construction."""

    def __init__(
        self,
        *,
        config: BufferConfig,
        staleness: StalenessConfig,
        prompts_per_step: int,
        rollouts_per_prompt: int,
        log_folder: Path,
        host: str = "127.0.0.1",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ledger = Ledger(
            prompts_per_step=prompts_per_step,
            rollouts_per_prompt=rollouts_per_prompt,
            max_staleness_versions=staleness.max_staleness_versions,
            over_stale=staleness.over_stale,
            max_attempts=config.max_attempts,
            lease_timeout_s=config.lease_timeout_s,
        )
        self._bound = staleness.max_staleness_versions
        self._columns = Columns()
        self._log = Log(log_folder)
        self._clock = clock
        self._waiting: list[Waiting] = []
        self._waited_s: dict[str, float] = defaultdict(float)
        self._replies: list[list[bytes | memoryview | pa.Buffer]] = []
        self._stopping = False
        self._socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 1000)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 0)
        port: int = self._socket.bind_to_random_port(f"tcp://{host}")
        self.endpoint = f"tcp://{host}:{port}"

    def run(self) -> None:
        """Waits for requests and for the deadlines of waiting ones; ends on `Stop` or a broken invariant."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        try:
            while not self._stopping:
                poller.poll(self._sleep_ms())
                self._take_requests()
                self._expire_leases()
                self._serve_waiting()
                self._settle()
        finally:
            self._log.close()
            self._socket.close()

    # ---- the loop's steps --------------------------------------------------------------------------------------

    def _sleep_ms(self) -> int:
        next_deadline = min((w.deadline for w in self._waiting), default=float("inf"))
        return int(1000 * max(0.0, min(_TICK_S, next_deadline - self._clock()))) + 1

    def _take_requests(self) -> None:
        for _ in range(_BURST):
            try:
                address, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(address, frames)

    def _take(self, address: bytes, frames: list[bytes]) -> None:
        if not 2 <= len(frames) <= 3:
            logger.warning("dropped a message of %d frames from %s", len(frames), address.hex())
            return
        request_id, header = frames[0], frames[1]
        body = frames[2] if len(frames) == 3 else b""
        try:
            request = wire.decode_request(header)
            if isinstance(request, wire.Capacity | wire.Lease | wire.ReadBatch):
                now = self._clock()
                self._waiting.append(Waiting(address, request_id, request, now, now + request.timeout_s))
                return
            self._reply(address, request_id, self._carry_out(request, body))
        except (msgspec.DecodeError, pa.ArrowInvalid, BadRequest, LeaseLost) as problem:
            # The asker's mistake, told to the asker. Anything else is ours and ends the process.
            self._reply(address, request_id, wire.Problem(kind=type(problem).__name__, message=str(problem)))

    def _expire_leases(self) -> None:
        for rollout in self._ledger.expire(self._clock()):
            logger.warning(
                "lease of rollout %d expired; it goes on with %d tokens", rollout.rollout_id, rollout.length
            )

    def _serve_waiting(self) -> None:
        still = []
        now = self._clock()
        for waiting in self._waiting:
            answer = self._try(waiting.request, now)
            if answer is None and now < waiting.deadline and not self._stopping:
                still.append(waiting)
                continue
            self._waited_s[_WAITS[type(waiting.request)]] += now - waiting.since
            reply, body = answer or (self._empty(waiting.request), None)
            self._reply(waiting.address, waiting.request_id, reply, body)
        self._waiting = still

    def _settle(self) -> None:
        """Logs what changed, frees what is closed, answers."""
        self._log.states(self._ledger.take_transitions())
        closed = self._ledger.take_closed()
        if closed:
            self._columns.drop(closed, self._ledger.groups)
        self._log.flush()
        for frames in self._replies:
            self._socket.send_multipart(frames, copy=False)
        self._replies.clear()

    def _reply(
        self, address: bytes, request_id: bytes, reply: wire.Reply, body: pa.Buffer | None = None
    ) -> None:
        frames: list[bytes | memoryview | pa.Buffer] = [address, request_id, wire.encode(reply)]
        if body is not None:
            frames.append(memoryview(body))
        self._replies.append(frames)

    # ---- requests that wait ------------------------------------------------------------------------------------

    def _try(
        self, request: wire.Capacity | wire.Lease | wire.ReadBatch, now: float
    ) -> tuple[wire.Reply, pa.Buffer | None] | None:
        if isinstance(request, wire.Capacity):
            capacity = self._ledger.capacity
            return (wire.Number(value=capacity), None) if capacity else None
        if isinstance(request, wire.Lease):
            rollouts = self._ledger.lease(request.engine_id, request.limit, now)
            if not rollouts:
                return None
            return wire.Rows(rows=len(rollouts)), wire.pack_rows(self._columns.leases(rollouts))
        selection = self._ledger.select()
        if selection is None:
            return None
        rows = self._columns.batch(selection.rollout_ids, self._ledger, selection.version - self._bound)
        return wire.Batch(selection=selection), wire.pack_rows(rows)

    def _empty(self, request: wire.Capacity | wire.Lease | wire.ReadBatch) -> wire.Reply:
        return wire.Number(value=0) if isinstance(request, wire.Capacity) else wire.Rows(rows=0)

    # ---- requests that are answered at once --------------------------------------------------------------------

    def _carry_out(self, request: wire.Request, body: bytes) -> wire.Reply:
        match request:
            case wire.Admit():
                return self._admit(wire.unpack_rows(body, PROMPTS))
            case wire.Append():
                return self._append(wire.unpack_rows(body, SEGMENTS))
            case wire.Score(rollouts=scored):
                return self._each([(s.rollout_id, partial(self._ledger.score, *_fields(s))) for s in scored])
            case wire.Fail(rollout_id=rollout_id):
                return self._each([(rollout_id, partial(self._fail, request))])
            case wire.Release(leases=leases):
                return self._each([(r, partial(self._ledger.release, r, lease)) for r, lease in leases])
            case wire.Heartbeat(engine_id=engine_id):
                self._ledger.heartbeat(engine_id, self._clock())
                return wire.Number(value=0)
            case wire.Commit(batch_id=batch_id, version=version):
                return wire.Balance(counts=self._ledger.commit(batch_id, version))
            case wire.Publish(version=version):
                self._ledger.publish(version)
                return wire.Number(value=version)
            case wire.Status():
                return self._report()
            case wire.Stop():
                self._stopping = True
                return wire.Balance(counts=self._ledger.check())
            case _:
                raise BadRequest(f"no such request: {request}")

    def _admit(self, rows: pa.RecordBatch) -> wire.Number:
        groups = self._ledger.admit(rows.num_rows)
        ids, tokens, payloads = (
            rows["prompt_id"].to_pylist(),
            slices(rows["tokens"]),
            rows["payload"].to_pylist(),
        )
        for group, prompt_id, prompt_tokens, payload in zip(groups, ids, tokens, payloads, strict=True):
            self._columns.put_prompt(
                group.group_id, Prompt(prompt_id, prompt_tokens, payload), group.rollout_ids
            )
        self._log.prompts([g.group_id for g in groups], rows)
        return wire.Number(value=len(groups))

    def _append(self, rows: pa.RecordBatch) -> wire.Refused:
        taken: list[int] = []
        refused: list[int] = []
        tokens, logprobs = slices(rows["tokens"]), slices(rows["logprobs"])
        names = ("rollout_id", "lease_id", "start", "version", "finish_reason")
        facts = zip(*(rows[name].to_pylist() for name in names), strict=True)
        now = self._clock()
        try:
            for i, (rollout_id, lease_id, start, version, finish_reason) in enumerate(facts):
                if len(tokens[i]) != len(logprobs[i]):
                    raise BadRequest(
                        f"segment of rollout {rollout_id}: {len(tokens[i])} tokens, {len(logprobs[i])} logprobs"
                    )
                try:
                    new = self._ledger.append(
                        rollout_id, lease_id, start, len(tokens[i]), version, finish_reason, now
                    )
                except LeaseLost:
                    refused.append(rollout_id)
                    continue
                if new:
                    self._columns.append(rollout_id, version, tokens[i], logprobs[i])
                    taken.append(i)
        finally:
            # Rows before a bad one were taken; the log must hold exactly what the ledger holds.
            if taken:
                self._log.segments(rows.take(pa.array(taken)) if len(taken) < rows.num_rows else rows)
        return wire.Refused(rollout_ids=refused)

    def _fail(self, request: wire.Fail) -> None:
        if self._ledger.fail(request.rollout_id, request.lease_id, request.reason):
            self._columns.restart(request.rollout_id)

    def _each(self, actions: list[tuple[int, Callable[[], object]]]) -> wire.Refused:
        refused = []
        for rollout_id, action in actions:
            try:
                action()
            except LeaseLost:
                refused.append(rollout_id)
        return wire.Refused(rollout_ids=refused)

    def _report(self) -> wire.Report:
        now = self._clock()
        waits = dict(self._waited_s)
        for waiting in self._waiting:
            cause = _WAITS[type(waiting.request)]
            waits[cause] = waits.get(cause, 0.0) + now - waiting.since
        ledger = self._ledger
        return wire.Report(
            version=ledger.version,
            states=ledger.by_state(),
            counts=ledger.counts(),
            held_groups=len(ledger.groups),
            capacity_groups=ledger.capacity,
            spanning_trained=ledger.spanning_trained,
            most_versions=ledger.most_versions,
            waits_s=waits,
        )


def _fields(scored: wire.Scored) -> tuple[int, int, float]:
    if not np.isfinite(scored.reward):
        raise BadRequest(f"reward of rollout {scored.rollout_id} is {scored.reward}: rewards must be finite")
    return scored.rollout_id, scored.lease_id, scored.reward
