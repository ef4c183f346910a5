"""A disk that fills up: nothing acknowledged is lost, the process lives and says what is wrong, and with room again
everything goes on by itself. The log lies on a tmpfs of a few MiB, where a filler file takes and gives back the room."""

import asyncio
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from asyncrl.buffer import BlockingBufferClient, BufferClient, PromptRow, connection, shard, wire
from asyncrl.buffer.columns import slices
from asyncrl.buffer.errors import DiskFull
from tests.buffer_world import (
    RawClient,
    accounts,
    check_order,
    check_rows,
    generate,
    goes_round,
    logged_rollouts,
    part,
    process_buffer,
    score,
    small_disk,
    tokens_of,
    until,
)
from tests.buffers import admit_all, buffer_service

DISK_BYTES = 8 * 2**20
PIECE, PIECES = 2500, 12
"""Tokens of one append (20 KB), appends of one rollout."""
PAGE = 4096
_INSIDE = "ASYNCRL_TEST_MAY_MOUNT"


@pytest.fixture
def disk(tmp_path, request):
    """A mounted tmpfs. Who may not mount runs the test once more in a user namespace of its own, where one may."""
    with small_disk(tmp_path / "small" / "rollouts", DISK_BYTES) as reason:
        if reason is None:
            yield Disk(tmp_path / "small" / "rollouts")
            return
    _run_inside(request.node.nodeid, reason)


