"""Random schedules against the ledger: whatever engines and learner do, and however often they ask, no token past the bound
is trained, no rollout twice, the equation holds, pacing is kept, the heaps tell the truth, engines get what they have room
for, a book that is rebuilt from its rows is the same book, and work goes on."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from asyncrl.buffer import base
from asyncrl.buffer.book import Book
from asyncrl.buffer.columns import Columns
from asyncrl.buffer.columns import Prompt as Asked
from asyncrl.buffer.errors import BadRequest, LeaseLost
from asyncrl.buffer.ledger import Ledger, Prompt
from asyncrl.buffer.records import LedgerSettings
from asyncrl.buffer.rows import StateRows
from asyncrl.buffer.schema import ENVIRONMENT, State
from asyncrl.buffer.token_files import Piece, TokenFiles

FRESH = 1 << 60
PROMPT_TOKENS = 2
HELD = (State.LEASED, State.COMPLETE)


def no_columns():
    return Columns(TokenFiles(0, lambda generation: Path("nowhere")))


def append_piece(columns, rollout_id, version, tokens):
    """Tokens that lie anywhere: the ledger knows how many there are, and the pieces say so too."""
    columns.append(rollout_id, Piece(1, 0, 0, tokens, version))


def age(group):
    trained = (r for r in group.rollouts.values() if r.rollout_id != group.greedy_id)
    return min((v for r in trained for v, _ in r.spans if v != ENVIRONMENT), default=None)


def has_all(group, size):
    """Whether it can be handed over, counted from scratch."""
    scored = [r.rollout_id for r in group.rollouts.values() if r.state is State.SCORED]
    return len(scored) == size + bool(group.greedy_id) and (not group.greedy_id or group.greedy_id in scored)


def order(rollout):
    oldest = age(rollout.group)
    return (FRESH if oldest is None else oldest, rollout.group.group_id, rollout.rollout_id)


def recount(book):
    """What the book keeps ready, counted from scratch."""
    by_state = Counter(r.state for r in book.rollouts.values())
    assert book.by_state == [by_state[s] for s in State]
    assert {r.rollout_id for g in book.groups.values() for r in g.rollouts.values()} == {*book.rollouts}
    waiting = [g for g in book.groups.values() if not g.batch_id]
    for group in waiting:
        assert group.oldest_version == age(group)
        scored = [r.rollout_id for r in group.rollouts.values() if r.state is State.SCORED]
        assert group.scored == len({*scored} - {group.greedy_id})
        assert group.greedy_id == 0 or group.greedy_id in group.rollouts
    assert dict(book.ages) == Counter(age(g) for g in waiting if age(g) is not None)
    assert {order(r) for r in book.rollouts.values() if r.state is State.QUEUED} <= {*book.queue}
    size = book.settings.rollouts_per_prompt
    complete = {(age(g), g.group_id) for g in waiting if has_all(g, size)}
    assert complete <= {*book.ready}
    for rollout in book.rollouts.values():
        assert (rollout.state in HELD) == bool(rollout.lease_id)
        assert rollout.length == sum(count for _, count in rollout.spans)
        if rollout.lease_id:
            seen = max(rollout.touched, book.engines[rollout.engine_id].seen)
            at = [e[0] for e in book.expiry if e[1:] == (rollout.rollout_id, rollout.lease_id)]
            assert at and min(at) <= seen + book.settings.lease_timeout_s
    generating = Counter(r.engine_id for r in book.rollouts.values() if r.state is State.LEASED)
    assert generating == {name: e.generating for name, e in book.engines.items() if e.generating}
    batched = {b: [g.group_id for g in groups] for b, groups in book.batches.items()}
    assert Counter(g for ids in batched.values() for g in ids) == Counter(
        g.group_id for g in book.groups.values() if g.batch_id
    )


def state_of(book, columns):
    """All that a crash must not change. Passed-over prompts leave no row, nor does what an engine knows of."""
    state = base.dump(book, columns, 0, [], 0)
    held = {(r.engine_id, r.lease_id) for r in book.rollouts.values() if r.lease_id}
    fields = {name: getattr(state, name) for name in state.__struct_fields__}
    return {**fields, "frontier": 0, "engines": held}


def left(room, taken):
    """Of an engine's room, beside what it takes."""
    return room - sum(PROMPT_TOKENS + r.length for r in taken if not r.finish_reason)


