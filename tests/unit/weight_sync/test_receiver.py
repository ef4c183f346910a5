"""The receiver against a publisher played by hand over real sockets: order, repetition, supersession, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest
import torch
import zmq
import zmq.asyncio
from offers import fill, offer_of

from asyncrl.weight_sync import sockets, wire
from asyncrl.weight_sync.errors import Dismissed, ProbeMismatch, VersionTimeout, WeightSyncError
from asyncrl.weight_sync.hosts import this_host
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.probe import Probe
from asyncrl.weight_sync.receiver import Receiver
from asyncrl.weight_sync.shm import map_version
from asyncrl.weight_sync.slots import Slots
from asyncrl.weight_sync.wire import Offer

PLAN = make_plan([("w", "float32", (100,))], 1024)
PROBE = Probe(tokens=(4, 5, 6), logprobs=(-5.0, -6.0), tolerance=0.1)


class Diary:
    """A target that maps for real and writes down what it was told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail_apply = False
        self.stage_s = 0.0
        self.apply_s = 0.0
        self.probe_s = 0.0
        self.probing = asyncio.Event()
        self.busy = False

    async def _call(self, what: str, seconds: float = 0.0) -> None:
        assert not self.busy, f"{what} while another call runs"
        self.busy = True
        self.calls.append(what)
        try:
            await asyncio.sleep(seconds)
        finally:
            self.busy = False

    async def stage(self, offer: Offer) -> None:
        await self._call(f"stage {offer.version}", self.stage_s)
        map_version(offer).close()

    async def apply(self, offer: Offer) -> float:
        await self._call(f"apply {offer.version}", self.apply_s)
        if self.fail_apply:
            raise RuntimeError("half written")
        return 0.125

    async def discard(self, version: int) -> None:
        await self._call(f"discard {version}")

    def hold(self) -> None:
        self.calls.append("hold")

    def release(self) -> None:
        self.calls.append("release")

    async def probe(self, tokens: Sequence[int]) -> list[float]:
        self.probing.set()
        await self._call("probe", self.probe_s)
        return [-float(token) for token in tokens[1:]]


class ByHand:
    """The publisher's end of one engine's connection."""

    def __init__(self, socket: zmq.asyncio.Socket, target: Diary, receiver: Receiver, slots: Slots) -> None:
        self.socket = socket
        self.target = target
        self.receiver = receiver
        self.slots = slots
        self.running: asyncio.Task[None] = asyncio.create_task(receiver.run())

    async def tell(self, message: wire.ToEngine | bytes) -> None:
        body = message if isinstance(message, bytes) else wire.encode(message)
        await self.socket.send_multipart([b"engine", body])

    async def hear(self) -> wire.ToPublisher:
        async with asyncio.timeout(10):
            name, body = await self.socket.recv_multipart()
        assert name == b"engine"
        return wire.decode_for_publisher(body)

    def offer(self, version: int) -> Offer:
        slot = self.slots.next()
        fill(slot, PLAN, {"w": torch.full((100,), float(version))})
        return offer_of(slot, PLAN, version)

    def propose(self, attempt: int, version: int, timeout_s: float = 10.0) -> wire.Propose:
        return wire.Propose(attempt=attempt, offer=self.offer(version), timeout_s=timeout_s)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[ByHand]:
    context = zmq.asyncio.Context()
    socket, endpoint = sockets.router(context, "127.0.0.1")
    slots = Slots(f"test-{uuid.uuid4().hex[:12]}", PLAN)
    target = Diary()
    hand = ByHand(socket, target, Receiver(target, endpoint, "engine"), slots)
    try:
        assert await hand.hear() == wire.Join(version=-1, host=this_host())
        yield hand
    finally:
        hand.running.cancel()
        await asyncio.wait({hand.running}, timeout=10)
        assert hand.running.done()
        slots.close()
        sockets.close(socket)
        context.term()


def test_stages_applies_and_probes():
    async def scenario() -> None:
        async with connected() as hand:
            await hand.tell(hand.propose(1, version=3))
            staged = await hand.hear()
            assert isinstance(staged, wire.Staged) and staged.attempt == 1 and hand.receiver.version == -1
            await hand.tell(wire.Apply(attempt=1, probe=PROBE))
            applied = await hand.hear()
            assert (
                isinstance(applied, wire.Applied)
                and applied.probe == (-5.0, -6.0)
                and applied.stall_s == 0.125
            )
            assert hand.receiver.version == 3
            assert hand.target.calls == ["stage 3", "hold", "apply 3", "probe", "release"]
            assert applied.digest == hand.receiver.digest and len(applied.digest) == 16

    asyncio.run(scenario())