def _run_inside(nodeid, reason):
    if os.environ.get(_INSIDE) or shutil.which("unshare") is None:
        pytest.skip(reason)
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip(f"{reason}; nor can a user namespace be made (unshare -rm)")
    done = subprocess.run(
        ["unshare", "-rm", sys.executable, "-m", "pytest", "-q", "-rs", nodeid],
        cwd=Path(__file__).resolve().parents[2],
        env={**os.environ, _INSIDE: "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    ended = "passed" if " passed" in done.stdout else "was skipped"
    pytest.skip(f"it {ended} in a user namespace of its own, as here {reason}")


class Disk:
    def __init__(self, folder):
        self.folder = folder
        self._filler = folder / "filler"

    @property
    def free_bytes(self):
        found = os.statvfs(self.folder)
        return found.f_bavail * found.f_frsize

    def fill(self, leave_bytes=0):
        """Takes all room but so much."""
        with self._filler.open("ab") as file:
            while (size := min(2**20, self.free_bytes - leave_bytes)) > 0:
                file.write(bytes(size))
                file.flush()

    def empty(self):
        self._filler.unlink()


@pytest.fixture(autouse=True)
def _soon(monkeypatch):
    monkeypatch.setattr(connection, "_ASK_AGAIN_S", 0.3)
    monkeypatch.setattr(connection, "_ASK_WAITING_S", 0.2)
    monkeypatch.setattr(connection, "_DISK_FULL_PAUSE_S", 0.1)


class Appender:
    """An engine in a thread that appends piece after piece, and notes what was acknowledged."""

    def __init__(self, buffer, pieces=PIECES):
        self.buffer, self.pieces = buffer, pieces
        self.acknowledged = {}
        self.failure = None
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    @property
    def total(self):
        return sum(self.acknowledged.values())

    def join(self, timeout_s=60):
        self._thread.join(timeout_s)
        assert not self._thread.is_alive() and self.failure is None, self.failure

    def _run(self):
        try:
            asyncio.run(self._work())
        except BaseException as problem:
            self.failure = problem
            raise

    async def _work(self):
        async with BufferClient(self.buffer.address) as client:
            await admit_all(client, 100)
            leases = await client.lease("e", 1000, 5.0)
            for index in range(self.pieces):
                reason = "stop" if index == self.pieces - 1 else ""
                for lease in leases:
                    piece = part(lease.rollout_id, lease.lease_id, index * PIECE, PIECE, 0, reason)
                    assert await client.append("e", [piece]) == []
                    self.acknowledged[lease.rollout_id] = (index + 1) * PIECE
                    await asyncio.sleep(0.01)
            for lease in leases:
                await score(client, lease)


def _says_disk_full(client):
    return client.status().disk_full


def _check_log(folder, acknowledged):
    logged = logged_rollouts(folder)
    for rollout_id, count in acknowledged.items():
        assert logged[rollout_id]["tokens_count"] >= count
        tokens = tokens_of(rollout_id, logged[rollout_id]["tokens_count"])
        assert np.array_equal(logged[rollout_id]["tokens"], tokens)


@pytest.mark.parametrize("killed", [False, True], ids=["lives", "killed-while-full"])
@pytest.mark.parametrize("durability", ["os", "fsync"])
def test_a_disk_that_fills_up_in_the_midst_of_appends(tmp_path, disk, durability, killed):
    with process_buffer(tmp_path, log_folder=disk.folder, bound=1, durability=durability) as buffer:
        buffer.client.publish(0)
        appender = Appender(buffer)
        until(lambda: appender.total >= 20 * PIECE, 20, "appends")
        disk.fill(leave_bytes=40 * 1024)
        full = until(lambda: _says_disk_full(buffer.client), 20, "the disk is full")
        assert str(disk.folder) in full and "no room" in full and "nothing is lost" in full
        time.sleep(0.5)
        stands_at = appender.total
        time.sleep(1.0)
        assert appender.total == stands_at  # nothing is acknowledged that is not written
        assert buffer.said().count("no room for the log") == 1  # said once, not in every round
        _refused_by_name(buffer)
        _check_log(disk.folder, appender.acknowledged)
        if killed:
            buffer.kill()
            buffer.start()
            assert buffer.client.status().counts.live > 0  # it starts on the full disk
        disk.empty()
        appender.join()
        until(lambda: not _says_disk_full(buffer.client), 10, "room again")
        trained = _read_all(buffer)
        assert set(trained) == set(appender.acknowledged)
        counts = buffer.stop()
        assert counts.holds and counts.trained == len(trained) == 8
        if not killed:
            assert "the log has room again" in buffer.said()
        _check_log(disk.folder, appender.acknowledged)
        check_order(disk.folder)


def _refused_by_name(buffer):
    """Changes are refused, what changes nothing is answered."""
    with RawClient(buffer.address.endpoints[0], buffer.client_keys) as client:
        for request in (
            wire.Publish(version=0),
            wire.Commit(batch_id=1, version=1),
            wire.Score(rollouts=[]),
            wire.Snapshot(step=1, keep=[]),
            wire.EngineLost(engine_id="x"),
            wire.Lease(engine_id="x", limit=1, after=0, timeout_s=0.1),
            wire.ReadBatch(after=0, timeout_s=0.1, from_files=True),
        ):
            answer = client.ask(request)
            assert isinstance(answer, wire.Problem) and answer.kind == DiskFull.__name__, (request, answer)
        assert client.ask(wire.Heartbeat(engine_id="e")) == wire.Number(value=0)
        assert client.ask(wire.Status()).disk_full


def _read_all(buffer):
    trained = []
    while found := buffer.client.read_batch(1.0):
        selection, rows = found
        for rollout_id, tokens in zip(rows["rollout_id"].to_pylist(), slices(rows["tokens"]), strict=True):
            assert np.array_equal(tokens, tokens_of(rollout_id, PIECE * PIECES))
            trained.append(rollout_id)
        assert buffer.client.commit(selection.batch_ids, selection.version + 1).holds
    assert len(set(trained)) == len(trained)
    return trained


def _open_files():
    return len(os.listdir("/proc/self/fd"))


def test_a_disk_that_is_full_when_the_next_file_begins(tmp_path, disk, monkeypatch, caplog):
    """With ever a page more of room, so that each write of a rotation is the one that fails."""
    monkeypatch.setattr(shard, "_ROTATE_AGAIN_S", 0.0)
    with buffer_service(tmp_path / "small", rotate_bytes=2**16) as (buffer, reader):
        reader.publish(0)

        async def grow():
            async with BufferClient(buffer.address) as client:
                await admit_all(client, 100)
                leases = await client.lease("e", 1000, 5.0)
                await _cycles(client, leases)

        async def _cycles(client, leases):
            opened = 0
            for pages in range(24):
                disk.fill(leave_bytes=pages * PAGE)
                last = len(leases) > 1 and pages == 23
                appends = asyncio.create_task(_append(client, leases[pages % 8], pages // 8, last))
                await asyncio.sleep(0.15)
                disk.empty()
                async with asyncio.timeout(20):
                    await appends
                if pages == 0:
                    opened = _open_files()
            assert _open_files() <= opened + 3, "files of rotations that failed are left open"

        asyncio.run(grow())
        assert any("next file waits" in record.getMessage() for record in caplog.records)
        assert reader.status().disk_full == ""
        state = (before := accounts(reader.status())).counts, before.states, before.version
        buffer.again()
        after = reader.status()
        assert (after.counts, after.states, after.version) == state and after.recovery.cut_bytes == 0
        assert after.recovery.live_tokens == 24 * 3 * 900

        async def finish():
            async with BufferClient(buffer.address) as client:
                await client.engine_lost("e")
                await generate(client, tokens=9 * 900)

        asyncio.run(finish())
        for version in (1, 2):
            selection, rows = reader.read_batch(5.0)
            for rollout_id, tokens in zip(
                rows["rollout_id"].to_pylist(), slices(rows["tokens"]), strict=True
            ):
                assert np.array_equal(tokens, tokens_of(rollout_id, 9 * 900))
            assert reader.commit(selection.batch_ids, version).trained == 4 * version
        assert len(list(buffer.log().glob("base-*"))) > 3
        goes_round(buffer)


async def _append(client, lease, turn, last):
    for piece in range(3):
        at = (turn * 3 + piece) * 900
        assert await client.append("e", [part(lease.rollout_id, lease.lease_id, at, 900)]) == []


def test_a_disk_that_is_full_at_a_snapshot(tmp_path, disk):
    """The earlier snapshot stays until the new one is there; asked again, the new one is made."""
    with buffer_service(tmp_path / "small", rotate_bytes=2**30) as (buffer, reader):
        reader.publish(0)
        goes_round(buffer)
        assert reader.snapshot(1).version == 1
        # The second batch, which was generated before, brings the version to 2.
        selection, _ = reader.read_batch(5.0)
        reader.commit(selection.batch_ids, 2)
        opened = 0
        with RawClient(buffer.address.endpoints[0], buffer.client_keys) as client:
            for pages in range(8):
                disk.fill(leave_bytes=0)
                with disk._filler.open("r+b") as file:
                    file.truncate(os.path.getsize(disk._filler) - pages * PAGE)
                before = accounts(client.ask(wire.Status()))
                answer = client.ask(wire.Snapshot(step=2, keep=[]))
                if isinstance(answer, wire.Snapshotted):
                    assert pages >= 4
                    break
                assert answer.kind == DiskFull.__name__ and "no room" in answer.message
                assert accounts(client.ask(wire.Status())) == before
                assert (buffer.log() / "snapshot-00000001.json").exists()
                opened = opened or _open_files()
                assert _open_files() <= opened + 1, "files of a snapshot that failed are left open"
                disk.empty()
            else:
                pages = None
        assert pages is not None, "no snapshot, however much room there was"
        disk.empty()
        goes_round(buffer)
        assert reader.snapshot(3, keep=(2,)).version == 3
        restored = reader.restore(2)
        assert restored.version == 2
        reader.publish(2)
        goes_round(buffer)
        assert sorted(p.name for p in buffer.log().glob("snapshot-*")) >= ["snapshot-00000002.json"]


def test_a_clients_wait_through_a_full_disk_ends_with_the_error_by_name(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(connection, "_DISK_FULL_S", 1.0)
    with buffer_service(tmp_path / "small") as (buffer, reader):
        reader.publish(0)
        disk.fill()

        async def admit():
            long = [
                PromptRow(prompt_id=f"long{i}", tokens=range(3000), payload="{}", position=i)
                for i in range(4)
            ]
            async with BufferClient(buffer.address) as client:
                await client.admit(0, long)

        other = BlockingBufferClient(buffer.address)
        # The first change is held until it is written; what comes after it is refused.
        held = threading.Thread(target=lambda: asyncio.run(admit()), daemon=True)
        held.start()
        until(lambda: _says_disk_full(reader), 10, "the disk is full")
        begun = time.monotonic()
        with pytest.raises(DiskFull, match="no room for the log"):
            other.commit((1,), 1)
        assert 0.9 < time.monotonic() - begun < 10
        other.close()
        disk.empty()
        held.join(20)
        until(lambda: reader.status().counts.admitted == 8, 10, "the admission is carried out")
        goes_round(buffer)


def test_a_disk_that_is_full_at_a_restore(tmp_path, disk):
    """It closed the log before there was another, and went on with neither. Now nothing changes until there is room."""
    with buffer_service(tmp_path / "small") as (buffer, reader):
        reader.publish(0)
        goes_round(buffer)
        reader.snapshot(1)
        selection, rows = reader.read_batch(5.0)
        reader.commit(selection.batch_ids, 2)
        before, refused = accounts(reader.status()), 0
        with RawClient(buffer.address.endpoints[0], buffer.client_keys) as client:
            for pages in range(12):
                disk.fill()
                with disk._filler.open("r+b") as file:
                    file.truncate(os.path.getsize(disk._filler) - pages * PAGE)
                answer = client.ask(wire.Restore(step=1))
                disk.empty()
                if isinstance(answer, wire.Snapshotted):
                    break
                refused += 1
                assert answer.kind == DiskFull.__name__
                assert accounts(reader.status()) == before
        assert refused >= 4 and answer == wire.Snapshotted(step=1, version=1, frontier=4)
        reader.publish(1)
        again = BlockingBufferClient(buffer.address)
        selection, same = again.read_batch(5.0)
        again.close()
        # What was trained since the snapshot is trainable again, and the same.
        assert same["rollout_id"].to_pylist() == rows["rollout_id"].to_pylist()
        reader.restore(1)
        reader.publish(1)
        buffer.again()
        goes_round(buffer)


def test_a_file_that_is_not_needed_any_more_gives_its_room_back(tmp_path):
    """A deleted file that was mapped to read tokens kept its room on the disk for as long as the process lived."""
    sizes = {"memory_bytes": 2**20, "rotate_bytes": 2**16, "keep_log": "needed"}
    with buffer_service(tmp_path, prompts_per_step=4, bound=0, **sizes) as (buffer, reader):
        reader.publish(0)
        for version in range(6):
            asyncio.run(_fill_past_memory(buffer, version))
            assert reader.status().held_bytes == 8 * 8 * 30_000
            selection, rows = reader.read_batch(5.0)
            check_rows(rows, 30_000)
            reader.commit(selection.batch_ids, version + 1)
        deleted = [
            line for line in Path("/proc/self/maps").read_text().splitlines() if ".arrows (deleted)" in line
        ]
        assert not deleted
        # What is closed since the last rotation goes with the next one.
        assert len(list(buffer.log().glob("segments-*"))) < 12


async def _fill_past_memory(buffer, version):
    """A batch of 8 rollouts with 240 KB each, all leased before the first has a token."""
    async with BufferClient(buffer.address) as client:
        await admit_all(client, 4)
        leases = await client.lease("e", 8, 2.0)
        assert len(leases) == 8
        for lease in leases:
            whole = part(lease.rollout_id, lease.lease_id, 0, 30_000, version, "stop")
            assert await client.append("e", [whole]) == []
            await score(client, lease)
