"""Random schedules against a shard and its files: after every commit another process finds the same state in a copy of the
folder, token for token; a restore goes back to exactly what was at its snapshot; what is deleted was needed by nobody."""

import contextlib
import errno
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncrl.buffer import base, wire
from asyncrl.buffer import log as log_module
from asyncrl.buffer.columns import slices
from asyncrl.buffer.config import BufferConfig
from asyncrl.buffer.errors import BadRequest, DiskFull
from asyncrl.buffer.handover import LogFiles, arrive, split
from asyncrl.buffer.log import file_of, journal_of
from asyncrl.buffer.records import LedgerSettings, Recovery
from asyncrl.buffer.schema import ENVIRONMENT, State
from asyncrl.buffer.shard import Shard
from tests.unit.buffer.test_ledger_model import turn, turns

SETTINGS = LedgerSettings(
    prompts_per_step=2, rollouts_per_prompt=2, max_staleness_versions=2, max_attempts=2, lease_timeout_s=5.0
)


def tiny(**config):
    """Sizes that a recipe refuses: files are full after some messages, and memory at once."""
    return BufferConfig(**{"rotate_bytes": 6000, "memory_bytes": 2000, **config})


def answers_of(columns):
    """rollout_id -> (tokens, logprobs, versions), as they are read back."""
    files = columns.files
    return {
        rollout_id: (
            [t for p in pieces for t in files.tokens(p).tolist()],
            [x for p in pieces for x in files.logprobs(p).tolist()],
            [p.version for p in pieces for _ in range(p.length)],
        )
        for rollout_id, pieces in columns.answers.items()
    }


def state_of(shard):
    """All that a crash must not change. Passed-over prompts leave no row, nor does what an engine knows of."""
    store = shard.store
    state = base.dump(
        shard.ledger.book, store.columns, store.log.generation, store.history, store.log.next_seq
    )
    held = {(r.engine_id, r.lease_id) for r in shard.ledger.book.rollouts.values() if r.lease_id}
    fields = {name: getattr(state, name) for name in state.__struct_fields__}
    return {**fields, "frontier": 0, "engines": held}


def positions(shard):
    return {g.position for g in shard.ledger.book.groups.values()}


