"""Memory that a client of the buffer owns and the buffer's process maps: bodies lie there, sockets carry headers only.

An arena is a memfd: it has no name, uses no page before the page is touched, and vanishes with the last process that
maps it, however that process ended. The client decides which part holds what (`Regions`); the service only looks at,
or writes to, the regions that a request names.

Invariants
----------
- An arena cannot change its size (it is sealed), so no access within it can raise SIGBUS because of the other side.
- `AttachedArena` maps only memory of our own user that carries the token of its location: a number of a process or of
  a file descriptor that means something else by now, here or on another host, is refused.
- Regions never overlap each other or the header, and start at multiples of 64 bytes, as Arrow likes them.
- A mapping lives until the last view of it is gone; `close` ends only the right to make new views.
- The client can write into a region at any time: the service must not rely on bytes that it checked but did not copy,
  other than as far as it trusts the client.

Nothing here is locked: one arena belongs to one thread. Callers: `client.py` owns arenas, `service.py` attaches them.
"""

from __future__ import annotations

import bisect
import fcntl
import mmap
import os
import secrets
from pathlib import Path
from typing import Annotated, Final

import msgspec

from asyncrl.buffer.errors import BadRequest, BufferFault

ALIGNMENT_BYTES: Final = 64
HEADER_BYTES: Final = 64
_TOKEN_BYTES: Final = 8
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
_NonNegative = Annotated[int, msgspec.Meta(ge=0)]


class ArenaRefused(BufferFault):
    """A location that cannot be attached, or is not what it says; the message names the reason."""


