"""A crash at any byte: what a shard finds is the state after the last commit that was whole, never less than was acknowledged,
and it says what was cut. Files that lost or changed bytes give the state of an earlier commit or LogDamaged, never garbage."""

import itertools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest

from asyncrl.buffer import base
from asyncrl.buffer import log as log_module
from asyncrl.buffer.errors import LogDamaged
from asyncrl.buffer.journal import RECORD_BYTES, STREAMS, decode
from asyncrl.buffer.log import file_of, journal_of
from asyncrl.buffer.shard import Shard
from tests.unit.buffer.test_store_model import SETTINGS, Driver, answers_of, state_of, tiny

SMALL = msgspec.structs.replace(SETTINGS, prompts_per_step=1, rollouts_per_prompt=1)
CONFIG = tiny(rotate_bytes=2**20)
FIRST = [file_of(Path(), name, 1).name for name in STREAMS] + [journal_of(Path(), 1).name]


@dataclass
class Write:
    """Some bytes that reached a file, in the order of the run."""

    name: str
    data: bytes
    at: int
    whole: bool
    """A base: it is there at once."""


@dataclass
class Run:
    writes: list[Write]
    states: list[tuple[int, dict]]
    """(writes by then, state): after each commit that was acknowledged."""

    def before_rotation(self):
        (rotation,) = [i for i, w in enumerate(self.writes) if w.whole and w.name == "base-000002.msgpack"]
        return self.writes[:rotation]


def record(folder, patch):
    """A small run: admitted and leased, sampled, scored, the next file begun, handed over, trained."""
    writes, states = [], []
    real_write_at, real_write = log_module.write_at, base.write

    def write_at(fd, parts, at):
        name = Path(os.readlink(f"/proc/self/fd/{fd}")).name
        writes.append(Write(name, b"".join(parts), at, False))
        return real_write_at(fd, parts, at)

    def write(path, data, **how):
        writes.append(Write(path.name, bytes(data), 0, True))
        return real_write(path, data, **how)

    patch.setattr(log_module, "write_at", write_at)
    patch.setattr(base, "write", write)

    def acknowledge():
        driver.settle()
        states.append((len(writes), state_of(driver.shard)))

    driver = Driver(folder, CONFIG, settings=SMALL)
    states.append((len(writes), None))  # the first commit holds no row
    driver.admit(1)
    leased = driver.lease("a", 1)
    acknowledge()
    driver.append("a", [(leased[0], 2, False)], 0)
    acknowledge()
    driver.append("a", [(leased[0], 1, True)], 0)
    driver.score(leased)
    acknowledge()
    driver.shard.store.rotate_log()
    states.append((len(writes), state_of(driver.shard)))
    driver.read()
    acknowledge()
    driver.train()
    acknowledge()
    driver.shard.close()
    patch.undo()
    return Run(writes, states)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        return record(tmp_path_factory.mktemp("run") / "folder", patch)


@pytest.fixture
def folder(tmp_path):
    memory = Path("/dev/shm")
    path = (memory if memory.is_dir() else tmp_path) / f"recovery-{os.getpid()}"
    yield path
    shutil.rmtree(path, ignore_errors=True)