@contextlib.contextmanager
def full_disk(after):
    """The log's writes fail from the `after`-th on, the first of them in its midst."""
    real, left = log_module.write_at, [after]

    def write_at(fd, parts, at):
        left[0] -= 1
        if left[0] >= 0:
            return real(fd, parts, at)
        data = memoryview(b"".join(parts))
        real(fd, [data[: data.nbytes // 2]], at)
        raise OSError(errno.ENOSPC, "No space left on device")

    log_module.write_at = write_at
    try:
        yield
    finally:
        log_module.write_at = real


class Driver:
    """Engines, a learner and a feeder, each with what it knows, against one shard in `folder`."""

    def __init__(self, folder, config, clock=lambda: 0.0, settings=SETTINGS):
        self.folder, self.config, self.clock, self.settings = Path(folder), config, clock, settings
        self.shard = Shard(settings, config, self.folder, clock)
        self.answers = {}  # rollout_id -> (tokens, logprobs, versions): what engines sent and the buffer took
        self.trained = Counter()  # position -> how often
        self.known = dict.fromkeys("ab", 0)
        self.held = {}  # rollout_id -> lease_id
        self.leases = []  # every one so far
        self.batch, self.got, self.token = None, 0, 0
        self.publish()

    @property
    def book(self):
        return self.shard.ledger.book

    def settle(self):
        self.shard.seal()
        self.shard.commit()
        live = self.book.rollouts
        self.answers = {r: a for r, a in self.answers.items() if r in live}
        self.held = {r: n for r, n in self.held.items() if r in live}

    def publish(self):
        self.shard.carry_out(wire.Publish(version=max(0, self.book.version)), b"")

    def admit(self, count):
        first = self.book.frontier
        room = self.shard.attempt(wire.Capacity(timeout_s=0.0), b"")
        asked = range(first, first + min(count, room.value if room else 0))
        request = wire.Admit(
            positions=list(asked),
            prompt_ids=[f"p{i}" for i in asked],
            payloads=[str(i) for i in asked],
            lengths=[2 for _ in asked],
            timeout_s=0.0,
        )
        body = np.array([t for i in asked for t in (i, i + 1)], np.int32).tobytes()
        reply = self.shard.attempt(request, body)
        assert reply.admitted + reply.passed_over == len(asked)
        for group in self.book.groups.values():
            for rollout_id in group.rollouts:
                self.answers.setdefault(rollout_id, ([], [], []))

    def lease(self, engine, limit):
        request = wire.Lease(engine_id=engine, limit=limit, after=self.known[engine], timeout_s=0.0)
        answer = self.shard.attempt(request, b"")
        leased = answer.rollouts if answer else []
        for entry in leased:
            rollout = self.book.rollouts[entry.rollout_id]
            position = rollout.group.position
            assert np.frombuffer(entry.prompt_tokens, np.int32).tolist() == [position, position + 1]
            assert entry.payload == str(position)
            assert np.frombuffer(entry.tokens, np.int32).tolist() == self.answers[entry.rollout_id][0]
            self.held[entry.rollout_id] = entry.lease_id
            self.leases.append((entry.rollout_id, entry.lease_id))
            self.known[engine] = max(self.known[engine], entry.lease_id)
        return [entry.rollout_id for entry in leased]

    def append(self, engine, parts, version):
        """`parts`: (rollout_id, tokens, whether they are the last). Returns those that were refused."""
        tokens = [
            list(range(self.token + 10 * i, self.token + 10 * i + n)) for i, (_, n, _) in enumerate(parts)
        ]
        self.token += 10 * len(parts)
        logprobs = [[-t / 8 for t in some] for some in tokens]
        request = wire.Append(
            engine_id=engine,
            rollout_ids=[r for r, _, _ in parts],
            lease_ids=[self.held.get(r, 0) for r, _, _ in parts],
            starts=[len(self.answers.get(r, ([],))[0]) for r, _, _ in parts],
            versions=[version] * len(parts),
            lengths=[n for _, n, _ in parts],
            finish_reasons=["stop" if done else "" for _, _, done in parts],
        )
        body = np.array([t for some in tokens for t in some], np.int32).tobytes()
        body += np.array([x for some in logprobs for x in some], np.float32).tobytes()
        refused = self.shard.carry_out(request, body).rollout_ids
        for (rollout_id, n, _), some, theirs in zip(parts, tokens, logprobs, strict=True):
            if rollout_id not in refused:
                answer = self.answers[rollout_id]
                for mine, new in zip(answer, (some, theirs, [version] * n), strict=True):
                    mine.extend(new)
        return refused

    def score(self, rollout_ids):
        scored = [wire.Scored(r, self.held.get(r, 0), float(r % 3)) for r in rollout_ids]
        return self.shard.carry_out(wire.Score(rollouts=scored), b"").rollout_ids

    def fail(self, rollout_id):
        request = wire.Fail(rollout_id=rollout_id, lease_id=self.held.get(rollout_id, 0), reason="broken")
        if not self.shard.carry_out(request, b"").rollout_ids and rollout_id in self.book.rollouts:
            self.answers[rollout_id] = ([], [], [])

    def poison(self, rollout_id):
        """It fails until it is given up, and its prompt with it; unless memory is short, and it is not leased again."""
        for _ in range(self.settings.max_attempts):
            if rollout_id not in self.held:
                self.lease("a", 100)
                self.settle()
            if rollout_id in self.held:
                self.fail(rollout_id)
                self.settle()
                self.held.pop(rollout_id, None)

    def work(self, engine, rollout_ids):
        """Finishes and scores them."""
        live = [r for r in rollout_ids if r in self.book.rollouts]
        parts = [(r, 0 if self.book.rollouts[r].finish_reason else 3, True) for r in live]
        assert self.append(engine, parts, self.book.version) == []
        self.settle()
        assert self.score(live) == []

    def read(self):
        if self.batch is not None:
            return
        request = wire.ReadBatch(after=self.got, timeout_s=0.0, from_files=True)
        answer = self.shard.attempt(request, b"")
        if answer is None:
            return
        self.batch, layout = answer.selection, answer.layout
        self.near, self.far = (
            (self.shard.places(answer), layout),
            split(self.shard.body(answer), layout.tokens),
        )
        self.shard.commit()  # as the service does before it answers
        self.read_near()
        rows = arrive(layout, self.batch.rollout_ids, *self.far)
        (self.got,) = self.batch.batch_ids
        assert tuple(rows["rollout_id"].to_pylist()) == self.batch.rollout_ids
        columns = zip(
            self.batch.rollout_ids,
            *(slices(rows[name]) for name in ("tokens", "logprobs", "versions", "trainable")),
            strict=True,
        )
        for rollout_id, tokens, logprobs, versions, trainable in columns:
            assert (tokens.tolist(), logprobs.tolist(), versions.tolist()) == self.answers[rollout_id]
            oldest = max(0, self.batch.version - self.settings.max_staleness_versions)
            assert trainable.tolist() == [v >= oldest for v in versions.tolist()]

    def read_near(self):
        """What a reader on this host takes from the files is what one on another host is sent."""
        for near, far in zip(LogFiles().read(*self.near), self.far, strict=True):
            assert near.dtype == far.dtype and np.array_equal(near, far)

    def train(self):
        """Whatever came between: the files that it was handed are there until the commit."""
        if self.batch is None:
            return
        self.read_near()
        trained = [self.book.groups[g].position for g in self.batch.group_ids]
        request = wire.Commit(batch_id=self.batch.batch_ids[0], version=self.book.version + 1)
        assert self.shard.carry_out(request, b"").counts.holds
        self.trained.update(trained)
        self.batch = None

    def snapshot(self, step, keep=()):
        return self.shard.carry_out(wire.Snapshot(step=step, keep=list(keep)), b"")

    def restore(self, step):
        """The learner that asks for it is a new one, and engines are told to drop what they hold."""
        reply = self.shard.carry_out(wire.Restore(step=step), b"")
        self.batch, self.got, self.held = None, 0, {}
        return reply

    def round(self):
        """One step in which everything works."""
        self.admit(100)
        self.settle()
        # Ends: each lease takes rollouts from the queue, and at the memory budget from one batch alone.
        while leased := self.lease("a", 100):
            self.settle()
            self.work("a", leased)
            self.settle()
        self.read()
        self.settle()
        self.train()
        self.settle()

    def reopen(self):
        self.shard.close()
        self.shard = Shard(self.settings, self.config, self.folder, self.clock)


class ShardMachine(RuleBasedStateMachine):
    @initialize(
        keep_log=st.sampled_from(["all", "needed"]),
        memory_bytes=st.sampled_from([1, 4000, 2**30]),
        rotate_bytes=st.sampled_from([3000, 8000]),
    )
    def begin(self, keep_log, memory_bytes, rotate_bytes):
        memory = Path("/dev/shm")  # where there is one: bases are synced, and disks are slow at it
        self.now = 0.0
        self.room = Path(tempfile.mkdtemp(prefix="shard-", dir=memory if memory.is_dir() else None))
        config = tiny(keep_log=keep_log, memory_bytes=memory_bytes, rotate_bytes=rotate_bytes)
        self.driver = Driver(self.room / "folder", config, lambda: self.now)
        self.driver.settle()
        self.saved = {}  # step -> what there was
        self.quarantined = set()

    @rule(data=st.data())
    def step(self, data):
        name, arguments = data.draw(TURNS)
        getattr(self, name)(**arguments)

    def leased(self, engines):
        found = self.driver.book.rollouts.values()
        return sorted(r.rollout_id for r in found if r.state is State.LEASED and r.engine_id in engines)

    # ---- engines and feeder ----------------------------------------------------------------------------------------

    @turn(
        5,
        prompts=st.integers(0, 6),
        engine=st.sampled_from("ab"),
        limit=st.integers(1, 6),
        works=st.sampled_from([False, False, True]),
    )
    def lease(self, prompts, engine, limit, works):
        self.driver.admit(prompts)
        before = {lease for _, lease in self.driver.leases}
        old = {r.lease_id for r in self.driver.book.rollouts.values() if r.lease_id}
        leased = self.driver.lease(engine, limit)
        new = {self.driver.held[r] for r in leased} - old
        assert not new & before  # no lease is ever given twice, also after a restore
        self.driver.settle()
        if works:
            self.driver.work(engine, leased)

    @turn(
        6,
        which=st.lists(st.integers(0, 11), min_size=1, max_size=4),
        tokens=st.integers(0, 5),
        done=st.booleans(),
        lag=st.integers(0, 1),
        given=st.sampled_from([False, False, True]),
    )
    def append(self, which, tokens, done, lag, given):
        """`given`: by the environment, in the middle of an answer."""
        leased = self.leased("ab")
        some = {leased[i % len(leased)] for i in which} if leased else ()
        version = ENVIRONMENT if given else max(0, self.driver.book.version - lag)
        said = {r: any(v != ENVIRONMENT for v in self.driver.answers[r][2]) for r in some}
        parts = [(r, tokens, done and (said[r] or (tokens > 0 and not given))) for r in some]
        assert self.driver.append("a", parts, version) == []
        self.driver.score([r for r, _, finished in parts if finished])

    @turn(2, which=st.integers(0, 11), fails=st.booleans())
    def lose(self, which, fails):
        if not self.driver.held:
            return
        rollout_id = sorted(self.driver.held)[which % len(self.driver.held)]
        if fails:
            self.driver.fail(rollout_id)
        else:
            leases = [(rollout_id, self.driver.held[rollout_id])]
            self.driver.shard.carry_out(wire.Release(leases=leases), b"")

    @turn(2, which=st.integers(0, 11))
    def poison(self, which):
        queued = sorted(r for r, held in self.driver.book.rollouts.items() if held.state is State.LEASED)
        if queued:
            self.driver.poison(queued[which % len(queued)])

    @turn(2, which=st.integers(0, 11))
    def append_and_fail_at_once(self, which):
        """All in one commit of the log."""
        some = self.leased("ab")[:3]
        if some:
            self.driver.append("a", [(r, 2, False) for r in some], self.driver.book.version)
            self.driver.fail(some[which % len(some)])
            rest = [r for r in some if r in self.leased("ab")]
            self.driver.append("a", [(r, 1, False) for r in rest], self.driver.book.version)

    @turn(1, engine=st.sampled_from("ab"), passed=st.sampled_from([1.0, 6.0]))
    def crash(self, engine, passed):
        self.now += passed
        self.driver.known[engine] = 0
        if passed == 1.0:
            self.driver.shard.carry_out(wire.EngineLost(engine_id=engine), b"")
        else:
            self.driver.shard.expire()

    # ---- the learner -----------------------------------------------------------------------------------------------

    @turn(
        2,
    )
    def read(self):
        self.driver.read()

    @turn(
        2,
    )
    def train(self):
        self.driver.train()

    @turn(
        3,
    )
    def round(self):
        self.driver.round()

    @turn(2, kept=st.integers(0, 2))
    def snapshot(self, kept):
        step = max(self.saved, default=0) + 1
        keep = sorted(self.saved)[-kept:] if kept else []
        driver = self.driver
        reply = driver.snapshot(step, keep)
        self.saved = {s: v for s, v in self.saved.items() if s in keep}
        self.saved[step] = (
            dict(driver.trained),
            driver.book.frontier,
            positions(driver.shard),
            {r: tuple(map(list, a)) for r, a in driver.answers.items()},
            driver.book.version,
        )
        assert (reply.step, reply.version, reply.frontier) == (
            step,
            driver.book.version,
            driver.book.frontier,
        )
        assert {*driver.shard.store.snapshots()} == {*self.saved}

    @turn(2, which=st.integers(0, 11))
    def restore(self, which):
        if not self.saved:
            return self.snapshot(0)
        step = sorted(self.saved)[which % len(self.saved)]
        driver = self.driver
        generation = driver.shard.store.log.generation
        driver.restore(step)
        trained, frontier, live, answers, version = self.saved[step]
        self.saved = {s: v for s, v in self.saved.items() if s <= step}
        book = driver.book
        assert (book.frontier, book.version, book.serving) == (frontier, version, False)
        assert set(book.quarantined) >= self.quarantined
        quarantined = {int(name[1:]) for name in book.quarantined}
        in_training = {g.position for g in book.groups.values() if g.batch_id}
        assert positions(driver.shard) == (live - quarantined) | in_training
        assert driver.shard.attempt(wire.Lease(engine_id="a", limit=9, after=0, timeout_s=0.0), b"") is None
        assert {*driver.shard.store.snapshots()} == {*self.saved}
        driver.trained = Counter(trained)
        driver.answers = {r: tuple(map(list, a)) for r, a in answers.items()}
        self.refuse_old_leases()
        self.find_aside(generation)
        driver.settle()
        driver.publish()

    def refuse_old_leases(self):
        """In each way that an engine could use them."""
        driver = self.driver
        for rollout_id, lease_id in driver.leases[-6:]:
            driver.held[rollout_id] = lease_id
            assert driver.append("a", [(rollout_id, 1, False)], 0) == [rollout_id]
            driver.fail(rollout_id)
            driver.held.clear()

    def find_aside(self, last):
        store = self.driver.shard.store
        aside = self.driver.folder / f"abandoned-{store.log.generation:06d}"
        for generation in range(1, last + 1):
            path = journal_of(self.driver.folder, generation)
            if generation not in store.history:
                assert not path.exists()
        assert journal_of(aside, last).exists() and file_of(aside, "segments", last).exists()

    # ---- the process -----------------------------------------------------------------------------------------------

    @turn(
        1,
    )
    def reopen(self):
        self.driver.settle()
        frontier = self.driver.book.frontier
        self.driver.reopen()
        assert self.driver.book.frontier <= frontier

    @turn(1, after=st.integers(0, 4))
    def disk_is_full_for_a_while(self, after):
        driver = self.driver
        leased = self.leased("ab")[:3]
        driver.admit(1)
        driver.append("a", [(r, 2, False) for r in leased], driver.book.version)
        with full_disk(after), contextlib.suppress(DiskFull):
            driver.settle()
        self.now += 60.0  # what is put off for a while is tried again
        with full_disk(after), contextlib.suppress(DiskFull):
            driver.settle()

    @invariant()
    def another_process_finds_the_same(self):
        if not hasattr(self, "driver"):
            return
        driver = self.driver
        driver.settle()
        self.quarantined |= set(driver.book.quarantined)
        assert set(driver.trained.values()) <= {1}
        assert not positions(driver.shard) & {*driver.trained}
        self.recount_pieces(driver.shard)
        copy = self.room / "copy"
        shutil.copytree(driver.folder, copy)
        other = Shard(SETTINGS, driver.config, copy, lambda: self.now)
        try:
            assert other.store.recovery is not None and other.store.recovery.cut_bytes == 0
            assert state_of(other) == state_of(driver.shard)
            assert answers_of(other.store.columns) == answers_of(driver.shard.store.columns) == driver.answers
            assert other.ledger.check() == driver.shard.ledger.check()
            self.recount_pieces(other)
            self.find_what_snapshots_need()
        finally:
            other.close()
            shutil.rmtree(copy)

    def recount_pieces(self, shard):
        pieces = [p for some in shard.store.columns.answers.values() for p in some]
        assert shard.store.files.held_bytes == 8 * sum(p.length for p in pieces)

    def find_what_snapshots_need(self):
        folder = self.driver.folder
        for snapshot in self.driver.shard.store.snapshots().values():
            state = base.decode(base.path_of(folder, snapshot.generation).read_bytes())
            pieces = zip(
                state.pieces.generations, state.pieces.logprobs_at, state.pieces.lengths, strict=True
            )
            for generation, logprobs_at, count in pieces:
                assert file_of(folder, "segments", generation).stat().st_size >= logprobs_at + 4 * count

    def teardown(self):
        if not hasattr(self, "driver"):
            return
        try:
            self.finish()
        finally:
            self.driver.shard.close()
            shutil.rmtree(self.room)

    def finish(self):
        """Everything is trained in the end that was not dropped or failed; files that nobody needs are gone."""
        driver = self.driver
        for engine in "ab":
            driver.shard.carry_out(wire.EngineLost(engine_id=engine), b"")
            driver.known[engine] = driver.book.next_lease
        driver.train()
        driver.settle()
        first = driver.shard.store.log.generation
        before = driver.trained.total()
        for _ in range(6):
            driver.round()
        assert driver.trained.total() >= before + 3 * SETTINGS.prompts_per_step
        driver.snapshot(max(self.saved, default=0) + 1)
        self.saved = {}
        driver.round()
        driver.round()
        self.another_process_finds_the_same()
        store = driver.shard.store
        assert store.log.generation > first
        kept = {g for g in range(1, store.log.generation + 1) if journal_of(driver.folder, g).exists()}
        if driver.config.keep_log == "all":
            assert kept == {*store.history, store.log.generation}
        else:
            (snapshot,) = store.snapshots().values()
            assert (
                kept
                <= {*snapshot.needs, snapshot.generation, store.log.generation} | store._live_generations()
            )


TURNS = turns(ShardMachine)
ShardMachine.TestCase.settings = settings(
    max_examples=50, stateful_step_count=30, deadline=None, report_multiple_bugs=False
)
TestShard = ShardMachine.TestCase


# ---- what random schedules do not reach ---------------------------------------------------------------------------


class Cut(Exception):
    """The process died here."""


@contextlib.contextmanager
def cut_short(after):
    """The `after`-th change to a folder, and all behind it, never happen."""
    left = [after]

    def dying(real):
        def change(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                raise Cut
            return real(*args, **kwargs)

        return change

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Path, "rename"), (Path, "unlink"), (os, "replace")):
            patch.setattr(owner, name, dying(getattr(owner, name)))
        yield


@pytest.fixture
def two_snapshots(tmp_path):
    """A run with snapshots of steps 1 and 2, and work behind each of them."""
    driver = Driver(tmp_path / "folder", tiny(rotate_bytes=2**20, memory_bytes=2**20))
    driver.round()
    driver.snapshot(1)
    driver.round()
    driver.snapshot(2, keep=[1])
    driver.round()
    yield driver
    driver.shard.close()


def test_a_restore_that_is_cut_short_happened_or_did_not(two_snapshots, tmp_path):
    seen = set()
    for after in range(100):
        dies, copy = tmp_path / f"{after}-dies", tmp_path / str(after)
        shutil.copytree(two_snapshots.folder, dies)
        shard = Shard(SETTINGS, two_snapshots.config, dies)
        try:
            with cut_short(after):
                shard.carry_out(wire.Restore(step=1), b"")
            done = True
        except Cut:
            done = False
        shutil.copytree(dies, copy)  # the one that died still holds its folder: it died in this process
        again = Shard(SETTINGS, two_snapshots.config, copy)
        version, snapshots = again.ledger.version, {*again.store.snapshots()}
        seen.add((version, *snapshots))
        assert (version, snapshots) in ((3, {1, 2}), (1, {1}))
        assert again.ledger.book.serving == (version == 3)
        past = {*again.store.history, again.store.log.generation}
        assert {int(p.name.split("-")[1]) for p in copy.glob("journal-*")} == past
        assert again.carry_out(wire.Restore(step=1), b"").version == 1
        again.close()
        if done:
            break
    assert done and len(seen) == 2


@pytest.mark.parametrize("after", range(4))
def test_a_full_disk_keeps_a_snapshot_or_a_restore_from_happening_and_does_no_harm(two_snapshots, after):
    driver = two_snapshots
    before, answers = state_of(driver.shard), answers_of(driver.shard.store.columns)
    for attempt in (lambda: driver.shard.carry_out(wire.Restore(step=1), b""), lambda: driver.snapshot(3)):
        with full_disk(after), pytest.raises(DiskFull, match="has no room for the log"):
            attempt()
        assert {*driver.shard.store.snapshots()} == {1, 2}
        assert state_of(driver.shard) == before and driver.book.serving
        assert answers_of(driver.shard.store.columns) == answers
    driver.round()
    driver.reopen()
    assert driver.book.version == before["version"] + 1
    assert driver.restore(1).version == 1


def test_a_rotation_that_is_cut_short_loses_nothing_and_is_reported(tmp_path):
    driver = Driver(tmp_path, tiny(rotate_bytes=2**20))
    driver.round()
    driver.admit(1)
    driver.settle()
    before = answers_of(driver.shard.store.columns)
    tokens = sum(len(answer[0]) for answer in before.values())
    state = base.dump(driver.book, driver.shard.store.columns, 2, [1], driver.shard.store.log.next_seq)
    base.write(base.path_of(tmp_path, 2), base.encode(state))
    driver.reopen()
    assert driver.shard.store.log.generation == 2
    assert driver.shard.store.recovery == Recovery(
        commits=0, cut_bytes=0, live_rollouts=len(before), live_tokens=tokens
    )
    assert answers_of(driver.shard.store.columns) == before
    driver.round()
    driver.shard.close()


def test_a_new_folder_reports_no_recovery(tmp_path):
    shard = Shard(SETTINGS, tiny(), tmp_path)
    assert shard.store.recovery is None
    shard.close()


def test_a_snapshot_that_is_not_there_or_damaged_is_refused(two_snapshots):
    with pytest.raises(BadRequest, match=r"no snapshot of step 3 .* there are \[1, 2\]"):
        two_snapshots.restore(3)
    generation = two_snapshots.shard.store.snapshots()[1].generation
    path = base.path_of(two_snapshots.folder, generation)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BadRequest, match=r"base of snapshot 1 in .* is damaged"):
        two_snapshots.restore(1)
    two_snapshots.round()  # it goes on as if it had not been asked


def test_the_same_restore_twice_goes_back_once(two_snapshots):
    first = two_snapshots.restore(1)
    assert two_snapshots.restore(1) == first
    assert {*two_snapshots.shard.store.snapshots()} == {1}


def test_a_prompt_that_was_found_to_be_bad_after_the_snapshot_stays_bad(two_snapshots):
    driver = two_snapshots
    driver.admit(1)
    driver.settle()
    live = {g.prompt_id: min(g.rollouts) for g in driver.book.groups.values()}
    driver.snapshot(3)
    frontier = driver.book.frontier
    *_, old = live  # the others are scored
    driver.poison(live[old])
    driver.admit(1)
    driver.settle()
    new = f"p{frontier}"
    driver.poison(max(r for g in driver.book.groups.values() if g.prompt_id == new for r in g.rollouts))
    driver.restore(3)
    driver.settle()
    assert {*driver.book.quarantined} == {old, new}
    assert old not in {g.prompt_id for g in driver.book.groups.values()}
    assert driver.shard.ledger.check().dropped["prompt is quarantined"] == 2
    driver.publish()
    driver.admit(1)  # passed over
    assert driver.book.frontier == frontier + 1 and new not in {
        g.prompt_id for g in driver.book.groups.values()
    }


def test_a_batch_that_was_open_at_the_snapshot_is_handed_over_again(two_snapshots):
    driver = two_snapshots
    driver.admit(2)
    driver.settle()
    leased = driver.lease("a", 100)
    driver.settle()
    driver.work("a", leased)
    driver.settle()
    driver.read()
    batch = driver.batch
    driver.snapshot(3)
    answers = {r: tuple(map(list, a)) for r, a in driver.answers.items()}
    driver.train()
    driver.settle()
    driver.restore(3)
    driver.answers = answers
    driver.publish()
    driver.read()
    assert driver.batch == batch
    driver.train()
    assert driver.book.version == 4