class Follower:
    """A second book, made from the first one's rows alone."""

    def __init__(self, ledger_settings):
        self.book, self.columns = Book(ledger_settings), no_columns()
        self.admitted, self.extended = [], []

    def follow(self, rows, now):
        """As a recovery reads a commit: prompts, then segments, then changes of state."""
        for group, rollout_ids, prompt in self.admitted:
            self.book.admit(
                group.group_id,
                rollout_ids,
                group.prompt_id,
                group.position,
                PROMPT_TOKENS,
                group.greedy_id,
            )
            self.columns.put_prompt(group.group_id, prompt, rollout_ids)
        for rollout_id, version, tokens in self.extended:
            self.book.extend(self.book.rollouts[rollout_id], version, tokens)
            append_piece(self.columns, rollout_id, version, tokens)
        for row in rows:
            rollout = self.book.rollouts.get(row.rollout_id)
            if rollout is not None and row.attempts > rollout.attempts:
                self.columns.restart(row.rollout_id)
            self.book.replay(row, now)
        self.columns.drop(self.book.closed, self.book.closed_groups)
        self.book.closed, self.book.closed_groups, self.book.rows = [], [], StateRows()
        self.admitted, self.extended = [], []


def turn(weight, **arguments):
    """Marks a method as something that may happen, `weight` times as often as another. The machine has one rule, as
    hypothesis leaves whole rules out of a schedule: without leases or commits few schedules come far."""

    def mark(method):
        method.turn = (weight, st.fixed_dictionaries(arguments))
        return method

    return mark


def turns(machine):
    found = {name: method.turn for name, method in vars(machine).items() if hasattr(method, "turn")}
    names = st.sampled_from([name for name, (weight, _) in found.items() for _ in range(weight)])
    return names.flatmap(lambda name: st.tuples(st.just(name), found[name][1]))


