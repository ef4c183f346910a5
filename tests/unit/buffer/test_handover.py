"""A batch's tokens on their way to the learner: from the log's files where these can be read, else in a frame, and the same."""

import asyncio
import itertools
import logging
import os
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncrl.buffer import BlockingBufferClient, BufferClient, handover, shard, wire
from asyncrl.buffer.arena import boot_id
from asyncrl.buffer.errors import BadRequest, DiskFull
from asyncrl.buffer.handover import FilesUnreadable, Layout, LogFiles, Places, split
from tests.buffer_world import check_rows, generate, goes_round, part, score
from tests.buffers import admit_all, buffer_service
from tests.unit.buffer.test_store_model import Driver, full_disk, state_of, tiny

FALLS_BACK = "batches come through the socket"


@pytest.fixture(params=[1, 3], ids=["1-shard", "3-shards"])
def world(request, tmp_path):
    """(buffer, reader) with one batch of 3 groups of 2 to be read, of answers that came in pieces."""
    with buffer_service(tmp_path, prompts_per_step=3, shards=request.param) as (buffer, reader):
        reader.publish(0)

        async def fill():
            async with BufferClient(buffer.address) as client:
                await admit_all(client, 3)
                leases = []
                while more := await client.lease("e", 1000, 0.1):
                    leases += more
                for start in (0, 5):
                    some = [part(x.rollout_id, x.lease_id, start, 5) for x in leases]
                    assert await client.append("e", some) == []
                for lease in leases:
                    last = part(lease.rollout_id, lease.lease_id, 10, 3, finish_reason="stop")
                    assert await client.append("e", [last]) == []
                    await score(client, lease)

        asyncio.run(fill())
        yield buffer, reader


def another_reader(buffer, *, far=False):
    """One that got nothing so far: a batch that was handed over comes to it again."""
    reader = BlockingBufferClient(buffer.address)
    if far:
        reader._files._boot_id = "elsewhere"
    return reader


# ---- near and far ----------------------------------------------------------------------------------------------------


def test_near_and_far_readers_get_the_same_batch(world, caplog):
    buffer, near = world
    far = another_reader(buffer, far=True)
    with caplog.at_level(logging.INFO, "asyncrl.buffer.reader"):
        selection, rows = near.read_batch(2.0)
        assert FALLS_BACK not in caplog.text
        again, in_frames = far.read_batch(2.0)
    assert caplog.text.count("the buffer is on another host") == buffer.config.shards
    assert again == selection and in_frames.equals(rows)
    check_rows(rows, 13)
    far.close()
    near.commit(selection.batch_ids, 1)
    goes_round(buffer)


def test_a_batch_for_the_files_has_no_body_and_one_for_a_frame_no_places(world):
    _, reader = world
    for connection in reader._shards:
        near, far = (
            connection.ask(wire.ReadBatch(after=0, timeout_s=1.0, from_files=near), timeout_s=1.0)
            for near in (True, False)
        )
        assert near.body is None and far.reply.places is None
        tokens, logprobs = LogFiles().read(near.reply.places, near.reply.layout)
        assert bytes(far.body) == tokens.tobytes() + logprobs.tobytes()
        assert len(far.body) == 8 * far.reply.layout.tokens


