"""One learner rank's side of the `collective` transport: packs its buckets and broadcasts them to all engines, through two
buffers that take turns.

    caller:  pack 0 | start 0 | pack 1 | start 1 | wait for 0, pack 2 | start 2 | ...
    group:            [--- broadcast 0 ---][--- broadcast 1 ---]  ...

What an engine cannot know from its offer goes through this rank's store, under `NAME/VERSION/`: `go/BUCKET` when a broadcast
starts, so that no engine waits for one in torch's code while the learner gathers; `sums`, the checksums, once all are sent and the
learner commits; `off`, why the transfer was called off.

Invariants
----------
- At most two buckets are under way, and there are two buffers of a bucket's size, from the first bucket of a version to its end.
- A group is used again only if its last version was sent and settled well; else it is dropped, with the buffers in use.
- After `GroupBroken` nothing more is sent of this version.
Imports torch. Called by the collective publisher on rank 0 and by `CollectiveShare` on the others, from one thread at a time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final

import torch
import torch.distributed as dist
import xxhash
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from asyncrl.weight_sync.collective_words import Stream
from asyncrl.weight_sync.errors import GroupBroken, WeightSyncError
from asyncrl.weight_sync.pieces import put_at
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.process_group import PeerGroup, connect_store, serve_store, wait_for
from asyncrl.weight_sync.torch_threads import start_thread

SLOWEST: Final = 20e6
"""Bytes per second. A bucket that travels slower than this is taken for stuck."""
GRACE_S: Final = 10.0
"""Beyond that."""

Look = Callable[[], None]


def read_off(store: Store, stream: Stream) -> str:
    """Why a version was called off at this store; empty: it was not."""
    key = f"{stream.prefix}/off"
    return store.get(key).decode() if store.check([key]) else ""


def group_timeout_s(plan: Plan, timeout_s: float) -> float:
    """How long a broadcast of one bucket may take, of `timeout_s` for all."""
    largest = max((bucket.size for bucket in plan.buckets), default=0)
    # Two may share the way.
    return min(timeout_s, GRACE_S + 2 * largest / SLOWEST)


class CollectiveSender:
    """Sends the buckets of rank `sender`."""

    def __init__(self, plan: Plan, sender: int, host: str, device: torch.device, timeout_s: float) -> None:
        """Serves a store on a free port of `host`, which engines reach. `timeout_s`: of a whole sync."""
        self.checksums: list[int] = []
        """Of the buckets that were sent of the present version."""
        self._plan = plan
        self._sender = sender
        self._host = host
        self._device = device
        self._timeout_s = group_timeout_s(plan, timeout_s)
        self._store, self.address = serve_store(host)
        self._group: PeerGroup | None = None
        self._making: _Making | None = None
        self._stream: Stream | None = None
        self._buffers: list[_Buffer] = []

    def called_off(self) -> str:
        """Why the present version was called off at this store, by whichever rank; empty: it was not."""
        return read_off(self._store, self._begun())

    def begin(self, stream: Stream) -> None:
        """A version is to be sent. Starts to make the group, if it is not there; never blocks."""
        self._stream = stream
        self.checksums = []
        if not stream.made:
            self._leave_group()
            self._forget_old_keys(stream)
            self._making = _Making(
                self._store, self.address, stream, self._device, self._timeout_s, self._host
            )
        largest = max((bucket.size for bucket in self._plan.of(self._sender)), default=0)
        self._buffers = [_Buffer(largest, self._device) for _ in range(2)]

    def send(self, bucket: Bucket, pieces: Sequence[torch.Tensor], look: Look) -> None:
        """Start to broadcast `bucket`: a flat tensor for each of its pieces, from any device, which may be given up on return.

        Waits for the broadcast of two buckets before. `look` is called meanwhile; what it raises ends the wait. Raises `GroupBroken`,
        or `WeightSyncError` for pieces that do not fit the plan.
        """
        stream = self._begun()
        buffer = self._buffers[len(self.checksums) % 2]
        self._settle(buffer, look)
        buffer.pack(self._plan, bucket, pieces)
        group = self._connected(look)
        buffer.start(group, bucket.size)
        self._store.set(f"{stream.prefix}/go/{bucket.index}", "1")
        # While it travels.
        self.checksums.append(buffer.checksum())

    def drain(self, look: Look) -> None:
        """Wait until all is sent. `look`, errors: as in `send`."""
        self._begun()
        self._connected(look)
        for buffer in self._buffers:
            self._settle(buffer, look)

    def tell_checksums(self) -> None:
        """The version is complete: engines may go on to verify it."""
        stream = self._begun()
        self._store.set(f"{stream.prefix}/sums", " ".join(map(str, self.checksums)))

    def call_off(self, reason: str) -> None:
        """Tell the engines that this version does not come, and drop the group. Never blocks."""
        if self._stream is not None:
            self._store.set(f"{self._stream.prefix}/off", reason)
        self._leave_group()
        self._buffers, self.checksums = [], []

    def end(self) -> None:
        """The version is settled; the group stays for the next one."""
        stream, self._stream = self._stream, None
        self._buffers, self.checksums = [], []
        if stream is None:
            return
        for key in self._keys(stream.prefix):
            self._store.delete_key(key)

    def close(self) -> None:
        """Leave the group. May be called twice. The store ends with this object."""
        self.call_off("the learner ends")
        self._stream = None

    def _begun(self) -> Stream:
        if self._stream is None:
            raise WeightSyncError("a bucket to send: expected a version that is begun")
        return self._stream

    def _connected(self, look: Look) -> PeerGroup:
        """The group, once every engine is in it."""
        if self._making is not None:
            self._group = self._making.wait(look)
            self._making = None
        if self._group is None:
            raise GroupBroken("the transfer was called off")
        return self._group

    def _settle(self, buffer: _Buffer, look: Look) -> None:
        if buffer.work is not None:
            wait_for(buffer.work, look)
            buffer.work = None

    def _leave_group(self) -> None:
        if self._making is not None:
            self._making.give_up()
            self._making = None
        if self._group is not None:
            self._group.drop()
            self._group = None

    def _forget_old_keys(self, stream: Stream) -> None:
        for key in self._keys(""):
            if not key.startswith(f"{stream.name}/"):
                self._store.delete_key(key)

    def _keys(self, prefix: str) -> Iterator[str]:
        # torch puts a slash of its own before each key that it keeps.
        return (
            key.removeprefix("/")
            for key in self._store.list_keys()
            if key.removeprefix("/").startswith(prefix)
        )


class _Making:
    """A group on its way: first the engines come, then it is made, in a thread, over a connection to the store of its own: one on
    which a rank is waited for answers nothing else."""

    def __init__(
        self,
        store: TCPStore,
        address: str,
        stream: Stream,
        device: torch.device,
        timeout_s: float,
        host: str,
    ) -> None:
        """`address`: of `store`."""
        self._store = store
        self._address = address
        self._stream = stream
        self._arguments = (device, timeout_s, host)
        self._made: PeerGroup | None = None
        self._error: BaseException | None = None
        self._given_up = False
        self._lock = threading.Lock()

    def wait(self, look: Look) -> PeerGroup:
        """The group. Raises `GroupBroken`, or what `look` raises, which is called again and again."""
        name = self._stream.name
        here = [f"{name}/here/{rank}" for rank in range(1, self._stream.size)]
        # Waits for: engines to come. Unblocked by: them. Ends: when all have, or with what `look` raises.
        while not self._store.check(here):
            look()
            time.sleep(1e-3)
        self._store.set(f"{name}/go", "1")
        thread = start_thread(self._make, "asyncrl-group")
        # Waits for: connections. Unblocked by: engines, or the group's timeout. Ends: then, or with what `look` raises.
        while thread.is_alive():
            look()
            thread.join(1e-3)
        if self._made is None:
            raise GroupBroken(f"group {name} was not made: {self._error}") from self._error
        return self._made

    def give_up(self) -> None:
        """If it is made all the same, nobody wants it."""
        with self._lock:
            self._given_up = True
            if self._made is not None:
                self._made.drop()

    def _make(self) -> None:
        stream = self._stream
        try:
            store = connect_store(self._address)
            made = PeerGroup(store, stream.name, 0, stream.size, *self._arguments)
        except GroupBroken as error:
            self._error = error
            return
        with self._lock:
            self._made = made
            if self._given_up:
                made.drop()


class _Buffer:
    """Room for one bucket as it travels: the bytes of its runs, one after the other."""

    def __init__(self, size: int, device: torch.device) -> None:
        """`size` in bytes."""
        self.work: dist.Work | None = None
        self._bytes = torch.empty(size, dtype=torch.uint8, device=device)
        self._host = (
            torch.empty(size, dtype=torch.uint8, pin_memory=True) if device.type == "cuda" else self._bytes
        )
        self._size = 0

    def pack(self, plan: Plan, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
        """Copy `pieces` in, cast to the wire dtype. Raises `WeightSyncError` for what does not fit."""
        if len(pieces) != len(bucket.pieces):
            raise WeightSyncError(
                f"bucket {bucket.index}: expected {len(bucket.pieces)} pieces, got {len(pieces)}"
            )
        self._size = bucket.size
        end = 0
        for piece, start, values in zip(bucket.pieces, bucket.places, pieces, strict=True):
            self._bytes[end:start].zero_()
            put_at(self._bytes, start, plan, piece, values)
            end = start + piece.size

    def start(self, group: PeerGroup, size: int) -> None:
        if size:
            self.work = group.broadcast(self._bytes[:size])

    def checksum(self) -> int:
        """Of what was packed. Of device memory, of a copy that is made while it travels."""
        if self._host is not self._bytes:
            self._host[: self._size].copy_(self._bytes[: self._size])
        packed: memoryview = self._host[: self._size].numpy().data
        return xxhash.xxh3_64_intdigest(packed)
