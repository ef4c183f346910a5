"""The engine's side of weight sync: what an engine must offer, and the client that drives it through a transaction.

Invariants
----------
- The target is called one call at a time, in the order of the publisher's commands.
- Commands are heard while a version is fetched and staged: the publisher can call that off, or offer a later one.
- `apply` is called only for the version last staged, after the publisher's command.
- A staging that fails leaves the old version live; it is reported. An `apply` or `probe` that fails leaves weights of which
  nobody knows what they are: it is reported, and then ends the receiver with that error.
- An engine that the publisher goes on without is told so, which ends the receiver: it never serves old weights unnoticed.
Runs in the engine's event loop; the publisher names the deadlines.
"""

from __future__ import annotations

import asyncio
import logging
import time
import traceback
from collections.abc import Sequence
from typing import Any, Final, Protocol

import msgspec
import zmq
import zmq.asyncio
from zmq.utils.monitor import recv_monitor_message

from asyncrl.weight_sync import sockets, wire
from asyncrl.weight_sync.checksum import version_digest
from asyncrl.weight_sync.errors import (
    Dismissed,
    GroupBroken,
    ProbeMismatch,
    VersionTimeout,
    WeightSyncError,
)
from asyncrl.weight_sync.fetching import Fetching
from asyncrl.weight_sync.hosts import this_host
from asyncrl.weight_sync.probe import Probe, largest_difference
from asyncrl.weight_sync.sockets import Secure
from asyncrl.weight_sync.wire import Offer

logger = logging.getLogger(__name__)

CANCEL_S: Final = 5.0
"""How long a staging that ran out of time may take to end once it is cancelled."""

Answer = wire.Staged | wire.Applied | wire.Failed


class WeightTarget(Protocol):
    """An engine as weight sync sees it. Called from the engine's event loop, one call at a time."""

    async def stage(self, offer: Offer) -> None:
        """Verify the bytes of `offer`, which are on this host, while generation goes on. Raises `ChecksumError`.
        When it raises or is cancelled, nothing is staged."""

    async def apply(self, offer: Offer) -> float:
        """Replace the weights at a step boundary and label what follows with `offer.version`.

        Returns the seconds in which no decode step could run. Generation goes on afterwards also when this raises
        before the first byte was written.
        """

    async def discard(self, version: int) -> None:
        """Forget a staged version that will not be applied."""

    def hold(self) -> None:
        """Let no token out of a stream until `release`; they are sampled all the same. Those of an engine that ends while it
        holds never come out."""

    def release(self) -> None:
        """The present weights may be heard."""

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        """Logprob of each token after the first under the present weights: [len(tokens) - 1]."""