def test_a_version_that_is_not_judged_yet_is_not_said_to_have_the_bytes_of_the_one_before():
    """Its status would show other weights than the learner's."""

    async def scenario() -> None:
        async with connected() as hand:
            await hand.tell(hand.propose(1, version=3))
            await hand.hear()
            await hand.tell(wire.Apply(attempt=1))
            first = await hand.hear()
            assert isinstance(first, wire.Applied) and hand.receiver.digest_of(3) == first.digest != ""
            hand.target.probe_s = 0.5
            await hand.tell(hand.propose(2, version=4))
            await hand.hear()
            await hand.tell(wire.Apply(attempt=2, probe=PROBE))
            async with asyncio.timeout(10):
                await hand.target.probing.wait()
            assert (hand.receiver.digest_of(3), hand.receiver.digest_of(4)) == (first.digest, "")
            second = await hand.hear()
            assert isinstance(second, wire.Applied) and second.digest != first.digest
            assert (hand.receiver.digest_of(3), hand.receiver.digest_of(4)) == ("", second.digest)

    asyncio.run(scenario())


def test_tokens_stay_in_until_the_probe_is_right_and_for_ever_where_it_is_wrong():
    async def scenario() -> None:
        async with connected() as hand:
            await hand.tell(hand.propose(1, version=3))
            await hand.hear()
            await hand.tell(
                wire.Apply(attempt=1, probe=msgspec.structs.replace(PROBE, logprobs=(-5.0, -6.5)))
            )
            failed = await hand.hear()
            assert isinstance(failed, wire.Failed) and failed.probe == (-5.0, -6.0)
            assert "engine engine at version 3, probe logprob 1" in failed.error
            assert isinstance(await hand.hear(), wire.Leave)
            await asyncio.wait({hand.running}, timeout=10)
            assert isinstance(hand.running.exception(), ProbeMismatch)
            assert hand.receiver.version == -1, "who waits for the version must not begin to serve it"
            assert hand.target.calls == ["stage 3", "hold", "apply 3", "probe"]

    asyncio.run(scenario())


def test_a_dismissal_ends_the_engine_that_it_is_for():
    async def scenario() -> None:
        async with connected() as hand:
            await hand.tell(wire.Dismiss(attempt=4, reason="one that had my name"))
            await hand.tell(hand.propose(5, version=0))
            assert isinstance(await hand.hear(), wire.Staged)
            await hand.tell(wire.Dismiss(attempt=4, reason="an old one"))
            await hand.tell(wire.Ping())
            await hand.tell(wire.Dismiss(attempt=5, reason="no answer within 3.0 s"))
            assert isinstance(await hand.hear(), wire.Leave)
            with pytest.raises(
                Dismissed, match=r"engine, version -1: put out of service .* no answer within"
            ):
                await hand.running

    asyncio.run(scenario())


def test_leaving_while_it_applies_is_a_farewell_and_no_failure():
    async def scenario() -> None:
        async with connected() as hand:
            await hand.tell(hand.propose(1, version=0))
            assert isinstance(await hand.hear(), wire.Staged)
            hand.target.apply_s = 60.0
            await hand.tell(wire.Apply(attempt=1))
            await asyncio.sleep(0.2)
            assert hand.target.calls[-1] == "apply 0" and hand.target.busy
            hand.running.cancel()
            assert await hand.hear() == wire.Leave(reason="cancelled")

    asyncio.run(scenario())


def test_repeated_commands_get_the_same_answers_without_being_done_again():
    async def scenario() -> None:
        async with connected() as hand:
            proposal = hand.propose(1, version=0)
            answers = []
            for command in (
                proposal,
                proposal,
                wire.Apply(attempt=1),
                wire.Apply(attempt=1),
            ):
                await hand.tell(command)
                answers.append(await hand.hear())
            assert answers[0] == answers[1] and answers[2] == answers[3]
            assert hand.target.calls == ["stage 0", "apply 0"]

    asyncio.run(scenario())


def test_a_superseded_offer_is_discarded_and_cannot_be_applied():
    async def scenario() -> None:
        async with connected() as hand:
            await hand.tell(hand.propose(1, version=0))
            await hand.hear()
            await hand.tell(hand.propose(2, version=1))
            assert (await hand.hear()).attempt == 2
            await hand.tell(wire.Apply(attempt=1))
            await hand.tell(wire.Abort(attempt=1, reason="old"))
            await hand.tell(wire.Apply(attempt=2))
            assert (await hand.hear()).attempt == 2
            assert hand.target.calls == ["stage 0", "discard 0", "stage 1", "apply 1"]

    asyncio.run(scenario())


