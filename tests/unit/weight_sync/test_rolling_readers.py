"""Whose reading the rolling publisher does not hear the end of, step by step over a real socket: the bytes stay, the name may not.

One thread is engine and publisher in turn, so every order here is the one that is written down.
"""

from __future__ import annotations

import contextlib
import mmap
import time
import uuid
from collections.abc import Iterator

import pytest
import torch
import zmq

from asyncrl.weight_sync import sockets, wire
from asyncrl.weight_sync.config import WeightSyncConfig
from asyncrl.weight_sync.errors import ChecksumError
from asyncrl.weight_sync.hosts import this_host
from asyncrl.weight_sync.pieces import cut
from asyncrl.weight_sync.plan import make_plan
from asyncrl.weight_sync.rolling_publisher import RollingPublisher
from asyncrl.weight_sync.shm import map_version, verify

PLAN = make_plan([("w", "float32", (50,)), ("b", "float32", (5,))], 200)
SPEAKS_S = 20.0
LAG = 3


class Hand:
    """An engine's end of one connection, which says and hears what the test says."""

    def __init__(self, publisher: RollingPublisher, name: str) -> None:
        self.publisher, self.name = publisher, name
        self.context = zmq.Context()
        self.socket, self.events = sockets.dealer(self.context, publisher.endpoint, name)
        self.say(wire.Join(version=-1, host=this_host()))

    def say(self, message: wire.ToPublisher) -> None:
        self.socket.send(wire.encode(message))

    def hear(self, kind: type) -> wire.ToEngine:
        """The next command that is no ping. Waits for the publisher, which has its turn here; ends at the deadline."""
        deadline = time.monotonic() + SPEAKS_S
        while time.monotonic() < deadline:
            self.publisher._exchange.step(0.01)
            if self.socket.poll(0):
                command = wire.decode_for_engine(self.socket.recv())
                if not isinstance(command, wire.Ping):
                    assert isinstance(command, kind)
                    return command
        raise AssertionError(f"no {kind.__name__} within {SPEAKS_S} s")

    def read(self, until: str) -> tuple[wire.Offer, mmap.mmap, int]:
        """It is offered a version, maps it, and goes as far as `until`; what it holds then, and the open attempt."""
        propose = self.hear(wire.Propose)
        mapped = map_version(propose.offer)
        if until == "apply":
            self.say(wire.Staged(attempt=propose.attempt, stage_s=0.0))
            assert self.hear(wire.Apply).attempt == propose.attempt
        return propose.offer, mapped, propose.attempt

    def close(self) -> None:
        if self.socket.closed:
            return
        self.socket.disable_monitor()
        self.events.close(linger=0)
        self.socket.close(linger=0)
        self.context.term()


class World:
    def __init__(self, publisher: RollingPublisher, hands: contextlib.ExitStack) -> None:
        self.publisher, self._hands = publisher, hands

    def engine(self, name: str = "a") -> Hand:
        return self._hands.enter_context(contextlib.closing(Hand(self.publisher, name)))

    def publish(self, version: int) -> None:
        self.publisher.begin(version)
        weights = {"w": torch.full((50,), float(version)), "b": torch.ones(5)}
        for bucket in PLAN.buckets:
            self.publisher.write(bucket, cut(PLAN, bucket, weights))
        self.publisher.commit()

    def inodes(self) -> dict[int, int]:
        return {number: held.slot.path.stat().st_ino for number, held in self.publisher._held.items()}

    def until(self, condition) -> None:
        """Waits for messages; ends when it holds, or at the deadline."""
        deadline = time.monotonic() + SPEAKS_S
        while not condition() and time.monotonic() < deadline:
            self.publisher._exchange.step(0.01)
        assert condition()

    def obey(self, hand: Hand, version: int) -> None:
        """It takes what it is offered, which is `version`."""
        offer, mapped, attempt = hand.read("apply")
        verify(mapped, offer)
        mapped.close()
        hand.say(wire.Applied(attempt=attempt, apply_s=0.0, stall_s=0.0, probe=()))
        self.until(lambda: self.publisher.engines[hand.name] == version)

    # ---- how the publisher comes to know nothing of a reader any more ------------------------------------------

    def another_takes_its_name(self, reader: Hand) -> None:
        """The commands to the first one are in its queue by then, or in its hands. The second does all that it is told to."""
        second = self.engine()
        self.obey(second, 0)

    def it_connects_anew(self, reader: Hand) -> None:
        reader.say(wire.Join(version=-1, host=this_host()))
        reader.hear(wire.Propose)

    def it_takes_its_leave(self, reader: Hand) -> None:
        reader.say(wire.Leave(reason="its process goes on"))
        self.until(lambda: not self.publisher._rolling.versions)

    def it_says_nothing_for_long(self, reader: Hand) -> None:
        exchange = self.publisher._exchange
        exchange._carry_out(self.publisher._rolling.tick(time.monotonic() + 1000.0))
        assert not self.publisher._rolling.versions

    def it_fails(self, reader: Hand) -> None:
        """Its workers may not have."""
        reader.say(wire.Failed(attempt=reader.publisher._rolling._members["a"].attempt, error="some of it"))
        self.until(lambda: not self.publisher._rolling.versions)

    def its_connection_is_gone(self, reader: Hand) -> None:
        reader.close()
        self.until(lambda: not self.publisher._rolling.versions)


@pytest.fixture
def world() -> Iterator[World]:
    run_id = f"test-{uuid.uuid4().hex[:12]}"
    config = WeightSyncConfig(timeout_s=2.0)
    with (
        RollingPublisher(config, run_id, PLAN, max_lag_versions=LAG) as publisher,
        contextlib.ExitStack() as hands,
    ):
        yield World(publisher, hands)


FORGOTTEN = [
    World.another_takes_its_name,
    World.it_connects_anew,
    World.it_takes_its_leave,
    World.it_says_nothing_for_long,
    World.it_fails,
    World.its_connection_is_gone,
]


@pytest.mark.parametrize("until", ["stage", "apply"])
@pytest.mark.parametrize("forgotten", FORGOTTEN, ids=lambda each: each.__name__)
def test_bytes_stay_for_a_reader_that_the_publisher_knows_no_more(world, forgotten, until):
    """Met as a schedule: the one before `another_takes_its_name` read the name again, which led to the version three later."""
    reader = world.engine()
    world.until(lambda: "a" in world.publisher.engines)
    world.publish(0)
    offer, mapped, _ = reader.read(until)
    assert offer.version == 0
    inode = world.inodes()[0]
    forgotten(world, reader)
    for version in range(1, LAG):
        world.publish(version)
    verify(mapped, offer)
    assert world.inodes()[0] == inode, "nothing was to be written there yet"
    world.publish(LAG)
    verify(mapped, offer)
    assert world.publisher._held[LAG].slot.path.stat().st_ino != inode
    with pytest.raises(ChecksumError):
        map_version(offer)  # the name has gone on: a verified mapping, or its inode, is what an engine keeps
    mapped.close()


@pytest.mark.parametrize("name", ["a", "b"], ids=["same name", "another name"])
def test_memory_is_used_again_once_every_reader_has_answered(world, name):
    reader = world.engine()
    world.until(lambda: "a" in world.publisher.engines)
    inodes = set()
    for version in range(LAG):
        world.publish(version)
        world.obey(reader, version)
        inodes |= set(world.inodes().values())
    assert len(inodes) == LAG
    world.engine(name).read("stage")
    for version in range(LAG, 2 * LAG - 1):  # up to the memory of the version that is being staged
        world.publish(version)
        assert set(world.inodes().values()) <= inodes
