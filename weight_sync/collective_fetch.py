"""The engine's side of the `collective` transport: receives a version's buckets from one group for each sender, all at once, into
memory of this host.

    thread of sender r:  wait for `go/0` | start 0 | wait for `go/1` | start 1 | wait for 0 ...      (see `collective_sender`)

An engine is one rank of each group, however many GPUs it runs on: its workers map the memory.

Invariants
----------
- A thread that is cancelled, called off, or whose sender is gone stops within `LOOK_S`, but for a broadcast of gloo under way: that
  may go on writing until the group's timeout, so its memory is never used again, and is freed after it.
- Groups are kept for the next version only if this one came whole over all of them.
- What breaks here is the way, not the engine: it is `GroupBroken`, unless this host has no memory.
Imports torch. Made by `fetching` with the first offer of a `wire.Group`; called in the engine's event loop.
"""

from __future__ import annotations

import asyncio
import functools
import mmap
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Final

import msgspec
import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from asyncrl.weight_sync.collective_sender import group_timeout_s
from asyncrl.weight_sync.errors import GroupBroken
from asyncrl.weight_sync.memory_file import MemoryFile
from asyncrl.weight_sync.plan import Bucket
from asyncrl.weight_sync.process_group import (
    PeerGroup,
    connect_store,
    own_address,
    store_errors,
    wait_for,
)
from asyncrl.weight_sync.torch_threads import stand_still, start_thread
from asyncrl.weight_sync.wire import Group, Offer, SharedFile

LOOK_S: Final = 0.25
"""How soon it is noticed, at most, that nobody waits any more, or that the sender is gone or called it off."""
SHORTEST_S: Final = 1e-4
LONGEST_S: Final = 5e-3
"""Between two looks for the next bucket."""


class CollectiveFetch:
    """Of one engine. A `Fetcher`."""

    def __init__(self, engine_id: str) -> None:
        self._engine_id = engine_id
        self._groups: dict[str, list[_Member]] = {}
        """Those of the last version, if it came whole: name -> one for each sender."""
        self._memory: MemoryFile | None = None
        """Of the last version, if it came whole."""

    async def fetch(self, offer: Offer, timeout_s: float) -> Offer:
        """See `Fetcher`. Raises `GroupBroken`, or `SharedMemoryError` if this host has no room."""
        source = offer.source
        assert isinstance(source, Group)
        members = self._members(source, offer, timeout_s)
        memory, self._memory = self._memory, None
        if memory is None or memory.size != offer.plan.total_bytes:
            if memory is not None:
                memory.abandon()
            memory = MemoryFile(f"{self._engine_id}-weights", offer.plan.total_bytes)
        reception = _Reception(offer, memory.map, members, timeout_s)
        try:
            checksums = await reception.run()
        except BaseException:
            reception.stop()
            memory.abandon()
            raise
        self._memory = memory
        self._groups[source.name] = members
        return msgspec.structs.replace(
            offer, source=SharedFile(path=str(memory.path)), checksums=tuple(checksums)
        )

    def close(self) -> None:
        """See `Fetcher`."""
        self._drop_groups()
        memory, self._memory = self._memory, None
        if memory is not None:
            # Not closed: the groups hold views of it until they have ended.
            memory.abandon()

    def _members(self, source: Group, offer: Offer, timeout_s: float) -> list[_Member]:
        """This engine in each of the groups: as they were, or to be made."""
        kept = self._groups.pop(source.name, None)
        self._drop_groups()
        if kept is not None and source.made:
            return kept
        if source.made:
            raise GroupBroken(f"engine {self._engine_id} is no longer in group {source.name}")
        return [
            _Member(source, sender, group_timeout_s(offer.plan, timeout_s))
            for sender in range(len(source.stores))
        ]

    def _drop_groups(self) -> None:
        for members in self._groups.values():
            for member in members:
                member.drop()
        self._groups.clear()


class _Member:
    """This engine in the group of one sender. Used by one thread at a time, but for `drop`."""

    def __init__(self, source: Group, sender: int, timeout_s: float) -> None:
        self.sender = sender
        self.device = torch.device("cuda", 0) if source.backend == "nccl" else torch.device("cpu")
        self._source = source
        self._timeout_s = timeout_s
        self._store: TCPStore | None = None
        self._group: PeerGroup | None = None
        self._lock = threading.Lock()
        self._dropped = False

    def store(self) -> TCPStore:
        """The connection to the sender's. Raises `GroupBroken`."""
        if self._store is None:
            self._store = connect_store(self._source.stores[self.sender])
        return self._store

    def group(self, look: _Look) -> PeerGroup:
        """Made if it is not there yet. Raises `GroupBroken`, or what `look` raises."""
        if self._group is not None:
            return self._group
        name, rank, store = self._source.name, self._source.rank, self.store()
        with store_errors(f"group {name}"):
            store.set(f"{name}/here/{rank}", "1")
        look.until(f"{name}/go")
        address = own_address(self._source.stores[self.sender])
        group = PeerGroup(store, name, rank, self._source.size, self.device, self._timeout_s, address)
        with self._lock:
            self._group = group
            if self._dropped:
                group.drop()
        return group

    def drop(self) -> None:
        """Leave the group. May be called twice, by any thread."""
        with self._lock:
            if self._group is not None and not self._dropped:
                self._group.drop()
            self._dropped = True


class _Stopped(Exception):
    """Nobody waits for this version any more."""


