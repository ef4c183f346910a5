"""The groups of the `collective` transport over NCCL: two processes, on one GPU if there is one."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack

import one_gpu
import pytest
import torch
from device_peers import Peer, peer, take_part

from asyncrl.weight_sync.process_group import serve_store

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or not torch.distributed.is_nccl_available(),
    reason="no CUDA device, or a torch without NCCL",
)
TIMEOUT_S = 30.0
"""Of a group. What gives up, gives up after `LIMIT_S`."""
LIMIT_S = 5.0


def device_of(rank: int) -> str:
    return f"cuda:{rank % torch.cuda.device_count()}"


class World:
    """Rank 0, which sends, and others; the store is in this process."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._store, self._address = serve_store("127.0.0.1")

    def rank(self, rank: int) -> Peer:
        environment = one_gpu.environment(rank, torch.cuda.device_count())
        return self._stack.enter_context(
            peer(take_part, device_of(rank), environment, self._address, rank, 2, TIMEOUT_S)
        )


@pytest.fixture
def world() -> Iterator[World]:
    with ExitStack() as stack:
        yield World(stack)


def meet(name: str, *ranks: Peer) -> None:
    for each in ranks:
        each.send(name)
    assert [each.answer() for each in ranks] == ["joined"] * len(ranks)


def broadcast(count: int, *ranks: Peer) -> None:
    for each in ranks:
        each.send((count, TIMEOUT_S))
    wanted = (0, (count - 1) % 251, int((torch.arange(count) % 251).sum()))
    for each in ranks:
        answer = each.answer()
        assert isinstance(answer, tuple), answer
        assert answer[:3] == wanted


def test_bytes_arrive(world: World) -> None:
    sender, receiver = world.rank(0), world.rank(1)
    meet("first", sender, receiver)
    for count in (1, 4097, 16 * 2**20):
        broadcast(count, sender, receiver)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_receiver_that_is_gone_holds_the_sender_no_longer_than_it_waits(world: World, how: int) -> None:
    """NCCL's kernel waits for the receiver on the device; the sender gives it up, and is in a group with the next one."""
    sender, receiver = world.rank(0), world.rank(1)
    meet("first", sender, receiver)
    broadcast(2**20, sender, receiver)
    pid = receiver.process.pid
    assert pid is not None
    os.kill(pid, how)
    try:
        started = time.monotonic()
        sender.send((64 * 2**20, LIMIT_S))
        answer = sender.answer()
        assert isinstance(answer, str) and answer.startswith("GroupBroken"), answer
        assert time.monotonic() - started < LIMIT_S + 5
        fresh = world.rank(1)
        meet("second", sender, fresh)
        broadcast(2**20, sender, fresh)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