class Region(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A part of an arena."""

    at: _NonNegative
    """Bytes from the arena's start, its header included."""
    nbytes: _NonNegative


class ArenaLocation(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Where another process of this host finds an arena."""

    pid: Annotated[int, msgspec.Meta(ge=1)]
    fd: _NonNegative
    size_bytes: Annotated[int, msgspec.Meta(gt=HEADER_BYTES)]
    token: int
    """Random; also the arena's first 8 bytes."""
    boot_id: str


class Regions:
    """Who has which part of `size_bytes` bytes after a header: first fit over a sorted free list. Pure."""

    def __init__(self, size_bytes: int) -> None:
        usable = (size_bytes - HEADER_BYTES) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        if usable <= 0:
            raise BadRequest(
                f"an arena of {size_bytes} bytes: expected at least {HEADER_BYTES + ALIGNMENT_BYTES}, "
                "as a header comes first"
            )
        self.capacity_bytes: Final = usable
        """The longest region that there can be. What is longer will never fit, however long one waits."""
        self._free = [Region(HEADER_BYTES, usable)]
        self._taken: dict[int, Region] = {}

    @property
    def free(self) -> list[Region]:
        """In order, and never two that touch."""
        return list(self._free)

    @property
    def taken(self) -> list[Region]:
        return list(self._taken.values())

    def allocate(self, nbytes: int) -> Region | None:
        """None when no free part is long enough now."""
        if nbytes < 1:
            raise BadRequest(f"a region of {nbytes} bytes: expected at least 1")
        needed = _aligned(nbytes)
        for index, hole in enumerate(self._free):
            if hole.nbytes >= needed:
                rest = Region(hole.at + needed, hole.nbytes - needed)
                self._free[index : index + 1] = [rest] if rest.nbytes else []
                region = Region(hole.at, nbytes)
                self._taken[region.at] = region
                return region
        return None

    def release(self, region: Region) -> None:
        """Raises BadRequest for a region that is not taken: its bytes may be another's by now."""
        if self._taken.get(region.at) != region:
            raise BadRequest(
                f"{region} is not taken (taken at {region.at}: {self._taken.get(region.at)}): it was freed before, "
                "or belongs to another arena; free each region once, as it was allocated"
            )
        del self._taken[region.at]
        hole = Region(region.at, _aligned(region.nbytes))
        first = last = bisect.bisect(self._free, hole.at, key=lambda free: free.at)
        if first > 0 and _end(self._free[first - 1]) == hole.at:
            first -= 1
        if last < len(self._free) and _end(hole) == self._free[last].at:
            last += 1
        merged = [*self._free[first:last], hole]
        start = min(part.at for part in merged)
        self._free[first:last] = [Region(start, sum(part.nbytes for part in merged))]


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def _end(region: Region) -> int:
    return region.at + region.nbytes


class _Mapping:
    """Shared memory with views of it, for the two sides of an arena."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self._memory: mmap.mmap | None = mmap.mmap(descriptor, size_bytes)

    def view(self, region: Region) -> memoryview:
        """Writable; valid as long as it is held, also after `close`. Raises BadRequest outside of the arena."""
        if self._memory is None:
            raise BadRequest(f"{region} of an arena that was closed: no new views of it can be made")
        if region.at < HEADER_BYTES or region.nbytes < 0 or _end(region) > len(self._memory):
            raise BadRequest(
                f"{region} ends at {_end(region)}: expected it within bytes {HEADER_BYTES} to {len(self._memory)}, "
                "between the arena's header and its end"
            )
        return memoryview(self._memory)[region.at : _end(region)]

    def close(self) -> None:
        """Views that are still held stay valid. Twice is harmless."""
        # mmap.close() would raise BufferError while there are views; the last of them unmaps as it goes.
        self._memory = None


class Arena(_Mapping):
    """The client's side: makes the memory and says which part is whose."""

    def __init__(self, size_bytes: int) -> None:
        self._regions = Regions(size_bytes)
        self._descriptor: int | None = os.memfd_create("asyncrl-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            token = secrets.token_bytes(_TOKEN_BYTES)
            os.ftruncate(self._descriptor, size_bytes)
            os.pwrite(self._descriptor, token, 0)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
            fcntl.fcntl(self._descriptor, fcntl.F_ADD_SEALS, seals)
            super().__init__(self._descriptor, size_bytes)
            self.location: Final = ArenaLocation(
                pid=os.getpid(),
                fd=self._descriptor,
                size_bytes=size_bytes,
                token=int.from_bytes(token, "little"),
                boot_id=boot_id(),
            )
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def capacity_bytes(self) -> int:
        """The longest region that fits into the empty arena."""
        return self._regions.capacity_bytes

    def allocate(self, nbytes: int) -> Region | None:
        """None when there is no room now; for more than `capacity_bytes` there never will be."""
        return self._regions.allocate(nbytes)

    def free(self, region: Region) -> None:
        """The region's bytes may be another's from now on: free it when nobody reads a view of it any more."""
        self._regions.release(region)

    def close(self) -> None:
        super().close()
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class AttachedArena(_Mapping):
    """The service's side: maps a client's arena after it has proved to be the one that its location means."""

    def __init__(self, location: ArenaLocation) -> None:
        """Raises ArenaRefused."""
        self.location: Final = location
        here = boot_id()
        if location.boot_id != here:
            raise _refused(
                location, f"it is on another host: expected boot id {here}, got {location.boot_id}"
            )
        try:
            # Not blocking: the number may mean a pipe or a terminal by now.
            flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
            descriptor = os.open(f"/proc/{location.pid}/fd/{location.fd}", flags)
        except OSError as error:
            raise _refused(location, f"it cannot be opened ({error.strerror})") from error
        try:
            _check(location, descriptor)
            super().__init__(descriptor, location.size_bytes)
        except OSError as error:
            raise _refused(location, f"it cannot be mapped ({error.strerror})") from error
        finally:
            os.close(descriptor)


def _check(location: ArenaLocation, descriptor: int) -> None:
    """Raises ArenaRefused unless the open file is the arena of the location."""
    try:
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
    except OSError as error:
        raise _refused(
            location, f"expected a sealed memfd, got a file without seals ({error.strerror})"
        ) from error
    # Before the size, which is only then the size for good.
    if not seals & fcntl.F_SEAL_SHRINK:
        raise _refused(location, f"expected it sealed against shrinking, got seals {seals:#x}")
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        raise _refused(location, f"expected it to belong to user {os.geteuid()}, got {status.st_uid}")
    if status.st_size != location.size_bytes:
        raise _refused(location, f"expected {location.size_bytes} bytes, got {status.st_size}")
    token = int.from_bytes(os.pread(descriptor, _TOKEN_BYTES, 0), "little")
    if token != location.token:
        raise _refused(
            location, "its token is another: the process or descriptor number means something else here"
        )


def _refused(location: ArenaLocation, reason: str) -> ArenaRefused:
    return ArenaRefused(
        f"the arena at descriptor {location.fd} of process {location.pid} ({location.size_bytes} bytes): {reason}. "
        "Client and buffer must be live processes of one user, host and pid namespace; from elsewhere, bodies have to "
        "go through the socket."
    )


def boot_id() -> str:
    """Of this host, since it was started."""
    return _BOOT_ID.read_text().strip()