def build(folder, writes):
    """The folder as these writes leave it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files = {}
    for write in writes:
        data = files.setdefault(write.name, bytearray())
        data[write.at :] = write.data
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return files


def opened(folder):
    """(state, recovery, answers) that a shard finds there."""
    shard = Shard(SMALL, CONFIG, folder, lambda: 0.0)
    try:
        shard.ledger.check()
        return state_of(shard), shard.store.recovery, answers_of(shard.store.columns)
    finally:
        shard.close()


def crashes(writes):
    """(whole writes, bytes of the next one) for every byte at which the process can die."""
    for count, write in enumerate(writes):
        yield from ((count, size) for size in range(1 if write.whole else len(write.data)))
    yield len(writes), 0


def expected(run, count):
    """The state that was acknowledged last, and from where on the writes of its generation do not count."""
    acknowledged = [(by, state) for by, state in run.states if by <= count]
    return acknowledged[-1] if acknowledged else (0, None)


def test_the_run_is_what_it_is_meant_to_be(run):
    names = {write.name for write in run.writes}
    assert {*FIRST, "base-000001.msgpack", "base-000002.msgpack", "journal-000002"} <= names
    assert len({msgspec.json.encode(str(state)) for _, state in run.states}) == len(run.states)
    assert run.states[-1][1]["trained"] == 1 and run.states[-1][0] == len(run.writes)


def test_a_crash_at_any_byte_loses_nothing_that_was_acknowledged(run, folder):
    for count, size in crashes(run.writes):
        torn = run.writes[count : count + 1] if size else []
        torn = [Write(w.name, w.data[:size], w.at, False) for w in torn]
        build(folder, [*run.writes[:count], *torn])
        by, state = expected(run, count)
        found, recovery, answers = opened(folder)
        if count == 0:
            assert recovery is None and found["version"] == -1
            continue
        behind = [w for w in [*run.writes[by:count], *torn] if not w.whole]
        new_base = any(w.whole and w.name != "base-000001.msgpack" for w in run.writes[by:count])
        if new_base:  # the next generation has begun: its base is the state that was acknowledged
            state = {**state, "generation": 2, "history": [1]}
        if state is not None:
            assert found == state, f"{count} writes and {size} bytes"
        else:
            assert (found["version"], found["admitted"]) == (-1, 0)
        assert recovery.cut_bytes == sum(len(w.data) for w in behind), f"{count} writes and {size} bytes"
        assert recovery.live_tokens == sum(len(tokens) for tokens, _, _ in answers.values())


def test_after_a_crash_at_any_write_the_run_goes_on(run, folder):
    for count in range(1, len(run.writes) + 1):
        build(folder, run.writes[:count])
        driver = Driver(folder, CONFIG, settings=SMALL)
        driver.answers = {r: tuple(map(list, a)) for r, a in answers_of(driver.shard.store.columns).items()}
        trained = driver.book.trained
        driver.settle()
        driver.known = {"a": 0, "b": 0}
        driver.round()
        assert driver.book.trained == trained + 1
        before = state_of(driver.shard)
        driver.reopen()
        assert state_of(driver.shard) == before
        driver.shard.close()


def records(files):
    journal = files[FIRST[-1]]
    return [decode(bytes(journal[at : at + RECORD_BYTES])) for at in range(0, len(journal), RECORD_BYTES)]


def truncations(run):
    """(file, size, commits that still count) for each size that the loss of power may leave a file with."""
    files = build_only(run.before_rotation())
    every = records(files)
    for number, name in enumerate(FIRST):
        for size in range(len(files[name])):
            if name == FIRST[-1]:
                yield name, size, size // RECORD_BYTES
            else:
                whole = itertools.takewhile(lambda r, at=number, end=size: r.ends[at] <= end, every)
                yield name, size, len([*whole])


def build_only(writes):
    files = {}
    for write in writes:
        files.setdefault(write.name, bytearray())[write.at :] = write.data
    return files


def find_earlier(run, folder, commits, where):
    """The state after so many commits, and a report of what was cut."""
    found, recovery, _ = opened(folder)
    assert recovery.commits == commits and recovery.cut_bytes > 0, where
    if commits > 1:
        assert found == run.states[commits - 1][1], where
    else:
        assert (found["version"], found["admitted"]) == (-1, 0), where


def test_a_file_that_lost_its_end_gives_an_earlier_commit_or_is_refused(run, folder):
    """With one commit it may have been torn; with more, some that were acknowledged are gone, and a person has to say so."""
    files = build_only(run.before_rotation())
    for name, size, commits in truncations(run):
        where = f"{name} at {size}"
        build(folder, run.before_rotation())
        os.truncate(folder / name, size)
        behind = (folder / FIRST[-1]).stat().st_size // RECORD_BYTES - commits - 1
        if behind > 0:
            with pytest.raises(
                LogDamaged, match=f"commit {commits} or its rows are damaged, and {behind} later"
            ):
                opened(folder)
            assert (folder / FIRST[-1]).read_bytes() == files[FIRST[-1]], where  # nothing is cut
        else:
            find_earlier(run, folder, commits, where)


def test_what_the_refusal_proposes_gives_the_commit_before_the_damage(run, folder):
    files = build(folder, run.before_rotation())
    second = records(files)[1]
    data = bytearray(files["states-000001.arrows"])
    data[second.ends[2] - 1] ^= 1
    (folder / "states-000001.arrows").write_bytes(data)
    with pytest.raises(LogDamaged, match="truncate -s ") as refused:
        opened(folder)
    size, path = str(refused.value).rpartition("truncate -s ")[2].split()
    os.truncate(path, int(size))
    find_earlier(run, folder, 1, "second commit")


def test_a_base_that_lost_its_end_is_damaged(run, folder):
    files = build(folder, run.before_rotation())
    for size in range(0, len(files["base-000001.msgpack"]), 7):
        (folder / "base-000001.msgpack").write_bytes(files["base-000001.msgpack"][:size])
        with pytest.raises(LogDamaged, match=r"base-000001.msgpack is damaged"):
            opened(folder)


def test_a_changed_byte_of_the_last_commit_gives_the_one_before(run, folder):
    writes = run.before_rotation()
    files = build_only(writes)
    before, last = records(files)[-2:]
    starts = [*before.ends, len(files[FIRST[-1]]) - RECORD_BYTES]
    ends = [*last.ends, len(files[FIRST[-1]])]
    state = run.states[last.number - 1][1]
    for name, start, end in zip(FIRST, starts, ends, strict=True):
        for at in range(start, end, 7):
            build(folder, writes)
            data = bytearray(files[name])
            data[at] ^= 0x10
            (folder / name).write_bytes(data)
            found, recovery, _ = opened(folder)
            assert found == state and recovery.cut_bytes > 0, f"{name} at {at}"


def test_a_changed_byte_of_a_base_is_damage(run, folder):
    files = build(folder, run.writes)
    for at in range(0, len(files["base-000002.msgpack"]), 7):
        data = bytearray(files["base-000002.msgpack"])
        data[at] ^= 0x10
        (folder / "base-000002.msgpack").write_bytes(data)
        with pytest.raises(LogDamaged, match=r"base-000002.msgpack is damaged"):
            opened(folder)


def test_tokens_that_an_earlier_file_lost_are_noticed_at_the_start(run, folder):
    """The base says where they lie; to find out when they are read would be too late."""
    (rotation,) = [i for i, w in enumerate(run.writes) if w.whole and w.name == "base-000002.msgpack"]
    writes = run.writes[: rotation + 1]
    build(folder, writes)
    whole = opened(folder)[2]
    assert any(tokens for tokens, _, _ in whole.values())
    path = folder / FIRST[1]
    path.write_bytes(path.read_bytes()[: -(path.stat().st_size // 3)])
    with pytest.raises(LogDamaged, match=r"segments-000001.arrows ends at byte"):
        opened(folder)
    path.unlink()
    with pytest.raises(LogDamaged, match=r"segments-000001.arrows"):
        opened(folder)


def test_a_journal_that_names_no_arrow_message_is_damage(run, folder, monkeypatch):
    """Its hash holds: another version wrote it."""
    build(folder, run.before_rotation())
    layouts = dict(log_module.LAYOUTS, prompts=log_module.SEGMENT_LOG)
    monkeypatch.setattr("asyncrl.buffer.recovery.LAYOUTS", layouts)
    with pytest.raises(LogDamaged, match="use the version of asyncrl that wrote it"):
        opened(folder)