WRONG = {
    "another boot id": ({"boot_id": "elsewhere"}, "the buffer is on another host"),
    "another inode": (lambda path, device, inode: (path, device, inode + 1), "is another file here"),
    "another device": (lambda path, device, inode: (path, device + 1, inode), "is another file here"),
    "a path that is not there": (
        lambda path, device, inode: (path + ".gone", device, inode),
        "No such file or directory",
    ),
    "another file at that path": (
        lambda path, device, inode: (path.replace("segments", "states"), device, inode),
        "is another file here",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_reader_that_cannot_read_the_files_falls_back_by_itself_and_says_so(
    world, name, monkeypatch, caplog
):
    change, reason = WRONG[name]
    asked, real = [], shard.places

    def places(*args):
        found = real(*args)
        asked.append(found)
        if isinstance(change, dict):
            return msgspec.structs.replace(found, **change)
        return msgspec.structs.replace(found, files={g: change(*file) for g, file in found.files.items()})

    monkeypatch.setattr(shard, "places", places)
    buffer, reader = world
    with caplog.at_level(logging.INFO, "asyncrl.buffer.reader"):
        selection, rows = reader.read_batch(2.0)
    check_rows(rows, 13)
    said = [r.getMessage() for r in caplog.records if FALLS_BACK in r.getMessage()]
    assert len(said) == len(asked) == buffer.config.shards and all(reason in line for line in said)
    assert set(selection.batch_ids) == {1}
    reader.commit(selection.batch_ids, 1)
    goes_round(buffer)
    assert len(asked) == buffer.config.shards  # it is not tried again for every batch


def test_a_reader_that_may_not_open_the_files_falls_back_by_itself(world, monkeypatch, caplog):
    real = os.open

    def refuse(path, *args, **kwargs):
        if "segments-" in str(path):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(handover.os, "open", refuse)
    buffer, reader = world
    with caplog.at_level(logging.INFO, "asyncrl.buffer.reader"):
        _, rows = reader.read_batch(2.0)
    check_rows(rows, 13)
    assert caplog.text.count("segments-000001.arrows: Permission denied") == buffer.config.shards


def test_a_file_that_is_too_short_is_not_taken_for_the_batch(tmp_path):
    path, where, layout = written(tmp_path, [(0, 40, 4), (16, 56, 6)])
    os.truncate(path, 79)
    with pytest.raises(FilesUnreadable, match="ends within"):
        LogFiles().read(where, layout)


def test_a_body_of_another_length_than_the_header_says_is_refused():
    with pytest.raises(BadRequest, match="a body of 15 bytes, expected 16 for 2 tokens"):
        split(memoryview(bytes(15)), 2)


def test_reading_leaves_no_file_open(tmp_path):
    """One that the shard deletes would keep its room on the disk."""
    _, where, layout = written(tmp_path, [(0, 40, 10)])
    files, before = LogFiles(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        files.read(where, layout)
        with pytest.raises(FilesUnreadable):
            files.read(msgspec.structs.replace(where, files={1: (*where.files[1][:2], 0)}), layout)
    assert len(os.listdir("/proc/self/fd")) == before


# ---- pieces and runs -------------------------------------------------------------------------------------------------


def written(folder, pieces, generation=1):
    """A file of counting numbers and (tokens_at, logprobs_at, length) pieces of it."""
    path = folder / f"file-{generation}"
    last = max(at + 4 * length for _, at, length in pieces)
    path.write_bytes(np.arange(-(-last // 4), dtype=np.int32).tobytes() + b"end")
    status = path.stat()
    where = Places(
        boot_id=boot_id(),
        files={generation: (str(path), status.st_dev, status.st_ino)},
        generations=[generation] * len(pieces),
        tokens_at=[piece[0] for piece in pieces],
        logprobs_at=[piece[1] for piece in pieces],
    )
    return path, where, layout_of([piece[2] for piece in pieces])


def layout_of(lengths):
    return Layout(
        group_ids=[1],
        group_sizes=[1],
        prompts=[b""],
        lengths=[sum(lengths)],
        piece_versions=[0] * len(lengths),
        piece_lengths=list(lengths),
        rewards=[0.0],
        costs=[0.0],
        greedy=[False],
        finish_reasons=["stop"],
        oldest_trainable_version=0,
    )


def runs(where, lengths):
    return list(handover._runs(where, lengths))


def spot(pieces, generations=None):
    return Places(
        boot_id="",
        files={},
        generations=generations or [1] * len(pieces),
        tokens_at=[piece[0] for piece in pieces],
        logprobs_at=[piece[1] for piece in pieces],
    ), [piece[2] for piece in pieces]


def test_pieces_one_behind_the_other_are_read_together_and_others_one_by_one():
    together = [(100, 500, 3), (112, 512, 1), (116, 516, 5)]
    assert runs(*spot(together)) == [(1, 100, 500, 9)]
    assert runs(*spot([*together, (200, 600, 2)])) == [(1, 100, 500, 9), (1, 200, 600, 2)]
    assert runs(*spot([(0, 50, 2), *together])) == [(1, 0, 50, 2), (1, 100, 500, 9)]
    backwards = together[::-1]
    assert runs(*spot(backwards)) == [(1, *piece) for piece in backwards]
    assert runs(*spot(together[:1])) == [(1, *together[0])]
    assert runs(*spot([])) == []


def test_neighbours_in_different_files_are_read_one_by_one():
    pieces = [(100, 500, 3), (112, 512, 1)]
    assert runs(*spot(pieces, [1, 2])) == [(1, 100, 500, 3), (2, 112, 512, 1)]


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2), st.integers(1, 6)), min_size=1, max_size=12),
    st.randoms(use_true_random=False),
)
def test_every_piece_is_in_exactly_one_run(drawn, rng):
    """Messages of several pieces in files, in any order: the runs say the same places, and are as few as can be."""
    pieces, ends = [], {1: 0, 2: 0, 3: 0}
    for generation, gap, length in drawn:
        at = ends[generation] + 8 * gap
        pieces.append((generation, at, 10_000 + at, length))
        ends[generation] = at + 4 * length
    if rng.random() < 0.5:
        rng.shuffle(pieces)
    where, lengths = spot([p[1:] for p in pieces], [p[0] for p in pieces])
    found = runs(where, lengths)
    tokens = [(g, at + 4 * i) for g, at, _, n in found for i in range(n)]
    logprobs = [(g, at + 4 * i) for g, _, at, n in found for i in range(n)]
    assert tokens == [(g, at + 4 * i) for g, at, _, n in pieces for i in range(n)]
    assert logprobs == [(g, at + 4 * i) for g, _, at, n in pieces for i in range(n)]
    for (g, at, _, n), (other, behind, _, _) in itertools.pairwise(found):
        assert (g, at + 4 * n) != (other, behind)


@settings(deadline=None)
@given(st.data())
def test_what_is_read_is_what_stands_at_the_places(tmp_path_factory, data):
    lengths = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=8))
    starts = [4 * data.draw(st.integers(0, 50)) for _ in lengths]
    pieces = [(at, at + 400, length) for at, length in zip(starts, lengths, strict=True)]
    _, where, layout = written(tmp_path_factory.mktemp("runs"), pieces)
    tokens, logprobs = LogFiles().read(where, layout)
    assert tokens.dtype == np.int32 and logprobs.dtype == np.float32
    assert tokens.tolist() == [at // 4 + i for at, _, n in pieces for i in range(n)]
    assert logprobs.view(np.int32).tolist() == [at // 4 + i for _, at, n in pieces for i in range(n)]


# ---- the log goes on meanwhile ---------------------------------------------------------------------------------------


def handed_over(folder, **config):
    """A driver with a batch that was handed over and is not committed."""
    driver = Driver(folder, tiny(memory_bytes=2**20, **config))
    driver.round()
    driver.admit(100)
    driver.settle()
    leased = driver.lease("a", 100)
    driver.settle()
    driver.work("a", leased)
    driver.settle()
    driver.read()
    assert driver.batch is not None
    return driver


def segment_files(folder):
    return {int(p.stem.split("-")[1]) for p in folder.glob("segments-*")}


def test_rotations_and_deletions_between_hand_over_and_commit_leave_the_files(tmp_path):
    driver = handed_over(tmp_path, keep_log="needed", rotate_bytes=2**20)
    held = {*driver.near[0].generations}
    for _ in range(3):
        driver.shard.store.rotate_log()
    present = driver.shard.store.log.generation
    assert segment_files(tmp_path) == held | {present} and present not in held  # those between are gone
    driver.read_near()
    driver.train()
    driver.settle()
    for _ in range(3):  # the other groups of then are trained too
        driver.round()
    driver.shard.store.rotate_log()
    assert not held & segment_files(tmp_path)
    driver.shard.close()


def test_the_status_says_how_often_and_for_how_long_at_most_the_log_was_rotated(tmp_path):
    """A snapshot begins a file too, and is no rotation: somebody asked for it and waits for it."""
    with buffer_service(tmp_path, prompts_per_step=2, rotate_bytes=2**16) as (buffer, reader):
        reader.publish(0)
        assert (reader.status().rotations, reader.status().longest_rotation_s) == (0, 0.0)
        for round_number in range(1, 4):
            goes_round(buffer, tokens=3000)
            reader.snapshot(round_number)
            status = reader.status()
            begun = len([*buffer.log().glob("base-*")]) - 1
            assert status.rotations == begun - round_number
        assert status.rotations > 0 and 0 < status.longest_rotation_s < 5.0


def test_a_reader_has_its_batch_while_the_log_is_rotated_and_old_files_deleted(tmp_path):
    """Over the socket, in files that are full after a step or two."""
    sizes = {"prompts_per_step": 2, "keep_log": "needed", "rotate_bytes": 2**16}
    with buffer_service(tmp_path, **sizes) as (buffer, reader):
        reader.publish(0)
        for version in range(6):
            asyncio.run(_fill(buffer, version))
            selection, rows = reader.read_batch(5.0)
            assert not reader._far
            check_rows(rows, 3000)
            reader.commit(selection.batch_ids, version + 1)
        files = segment_files(buffer.log())
        assert max(files) > 3 and min(files) > 1


async def _fill(buffer, version):
    async with BufferClient(buffer.address) as client:
        await admit_all(client, 2)
        await generate(client, tokens=3000, version=version)


def test_what_cannot_be_written_cannot_be_read_and_is_handed_over_again(tmp_path):
    """Tokens that came in this very round are read from the file too: a prefix for the next lease, a batch for a far reader."""
    driver = Driver(tmp_path, tiny(memory_bytes=2**20))
    driver.admit(2)
    leased = driver.lease("a", 2)
    driver.settle()
    driver.append("a", [(leased[0], 5, False)], 0)
    driver.shard.carry_out(wire.Release(leases=[(leased[0], driver.held[leased[0]])]), b"")
    driver.shard.seal()
    again = wire.Lease(engine_id="b", limit=1, after=0, timeout_s=0.0)
    with full_disk(0), pytest.raises(DiskFull):
        driver.shard.attempt(again, b"")
    (entry,) = driver.shard.attempt(again, b"").rollouts
    assert np.frombuffer(entry.tokens, np.int32).tolist() == driver.answers[leased[0]][0]
    driver.settle()
    driver.held[leased[0]] = entry.lease_id
    rest = driver.lease("a", 100)
    for rollout_id in (*leased, *rest):
        driver.append("a", [(rollout_id, 3, True)], 0)
    assert driver.score([*leased, *rest]) == []
    driver.shard.seal()
    request = wire.ReadBatch(after=0, timeout_s=0.0, from_files=False)
    batch = driver.shard.attempt(request, b"")
    with full_disk(0), pytest.raises(DiskFull):
        driver.shard.body(batch)
    same = driver.shard.attempt(request, b"")
    assert same.selection == batch.selection
    tokens, _ = split(driver.shard.body(same), same.layout.tokens)
    assert tokens.tolist() == [t for r in same.selection.rollout_ids for t in driver.answers[r][0]]
    driver.settle()
    before = state_of(driver.shard)
    driver.reopen()
    assert state_of(driver.shard) == before
    driver.shard.close()


def test_after_a_restore_the_right_files_are_read(tmp_path):
    """What was abandoned had files of later generations, with the same rollouts' other tokens."""
    driver = handed_over(tmp_path, rotate_bytes=2**20)
    driver.snapshot(1)
    kept = {r: tuple(map(list, a)) for r, a in driver.answers.items()}
    driver.train()
    driver.settle()
    driver.round()
    driver.restore(1)
    driver.answers = kept
    driver.publish()
    driver.read()  # the open batch again, from the files of before the snapshot
    generation = driver.shard.store.log.generation
    aside = tmp_path / f"abandoned-{generation:06d}"
    assert segment_files(aside) and all(Path(f[0]).exists() for f in driver.near[0].files.values())
    driver.train()
    driver.settle()
    driver.round()
    driver.shard.close()


def test_one_reader_reads_on_after_a_restore(world):
    """The same client: what it was told of files before does not count any more."""
    buffer, reader = world
    reader.snapshot(1)
    _, first = reader.read_batch(2.0)
    reader.restore(1)
    reader.publish(0)
    selection, rows = reader.read_batch(2.0)
    assert rows.equals(first) and not reader._far
    reader.commit(selection.batch_ids, 1)
    goes_round(buffer)
    assert not reader._far
