"""Arenas: the allocator under random schedules, what attaching refuses, and that nothing outlives its users."""

import contextlib
import fcntl
import gc
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from asyncrl.buffer import arena as module
from asyncrl.buffer.arena import (
    ALIGNMENT_BYTES,
    HEADER_BYTES,
    Arena,
    ArenaLocation,
    ArenaRefused,
    AttachedArena,
    Region,
    Regions,
)
from asyncrl.buffer.errors import BadRequest, BufferFault

SIZE = 4096 + 17
CLIENT = """
import sys, msgspec
from asyncrl.buffer.arena import Arena
arena = Arena(1 << 20)
region = arena.allocate(100_000)
arena.view(region)[:] = b"x" * region.nbytes
print(msgspec.json.encode((arena.location, region)).decode(), flush=True)
sys.stdin.read()
"""


def padded(region):
    return -(-region.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class RegionsMachine(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.regions = Regions(SIZE)
        self.whole = self.regions.free
        self.held = []

    @rule(nbytes=st.one_of(st.integers(1, 300), st.integers(1, SIZE)))
    def allocate(self, nbytes):
        room = max((hole.nbytes for hole in self.regions.free), default=0)
        region = self.regions.allocate(nbytes)
        assert (region is None) == (padded(Region(0, nbytes)) > room)
        if region is not None:
            assert region.nbytes == nbytes and region.at % ALIGNMENT_BYTES == 0
            self.held.append(region)

    @rule(data=st.data())
    def release(self, data):
        if self.held:
            region = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.regions.release(region)
            with pytest.raises(BadRequest, match="is not taken"):
                self.regions.release(region)

    @invariant()
    def every_byte_is_in_one_place(self):
        parts = [(r.at, padded(r), "taken") for r in self.held]
        parts += [(r.at, r.nbytes, "free") for r in self.regions.free]
        at = HEADER_BYTES
        for start, nbytes, _ in sorted(parts):
            assert start == at
            at += nbytes
        assert at == HEADER_BYTES + self.regions.capacity_bytes
        assert sorted(self.regions.taken, key=lambda r: r.at) == sorted(self.held, key=lambda r: r.at)

    @invariant()
    def free_parts_are_sorted_and_merged(self):
        free = self.regions.free
        assert all(a.at + a.nbytes < b.at for a, b in itertools.pairwise(free))

    def teardown(self):
        for region in self.held:
            self.regions.release(region)
        assert self.regions.free == self.whole and len(self.whole) == 1


RegionsMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
TestRegions = RegionsMachine.TestCase


def test_the_first_hole_that_fits_is_taken():
    regions = Regions(64 + 640)
    a, b, c = (regions.allocate(n) for n in (128, 1, 64))
    assert [r.at for r in (a, b, c)] == [64, 192, 256]
    regions.release(a)
    assert regions.allocate(129).at == 320, "the first hole is too short"
    assert regions.allocate(64).at == 64
    assert regions.allocate(65).at == 512
    assert regions.allocate(65) is None, "64 bytes at the front and 64 at the end are free"


def test_a_region_that_can_never_fit_is_told_by_the_capacity():
    regions = Regions(SIZE)
    assert regions.capacity_bytes == 4032
    assert regions.allocate(4033) is None and regions.allocate(4032) is not None


@pytest.mark.parametrize("size_bytes", [0, 64, 127])
def test_an_arena_needs_room_behind_its_header(size_bytes):
    with pytest.raises(BadRequest, match="expected at least 128"):
        Arena(size_bytes)


@pytest.mark.parametrize("nbytes", [0, -1])
def test_a_region_has_bytes(nbytes):
    with pytest.raises(BadRequest, match="expected at least 1"):
        Regions(SIZE).allocate(nbytes)


def test_a_region_of_other_length_is_not_freed():
    regions = Regions(SIZE)
    region = regions.allocate(100)
    with pytest.raises(BadRequest, match="is not taken"):
        regions.release(Region(region.at, 50))


@pytest.fixture
def arena():
    with contextlib.closing(Arena(SIZE)) as made:
        yield made


def sent(value):
    """What arrives on the other side of a socket."""
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value), type=type(value))


def mappings():
    return [
        line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:asyncrl-arena" in line
    ]


def open_files():
    return len(os.listdir("/proc/self/fd"))


def test_both_sides_see_the_same_bytes(arena):
    attached = AttachedArena(sent(arena.location))
    for side, other in ((arena, attached), (attached, arena)):
        region = arena.allocate(100)
        side.view(sent(region))[:] = bytes(range(100))
        assert bytes(other.view(region)) == bytes(range(100))
        arena.free(region)
    attached.close()


