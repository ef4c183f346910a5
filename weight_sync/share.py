"""The part of a pulled publisher on learner ranks above 0, where every rank writes its own share (`plan.senders`): into the file
of rank 0's version, on its host, each rank at its own places.

    rank 0   Publisher.begin --where--> ShareWriter.begin       (Ranks.share)
    each     write its own buckets
    rank 0   Publisher.commit <--checksums-- ShareWriter.commit  (Ranks.collect)

Invariants
----------
- No two ranks write one byte, and nobody writes after its `commit` or `abandon`.
- `begin` and `commit` are collectives that no rank leaves out, whatever went wrong before: an error of one is raised by all.
- Whether engines take the version is rank 0's matter alone.
Called by the learner as a publisher is, from one thread at a time; rank 0's half is called by `publisher`.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec
import torch

from asyncrl.weight_sync.errors import SharedMemoryError, WeightSyncError
from asyncrl.weight_sync.pieces import put_summed
from asyncrl.weight_sync.plan import Bucket, Plan
from asyncrl.weight_sync.ranks import Ranks
from asyncrl.weight_sync.shm import FOLDER


class Begun(msgspec.Struct, frozen=True, kw_only=True):
    """From rank 0: where a version is written."""

    version: int
    path: str = ""
    host: str = ""
    """Of rank 0 (`hosts.this_host`)."""
    error: str = ""
    """Why it is not; empty if it is."""


class Written(msgspec.Struct, frozen=True, kw_only=True):
    """From each rank: what it wrote."""

    checksums: dict[int, int] = {}
    """Bucket -> its checksum."""
    error: str = ""
    """Why it is not all of its share; empty if it is."""


_encode: Final = msgspec.msgpack.Encoder().encode
_decode_begun: Final = msgspec.msgpack.Decoder(Begun).decode
_decode_written: Final = msgspec.msgpack.Decoder(Written).decode


def tell(ranks: Ranks, begun: Begun) -> None:
    """Rank 0's half of `begin`. A collective."""
    ranks.share(_encode(begun))


def gather_checksums(ranks: Ranks, version: int, written: Written) -> dict[int, int]:
    """Every rank's half of `commit`: the checksums of all buckets. A collective. Raises `WeightSyncError` if a rank did not write
    its share."""
    answers = [_decode_written(each) for each in ranks.collect(_encode(written))]
    errors = [f"learner rank {rank}: {each.error}" for rank, each in enumerate(answers) if each.error]
    if errors:
        raise WeightSyncError(f"version {version} is not complete. " + "; ".join(errors))
    return {bucket: checksum for each in answers for bucket, checksum in each.checksums.items()}


class ShareWriter:
    """Of one rank above 0."""

    def __init__(self, plan: Plan, ranks: Ranks, host: str) -> None:
        """`host`: this process's (`hosts.this_host`)."""
        self._plan, self._ranks, self._host = plan, ranks, host
        self._own = plan.of(ranks.rank)
        self._mapped: dict[str, _Mapped] = {}
        """By path: the files take turns, so each is mapped once."""
        self._version: int | None = None
        self._bytes: torch.Tensor | None = None
        """Of the version that is begun."""
        self._checksums: dict[int, int] = {}

    def begin(self, version: int) -> None:
        """See `Publisher.begin`. A collective. Raises `WeightSyncError` if rank 0 could not begin, or its file cannot be written
        from here."""
        self.abandon()
        begun = _decode_begun(self._ranks.share(b""))
        if begun.error:
            raise WeightSyncError(
                f"version {begun.version}: learner rank 0 could not begin it: {begun.error}"
            )
        if begun.version != version:
            raise WeightSyncError(f"expected version {version} to begin, learner rank 0 has {begun.version}")
        if begun.host != self._host:
            raise SharedMemoryError(
                f"version {version}: learner rank {self._ranks.rank} runs on {self._host}, rank 0 on {begun.host}: expected one "
                'host with one /dev/shm for weight_sync.senders = "all"; set it to "one", or transport to "collective"'
            )
        self._version, self._bytes, self._checksums = version, self._map(Path(begun.path)).bytes, {}

    def write(self, bucket: Bucket, pieces: Sequence[torch.Tensor]) -> None:
        """See `Publisher.write`; `bucket` is one of this rank's, in the plan's order."""
        if self._bytes is None:
            raise WeightSyncError("write: no version is begun; call begin(version) first")
        index = len(self._checksums)
        if index == len(self._own) or bucket != self._own[index]:
            raise WeightSyncError(
                f"version {self._version}: bucket {bucket.index} out of order, expected bucket {index} of {len(self._own)} that "
                f"rank {self._ranks.rank} writes"
            )
        self._checksums[bucket.index] = put_summed(self._bytes, self._plan, bucket, pieces)

    def abandon(self) -> None:
        """Forget a version that is begun and not committed."""
        self._version = self._bytes = None

    def commit(self, probe: object = None) -> None:
        """Hand rank 0 what was written. A collective. Raises `WeightSyncError`, on every rank, if one did not write its share."""
        version, missing = self._version, len(self._own) - len(self._checksums)
        error = ""
        if self._bytes is None:
            error = "no version is begun"
        elif missing:
            error = f"expected {len(self._own)} buckets, {missing} of them are not written"
        self.abandon()
        gather_checksums(
            self._ranks, -1 if version is None else version, Written(checksums=self._checksums, error=error)
        )

    def close(self) -> None:
        """Let go of rank 0's files. May be called twice."""
        self.abandon()
        while self._mapped:
            self._mapped.popitem()[1].close()

    def _map(self, path: Path) -> _Mapped:
        known = self._mapped.get(str(path))
        if known is not None and known.leads_there():
            return known
        if known is not None:
            del self._mapped[str(path)]
            known.close()
        self._mapped[str(path)] = _Mapped(path, self._plan)
        return self._mapped[str(path)]


class _Mapped:
    """Rank 0's file, mapped for writing."""

    def __init__(self, path: Path, plan: Plan) -> None:
        if path.parent != FOLDER:
            raise SharedMemoryError(f"{path}: expected a file in {FOLDER} to write a share into")
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise SharedMemoryError(f"{path} of learner rank 0 cannot be opened: {error.strerror}") from error
        try:
            found = os.fstat(descriptor)
            if found.st_size < plan.total_bytes:
                raise SharedMemoryError(
                    f"{path} has {found.st_size} bytes, expected at least {plan.total_bytes} by the plan"
                )
            self._map = mmap.mmap(descriptor, plan.total_bytes)
        finally:
            os.close(descriptor)
        self._path, self._inode = path, found.st_ino
        self.bytes = torch.frombuffer(self._map, dtype=torch.uint8)

    def leads_there(self) -> bool:
        """Whether the path is this file still: rank 0 replaces one that engines may read for long."""
        try:
            return self._path.stat().st_ino == self._inode
        except FileNotFoundError:
            return False

    def close(self) -> None:
        # The tensor exports the mapping's buffer, which cannot be closed before the tensor is gone.
        self.bytes = torch.empty(0, dtype=torch.uint8)
        self._map.close()