def test_an_abort_discards_and_the_next_attempt_works():
    async def scenario() -> None:
        async with connected() as hand:
            await hand.tell(hand.propose(1, version=0))
            await hand.hear()
            await hand.tell(wire.Abort(attempt=1, reason="another engine failed"))
            await hand.tell(wire.Apply(attempt=1))
            refused = await hand.hear()
            assert isinstance(refused, wire.Failed) and "not staged" in refused.error
            await hand.tell(hand.propose(2, version=0))
            assert isinstance(await hand.hear(), wire.Staged)
            assert hand.target.calls == ["stage 0", "discard 0", "stage 0"]
            assert hand.receiver.version == -1

    asyncio.run(scenario())


def test_a_bad_checksum_is_answered_with_its_traceback_and_the_receiver_goes_on():
    async def scenario() -> None:
        async with connected() as hand:
            good = hand.propose(1, version=0)
            bad = msgspec.structs.replace(good, offer=msgspec.structs.replace(good.offer, checksums=(1,)))
            await hand.tell(bad)
            failed = await hand.hear()
            assert isinstance(failed, wire.Failed)
            assert "Traceback" in failed.error and "ChecksumError: version 0, bucket 0" in failed.error
            await hand.tell(msgspec.structs.replace(good, attempt=2))
            assert isinstance(await hand.hear(), wire.Staged)

    asyncio.run(scenario())


def test_staging_ends_when_its_time_is_over():
    async def scenario() -> None:
        async with connected() as hand:
            hand.target.stage_s = 60.0
            await hand.tell(hand.propose(1, version=0, timeout_s=0.2))
            failed = await hand.hear()
            assert isinstance(failed, wire.Failed) and "took over 0.2 s" in failed.error
            hand.target.stage_s = 0.0
            await hand.tell(hand.propose(2, version=0))
            assert isinstance(await hand.hear(), wire.Staged)

    asyncio.run(scenario())


def test_an_apply_that_fails_is_reported_and_ends_the_receiver_and_who_waits():
    async def scenario() -> None:
        async with connected() as hand:
            waiting = asyncio.create_task(hand.receiver.wait_for_version(0, timeout_s=10))
            hand.target.fail_apply = True
            await hand.tell(hand.propose(1, version=0))
            await hand.hear()
            await hand.tell(wire.Apply(attempt=1))
            failed, left = await hand.hear(), await hand.hear()
            assert isinstance(failed, wire.Failed) and "RuntimeError: half written" in failed.error
            assert isinstance(left, wire.Leave) and "half written" in left.reason
            with pytest.raises(RuntimeError, match="half written"):
                await asyncio.wait_for(hand.running, 10)
            with pytest.raises(WeightSyncError, match="its receiver ended at version -1"):
                await waiting
            assert hand.receiver.version == -1

    asyncio.run(scenario())


def test_cancelled_it_says_farewell():
    async def scenario() -> None:
        async with connected() as hand:
            hand.running.cancel()
            assert await hand.hear() == wire.Leave(reason="cancelled")
            with pytest.raises(asyncio.CancelledError):
                await hand.running

    asyncio.run(scenario())


def test_waiting_for_a_version():
    async def scenario() -> None:
        async with connected() as hand:
            with pytest.raises(VersionTimeout, match=r"expected version 0 .* within 0.1 s, has -1"):
                await hand.receiver.wait_for_version(0, timeout_s=0.1)
            waiting = asyncio.create_task(hand.receiver.wait_for_version(4, timeout_s=10))
            for attempt, version in ((1, 3), (2, 5)):
                await hand.tell(hand.propose(attempt, version))
                await hand.hear()
                assert not waiting.done()
                await hand.tell(wire.Apply(attempt=attempt))
                await hand.hear()
            await waiting
            await hand.receiver.wait_for_version(5, timeout_s=0.1)

    asyncio.run(scenario())


def test_what_is_no_command_ends_the_receiver():
    async def scenario() -> None:
        async with connected() as hand:
            await hand.tell(b"\x93garbage")
            with pytest.raises(WeightSyncError, match="same version of asyncrl"):
                await asyncio.wait_for(hand.running, 10)

    asyncio.run(scenario())


def test_pings_are_not_answered():
    async def scenario() -> None:
        async with connected() as hand:
            for _ in range(3):
                await hand.tell(wire.Ping())
            await hand.tell(hand.propose(1, version=0))
            assert isinstance(await hand.hear(), wire.Staged)

    asyncio.run(scenario())


def test_an_engine_id_must_fit_its_routing_id():
    async def scenario() -> None:
        receiver = Receiver(Diary(), "tcp://127.0.0.1:1", "x" * 300)
        with pytest.raises(ValueError, match="got 300 bytes"):
            await receiver.run()

    asyncio.run(scenario())