class LedgerMachine(RuleBasedStateMachine):
    @initialize(
        groups=st.integers(1, 3),
        size=st.integers(1, 3),
        spare=st.sampled_from([0, 0, 1, 2]),
        bound=st.integers(0, 3),
        over_stale=st.sampled_from(["mask", "wait", "wait", "drop"]),
        greedy=st.booleans(),
        dynamic_sampling=st.booleans(),
        shards=st.sampled_from([1, 3]),
        punctual=st.booleans(),
    )
    def begin(self, groups, size, spare, bound, over_stale, greedy, dynamic_sampling, shards, punctual):
        self.settings = LedgerSettings(
            prompts_per_step=groups,
            rollouts_per_prompt=size,
            spare_rollouts_per_prompt=spare,
            greedy_baseline=greedy,
            dynamic_sampling=dynamic_sampling and size > 1,  # one reward has no spread
            max_staleness_versions=bound,
            over_stale=over_stale,
            max_attempts=2,
            lease_timeout_s=5.0,
            shard=shards - 1,
            shards=shards,
        )
        self.bound, self.now = bound, 0.0
        self.ledger, self.columns = Ledger(self.settings), no_columns()
        self.follower = Follower(self.settings)
        self.ledger.publish(0)
        self.batch = None
        self.got = 0  # the last batch that arrived
        self.known = dict.fromkeys("ab", 0)  # the last lease that arrived
        self.asked, self.leases = [], []
        self.requests = 0
        self.passes = {}  # rollout_id -> (when it was passed over first, the requests that did)
        self.trained = Counter()
        self.versions = {}  # rollout_id -> version of each of its tokens
        self.punctual = punctual  # engines send what they sample before the next version is published
        self.overdue = False  # a token came that is older than the present version

    @rule(data=st.data())
    def step(self, data):
        name, arguments = data.draw(TURNS)
        getattr(self, name)(**arguments)

    # ---- admission -------------------------------------------------------------------------------------------------

    def admit(self, most, names):
        first = self.ledger.book.frontier
        count = min(most, self.ledger.capacity)
        self.offer([Prompt(f"p{i % names}", i, PROMPT_TOKENS) for i in range(first, first + count)])

    def offer(self, asked):
        quarantined = set(self.ledger.book.quarantined)
        admitted = self.ledger.admit(asked)
        assert [g is None for g in admitted] == [p.prompt_id in quarantined for p in asked]
        for group in filter(None, admitted):
            prompt = Asked(np.zeros(PROMPT_TOKENS, np.int32), "")
            self.columns.put_prompt(group.group_id, prompt, group.rollouts)
            self.follower.admitted.append((group, list(group.rollouts), prompt))
            ids = [group.group_id, *group.rollouts]
            assert {i % self.settings.shards for i in ids} == {self.settings.shard}
            self.versions.update((r, []) for r in group.rollouts)
        self.asked = asked

    @turn(1, more=st.integers(0, 3))
    def ask_for_too_much(self, more):
        """What was admitted before, or more than there is room for."""
        if not more:
            assert not any(self.ledger.admit(self.asked))
            return
        first, count = self.ledger.book.frontier, self.ledger.capacity + more
        try:
            self.ledger.admit([Prompt(f"new{i}", i, PROMPT_TOKENS) for i in range(first, first + count)])
        except BadRequest:
            return
        raise AssertionError("admitted past the bound")

    # ---- engines ---------------------------------------------------------------------------------------------------

    @turn(
        6,
        prompts=st.integers(0, 9),
        names=st.sampled_from([5, 1000]),
        engine=st.sampled_from("ab"),
        limit=st.integers(1, 9),
        memory_is_short=st.sampled_from([False, False, True]),
        arrives=st.integers(0, 3),
        room=st.sampled_from([-1, -1, 0, 4, 5, 9, 20]),
        again=st.sampled_from([False, True]),
    )
    def lease(self, prompts, names, engine, limit, memory_is_short, arrives, room, again):
        self.admit(prompts, names)
        rollouts = self.ledger.book.rollouts.values()
        lost = {r for r in rollouts if r.engine_id == engine and r.lease_id > self.known[engine]}
        if not again:  # else one that waits is looked at once more
            self.requests += 1
        expected, passed = self.expected(engine, limit, memory_is_short, room)
        got = self.ledger.lease(
            engine,
            limit,
            self.now,
            after=self.known[engine],
            next_batch_only=memory_is_short,
            kv_free_tokens=room,
            request=self.requests,
        )
        assert {*got} == lost if lost else got == expected
        assert self.ledger.held_back == bool(passed and not lost)
        if not lost:
            for rollout in passed:
                self.passes.setdefault(rollout.rollout_id, (self.now, set()))[1].add(self.requests)
        for rollout in got:
            self.passes.pop(rollout.rollout_id, None)
        if arrives:
            self.known[engine] = max((r.lease_id for r in got), default=self.known[engine])
        self.leases += [(r.rollout_id, r.lease_id) for r in got]

    def expected(self, engine, limit, memory_is_short, room):
        """Those of `wanted` that the engine has room for, and those before its last one that it has not."""
        got, passed = [], []
        idle = not any(r.engine_id == engine for r in self.held(State.LEASED))
        for rollout in self.wanted(memory_is_short):
            if len(got) == limit:
                break
            since, requests = self.passes.get(rollout.rollout_id, (self.now, ()))
            often = len(requests) >= 8 and max(requests) != self.requests
            due = often or self.now - since >= 2.0
            need = 0 if rollout.finish_reason else PROMPT_TOKENS + rollout.length
            if room >= 0 and need and rollout.length and need > left(room, got) and not idle and not due:
                passed.append(rollout)
                continue
            got.append(rollout)
            idle = idle and not need
        return got, passed

    def wanted(self, memory_is_short):
        """The queued rollouts, those nearest to their deadlines first, counted from scratch."""
        groups = [g for g in self.ledger.book.groups.values() if not g.batch_id]
        if memory_is_short:
            groups.sort(key=lambda g: (FRESH if age(g) is None else age(g), g.group_id))
            groups = groups[: self.settings.prompts_per_step]
        queued = (r for g in groups for r in g.rollouts.values() if r.state is State.QUEUED)
        return sorted(queued, key=order)

    def held(self, *states):
        found = [r for r in self.ledger.book.rollouts.values() if r.state in states]
        return sorted(found, key=lambda r: r.rollout_id)

    @turn(
        4,
        which=st.lists(st.integers(0, 11), min_size=1, max_size=4),
        tokens=st.integers(0, 4),
        done=st.booleans(),
        lag=st.sampled_from([-1, 0, 0, 0, 0, 1, 2]),
        given=st.sampled_from([False, False, True]),
    )
    def append(self, which, tokens, done, lag, given):
        """`given`: by the environment, at any place: the ledger does not hold it to its turn."""
        leased = self.held(State.LEASED)
        for rollout in {leased[i % len(leased)] for i in which} if leased else ():
            said = any(v != ENVIRONMENT for v in self.versions[rollout.rollout_id])
            last = done and (said or (tokens > 0 and not given))
            if given:
                self.refuse_an_answer_that_nobody_sampled(rollout, tokens, said)
                self.extend(rollout, tokens, ENVIRONMENT, last, again=True)
                continue
            # An engine has the version that is being published before the buffer hears that it is.
            ahead = lag < 0 and self.batch is not None
            behind = 0 if self.punctual else max(0, lag)
            version = self.ledger.version + 1 if ahead else max(0, self.ledger.version - behind)
            self.extend(rollout, tokens, version, last, again=True)

    def refuse_an_answer_that_nobody_sampled(self, rollout, tokens, said):
        if said:
            return
        request = (
            rollout.rollout_id,
            rollout.lease_id,
            rollout.length,
            tokens,
            ENVIRONMENT,
            "stop",
            self.now,
        )
        with pytest.raises(BadRequest, match="without a sampled token"):
            self.ledger.append(*request)

    def extend(self, rollout, tokens, version, last, again=False):
        finish_reason = "stop" if last else ""
        start, lease_id = rollout.length, rollout.lease_id
        request = (rollout.rollout_id, lease_id, start, tokens, version, finish_reason, self.now)
        assert self.ledger.append(*request)
        if tokens:
            self.follower.extended.append((rollout.rollout_id, version, tokens))
            append_piece(self.columns, rollout.rollout_id, version, tokens)
            self.versions[rollout.rollout_id] += [version] * tokens
            self.overdue |= version != ENVIRONMENT and version < self.ledger.version
        if again and (tokens or last):
            assert not self.ledger.append(*request)  # the answer was lost

    @turn(
        2,
        which=st.lists(st.integers(0, 11), min_size=1, max_size=4),
        rewards=st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=4, max_size=4),
    )
    def score(self, which, rewards):
        complete = self.held(State.COMPLETE)
        chosen = {complete[i % len(complete)] for i in which} if complete else ()
        for rollout, reward in zip(chosen, rewards, strict=False):
            if rollout.state is State.COMPLETE:  # else it became surplus by a sibling
                lease_id = rollout.lease_id
                assert self.ledger.score(rollout.rollout_id, lease_id, reward)
                if rollout.rollout_id in self.ledger.book.rollouts:
                    assert not self.ledger.score(rollout.rollout_id, lease_id, reward)

    @turn(2, which=st.integers(0, 11), how=st.sampled_from(["fail", "fail again", "release"]))
    def lose(self, which, how):
        held = self.held(*HELD)
        if not held:
            return
        rollout = held[which % len(held)]
        rollout_id, lease_id = rollout.rollout_id, rollout.lease_id
        if how == "release":
            self.ledger.release(rollout_id, lease_id)
            return
        if how == "fail again":
            rollout.attempts = self.follower.book.rollouts[rollout_id].attempts = 1
        if self.ledger.fail(rollout_id, lease_id, "broken"):
            self.versions[rollout_id] = []
            self.columns.restart(rollout_id)

    @turn(1, which=st.integers(1, 20), how=st.sampled_from(["append", "score", "fail", "release"]))
    def use_a_lost_lease(self, which, how):
        rollout_id, lease_id = self.leases[-which] if which <= len(self.leases) else (1, 0)
        rollout = self.ledger.book.rollouts.get(rollout_id)
        if rollout is not None and lease_id in (rollout.lease_id, rollout.scored_lease_id):
            return
        calls = {
            "append": lambda: self.ledger.append(rollout_id, lease_id, 0, 1, 0, "", self.now),
            "score": lambda: self.ledger.score(rollout_id, lease_id, 1.0),
            "fail": lambda: self.ledger.fail(rollout_id, lease_id, "broken"),
            "release": lambda: self.ledger.release(rollout_id, lease_id),
        }
        try:
            calls[how]()
        except LeaseLost:
            return
        raise AssertionError(f"{how} by lease {lease_id} of {rollout}")

    @turn(
        5, passed=st.integers(0, 4), most=st.integers(1, 9), spread=st.sampled_from([True, True, True, False])
    )
    def work(self, passed, most, spread):
        """Engines that do their work, but for some old rollouts, so that schedules get somewhere."""
        for n, rollout in enumerate(self.held(*HELD)[passed : passed + most]):
            if rollout.rollout_id in self.ledger.book.rollouts:  # else it became surplus by a sibling
                self.finish(rollout, float(n) if spread else 0.5)

    def finish(self, rollout, reward):
        if rollout.state is State.LEASED:
            tokens = 0 if rollout.finish_reason else 1
            self.extend(rollout, tokens, self.ledger.version, last=True)
        self.ledger.score(rollout.rollout_id, rollout.lease_id, reward)

    @turn(1, engine=st.sampled_from("ab"), noticed=st.booleans())
    def crash(self, engine, noticed):
        """It starts anew and does not know what it held: where nobody noticed all of that is given to it again."""
        self.known[engine] = 0
        if noticed:
            self.ledger.release_engine(engine)

    @turn(1, passed=st.floats(0.1, 6.0), alive=st.sampled_from(["", "a", "ab"]))
    def wait(self, passed, alive):
        self.now += passed
        for engine in (*alive, "idle"):
            self.ledger.heartbeat(engine, self.now)
        for rollout in self.ledger.expire(self.now):
            assert rollout.state is State.QUEUED and not rollout.lease_id
        engines = self.ledger.book.engines
        assert "idle" not in engines  # it never leased
        for rollout in self.ledger.book.rollouts.values():
            if rollout.lease_id:
                assert max(rollout.touched, engines[rollout.engine_id].seen) + 5.0 > self.now

    # ---- the learner -----------------------------------------------------------------------------------------------

    @turn(7, arrives=st.integers(0, 3), commit=st.sampled_from([True, True, False]), again=st.booleans())
    def learn(self, arrives, commit, again):
        if self.batch is None:
            self.read(arrives)
        if self.batch is not None and commit:
            self.commit(again)

    def read(self, arrives):
        open_batches = sorted(self.ledger.book.batches)
        batch = self.ledger.select(after=self.got)
        if batch is None:
            return
        assert not open_batches or [*batch.batch_ids] == open_batches
        self.check_batch(batch)
        if arrives:
            self.batch, self.got = batch, batch.batch_ids[0]

    def check_batch(self, batch):
        book, config = self.ledger.book, self.settings
        assert len(batch.group_ids) == config.prompts_per_step
        per_group = config.rollouts_per_prompt + config.greedy_baseline
        assert len({*batch.rollout_ids}) == config.prompts_per_step * per_group
        assert not any(r in self.trained for r in batch.rollout_ids)
        baselines = {book.groups[g].greedy_id for g in batch.group_ids}
        assert not config.greedy_baseline or baselines <= {*batch.rollout_ids}
        aged = {
            r: [batch.version - v for v in self.versions[r] if v != ENVIRONMENT and r not in baselines]
            for r in batch.rollout_ids
        }
        every = [a for ages in aged.values() for a in ages]
        trainable = [a for a in every if 0 <= a <= self.bound]
        assert (batch.tokens, batch.trainable_tokens) == (len(every), len(trainable))
        assert (batch.staleness_min, batch.staleness_max) == (min(trainable), max(trainable))
        for group_id in batch.group_ids:
            members = book.groups[group_id].rollouts
            assert min(a for r in members for a in aged[r]) <= self.bound
            if config.dynamic_sampling:
                assert len({r.reward for r in members.values() if r.rollout_id not in baselines}) > 1
        if config.over_stale == "drop" or (config.over_stale == "wait" and not self.overdue):
            assert max(every) <= self.bound

    def commit(self, again):
        (batch_id,), version = self.batch.batch_ids, self.ledger.version + 1
        counts = self.ledger.commit(batch_id, version)
        self.trained.update(self.batch.rollout_ids)
        assert counts.holds and counts.trained == self.trained.total()
        per_group = self.settings.rollouts_per_prompt + self.settings.greedy_baseline
        assert counts.baselines * per_group == self.settings.greedy_baseline * counts.trained
        if again:
            assert self.ledger.commit(batch_id, version) == counts
            self.ledger.publish(version)
        self.batch = None

    # ---- always ----------------------------------------------------------------------------------------------------

    @turn(2, replayed=st.booleans())
    def resume(self, replayed):
        """The process is another one: its book is read from a base, or from the rows alone."""
        if replayed:
            book, columns = self.follower.book, self.follower.columns
        else:
            book, columns = self.ledger.book, self.columns
        state = base.decode(base.encode(base.dump(book, columns, 1, [], 0)))
        book, self.columns = base.load(state, self.settings, no_columns().files, self.now)
        book.frontier = self.ledger.book.frontier
        self.passes = {}
        self.ledger = Ledger(self.settings, book)

    @invariant()
    def holds(self):
        if not hasattr(self, "ledger"):
            return  # before the beginning
        book = self.ledger.book
        counts = self.ledger.check()
        assert len(book.groups) <= (self.bound + 1) * self.settings.prompts_per_step
        assert set(self.trained.values()) <= {1}
        if self.settings.over_stale == "wait" and not self.overdue:
            assert "over_stale" not in counts.dropped
        if not self.settings.dynamic_sampling:
            assert "no reward spread" not in counts.dropped
        recount(book)
        self.columns.drop(*self.ledger.take_closed())
        self.follower.follow(self.ledger.take_rows(), self.now)
        assert state_of(self.follower.book, self.follower.columns) == state_of(book, self.columns)
        recount(self.follower.book)

    def teardown(self):
        """From wherever the schedule ended, working engines and a working learner make progress, also at the memory budget
        and where groups are dropped on the way."""
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        for engine in "ab":
            ledger.release_engine(engine)
        for batch_id in sorted(ledger.book.batches):
            ledger.commit(batch_id, ledger.version + 1)
        before, steps = ledger.counts().trained, 0
        # A round may go to groups that are dropped: those over-stale by now, and one in four for its rewards.
        for round_number in range(12):
            first = ledger.book.frontier
            self.offer([Prompt(f"fresh{i}", i, PROMPT_TOKENS) for i in range(first, first + ledger.capacity)])
            for rollout in self.lease_all():
                spread = (rollout.group.group_id // self.settings.shards + round_number) % 4
                if rollout.rollout_id in ledger.book.rollouts:  # it may have become surplus by its siblings
                    self.finish(rollout, float(rollout.rollout_id) if spread else 0.0)
            batch = ledger.select()
            if batch is not None:
                self.check_batch(batch)
                ledger.commit(batch.batch_ids[0], ledger.version + 1)
                steps += 1
            self.holds()
        assert steps >= 3 and ledger.check().trained > before

    def lease_all(self):
        """What the next batch needs, by one request of an engine without any room that is looked at twice: time moves it on."""
        self.requests += 1
        got = []
        for _ in range(2):
            got += self.ledger.lease(
                "a", 1000, self.now, next_batch_only=True, kv_free_tokens=0, request=self.requests
            )
            self.now += 2.1
        assert not self.wanted(memory_is_short=True)
        return got


TURNS = turns(LedgerMachine)
LedgerMachine.TestCase.settings = settings(
    max_examples=160, stateful_step_count=60, deadline=None, report_multiple_bugs=False
)
TestLedger = LedgerMachine.TestCase