class _Look:
    """What a thread looks out for while it waits."""

    def __init__(self, store: TCPStore, prefix: str, stop: threading.Event, deadline: float) -> None:
        self._store = store
        self._prefix = prefix
        self._stop = stop
        self._deadline = deadline
        self._next = 0.0

    def __call__(self) -> None:
        """Raises `_Stopped`, or `GroupBroken` if the sender is gone or has called it off, or time is over."""
        stand_still()
        if self._stop.is_set():
            raise _Stopped
        now = time.monotonic()
        if now >= self._deadline:
            raise GroupBroken(f"{self._prefix}: not received in time")
        if now < self._next:
            return
        self._next = now + LOOK_S
        off = f"{self._prefix}/off"
        with store_errors(self._prefix):
            if self._store.check([off]):
                raise GroupBroken(f"{self._prefix}: called off: {self._store.get(off).decode()}")

    def until(self, key: str) -> None:
        """Return once the sender has set `key`. Raises as a call does."""
        pause_s = SHORTEST_S
        # Waits for: the key. Unblocked by: the sender. Ends: then, or with what the look raises.
        while True:
            with store_errors(self._prefix):
                if self._store.check([key]):
                    return
            self()
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.5, LONGEST_S)


class _Reception:
    """One version on its way in: a thread for each sender."""

    def __init__(self, offer: Offer, version: mmap.mmap, members: list[_Member], timeout_s: float) -> None:
        assert isinstance(offer.source, Group)
        self._plan = offer.plan
        self._prefix = f"{offer.source.name}/{offer.version}"
        self._version = version
        self._members = members
        self._stop = threading.Event()
        self._deadline = time.monotonic() + timeout_s

    async def run(self) -> list[int]:
        """The checksum of each bucket. Raises the first error of a thread. May be cancelled."""
        results: list[Future[dict[int, int]]] = []
        for member in self._members:
            results.append(Future())
            start_thread(functools.partial(self._thread, member, results[-1]), "asyncrl-collective")
        # Waits for: all threads, or the first error. Unblocked by: them, at their deadline at the latest, or the caller, who
        # cancels. A thread in the store's code may stay there while the learner's host stands still: nobody waits for it then.
        each = await asyncio.gather(*(asyncio.wrap_future(result) for result in results))
        sums = {index: value for found in each for index, value in found.items()}
        return [sums[bucket.index] for bucket in self._plan.buckets]

    def stop(self) -> None:
        """Nobody waits for it any more: leave the groups."""
        self._stop.set()
        for member in self._members:
            member.drop()

    def _thread(self, member: _Member, result: Future[dict[int, int]]) -> None:
        result.set_running_or_notify_cancel()
        try:
            result.set_result(self._receive(member))
        except BaseException as error:  # noqa: BLE001 - raised where the result is waited for
            result.set_exception(error)

    def _receive(self, member: _Member) -> dict[int, int]:
        """The buckets of one sender, to their places: index -> checksum, as the sender says."""
        store = member.store()
        look = _Look(store, self._prefix, self._stop, self._deadline)
        group = member.group(look)
        buckets = self._plan.of(member.sender)
        version = torch.frombuffer(self._version, dtype=torch.uint8)
        rooms = _Rooms(version, buckets, member.device)
        under_way: deque[tuple[Bucket, torch.Tensor, dist.Work]] = deque()
        for bucket in buckets:
            look.until(f"{self._prefix}/go/{bucket.index}")
            if bucket.size:
                room = rooms.of(bucket)
                under_way.append((bucket, room, group.broadcast(room)))
            if len(under_way) == 2:
                rooms.land(*under_way.popleft(), look)
        while under_way:
            rooms.land(*under_way.popleft(), look)
        look.until(f"{self._prefix}/sums")
        with store_errors(self._prefix):
            sums = store.get(f"{self._prefix}/sums").decode().split()
        return {bucket.index: int(each) for bucket, each in zip(buckets, sums, strict=True)}


class _Rooms:
    """Where buckets are received: at their place, if that is on the device and in one run; else in two buffers that take turns."""

    def __init__(self, version: torch.Tensor, buckets: Sequence[Bucket], device: torch.device) -> None:
        """`version`: its bytes on the host, uint8, [total_bytes]."""
        self._version = version
        self._device = device
        self._turn = 0
        elsewhere = [bucket.size for bucket in buckets if not self._is_direct(bucket)]
        self._buffers = [
            torch.empty(max(elsewhere, default=0), dtype=torch.uint8, device=device) for _ in range(2)
        ]

    def of(self, bucket: Bucket) -> torch.Tensor:
        """Room for the bytes of `bucket`, which no other bucket under way has: uint8, [bucket.size]."""
        if self._is_direct(bucket):
            (run,) = bucket.runs
            return self._version[run.offset : run.offset + run.size]
        self._turn += 1
        return self._buffers[self._turn % 2][: bucket.size]

    def land(self, bucket: Bucket, room: torch.Tensor, work: dist.Work, look: _Look) -> None:
        """Wait for what is received in `room`, and bring it to its place."""
        wait_for(work, look)
        if self._is_direct(bucket):
            return
        start = 0
        for run in bucket.runs:
            self._version[run.offset : run.offset + run.size].copy_(room[start : start + run.size])
            start += run.size

    def _is_direct(self, bucket: Bucket) -> bool:
        return self._device.type == "cpu" and len(bucket.runs) == 1