class Receiver:
    """Takes versions from one publisher for one engine."""

    def __init__(
        self,
        target: WeightTarget,
        endpoint: str,
        engine_id: str,
        *,
        secure: Secure | None = None,
    ) -> None:
        """`engine_id` is unique among the publisher's engines; an engine started again uses its old one. `secure` is called on
        the socket before it connects."""
        self.version = -1
        """The last one applied, -1 for none."""
        self.digest = ""
        """Of its bytes (`checksum.version_digest`)."""
        self._target = target
        self._endpoint = endpoint
        self._engine_id = engine_id
        self._secure = secure
        self._fetching = Fetching(engine_id, secure)
        self._staging: asyncio.Task[None] | None = None
        """Of the present attempt, while it is under way."""
        self._staged: Offer | None = None
        self._attempt = 0
        self._answer: Answer | None = None
        """To the last command, kept for its repetition."""
        self._changed = asyncio.Condition()
        self._ended = False

    async def run(self) -> None:
        """Join, and obey the publisher until cancelled, which leaves in order. Raises what the target raised in `apply` or
        `probe`, `Dismissed`, or `WeightSyncError` if the publisher speaks another language."""
        context = zmq.asyncio.Context()
        socket, connections = sockets.dealer(context, self._endpoint, self._engine_id, self._secure)
        poller = zmq.asyncio.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(connections, zmq.POLLIN)
        reason = "cancelled"
        try:
            # Waits for: connections and commands. Unblocked by: the publisher. Ends: cancelled, or an error.
            while True:
                ready = await self._next(poller)
                if connections in ready:
                    await recv_monitor_message(connections)
                    await socket.send(wire.encode(self._join()))
                if socket in ready:
                    await self._obey(socket, self._decoded(await socket.recv()))
        except Exception as error:
            reason = repr(error)
            raise
        finally:
            _send_now(socket, wire.Leave(reason=reason))
            if self._staging is not None:
                self._staging.cancel()
                await asyncio.wait({self._staging}, timeout=2 * CANCEL_S)
            self._fetching.close()
            socket.disable_monitor()
            connections.close(linger=0)
            sockets.close(socket)
            context.term()
            await self._end()

    async def _next(self, poller: zmq.asyncio.Poller) -> dict[Any, int]:
        """What is ready to be read; empty when a staging has ended. Raises what ended that, if it was no matter of the version."""
        polling = asyncio.ensure_future(poller.poll())
        waited = {polling, self._staging} if self._staging is not None else {polling}
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if self._staging is not None and self._staging.done():
                staging, self._staging = self._staging, None
                staging.result()
            return dict(polling.result()) if polling.done() else {}
        finally:
            polling.cancel()

    def _join(self) -> wire.Join:
        return wire.Join(version=self.version, host=this_host())

    def digest_of(self, version: int) -> str:
        """Of the bytes that the engine loaded, if it runs `version` and that is judged; empty where it is not yet: an engine runs a
        version from its `apply` on, and the answer to the probe comes after that."""
        return self.digest if version == self.version else ""

    async def wait_for_version(self, version: int, timeout_s: float) -> None:
        """Return when `version` or a later one is live. Raises `VersionTimeout` after `timeout_s`, and
        `WeightSyncError` if the receiver ends before."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.version >= version or self._ended)
        except TimeoutError as error:
            raise VersionTimeout(
                f"engine {self._engine_id}: expected version {version} from {self._endpoint} within {timeout_s:g} s, "
                f"has {self.version}. Is the learner alive, and does it publish?"
            ) from error
        if self.version < version:
            raise WeightSyncError(
                f"engine {self._engine_id}: its receiver ended at version {self.version} while version {version} "
                f"was waited for"
            )

    async def _obey(self, socket: zmq.asyncio.Socket, command: wire.ToEngine) -> None:
        if isinstance(command, wire.Ping) or command.attempt < self._attempt:
            return
        if isinstance(command, wire.Propose):
            await self._propose(socket, command)
        elif isinstance(command, wire.Apply):
            await self._apply(socket, command)
        elif command.attempt > self._attempt:
            return  # about an offer to an engine that had this name before
        elif isinstance(command, wire.Dismiss):
            raise Dismissed(
                f"engine {self._engine_id}, version {self.version}: put out of service by {self._endpoint}, must be "
                f"started again: {command.reason}"
            )
        else:
            logger.warning("engine=%s sync aborted reason=%s", self._engine_id, command.reason)
            await self._discard()

    async def _propose(self, socket: zmq.asyncio.Socket, command: wire.Propose) -> None:
        if command.attempt == self._attempt:
            if self._answer is not None:
                await socket.send(wire.encode(self._answer))
            return
        # The publisher has gone on to another attempt: what it said of the one before is lost or was not for us.
        await self._discard()
        self._attempt, self._answer = command.attempt, None
        self._staging = asyncio.create_task(self._take(socket, command))

    async def _take(self, socket: zmq.asyncio.Socket, command: wire.Propose) -> None:
        """Stage what is offered and answer. Raises `WeightSyncError` if that can neither be done nor be ended."""
        started = time.monotonic()
        task = asyncio.create_task(self._stage(command))
        try:
            # Waits for: the bytes. Unblocked by: the target, the time that the publisher gives, or `_discard`.
            done, _ = await asyncio.wait({task}, timeout=command.timeout_s)
        finally:
            await self._end_task(task, command.offer.version)
        if done and task.exception() is None:
            self._staged = task.result()
            self._answer = wire.Staged(attempt=command.attempt, stage_s=time.monotonic() - started)
        else:
            late = TimeoutError(f"staging version {command.offer.version} took over {command.timeout_s:g} s")
            error = (task.exception() if done else None) or late
            cut = isinstance(error, GroupBroken)
            text = str(error) if cut else "".join(traceback.format_exception(error))
            logger.error("engine=%s version=%d not staged: %s", self._engine_id, command.offer.version, text)
            self._answer = wire.Failed(attempt=command.attempt, error=text, cut=cut)
        await socket.send(wire.encode(self._answer))

    async def _stage(self, command: wire.Propose) -> Offer:
        offer = await self._fetching.fetch(command.offer, command.timeout_s)
        await self._target.stage(offer)
        return offer

    async def _end_task(self, task: asyncio.Task[Offer], version: int) -> None:
        task.cancel()
        await asyncio.wait({task}, timeout=CANCEL_S)
        if not task.done():
            raise WeightSyncError(
                f"engine {self._engine_id}: staging version {version} took too long and cannot be cancelled; the engine "
                f"must be restarted"
            )

    async def _apply(self, socket: zmq.asyncio.Socket, command: wire.Apply) -> None:
        if isinstance(self._answer, wire.Applied) and command.attempt == self._attempt:
            await socket.send(wire.encode(self._answer))
            return
        offer = self._staged
        if offer is None or command.attempt != self._attempt:
            error = (
                f"told to apply attempt {command.attempt}, which is not staged here (last: {self._attempt})"
            )
            await socket.send(wire.encode(wire.Failed(attempt=command.attempt, error=error)))
            return
        try:
            started = time.monotonic()
            if command.probe is not None:
                self._target.hold()
            stall_s = await self._target.apply(offer)
            apply_s = time.monotonic() - started
            answer = await self._judged(offer, command.probe) if command.probe is not None else ()
        except ProbeMismatch as error:
            _send_now(socket, wire.Failed(attempt=command.attempt, error=str(error), probe=error.answer))
            raise
        except Exception as error:
            text = "".join(traceback.format_exception(error))
            _send_now(socket, wire.Failed(attempt=command.attempt, error=text))
            raise
        self._staged = None
        # `stage` found these sums in the bytes that `apply` then loaded, or it would have raised.
        self.digest = version_digest(offer.checksums)
        self._answer = wire.Applied(
            attempt=command.attempt, apply_s=apply_s, stall_s=stall_s, probe=answer, digest=self.digest
        )
        async with self._changed:
            self.version = offer.version
            self._changed.notify_all()
        await socket.send(wire.encode(self._answer))

    async def _judged(self, offer: Offer, probe: Probe) -> tuple[float, ...]:
        """The engine's answer, once it is right: only then tokens may come out. Raises `ProbeMismatch`."""
        answer = tuple(await self._target.probe(probe.tokens))
        worst = largest_difference(probe, answer)
        if not worst.size <= probe.tolerance:
            raise ProbeMismatch(
                self._engine_id, offer.version, worst.position, worst.expected, worst.got, answer=answer
            )
        self._target.release()
        return answer

    async def _discard(self) -> None:
        staging, self._staging = self._staging, None
        if staging is not None:
            staging.cancel()
            await asyncio.wait({staging})  # it ends within CANCEL_S, or with the error that says so
            if not staging.cancelled():
                staging.result()
        if self._staged is not None:
            version, self._staged = self._staged.version, None
            await self._target.discard(version)

    async def _end(self) -> None:
        async with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _decoded(self, message: bytes) -> wire.ToEngine:
        try:
            command: wire.ToEngine = wire.decode_for_engine(message)
        except msgspec.DecodeError as error:
            raise WeightSyncError(
                f"engine {self._engine_id}: {self._endpoint} sent what is no command ({error}); learner and engine "
                f"must run the same version of asyncrl"
            ) from error
        return command


def _send_now(socket: zmq.asyncio.Socket, message: Answer | wire.Leave) -> None:
    """Queue `message` without waiting; if the publisher is gone or reads nothing, it finds out by itself."""
    try:
        zmq.Socket.shadow(socket.underlying).send(wire.encode(message), zmq.NOBLOCK)
    except zmq.Again:
        logger.warning("publisher unreachable, not sent: %s", type(message).__name__)