def test_an_arena_cannot_change_its_size_or_its_seals(arena):
    for size in (0, SIZE - 1, SIZE + 1):
        with pytest.raises(PermissionError):
            os.ftruncate(arena.location.fd, size)
    with pytest.raises(PermissionError):
        fcntl.fcntl(arena.location.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_memory_is_used_only_where_it_was_touched():
    with contextlib.closing(Arena(1 << 34)) as large:
        used = os.fstat(large.location.fd).st_blocks * 512
        assert used <= 1 << 21, "the page of the header"
        region = large.allocate(1 << 33)
        large.view(region)[:5] = b"start"
        assert os.fstat(large.location.fd).st_blocks * 512 <= used + (1 << 21)


@pytest.mark.parametrize("side", ["client", "service"])
@pytest.mark.parametrize(
    "region",
    [
        Region(0, 10),
        Region(63, 10),
        Region(-64, 10),
        Region(64, -1),
        Region(64, SIZE - 63),
        Region(SIZE + 1, 0),
    ],
)
def test_views_stay_within_the_arena(arena, side, region):
    where = arena if side == "client" else AttachedArena(arena.location)
    with pytest.raises(BadRequest, match="between the arena's header and its end"):
        where.view(region)
    assert len(where.view(Region(64, SIZE - 64))) == SIZE - 64


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"boot_id": "00000000-0000-0000-0000-000000000000"}, "on another host"),
        ({"size_bytes": SIZE - 1}, f"expected {SIZE - 1} bytes, got {SIZE}"),
        ({"token": 0}, "token is another"),
        ({"token": -1}, "token is another"),
        ({"token": 1 << 64}, "token is another"),
        ({"fd": 1_000_000}, "cannot be opened"),
        ({"pid": 1 << 30}, "cannot be opened"),
    ],
)
def test_what_is_not_the_location_is_refused(arena, changes, reason):
    location = msgspec.structs.replace(arena.location, **changes)
    before = open_files()
    with pytest.raises(ArenaRefused, match=reason) as caught:
        AttachedArena(location)
    assert isinstance(caught.value, BufferFault)
    assert open_files() == before


def test_another_arena_behind_the_same_numbers_is_refused():
    first = Arena(SIZE)
    old = first.location
    first.close()
    with contextlib.closing(Arena(SIZE)) as second:
        assert (second.location.pid, second.location.fd) == (old.pid, old.fd)
        with pytest.raises(ArenaRefused, match="token is another"):
            AttachedArena(old)


def test_memory_of_another_user_is_refused(arena, monkeypatch):
    monkeypatch.setattr(module.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ArenaRefused, match="expected it to belong to user"):
        AttachedArena(arena.location)


def files_that_are_no_arena(tmp_path):
    unsealed = os.memfd_create("unsealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, SIZE)
    grown = os.memfd_create("only-growing-sealed", os.MFD_ALLOW_SEALING)
    os.ftruncate(grown, SIZE)
    fcntl.fcntl(grown, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW)
    (tmp_path / "file").write_bytes(bytes(SIZE))
    os.mkfifo(tmp_path / "fifo")
    return {
        "unsealed": unsealed,
        "grow_only": grown,
        "file": os.open(tmp_path / "file", os.O_RDWR),
        "fifo": os.open(tmp_path / "fifo", os.O_RDWR),
    }


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["unsealed", "grow_only", "file", "fifo"])
def test_files_that_can_shrink_are_refused(arena, tmp_path, kind):
    descriptors = files_that_are_no_arena(tmp_path)
    try:
        with pytest.raises(ArenaRefused, match="sealed"):
            AttachedArena(msgspec.structs.replace(arena.location, fd=descriptors[kind]))
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


@pytest.mark.parametrize(
    "changes", [{"pid": 0}, {"pid": -1}, {"fd": -1}, {"size_bytes": 64}, {"token": "x"}, {"more": 1}]
)
def test_an_impossible_location_is_not_decoded(arena, changes):
    body = msgspec.msgpack.encode(msgspec.to_builtins(arena.location) | changes)
    with pytest.raises(msgspec.ValidationError):
        msgspec.msgpack.decode(body, type=ArenaLocation)


def test_closing_leaves_views_alone_and_the_last_view_unmaps():
    gc.collect()
    mapped, files = len(mappings()), open_files()
    client = Arena(SIZE)
    service = AttachedArena(client.location)
    region = client.allocate(100)
    view = service.view(region)
    view[:] = b"y" * 100
    part = view[10:20]
    del view
    for _ in range(2):
        client.close()
        service.close()
    assert bytes(part) == b"y" * 10
    assert len(mappings()) == mapped + 1, "the client's mapping is gone, the service's has a view"
    del part
    assert len(mappings()) == mapped and open_files() == files
    with pytest.raises(BadRequest, match="closed"):
        service.view(region)


def test_a_killed_client_leaves_its_views_and_nothing_else():
    mapped = len(mappings())
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", CLIENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        location, region = msgspec.json.decode(child.stdout.readline(), type=tuple[ArenaLocation, Region])
        assert location.pid == child.pid
        name = os.readlink(f"/proc/{child.pid}/fd/{location.fd}")
        assert name == "/memfd:asyncrl-arena (deleted)", "no name that could be left over"
        assert "/dev/shm" not in Path(f"/proc/{child.pid}/maps").read_text()
        service = AttachedArena(location)
        view = service.view(region)
        child.send_signal(signal.SIGKILL)
        assert child.wait(timeout=30) == -signal.SIGKILL
    finally:
        child.kill()
        child.communicate(timeout=30)
    assert bytes(view) == b"x" * 100_000
    view[:3] = b"abc"
    assert bytes(service.view(region)[:4]) == b"abcx"
    with pytest.raises(ArenaRefused, match="cannot be opened"):
        AttachedArena(location)
    assert len(mappings()) == mapped + 1
    del view
    service.close()
    assert len(mappings()) == mapped


def test_a_child_process_does_not_inherit_the_arena(arena):
    program = (
        "import os\n"
        "paths = [f'/proc/self/fd/{name}' for name in os.listdir('/proc/self/fd')]\n"
        "print([os.readlink(path) for path in paths if os.path.lexists(path)])"
    )
    other = os.memfd_create("inherited", 0)
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            close_fds=False,
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    finally:
        os.close(other)
    # `other` was not opened with CLOEXEC: it shows that the test would see the arena.
    assert "memfd:asyncrl-arena" in os.readlink(f"/proc/self/fd/{arena.location.fd}")
    assert "memfd:inherited" in done.stdout and "memfd:asyncrl-arena" not in done.stdout
