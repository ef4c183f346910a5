"""Random schedules against the ledger: no token past the bound is handed over, the equation always holds, the pacing
bound is kept, nothing deadlocks."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from asyncrl.buffer.errors import LeaseLost
from asyncrl.buffer.ledger import Ledger
from asyncrl.buffer.schema import State

B, N, ATTEMPTS = 2, 2, 2


class LedgerMachine(RuleBasedStateMachine):
    leases = Bundle("leases")

    @initialize(bound=st.integers(0, 3), over_stale=st.sampled_from(["mask", "wait", "drop"]))
    def begin(self, bound, over_stale):
        self.bound, self.over_stale, self.now = bound, over_stale, 0.0
        self.ledger = Ledger(
            prompts_per_step=B,
            rollouts_per_prompt=N,
            max_staleness_versions=bound,
            over_stale=over_stale,
            max_attempts=ATTEMPTS,
            lease_timeout_s=5.0,
        )
        self.ledger.publish(0)
        self.batch = None
        self.trained: set[int] = set()

    @rule(part=st.integers(1, 4))
    def admit(self, part):
        self.ledger.admit(min(part, self.ledger.capacity))

    @rule(target=leases, engine=st.sampled_from("ab"))
    def lease(self, engine):
        got = self.ledger.lease(engine, 1, self.now)
        return (got[0], got[0].lease_id) if got else None

    @rule(lease=leases, tokens=st.integers(0, 4), done=st.booleans(), ahead=st.booleans())
    def append(self, lease, tokens, done, ahead):
        if lease is None:
            return
        rollout, lease_id = lease
        version = self.ledger.version + int(ahead and self.batch is not None)
        if rollout.state is State.COMPLETE:
            return
        done = done and rollout.length + tokens > 0
        valid = rollout.lease_id == lease_id and rollout.state is State.LEASED
        try:
            self.ledger.append(
                rollout.rollout_id,
                lease_id,
                rollout.length,
                tokens,
                version,
                "stop" if done else "",
                self.now,
            )
        except LeaseLost:
            assert not valid

    @rule(lease=leases)
    def score(self, lease):
        if lease is not None and lease[0].lease_id == lease[1] and lease[0].state is State.COMPLETE:
            self.ledger.score(lease[0].rollout_id, lease[1], 1.0)

    @rule(lease=leases, give_up=st.booleans())
    def lose(self, lease, give_up):
        if lease is None or lease[0].lease_id != lease[1]:
            return
        if give_up:
            self.ledger.fail(lease[0].rollout_id, lease[1], "broken")
        else:
            self.ledger.release(lease[0].rollout_id, lease[1])

    @rule(engine=st.sampled_from("ab"))
    def crash(self, engine):
        self.ledger.release_engine(engine)

    @rule(passed=st.floats(0.1, 6.0))
    def wait(self, passed):
        self.now += passed
        self.ledger.expire(self.now)

    @precondition(lambda self: self.batch is None)
    @rule()
    def read(self):
        self.batch = self.ledger.select()
        if self.batch is None:
            return
        self.check_batch()

    def check_batch(self):
        batch, ledger = self.batch, self.ledger
        assert len(batch.group_ids) == B and len(batch.rollout_ids) == B * N
        assert not self.trained & set(batch.rollout_ids)
        assert batch.staleness_min >= 0 and batch.staleness_max <= self.bound
        assert batch.trainable_tokens > 0
        if self.over_stale != "mask":
            ages = [batch.version - v for r in batch.rollout_ids for v, _ in ledger.rollouts[r].spans]
            assert max(ages) <= self.bound
            assert batch.tokens == batch.trainable_tokens

    @precondition(lambda self: self.batch is not None)
    @rule()
    def commit(self):
        assert self.ledger.commit(self.batch.batch_id, self.ledger.version + 1).holds
        self.trained |= set(self.batch.rollout_ids)
        self.batch = None

    @invariant()
    def accounts(self):
        if not hasattr(self, "ledger"):
            return
        self.ledger.check()
        assert len(self.ledger.groups) <= (self.bound + 1) * B
        if self.over_stale == "wait":
            assert "over_stale" not in self.ledger.counts().dropped

    def teardown(self):
        """From wherever the schedule ended, working engines and a working learner make progress."""
        if not hasattr(self, "ledger"):
            return
        ledger = self.ledger
        for engine in "ab":
            ledger.release_engine(engine)
        if self.batch is not None:
            ledger.commit(self.batch.batch_id, ledger.version + 1)
        for _ in range(3):
            ledger.admit(ledger.capacity)
            for r in ledger.lease("a", 1000, self.now):
                if not r.finish_reason:
                    ledger.append(r.rollout_id, r.lease_id, r.length, 1, ledger.version, "stop", self.now)
                else:
                    ledger.append(r.rollout_id, r.lease_id, r.length, 0, ledger.version, "stop", self.now)
                ledger.score(r.rollout_id, r.lease_id, 0.0)
            batch = ledger.select()
            if batch is None:  # everything that was ready was over-stale and dropped: there is room again
                assert ledger.capacity > 0
                continue
            ledger.commit(batch.batch_id, ledger.version + 1)
        assert ledger.check().trained > 0


LedgerMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestLedger = LedgerMachine.TestCase
